"""Packed N:M weights: of each M consecutive entries along an axis the N kept, and where they stood.

W [I, O], inputs first, is stored outputs first. Axis "output" groups M consecutive outputs, axis "input" M consecutive
inputs; an index has b = log2 M bits, M a power of two from 2 to 16.

    axis       values             indices, uint8           holds
    output     [N, O / M, I]      [b, N, O / M, I / 8]     values[k, r, i] = W[i, M r + index[k, r, i]]
    input      [N, O, I / M]      [b, N, O / 8, I / M]     values[k, o, c] = W[M c + index[k, o, c], o]

A group's indices rise with k; where it keeps fewer than N, zeros fill the rest.

Eight indices of b bits make a word of b bytes, and plane p of `indices` holds byte p of every word, byte 0 the lowest.
Field s of a word, bits s b to s b + b - 1, is the index of

    output     column s (I / 8) + c, for the word in column c: eight pieces of a row share their words
    input      row 8 q + s, for the word in row q: eight neighbouring rows share their words

so one load of words serves eight loads of values that lie as the words do: an index is a shift and a mask away from the
thread that holds its value. Sizes that 8 does not divide are rounded up, and the fields left over are 0. 2:4 in
bfloat16 takes (2 * 16 + 2 * 2) / (4 * 16) = 0.5625 of the dense bytes.

Sharding: the grouped axis splits at any multiple of M, so the three matrices of an FFN grouped along its neurons split
over the neurons as the dense ones do. The outputs of axis "input" split at multiples of 8. The inputs of axis "output"
do not split, as their words reach over the whole row.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

Axis = Literal["input", "output"]
FIELDS = 8  # indices a word


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "indices"], meta_fields=["axis"])
@dataclass(frozen=True)
class PackedNM:
    """A matrix [I, O] that keeps `n` of each `m` entries along `axis`, as `pack` makes it.

    A pytree of two arrays: layers are stacked by `jax.tree.map(lambda *x: jnp.stack(x), *layers)`, shardings are given
    as a PackedNM of them.
    """

    values: Any  # [N, rows, columns]
    indices: Any  # uint8 [b, N, word rows, word columns]
    axis: Axis

    @property
    def n(self) -> int:
        return self.values.shape[-3]

    @property
    def m(self) -> int:
        return 1 << self.indices.shape[-4]

    @property
    def shape(self) -> tuple[int, int]:
        """(I, O) of the dense matrix."""
        rows, columns = self.values.shape[-2:]
        return (columns, rows * self.m) if self.axis == "output" else (columns * self.m, rows)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.indices.nbytes


def pack(weight: jax.Array, n: int, m: int, axis: Axis) -> PackedNM:
    """Packs a matrix of zeros in the N:M pattern.

    Args:
        weight: [I, O], inputs first, at most `n` nonzero entries in each group.
        n: entries kept of each group.
        m: size of a group: 2, 4, 8 or 16.
        axis: along which the groups run.
    Raises:
        ValueError: a pattern or axis that is none, an axis that M does not divide, or a group that keeps more than N:
            the first is named. Under a transformation of JAX, where values are not known, the group is not looked for.
    """
    if m not in (2, 4, 8, 16) or not 0 < n < m:
        raise ValueError(f"pattern: expected N:M with M of 2, 4, 8 or 16 and 0 < N < M, got {n}:{m}")
    if axis not in get_args(Axis):
        raise ValueError(f"axis: expected 'input' or 'output', got {axis!r}")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected [I, O], got shape {weight.shape}")
    size = weight.shape[axis == "output"]
    if size % m:
        raise ValueError(f"weight: expected {axis}s in groups of {m}, got {size} of them")
    values, indices, most = _pack(weight, n, m, axis)
    if not isinstance(most, jax.core.Tracer) and np.any(np.asarray(most) > n):
        row, column = np.unravel_index(int(np.argmax(np.asarray(most) > n)), most.shape)
        line, group = (column, row) if axis == "output" else (row, column)
        other = "input" if axis == "output" else "output"
        raise ValueError(
            f"weight: expected at most {n} nonzero {axis}s in each group of {m}, got {most[row, column]} in "
            f"{other} {line}, {axis}s {group * m} to {group * m + m - 1}"
        )
    return PackedNM(values, indices, axis)


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def _pack(weight: jax.Array, n: int, m: int, axis: Axis) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values and indices, and how many entries each group keeps: uint8 [rows, columns]."""
    inputs, outputs = weight.shape
    if axis == "output":
        groups = weight.T.reshape(outputs // m, m, inputs).transpose(1, 0, 2)
    else:
        groups = weight.T.reshape(outputs, inputs // m, m).transpose(2, 0, 1)
    kept = groups != 0  # [M, rows, columns]
    first = jnp.argsort(~kept, axis=0, stable=True)[:n]
    index = jnp.sort(first, axis=0).astype(jnp.uint32)
    values = jnp.take_along_axis(groups, index, axis=0)

    bits = m.bit_length() - 1
    along = 2 if axis == "output" else 1
    index = jnp.pad(index, [(0, -index.shape[i] % FIELDS if i == along else 0) for i in range(3)])
    if axis == "output":
        fields = index.reshape(n, index.shape[1], FIELDS, -1).transpose(2, 0, 1, 3)
    else:
        fields = index.reshape(n, -1, FIELDS, index.shape[2]).transpose(2, 0, 1, 3)
    shifts = jnp.arange(FIELDS, dtype=jnp.uint32).reshape(-1, 1, 1, 1) * bits
    word = jnp.sum(fields << shifts, axis=0, dtype=jnp.uint32)
    indices = jnp.stack([(word >> (8 * p)).astype(jnp.uint8) for p in range(bits)])
    return values, indices, jnp.sum(kept, axis=0, dtype=jnp.uint8)


def index_fields(packed: PackedNM) -> jax.Array:
    """The index of every value, int32 [N, rows, columns]."""
    bits = packed.indices.shape[0]
    _, rows, columns = packed.values.shape
    planes = packed.indices.astype(jnp.uint32)
    word = functools.reduce(jnp.bitwise_or, [planes[p] << (8 * p) for p in range(bits)])
    fields = jnp.stack([(word >> (bits * s)) & (packed.m - 1) for s in range(FIELDS)], axis=2)
    if packed.axis == "output":  # [N, rows, fields, word columns]
        index = fields.reshape(*fields.shape[:2], -1)
    else:  # [N, word rows, fields, columns]
        index = fields.reshape(fields.shape[0], -1, fields.shape[-1])
    return index[:, :rows, :columns].astype(jnp.int32)


def unpack(packed: PackedNM) -> jax.Array:
    """The dense matrix [I, O]."""
    index, m = index_fields(packed), packed.m
    zero = jnp.zeros((), packed.dtype)
    entries = []
    for position in range(m):
        entry = jnp.full(index.shape[1:], zero)
        for k in range(packed.n):
            entry = jnp.where(index[k] == position, packed.values[k], entry)
        entries.append(entry)
    along = 1 if packed.axis == "output" else 2
    return jnp.stack(entries, axis=along).reshape(packed.shape[::-1]).T
