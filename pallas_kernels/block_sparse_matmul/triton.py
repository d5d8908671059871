"""The block-sparse product and its gradients on an NVIDIA GPU's tensor cores.

A program owns a tile of the result and walks the list of blocks that add to it: the loads of the next steps are on
their way while one is multiplied. Programs side by side share their tokens and, a group of tiles further, their blocks,
so that both come from the cache.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.backend import like
from pallas_kernels.block_sparse_matmul.packing import BlockSparse
from pallas_kernels.triton import call, dot, grouped


@dataclass(frozen=True)
class Tuning:
    """How the work is cut. Depths are upper bounds."""

    tokens: int = 128  # a tile of the result
    depth: int = 64  # of a block, a step
    token_depth: int = 64  # tokens a step where they are summed over
    group: int = 8  # tiles of tokens whose programs run side by side
    warps: int = 8
    stages: int = 4


def default_tuning(dtype: Any) -> Tuning:
    """For an H100: four steps of 16-bit values in flight, as many bytes of 32-bit ones."""
    return Tuning() if jnp.dtype(dtype).itemsize == 2 else Tuning(depth=32, token_depth=32)


def unsupported(x: jax.Array, weight: BlockSparse) -> str | None:
    size = weight.block_size
    if size not in (16, 32, 64, 128):
        return f"expected blocks of 16, 32, 64 or 128, got {size}"
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
    """x times the matrix or its transpose: a program sums over the blocks of a column or of a row."""
    tuning = tuning or default_tuning(x.dtype)
    size, depth = weight.block_size, min(tuning.depth, weight.block_size)
    total, tokens = x.shape[0], min(tuning.tokens, pl.next_power_of_2(max(x.shape[0], 16)))
    tiles = pl.cdiv(total, tokens)
    start = weight.row_start if transposed else weight.column_start
    lines = start.shape[0] - 1
    lists = (start, weight.by_row, weight.column) if transposed else (start, weight.row)

    def kernel(x_ref: Any, values_ref: Any, start_ref: Any, *refs: Any) -> None:
        *list_refs, y_ref = refs
        tile, line = grouped(pl.program_id(0), tiles, lines, tuning.group)
        token = tile * tokens + jnp.arange(tokens)[:, None]
        whole = total % tokens == 0
        first = start_ref[line]
        steps = jnp.int32(size // depth)

        def step(i: Any, sums: jax.Array) -> jax.Array:
            entry, part = first + jax.lax.div(i, steps), jax.lax.rem(i, steps) * depth
            block = list_refs[0][entry] if transposed else entry
            across = list_refs[-1][block if transposed else entry]
            along = part + jnp.arange(depth)
            at = token, (across * size + along)[None]
            if whole:
                a = plt.load(x_ref.at[at])
            else:
                a = plt.load(x_ref.at[at], mask=jnp.broadcast_to(token < total, (tokens, depth)), other=0.0)
            within = jnp.arange(size)
            if transposed:
                return sums + dot(a, values_ref[block, within[:, None], along[None]], trans_b=True)
            return sums + dot(a, values_ref[block, along[:, None], within[None]])

        count = (start_ref[line + 1] - first) * steps
        sums = jax.lax.fori_loop(jnp.int32(0), count, step, jnp.zeros((tokens, size), jnp.float32))
        at = token, (line * size + jnp.arange(size))[None]
        mask = None if whole else jnp.broadcast_to(token < total, sums.shape)
        plt.store(y_ref.at[at], sums.astype(y_ref.dtype), mask=mask)

    out = like(x, (total, lines * size), x.dtype)
    launch: dict[str, Any] = {"warps": tuning.warps, "stages": tuning.stages, "interpret": interpret}
    return call(kernel, out, programs=tiles * lines, **launch)(x, weight.values, *lists)


def block_products(
    x: jax.Array, dy: jax.Array, weight: BlockSparse, interpret: Any = False, tuning: Tuning | None = None
) -> jax.Array:
    """As `reference.block_products`."""
    tuning = tuning or default_tuning(x.dtype)
    size, total = weight.block_size, x.shape[0]
    depth = min(tuning.token_depth, pl.next_power_of_2(max(total, 16)))
    whole = total % depth == 0

    def kernel(x_ref: Any, dy_ref: Any, row_ref: Any, column_ref: Any, start_ref: Any, out_ref: Any) -> None:
        entry = pl.program_id(0)
        row, column = row_ref[entry], column_ref[entry]

        def step(i: Any, sums: jax.Array) -> jax.Array:
            token = (i * depth + jnp.arange(depth))[:, None]

            def load(ref: Any, block: jax.Array) -> jax.Array:
                at = token, (block * size + jnp.arange(size))[None]
                if whole:
                    return plt.load(ref.at[at])
                return plt.load(ref.at[at], mask=jnp.broadcast_to(token < total, (depth, size)), other=0.0)

            return sums + dot(load(x_ref, row), load(dy_ref, column), trans_a=True)

        there = entry < start_ref[start_ref.shape[0] - 1]
        steps = jnp.where(there, jnp.int32(pl.cdiv(total, depth)), jnp.int32(0))
        sums = jax.lax.fori_loop(jnp.int32(0), steps, step, jnp.zeros((size, size), jnp.float32))
        out_ref[entry] = sums.astype(out_ref.dtype)

    out = like(x, weight.values.shape, weight.values.dtype)
    launch: dict[str, Any] = {"warps": tuning.warps, "stages": tuning.stages, "interpret": interpret}
    run = call(kernel, out, programs=len(weight.row), **launch)
    return run(x, dy, weight.row, weight.column, weight.column_start)
