"""The block-sparse product and its gradients on a TPU: the lists of blocks are prefetched and say what is fetched next.

The grid visits, for each tile of tokens, the blocks of the first column, then those of the second, and so on; a column
without blocks is visited once, to be zero. Sums are kept on the chip until their column is done.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.backend import like
from pallas_kernels.block_sparse_matmul.packing import BlockSparse
from pallas_kernels.mosaic_tpu import dot

_TOKENS = 1024  # a tile of the result, and a step of a sum over tokens


def unsupported(x: jax.Array, weight: BlockSparse) -> str | None:
    if weight.block_size % 128:
        return f"expected blocks of a multiple of 128, got {weight.block_size}"
    if x.dtype == jnp.float16:
        return "expected float32 or bfloat16, got float16"
    return None


def matmul(x: jax.Array, weight: BlockSparse, interpret: Any = False) -> jax.Array:
    """As `reference.matmul`."""
    return _walk(x, weight, weight.column_start, jnp.arange(len(weight.row)), weight.row, 0, interpret)


def transposed_matmul(dy: jax.Array, weight: BlockSparse, interpret: Any = False) -> jax.Array:
    """As `reference.transposed_matmul`."""
    return _walk(dy, weight, weight.row_start, weight.by_row, weight.column, 1, interpret)


def _walk(
    x: jax.Array,
    weight: BlockSparse,
    start: jax.Array,
    order: jax.Array,
    across: jax.Array,
    contract: int,
    interpret: Any,
) -> jax.Array:
    """x times the matrix or its transpose: line l of the result sums over the blocks order[start[l] : start[l + 1]]."""
    size, total, lines = weight.block_size, x.shape[0], start.shape[0] - 1
    tokens = min(_TOKENS, total)
    line, entry, there, visits = _visits(start, order)
    column = across[entry]

    def kernel(line: Any, column: Any, entry: Any, there: Any, x_ref: Any, w_ref: Any, y_ref: Any, sums: Any) -> None:
        i = pl.program_id(1)

        @pl.when((i == 0) | (line[i] != line[jnp.maximum(i - 1, 0)]))
        def _() -> None:
            sums[...] = jnp.zeros_like(sums)

        @pl.when(there[i] > 0)
        def _() -> None:
            sums[...] += dot(x_ref[...], w_ref[...], 1, contract)

        @pl.when((i == pl.num_programs(1) - 1) | (line[i] != line[jnp.minimum(i + 1, line.shape[0] - 1)]))
        def _() -> None:
            y_ref[...] = sums[...].astype(y_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(total, tokens), visits),
            in_specs=[
                pl.BlockSpec((tokens, size), lambda t, i, line, column, entry, there: (t, column[i])),
                pl.BlockSpec((None, size, size), lambda t, i, line, column, entry, there: (entry[i], 0, 0)),
            ],
            out_specs=pl.BlockSpec((tokens, size), lambda t, i, line, column, entry, there: (t, line[i])),
            scratch_shapes=[pltpu.VMEM((tokens, size), jnp.float32)],
        ),
        out_shape=like(x, (total, lines * size), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(x, weight),
        interpret=interpret,
        name="block_sparse_matmul",
    )(line, column, entry, there, x, weight.values)


def _visits(start: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Line, block and whether there is one, int32 of each step of the grid, and the number of steps."""
    lines, counts = start.shape[0] - 1, start[1:] - start[:-1]
    begin = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(jnp.maximum(counts, 1), dtype=jnp.int32)])
    step = jnp.arange(order.shape[0] + lines, dtype=jnp.int32)
    line = jnp.clip(jnp.searchsorted(begin, step, side="right").astype(jnp.int32) - 1, 0, lines - 1)
    entry = order[jnp.clip(start[line] + step - begin[line], 0, order.shape[0] - 1)].astype(jnp.int32)
    return line, entry, (counts[line] > 0).astype(jnp.int32), begin[-1]


def block_products(x: jax.Array, dy: jax.Array, weight: BlockSparse, interpret: Any = False) -> jax.Array:
    """As `reference.block_products`."""
    size, total, capacity = weight.block_size, x.shape[0], len(weight.row)
    tokens = min(_TOKENS, total)
    steps = pl.cdiv(total, tokens)

    def kernel(row: Any, column: Any, count: Any, x_ref: Any, dy_ref: Any, out_ref: Any, sums: Any) -> None:
        c, t = pl.program_id(0), pl.program_id(1)

        @pl.when(t == 0)
        def _() -> None:
            sums[...] = jnp.zeros_like(sums)

        @pl.when(c < count[0])
        def _() -> None:
            a, b = x_ref[...], dy_ref[...]
            if total % tokens:  # what lies beyond the last token is anything
                token = t * tokens + jax.lax.broadcasted_iota(jnp.int32, a.shape, 0)
                a, b = (jnp.where(token < total, v, jnp.zeros((), v.dtype)) for v in (a, b))
            sums[...] += dot(a, b, 0, 0)

        @pl.when(t == steps - 1)
        def _() -> None:
            out_ref[...] = sums[...].astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(capacity, steps),
            in_specs=[
                pl.BlockSpec((tokens, size), lambda c, t, row, column, count: (t, row[c])),
                pl.BlockSpec((tokens, size), lambda c, t, row, column, count: (t, column[c])),
            ],
            out_specs=pl.BlockSpec((None, size, size), lambda c, t, row, column, count: (c, 0, 0)),
            scratch_shapes=[pltpu.VMEM((size, size), jnp.float32)],
        ),
        out_shape=like(x, weight.values.shape, weight.values.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(x, weight),
        interpret=interpret,
        name="block_products",
    )(weight.row, weight.column, weight.column_start[-1:], x, dy)


def _cost(x: jax.Array, weight: BlockSparse) -> pl.CostEstimate:
    flops = 2 * x.shape[0] * weight.values.size
    return pl.CostEstimate(flops=flops, bytes_accessed=x.nbytes + weight.values.nbytes, transcendentals=0)
