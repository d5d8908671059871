from jsparse.cli import main

main()
