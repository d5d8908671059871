"""Block-sparse matrices: the blocks that are there, and where, listed both by column and by row."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "row", "column", "column_start", "by_row", "row_start"],
    meta_fields=[],
)
@dataclass(frozen=True)
class BlockSparse:
    """A matrix [I, O] of which only some blocks are stored, b by b.

    Blocks are ordered by column, then by row. Where they stand is in arrays, not in the program, so that one compiled
    step serves every mask of a capacity C, and so that shards may differ; entries from `column_start[-1]` on are spare.
    """

    values: Any  # [C, b, b]
    row: Any  # int32 [C], the block of inputs
    column: Any  # int32 [C], the block of outputs
    column_start: Any  # int32 [O / b + 1]; column o's blocks are values[column_start[o] : column_start[o + 1]]
    by_row: Any  # int32 [C], the blocks ordered by row, then by column
    row_start: Any  # int32 [I / b + 1]; row i's blocks are values[by_row[row_start[i] : row_start[i + 1]]]

    @property
    def block_size(self) -> int:
        return self.values.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """(I, O) of the dense matrix; of a shard, inside `jax.shard_map`."""
        return tuple((start.shape[-1] - 1) * self.block_size for start in (self.row_start, self.column_start))


def pack_blocks(weight: jax.Array, mask: np.ndarray, *, capacity: int | None = None, shards: int = 1) -> BlockSparse:
    """Takes the blocks of a matrix that a mask names.

    Args:
        weight: [I, O].
        mask: bool [I / b, O / b] known now, True where a block is kept; its shape gives the block size b.
        capacity: blocks to make room for, in each shard; None: as many as are kept, in the fullest shard.
        shards: packs the outputs in so many equal parts, one after the other along the first axis of every array, each
            a BlockSparse of its own once `jax.shard_map` has split that axis. Whole, such a matrix is of no use.
    Raises:
        ValueError: a mask that does not divide the matrix into squares, outputs that the shards do not divide, or a
            capacity that does not suffice.
    """
    mask = np.asarray(mask, bool)
    inputs, outputs = weight.shape
    if mask.ndim != 2 or 0 in mask.shape or inputs % mask.shape[0] or inputs * mask.shape[1] != outputs * mask.shape[0]:
        raise ValueError(f"mask: expected the square blocks of a matrix {weight.shape}, got shape {mask.shape}")
    if mask.shape[1] % shards:
        raise ValueError(f"shards: expected a divisor of {mask.shape[1]} blocks of outputs, got {shards}")
    parts = np.split(mask, shards, axis=1)
    most = max(int(part.sum()) for part in parts)
    capacity = most if capacity is None else capacity
    if capacity < most:
        raise ValueError(f"capacity: expected at least {most}, the blocks that the mask keeps, got {capacity}")
    size = inputs // mask.shape[0]
    packed = [_pack(w, part, size, capacity) for w, part in zip(jnp.split(weight, shards, axis=1), parts, strict=True)]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *packed)


def _pack(weight: jax.Array, mask: np.ndarray, size: int, capacity: int) -> BlockSparse:
    column, row = np.nonzero(mask.T)
    by_row = np.lexsort((column, row))
    blocks = weight.reshape(mask.shape[0], size, mask.shape[1], size)[row, :, column]
    spare = capacity - len(row)

    def places(x: np.ndarray) -> jax.Array:
        return jnp.asarray(np.pad(x, (0, spare)), jnp.int32)

    def starts(counts: np.ndarray) -> jax.Array:
        return jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)

    return BlockSparse(
        jnp.pad(blocks, ((0, spare), (0, 0), (0, 0))),
        places(row), places(column), starts(mask.sum(0)), places(by_row), starts(mask.sum(1)),
    )  # fmt: skip


def unpack_blocks(weight: BlockSparse) -> jax.Array:
    """The dense matrix [I, O], zero where no block is."""
    size, (inputs, outputs) = weight.block_size, weight.shape
    there = jnp.arange(len(weight.row)) < weight.column_start[-1]
    row = jnp.where(there, weight.row, inputs // size)  # outside: dropped
    dense = jnp.zeros((inputs // size, outputs // size, size, size), weight.values.dtype)
    dense = dense.at[row, weight.column].set(weight.values, mode="drop")
    return dense.swapaxes(1, 2).reshape(inputs, outputs)
