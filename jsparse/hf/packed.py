"""Packed N:M matrices in model folders: two tensors in the place of one weight.

config.json                            "packed": {"gate_proj": "2:4 output", "down_proj": "2:4 input", ...}
model.layers.0.mlp.gate_proj.values    [N, rows, columns], see `pallas_kernels.nm_matmul.packing`
model.layers.0.mlp.gate_proj.indices   uint8 [b, N, word rows, word columns]
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jsparse.config import check
from jsparse.hf.names import BLOCK
from jsparse.hf.tensors import Outgoing, Stored
from jsparse.methods.packing import check_packable
from jsparse.methods.patterns import MLP, NofM, parse_pattern
from pallas_kernels import PackedNM, unpack
from pallas_kernels.nm_matmul.packing import FIELDS

Along = Literal["input", "output"]
Packing = dict[str, tuple[NofM, Along]]  # by our names, such as "ffn.gate": the pattern and the axis of its groups

_THEIRS = {name: BLOCK[name][0].removesuffix(".weight") for name in MLP}  # "ffn.gate": "mlp.gate_proj"


def from_config(values: dict[str, Any], where: str = "packed") -> Packing:
    """Reads config.json's `packed`. Raises ConfigError where it is not what `to_config` writes."""
    ours = {theirs.removeprefix("mlp."): name for name, theirs in _THEIRS.items()}
    found: Packing = {}
    for key, text in values.items():
        check(key in ours, where, f"matrices among {', '.join(ours)}", key)
        pattern, _, axis = str(text).partition(" ")
        check(axis in ("input", "output"), f"{where}.{key}", "a pattern and an axis, such as '2:4 output'", text)
        found[ours[key]] = check_packable(parse_pattern(pattern)), axis  # type: ignore[assignment]
    return found


def to_config(packing: Packing) -> dict[str, Any]:
    """The fields of config.json."""
    if not packing:
        return {}
    return {"packed": {_THEIRS[name].removeprefix("mlp."): f"{p} {axis}" for name, (p, axis) in packing.items()}}


def dense(stored: dict[str, Stored], packing: Packing, where: Path) -> dict[str, Stored]:
    """Stored tensors with every packed pair as the one dense weight that it stands for, unpacked as it is read.

    Raises ValueError where a tensor of a pair is missing or the two do not fit each other and their pattern.
    """
    found = dict(stored)
    for name, (pattern, axis) in packing.items():
        ending = f".{_THEIRS[name]}.values"
        for key in [key for key in stored if key.endswith(ending)]:
            stem = key.removesuffix(".values")
            values = found.pop(key)
            if f"{stem}.indices" not in found:
                raise ValueError(f"{where}: missing tensor {stem}.indices")
            indices = found.pop(f"{stem}.indices")
            found[f"{stem}.weight"] = _dense(values, indices, pattern, axis, stem)
    return found


def _dense(values: Stored, indices: Stored, pattern: NofM, axis: Along, stem: str) -> Stored:
    n, m, bits = pattern.n, pattern.m, pattern.m.bit_length() - 1
    _, rows, columns = values.shape if len(values.shape) == 3 else (0, 0, 0)
    words = (rows, -(-columns // FIELDS)) if axis == "output" else (-(-rows // FIELDS), columns)
    if values.shape != (n, rows, columns) or indices.shape != (bits, n, *words) or indices.dtype != np.uint8:
        raise ValueError(f"{values.file}: {stem}: values {values.shape} and indices {indices.dtype} {indices.shape} "
                         f"are no matrix packed {pattern} along the {axis}s")  # fmt: skip
    shape = (rows * m, columns) if axis == "output" else (rows, columns * m)  # outputs first
    # rows of values that stand for whole rows of the matrix and for whole words
    step, per = (1, m) if axis == "output" else (FIELDS, 1)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        cut, *across = (slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))
        first, last = cut.start // per // step * step, min(-(-cut.stop // per), rows)
        of_words = slice(first // step, -(-last // step))
        whole = slice(None)
        part = PackedNM(values.read((whole, slice(first, last), whole)),
                        indices.read((whole, whole, of_words, whole)), axis)  # fmt: skip
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            rows_first = np.asarray(_unpack(part)).T
        return rows_first[cut.start - first * per : cut.stop - first * per, *across]

    return Stored(values.file, shape, values.dtype, read)


_unpack = jax.jit(unpack)


def load_stack(
    stored: dict[str, Stored], prefix: str, name: str, layers: int, axis: Along, dtype: Any, put: Callable[..., Any]
) -> PackedNM:
    """The packed matrices of all layers, stacked: read into host arrays led by L, then `put` on devices."""

    def whole(kind: str, dtype: Any) -> Any:
        tensors = [stored[f"{prefix}{i}.{_THEIRS[name]}.{kind}"] for i in range(layers)]
        target = tensors[0].dtype if dtype is None else dtype
        out = np.empty((layers, *tensors[0].shape), target)
        for i, tensor in enumerate(tensors):
            out[i] = tensor.read((slice(None),) * len(tensor.shape))
        return put(out)

    return PackedNM(whole("values", dtype), whole("indices", None), axis)


def outgoing(weight: str, shape: tuple[int, ...], dtype: np.dtype, packing: tuple[NofM, Along],
             packed: Callable[[], PackedNM]) -> dict[str, Outgoing]:  # fmt: skip
    """The pair of tensors to write for a weight (Hugging Face's name, outputs first); `packed()` makes it when it is
    asked for, once for each of the two."""
    pattern, axis = packing
    bits = pattern.m.bit_length() - 1
    rows, columns = (shape[0] // pattern.m, shape[1]) if axis == "output" else (shape[0], shape[1] // pattern.m)
    words = (rows, -(-columns // FIELDS)) if axis == "output" else (-(-rows // FIELDS), columns)
    stem = weight.removesuffix("weight")

    def parts(kind: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        yield from np.asarray(getattr(packed(), kind)).astype(dtype, copy=False)

    byte = np.dtype(np.uint8)
    return {
        f"{stem}values": Outgoing((pattern.n, rows, columns), dtype, functools.partial(parts, "values", dtype)),
        f"{stem}indices": Outgoing((bits, pattern.n, *words), byte, functools.partial(parts, "indices", byte)),
    }
