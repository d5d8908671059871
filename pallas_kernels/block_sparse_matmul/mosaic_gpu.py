"""The block-sparse product and its gradients on Hopper: all are sums of small dense products (`wgmma.py`).

           a consumer's sum                     its a of a step              the common b of a step
forward    128 tokens, a column of blocks       x, the block's inputs        the block
dX         128 tokens, a row of blocks          dy, the block's outputs      the block transposed
dW         a block; the two are of one column   x transposed, its inputs     dy, the column's outputs
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_matmul.packing import BlockSparse
from pallas_kernels.mosaic_gpu import MULTIPROCESSORS, too_old
from pallas_kernels.wgmma import CONSUMERS, DEPTH, Side, Unit, launch


@dataclass(frozen=True)
class Tuning:
    """How the work is cut."""

    tokens: int = 128  # of a consumer's tile, forward and dX; a multiple of 64
    stages: int = 4  # steps in the ring, at most what fits
    group: int = 4  # tiles of tokens that are worked on side by side
    programs: int = MULTIPROCESSORS  # thread blocks


def unsupported(x: jax.Array, weight: BlockSparse) -> str | None:
    if reason := too_old():
        return reason
    if x.dtype == jnp.float32:
        return "expected bfloat16 or float16, got float32"
    if weight.block_size not in (64, 128):
        return f"expected blocks of 64 or 128, got {weight.block_size}"
    if x.shape[0] % 8:
        return f"expected a number of tokens that 8 divides, got {x.shape[0]}"
    return None


def matmul(x: jax.Array, weight: BlockSparse, interpret: Any = False, tuning: Tuning | None = None) -> jax.Array:
    """As `reference.matmul`."""
    return _walk(x, weight, False, interpret, tuning)


def transposed_matmul(
    dy: jax.Array, weight: BlockSparse, interpret: Any = False, tuning: Tuning | None = None
) -> jax.Array:
    """As `reference.transposed_matmul`."""
    return _walk(dy, weight, True, interpret, tuning)


def _walk(x: jax.Array, weight: BlockSparse, transposed: bool, interpret: Any, tuning: Tuning | None) -> jax.Array:
    """x times the matrix or its transpose: a unit is a tile of tokens and a column or a row of blocks."""
    tuning = tuning or Tuning()
    size, total = weight.block_size, x.shape[0]
    start = weight.row_start if transposed else weight.column_start
    lists = (weight.by_row, weight.column) if transposed else (weight.row,)
    tiles, lines = pl.cdiv(total, CONSUMERS * tuning.tokens), start.shape[0] - 1
    parts = size // DEPTH

    def unit(refs: Sequence[Any], y_ref: Any, number: jax.Array) -> Unit:
        x_ref, values_ref, start_ref, *list_refs = refs
        tile, line = plgpu.planar_snake(number, (tiles, lines), 0, tuning.group)
        first = start_ref[line]

        def tokens(consumer: Any) -> Any:
            return pl.ds((tile * CONSUMERS + consumer) * tuning.tokens, tuning.tokens)

        def sources(step: jax.Array) -> tuple[list[Any], list[Any]]:
            place, part = first + jax.lax.div(step, parts), pl.ds(jax.lax.rem(step, parts) * DEPTH, DEPTH)
            block = list_refs[0][place] if transposed else place
            across = pl.ds(list_refs[-1][block] * size + part.start, DEPTH)
            b = values_ref.at[block, :, part] if transposed else values_ref.at[block, part]
            return [x_ref.at[tokens(consumer), across] for consumer in range(CONSUMERS)], [b]

        def target(consumer: jax.Array) -> tuple[Any, Any]:
            return True, y_ref.at[tokens(consumer), pl.ds(line * size, size)]

        return Unit((start_ref[line + 1] - first) * parts, sources, target)

    return launch(
        unit,
        tiles * lines,
        [x, weight.values, start, *lists],
        jax.ShapeDtypeStruct((total, lines * size), x.dtype),
        a=Side((tuning.tokens, DEPTH)),
        b=Side((size, DEPTH) if transposed else (DEPTH, size), turned=transposed, common=True),
        stages=tuning.stages,
        programs=tuning.programs,
        interpret=interpret,
    )


def block_products(
    x: jax.Array, dy: jax.Array, weight: BlockSparse, interpret: Any = False, tuning: Tuning | None = None
) -> jax.Array:
    """As `reference.block_products`. A unit is up to two blocks of a column."""
    tuning = tuning or Tuning()
    size, steps = weight.block_size, pl.cdiv(x.shape[0], DEPTH)
    first, count = _pairs(weight)

    def unit(refs: Sequence[Any], out_ref: Any, number: jax.Array) -> Unit:
        x_ref, dy_ref, row_ref, column_ref, start_ref, first_ref, count_ref = refs
        first, count = first_ref[number], count_ref[number]
        used = first < start_ref[start_ref.shape[0] - 1]  # spare places are zero, a sum of no steps

        def sources(step: jax.Array) -> tuple[list[Any], list[Any]]:
            tokens = pl.ds(step * DEPTH, DEPTH)
            a = [x_ref.at[tokens, pl.ds(row_ref[block] * size, size)] for block in (first, first + count - 1)]
            return a, [dy_ref.at[tokens, pl.ds(column_ref[first] * size, size)]]

        def target(consumer: jax.Array) -> tuple[Any, Any]:
            return consumer < count, out_ref.at[first + consumer]

        return Unit(jnp.where(used, jnp.int32(steps), 0), sources, target)

    return launch(
        unit,
        first.shape[0],
        [x, dy, weight.row, weight.column, weight.column_start, first, count],
        jax.ShapeDtypeStruct(weight.values.shape, weight.values.dtype),
        a=Side((DEPTH, size), turned=True),
        b=Side((DEPTH, size), common=True),
        stages=tuning.stages,
        programs=tuning.programs,
        interpret=interpret,
    )


def _pairs(weight: BlockSparse) -> tuple[jax.Array, jax.Array]:
    """The blocks by twos of one column, an odd one alone: the first of each pair and how many there are, 0 to 2.

    Spare places follow as if they were a column more.
    """
    capacity = weight.row.shape[0]
    start = jnp.append(weight.column_start, jnp.int32(capacity))
    pairs = (start[1:] - start[:-1] + 1) // 2  # of each column
    begin = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(pairs, dtype=jnp.int32)])
    pair = jnp.arange((capacity + pairs.shape[0]) // 2, dtype=jnp.int32)  # as many as there can be
    column = jnp.searchsorted(begin[1:-1], pair, side="right")
    first = start[column] + 2 * (pair - begin[column])
    return first, jnp.clip(start[column + 1] - first, 0, 2)
