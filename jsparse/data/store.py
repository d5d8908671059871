"""Token stores: text tokenized once, into a folder of arrays that are mapped into memory.

    tokens.npy    uint16, or uint32 where the vocabulary needs it: all documents in a row, each with an end token
    offsets.npy   int64: where each document starts
    loss.npy      bool, one a token, only of sources with a `prompt`: False on the prompts
    store.json    format, tokenizer, end token, counts

Opening a store needs numpy alone.
"""

import hashlib
import itertools
import json
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from jsparse.config import ConfigError, Source
from jsparse.data import text

FORMAT = 1
_PIECE = 1 << 20  # characters tokenized at once: bounds the memory


@dataclass(frozen=True, eq=False)
class Store:
    """An open token store.

    Attributes:
        name: the source's path, for messages.
        tokens: uint16 or uint32 [n], mapped.
        offsets: int64 [documents], the start of each; None of a bare token file, whose documents are not known.
        loss: bool [n], mapped: which tokens take loss; None is all.
    """

    name: str
    tokens: np.ndarray
    offsets: np.ndarray | None = None
    loss: np.ndarray | None = None


def open_source(source: Source, tokenizer: str | Path | None, cache: str | Path, vocab_size: int) -> Store:
    """Opens a source: a token store or bare `.npy` token file as it is, text by way of `build`.

    Args:
        source: of a recipe, or just `Source(path)`.
        tokenizer: tokenizer folder; None will do where the source is tokenized already.
        cache: folder for the stores made from text.
        vocab_size: V of the model that is to read the tokens.

    Raises:
        ConfigError: nothing to read there; a column, token or tokenizer that does not exist; token ids beyond V.
        ValueError: damaged or empty data.
    """
    path = Path(source.path).expanduser()
    if path.suffix != ".npy" and not (path / "store.json").is_file():
        if tokenizer is None:
            raise ConfigError(f"data.tokenizer: expected a tokenizer folder to read {source.path}, got none")
        path = build(source, tokenizer, cache)
    store, largest = _open_tokens(path, source) if path.suffix == ".npy" else _open_store(path, source)
    if source.prompt is not None and store.loss is None:
        raise ConfigError(f"{source.path}: holds no prompts, but the source asks for `prompt: {source.prompt}`")
    if largest >= vocab_size:
        expected = f"token ids below the model's vocab_size {vocab_size}"
        raise ConfigError(f"{source.path}: expected {expected}, got {largest}: the tokenizer is another model's")
    return store


def _open_tokens(path: Path, source: Source) -> tuple[Store, int]:
    tokens = _load(path)
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32) or tokens.size == 0:
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise ValueError(f"{path}: expected a list of token ids, uint16 or uint32, got {got}")
    return Store(source.path, tokens), int(tokens.max())


def _open_store(path: Path, source: Source) -> tuple[Store, int]:
    try:
        about = json.loads((path / "store.json").read_text())
        found = about["format"], about["tokens"], about["documents"], about["largest_id"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}/store.json: not that of a token store: {text.first_line(error)}") from None
    if found[0] != FORMAT:
        raise ValueError(f"{path}: expected a token store of format {FORMAT}, got {found[0]!r}: build it anew")
    tokens, offsets = _load(path / "tokens.npy"), _load(path / "offsets.npy")
    loss = _load(path / "loss.npy") if (path / "loss.npy").exists() else None
    if (len(tokens), len(offsets)) != found[1:3] or (loss is not None and len(loss) != len(tokens)):
        raise ValueError(f"{path}: expected the {found[1]} tokens and {found[2]} documents of store.json, "
                         f"got {len(tokens)} and {len(offsets)}: build it anew")  # fmt: skip
    return Store(source.path, tokens, offsets, loss), found[3]


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a whole .npy file: {text.first_line(error)}") from None


