"""Text sources to documents, one after the other, in constant memory.

Text and JSON lines are read here, not through `datasets`: that rejects lines whose other columns change their type and
does not say which line of a file is bad. It reads everything else.
"""

import bz2
import glob
import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jsparse.config import ConfigError, Source

_FILE = re.compile(r"\.(?:(?P<lines>txt|jsonl?)(?P<packed>\.gz|\.xz|\.bz2)?|parquet)$")
_OPEN: dict[str | None, Callable[[Any], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

Document = tuple[str | None, str]  # prompt, text
Row = tuple[str, float, Any]  # where it stands, share of its file read so far, its columns


def read(source: Source) -> tuple[str, Iterator[tuple[float, Document]]]:
    """Finds a source's text: a file, every file below a folder in the order of their names, or a `datasets` name.

    Returns:
        A key that changes with any byte of the content, and the documents, each with the share read so far, 0 to 1.

    Raises:
        ConfigError: no such file, column or data set.
        ValueError: a damaged file; raised while reading.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _FILE.search(file.name) and file.is_file())
    elif path.exists() or _FILE.search(path.name) or not _NAME.fullmatch(source.path):
        files = [path] if _FILE.search(path.name) else []
    else:
        return _read_named(source)
    if not files:
        kinds = ".txt or .jsonl (also .gz, .xz, .bz2), .parquet or .npy, a folder of text or a token store"
        raise ConfigError(f"{source.path}: expected {kinds}, or the name of a `datasets` data set")
    try:
        sizes = [file.stat().st_size for file in files]
        digests = [(_kind(file)[0], _digest(file)) for file in files]
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename}: no such file") from None

    def documents() -> Iterator[tuple[float, Document]]:
        before = 0
        for file, size in zip(files, sizes, strict=True):
            for where, share, row in _rows(file, size):
                yield (before + share * size) / max(1, sum(sizes)), _pick(row, source, where)
            before += size

    return json.dumps(digests), documents()


def _kind(file: Path) -> re.Match[str]:
    match = _FILE.search(file.name)
    assert match is not None  # `read` lets no other name through
    return match


def _digest(file: Path) -> str:
    with file.open("rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()


def _rows(file: Path, size: int) -> Iterator[Row]:
    kind, where = _kind(file), str(file)
    try:
        if kind["lines"] is None:
            import datasets

            for row in datasets.load_dataset("parquet", data_files=glob.escape(where), split="train", streaming=True):
                yield where, 0.0, row
            return
        with file.open("rb") as raw, _OPEN.get(kind["packed"], lambda x: x)(raw) as stream:
            if kind["lines"] == "txt":
                yield where, 1.0, {"text": stream.read().decode()}
                return
            for number, line in enumerate(stream, 1):
                where = f"{file}:{number}"
                if line.strip():
                    yield where, raw.tell() / size, json.loads(line)
    except (ValueError, EOFError, OSError, lzma.LZMAError, zlib.error, ImportError) as error:
        raise ValueError(f"{where}: cannot be read: {first_line(error)}") from None


def _read_named(source: Source) -> tuple[str, Iterator[tuple[float, Document]]]:
    name, _, config = source.path.partition(":")
    try:
        import datasets

        data = datasets.load_dataset(name, config or None, split=source.split)
    except Exception as error:  # the library and what it calls raise kinds of their own
        raise ConfigError(f"{source.path}: neither a file nor a data set that loads: {first_line(error)}") from None
    where = f"{source.path} {source.split}"
    return data._fingerprint, ((i / len(data), _pick(row, source, where)) for i, row in enumerate(data))


def _pick(row: Any, source: Source, where: str) -> Document:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with columns, got {type(row).__name__}")
    for column in (source.text, source.prompt):
        if column is not None and column not in row:
            raise ConfigError(f"{where}: expected a column {column!r}, got only {', '.join(row)}")
        if column is not None and not isinstance(row[column], str):
            raise ValueError(f"{where}: expected text in column {column!r}, got {row[column]!r:.50}")
    return None if source.prompt is None else _unicode(row[source.prompt]), _unicode(row[source.text])


def _unicode(string: str) -> str:
    """JSON may hold half a surrogate pair, which no tokenizer takes: it becomes a question mark."""
    return string.encode(errors="replace").decode()


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
