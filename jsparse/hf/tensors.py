"""Tensors on disk: read slice by slice, written as a stream, so that a model never lies in host memory twice."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

PIECE = 2**25  # bytes moved at once

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_KINDS = DTYPES | {"U8": np.dtype(np.uint8)}  # and that of packed indices
_CODES = {dtype: code for code, dtype in _KINDS.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, not read yet."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]


def open_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a model folder: model.safetensors, or the shards of model.safetensors.index.json.

    Raises:
        ValueError: no such file, a damaged one, or an index that disagrees with its shards.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return _open_file(single)
    if not index.exists():
        others = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        found = f"; found {', '.join(others)} (pickles are never loaded: save as safetensors first)" if others else ""
        raise ValueError(f"{folder}: no model.safetensors and no model.safetensors.index.json{found}")
    try:
        shard_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index}: damaged: expected JSON with a weight_map") from None
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index}: shard {shard!r} lies outside the folder")
        for name, stored in _open_file(folder / shard).items():
            if name in tensors:
                raise ValueError(f"{stored.file}: tensor {name} is also in {tensors[name].file.name}")
            tensors[name] = stored
    for name, shard in shard_of.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise ValueError(f"{index}: tensor {name} is not in {shard}")
    return tensors


def _open_file(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="numpy") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except FileNotFoundError:
        raise ValueError(f"{file}: missing, though the index names it") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated or damaged safetensors file ({error})") from None
    tensors = {}
    for name, (shape, code) in found.items():
        if code not in _KINDS:
            raise ValueError(f"{file}: tensor {name}: expected one of {', '.join(DTYPES)}, got {code} (quantised?)")

        def read(index: tuple[slice, ...], name: str = name) -> np.ndarray:
            # Opened anew each time: the pages of a mapped file count as this process's memory until it is closed.
            with safe_open(file, framework="numpy") as f:
                return f.get_slice(name)[index]

        tensors[name] = Stored(file, shape, _KINDS[code], read)
    return tensors


def pieces(rows: slice, row_bytes: int) -> Iterator[slice]:
    """Cuts a range of rows into ranges of about PIECE bytes."""
    step = max(1, PIECE // max(1, row_bytes))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source for arrays of one dtype, one of which may be a transposed view.

    Goes in strips that stay in the processor's cache and moves plain integers: numpy's own loop is four to eight times
    slower, for bfloat16 above all.
    """
    bits = f"u{source.dtype.itemsize}"
    target, source = target.view(bits), source.view(bits)
    if source.ndim < 2 or (source.flags.c_contiguous and target.flags.c_contiguous):
        target[...] = source
    elif source.flags.c_contiguous:
        for i in range(0, source.shape[0], 64):
            target[i : i + 64] = source[i : i + 64]
    else:
        for i in range(0, source.shape[1], 64):
            target[:, i : i + 64] = source[:, i : i + 64]


@dataclass(frozen=True)
class Outgoing:
    """A tensor to write. `rows()` yields it in order, as arrays of consecutive rows."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_folder(folder: Path, tensors: dict[str, Outgoing], max_shard_bytes: float) -> None:
    """Writes model.safetensors, or shards of at most `max_shard_bytes` and their index, one piece at a time."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, {name: tensors[name] for name in names})
    if len(shards) > 1:
        totals = {
            "total_parameters": sum(int(np.prod(t.shape)) for t in tensors.values()),
            "total_size": sum(t.nbytes for t in tensors.values()),
        }
        shard_of = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / "model.safetensors.index.json", {"metadata": totals, "weight_map": shard_of})


def _write_file(file: Path, tensors: dict[str, Outgoing]) -> None:
    """The safetensors container: length of the header (8 bytes), the header (JSON padded to 8 bytes), raw data.

    Written by hand because the library wants every tensor of a file in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    ordered = list(tensors.items())
    if any(t.nbytes % 8 for t in tensors.values()):
        ordered.sort(key=lambda item: -item[1].dtype.itemsize)  # keeps every tensor aligned
    for name, t in ordered:
        header[name] = {"dtype": _CODES[t.dtype], "shape": t.shape, "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, t in ordered:
            start = f.tell()
            for piece in t.rows():
                f.write(np.ascontiguousarray(piece).view(np.uint8).data)
            if f.tell() - start != t.nbytes:
                raise ValueError(f"tensor {name}: expected {t.nbytes} bytes, got {f.tell() - start}")
        f.flush()
        os.fsync(f.fileno())


def write_json(file: Path, values: Any) -> None:
    with open(file, "w", encoding="utf-8") as f:
        f.write(json.dumps(values, indent=2) + "\n")
        f.flush()
        os.fsync(f.fileno())
