"""Files that appear whole or not at all, whatever ends the process that writes them."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replacing(path: Any) -> Iterator[Any]:
    """A name beside `path`, a `pathlib` or `epath` path: the file written there takes its place when the block ends
    well, and vanishes when it does not."""
    scratch = path.parent / f".{path.name}.tmp"
    try:
        yield scratch
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_text(path: Any, text: str) -> None:
    """Writes a text file in place of an older one."""
    with replacing(path) as scratch:
        scratch.write_text(text)