def build(source: Source, tokenizer: str | Path, cache: str | Path) -> Path:
    """Tokenizes a text source and returns the folder of its store, in the cache; at once where it is there already.

    Its key is the content (every byte of the files, or the fingerprint that `datasets` gives), the tokenizer, the
    columns and the end token. It appears whole, by renaming; where builders race, the first wins.

    Texts above a million characters are tokenized in pieces that begin at a space, which changes nothing for tokenizers
    that split words at spaces first.

    Raises:
        ConfigError, ValueError: as `open_source`.
    """
    content, documents = text.read(source)
    backend, end_id = _load_tokenizer(Path(tokenizer).expanduser(), source.end_token)
    fingerprint = _hash(backend.to_str())
    key = _hash(json.dumps([FORMAT, content, fingerprint, end_id, source.text, source.prompt]))
    name = re.sub(r"\W+", "-", Path(source.path).name.partition(".")[0])
    store = Path(cache).expanduser() / "tokens" / f"{name}-{key[:24]}"
    if (store / "store.json").is_file():
        return store
    scratch = store.with_name(f".{store.name}.{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        counts = _write(scratch, source, _pieces(documents), backend, end_id)
        about = {"format": FORMAT, "source": source.path, "tokenizer": fingerprint, "end_id": end_id, **counts}
        (scratch / "store.json").write_text(json.dumps(about, indent=1) + "\n")
        try:
            scratch.rename(store)
        except OSError:  # a folder cannot replace one that holds files
            if not (store / "store.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return store


def _hash(string: str) -> str:
    return hashlib.sha256(string.encode()).hexdigest()


def _load_tokenizer(folder: Path, end_token: str | None) -> tuple[Any, int]:
    """The `tokenizers.Tokenizer` of a Hugging Face folder, and the id that ends documents."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ConfigError("data: to read text install transformers, or give a token store") from None
    if not folder.is_dir():
        raise ConfigError(f"data.tokenizer: expected a tokenizer folder, got {folder}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # every kind there is
        raise ConfigError(f"data.tokenizer: {folder} does not load: {text.first_line(error)}") from None
    backend.no_truncation()  # a tokenizer.json may ask for both
    backend.no_padding()
    end_id = tokenizer.eos_token_id if end_token is None else backend.token_to_id(end_token)
    if end_id is None:
        missing = "an end token (name one by `end_token`)" if end_token is None else f"the end_token {end_token!r}"
        raise ConfigError(f"data.tokenizer: expected {missing} in {folder}, got a vocabulary without it")
    return backend, end_id


class _Piece(NamedTuple):
    """What is tokenized by itself: a prompt, a text, or a part of a long text."""

    share: float  # of the source, read so far
    text: str
    loss: bool
    end: bool  # of a document


def _pieces(documents: Iterator[tuple[float, text.Document]]) -> Iterator[_Piece]:
    for share, (prompt, body) in documents:
        if prompt is not None:
            yield _Piece(share, prompt, loss=False, end=False)
        start = 0
        while len(body) - start > _PIECE:
            space = body.rfind(" ", start + 1, start + _PIECE)
            cut = start + _PIECE if space < 0 else space
            yield _Piece(share, body[start:cut], loss=True, end=False)
            start = cut
        yield _Piece(share, body[start:], loss=True, end=True)


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + 1
        if characters >= _PIECE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Npy:
    """A 1-D .npy file that is appended to: numpy's header leaves room for the length to grow."""

    def __init__(self, path: Path, dtype: Any):
        self.length, self._dtype, self._file = 0, np.dtype(dtype), path.open("wb")
        self._header()

    def _header(self) -> None:
        fields = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, fields)

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self._dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        self._file.close()


def _write(folder: Path, source: Source, pieces: Iterator[_Piece], backend: Any, end_id: int) -> dict[str, int]:
    """Writes the arrays and returns the counts for store.json."""
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    largest, ends = 0, [np.zeros(1, np.int64)]
    with (
        closing(_Npy(folder / "tokens.npy", np.uint16 if vocab_size <= 1 << 16 else np.uint32)) as tokens,
        closing(_Npy(folder / "loss.npy", bool)) as loss,
        Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        bar = progress.add_task(f"tokenizing {source.path}", total=1.0)
        for batch in _batches(pieces):
            encodings = backend.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
            ids = [e.ids + [end_id] * piece.end for e, piece in zip(encodings, batch, strict=True)]
            lengths = np.array([len(x) for x in ids])
            ends.append((tokens.length + np.cumsum(lengths))[[piece.end for piece in batch]])
            values = np.fromiter(itertools.chain.from_iterable(ids), np.uint32, lengths.sum())
            largest = max(largest, int(values.max(initial=0)))
            tokens.append(values)
            loss.append(np.repeat([piece.loss for piece in batch], lengths))
            progress.update(bar, completed=batch[-1].share)
    offsets = np.concatenate(ends)[:-1]
    if tokens.length == len(offsets):  # end tokens alone, or nothing
        raise ValueError(f"{source.path}: expected text, got {len(offsets)} documents without any")
    np.save(folder / "offsets.npy", offsets)
    if source.prompt is None:
        (folder / "loss.npy").unlink()
    return {"tokens": tokens.length, "documents": len(offsets), "largest_id": largest, "vocab_size": vocab_size}
