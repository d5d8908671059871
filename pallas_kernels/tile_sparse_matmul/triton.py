"""The tile-sparse product and its gradients on an NVIDIA GPU's tensor cores.

A program owns a piece of the result and walks what adds to it: all inputs where the block is active and none where it
is not, or the list of a tile's active blocks, or the list of the tiles that use a block. One kernel serves all three.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.backend import like
from pallas_kernels.tile_sparse_matmul.api import Sparse
from pallas_kernels.tile_sparse_matmul.masks import active
from pallas_kernels.triton import call, dot, grouped, power_of_two

_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Tuning:
    """How the work is cut. Sizes are upper bounds."""

    width: int = 128  # of a piece of the result, along the axis that is not sparse
    depth: int = 64  # of the sum, a step
    group: int = 8  # rows of pieces whose programs run side by side
    warps: int = 8
    stages: int = 4


def default_tuning(dtype: Any) -> Tuning:
    """As many bytes in flight for 32-bit values as for 16-bit ones."""
    return Tuning() if jnp.dtype(dtype).itemsize == 2 else Tuning(depth=32)


def unsupported(x: jax.Array, weight: jax.Array, mask: jax.Array, sparse: Sparse, tile: int) -> str | None:
    axis = int(sparse == "outputs")
    block = weight.shape[axis] // mask.shape[1]
    if tile not in _SIZES or block not in _SIZES:
        return f"expected tiles and blocks of 16, 32, 64 or 128, got {tile} and {block}"
    if weight.shape[1 - axis] % 16:
        return f"expected a weight that 16 divides, got {weight.shape}"
    return None


def matmul(
    x: jax.Array, weight: jax.Array, mask: jax.Array, sparse: Sparse, tile: int, transposed: bool,
    interpret: Any = False, tuning: Tuning | None = None,
) -> jax.Array:  # fmt: skip
    """As `reference.matmul`."""
    tuning = tuning or default_tuning(x.dtype)
    inputs, outputs = weight.shape[::-1] if transposed else weight.shape
    out = like(x, (x.shape[0], outputs), x.dtype)
    how: dict[str, Any] = {"tuning": tuning, "interpret": interpret, "trans_b": transposed}
    if sparse == "outputs":
        blocks = mask.shape[1]
        count = mask.reshape(-1).astype(jnp.int32)
        return _sums(x, weight, None, count, lambda i, j: i * blocks + j, inputs, (tile, outputs // blocks), out, **how)
    order, count = active(mask)
    size = tile, power_of_two(tuning.width, outputs)
    return _sums(x, weight, order, count, lambda i, j: i, inputs // mask.shape[1], size, out, **how)


def weight_gradient(
    x: jax.Array, dy: jax.Array, mask: jax.Array, sparse: Sparse, tile: int,
    interpret: Any = False, tuning: Tuning | None = None,
) -> jax.Array:  # fmt: skip
    """As `reference.weight_gradient`."""
    tuning = tuning or default_tuning(x.dtype)
    order, count = active(mask.T)
    inputs, outputs = x.shape[1], dy.shape[1]
    out = like(x, (inputs, outputs), x.dtype)
    how: dict[str, Any] = {"tuning": tuning, "interpret": interpret, "trans_a": True}
    if sparse == "outputs":
        size = power_of_two(tuning.width, inputs), outputs // mask.shape[1]
        return _sums(x, dy, order, count, lambda i, j: j, tile, size, out, **how)
    size = inputs // mask.shape[1], power_of_two(tuning.width, outputs)
    return _sums(x, dy, order, count, lambda i, j: i, tile, size, out, **how)


def _sums(
    a: jax.Array,
    b: jax.Array,
    order: jax.Array | None,
    count: jax.Array,
    line: Callable[[Any, Any], Any],
    chunk: int,
    size: tuple[int, int],
    out: jax.ShapeDtypeStruct,
    *,
    tuning: Tuning,
    interpret: Any,
    trans_a: bool = False,
    trans_b: bool = False,
) -> jax.Array:
    """The product of a [M, K] and b [K, N], given transposed or not, where piece (i, j) of the result sums over the
    first count[line(i, j)] chunks of K in row line(i, j) of the order. Without an order there is one chunk, all of K.

    Tokens, M or (a transposed) K, need not fill the last piece or chunk.
    """
    (m, n), depth = size, power_of_two(tuning.depth, chunk)
    rows, columns = pl.cdiv(out.shape[0], m), out.shape[1] // n
    total = a.shape[0]  # tokens
    whole = total % (chunk if trans_a else m) == 0

    def kernel(a_ref: Any, b_ref: Any, count_ref: Any, *refs: Any) -> None:
        *order_refs, y_ref = refs
        i, j = grouped(pl.program_id(0), rows, columns, tuning.group)
        row, column = i * m + jnp.arange(m), j * n + jnp.arange(n)
        mine = line(i, j)
        steps = jnp.int32(chunk // depth)

        def load(ref: Any, first: jax.Array, second: jax.Array, tokens_first: bool) -> jax.Array:
            at = first[:, None], second[None]
            if whole or not tokens_first:
                return plt.load(ref.at[at])
            return plt.load(ref.at[at], mask=jnp.broadcast_to(at[0] < total, (len(first), len(second))), other=0.0)

        def step(s: Any, sums: jax.Array) -> jax.Array:
            along = jax.lax.rem(s, steps) * depth + jnp.arange(depth)
            for order_ref in order_refs:
                along += order_ref[mine, jax.lax.div(s, steps)] * chunk
            left = load(a_ref, *((along, row) if trans_a else (row, along)), True)
            right = load(b_ref, *((column, along) if trans_b else (along, column)), trans_a)
            return sums + dot(left, right, trans_a=trans_a, trans_b=trans_b)

        sums = jax.lax.fori_loop(jnp.int32(0), count_ref[mine] * steps, step, jnp.zeros((m, n), jnp.float32))
        mask = None if whole or trans_a else jnp.broadcast_to(row[:, None] < total, (m, n))
        plt.store(y_ref.at[row[:, None], column[None]], sums.astype(y_ref.dtype), mask=mask)

    run = call(kernel, out, programs=rows * columns, warps=tuning.warps, stages=tuning.stages, interpret=interpret)
    return run(a, b, count, *(() if order is None else (order,)))
