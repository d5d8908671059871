"""Pictures and tables of runs and evaluations: `jsparse report`, and what a notebook needs of it.

runs, results = report.read([Path("runs/relu"), Path("runs/prosparse"), Path("evals")])
rich.print(report.summary_table(results))
report.training_picture(runs)
"""

from jsparse.report.page import report as report
from jsparse.report.pictures import make_looks as make_looks
from jsparse.report.pictures import profile_picture as profile_picture
from jsparse.report.pictures import sparsity_picture as sparsity_picture
from jsparse.report.pictures import tradeoff_picture as tradeoff_picture
from jsparse.report.pictures import training_picture as training_picture
from jsparse.report.results import Result as Result
from jsparse.report.results import Run as Run
from jsparse.report.results import read as read
from jsparse.report.results import result as result
from jsparse.report.results import summary_table as summary_table
