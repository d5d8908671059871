"""The residual addition with RMSNorm in one launch on an NVIDIA GPU: a program a row.

With a router, a program scores two of its blocks, and each normalises all rows for itself: for a few rows that takes no
longer than its rows of the router take to arrive, and less than a launch. No load is moved across a store or a sum over
the program's threads, so all are issued before the first of these.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import triton as shared
from pallas_kernels.block_sparse_ffn.reference import Router

LARGEST = 16_384  # values of a row that a program's registers hold


def unsupported(x: jax.Array) -> str | None:
    return None if x.shape[1] <= LARGEST else f"expected a width of at most {LARGEST}, got {x.shape[1]}"


def add_rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, dtype: Any, delta: jax.Array | None, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """As `reference.add_rms_norm`."""
    rows, width = x.shape
    operands = (x, scale) if delta is None else (x, scale, delta)
    normed = jax.ShapeDtypeStruct(x.shape, dtype)
    found = shared.call(
        functools.partial(_kernel, eps=eps, size=pl.next_power_of_2(width), width=width),
        [normed] if delta is None else [normed, jax.ShapeDtypeStruct(x.shape, x.dtype)],
        programs=rows,
        warps=8 if width > 1024 else 4,
        aliases={} if delta is None else {0: 1},
        interpret=interpret,
        name="add_rms_norm",
    )(*operands)
    return (x if delta is None else found[1]), found[0]


def _kernel(x_ref: Any, scale_ref: Any, *refs: Any, eps: float, size: int, width: int) -> None:
    row = pl.program_id(0)
    columns: Any = pl.ds(0, size)
    mask: Any = None
    if size > width:  # a slice may not reach beyond an array, indices may where a mask leaves them out
        columns = jnp.arange(size)
        mask = columns < width
    rows = row if mask is None else jnp.full_like(columns, row)
    scale = plt.load(scale_ref.at[columns], mask=mask, other=None if mask is None else 0.0)
    y = plt.load(x_ref.at[rows, columns], mask=mask, other=None if mask is None else 0.0)
    if len(refs) == 3:
        delta_ref, out_ref, sum_ref = refs
        y = y + plt.load(delta_ref.at[rows, columns], mask=mask, other=None if mask is None else 0.0)
        plt.store(sum_ref.at[rows, columns], y, mask=mask)
    else:
        (out_ref,) = refs
    normed = y * jax.lax.rsqrt(jnp.sum(y * y) / width + eps) * scale
    plt.store(out_ref.at[rows, columns], normed.astype(out_ref.dtype), mask=mask)


def add_norm_route(
    x: jax.Array,
    scale: jax.Array,
    eps: float,
    dtype: Any,
    router: Router,
    delta: jax.Array | None,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `reference.add_norm_route`."""
    (rows, width), blocks = x.shape, router.weight.shape[0]
    some, chunks = shared.power_of_two(2, blocks), shared.columns(width, 4096)

    def kernel(x_ref: Any, scale_ref: Any, weight_ref: Any, threshold_ref: Any, *refs: Any) -> None:
        *delta_refs, sum_ref, normed_ref, mask_ref = refs
        mine = pl.ds(pl.program_id(0) * some, some)
        tiles = [shared.load_weights(weight_ref, mine, k) for k in chunks]  # on their way while rows are normalised
        scales, threshold = [scale_ref[k] for k in chunks], threshold_ref[0]
        sums = [[functools.reduce(jnp.add, [ref[b, k] for ref in (x_ref, *delta_refs)]) for k in chunks]
                for b in range(rows)]  # fmt: skip
        for b, y in enumerate(sums):
            square = functools.reduce(jnp.add, [jnp.sum(part * part) for part in y])
            inverse = jax.lax.rsqrt(square / width + eps)
            normed = [(part * inverse * scale).astype(dtype) for part, scale in zip(y, scales, strict=True)]
            products = [tile.astype(jnp.float32) * part.astype(jnp.float32)[None]
                        for tile, part in zip(tiles, normed, strict=True)]  # fmt: skip
            score = functools.reduce(jnp.add, [jnp.sum(product, axis=1) for product in products])
            mask_ref[b, mine] = jax.lax.logistic(score) > threshold

            @pl.when(pl.program_id(0) == 0)
            def _(b: int = b, y: Any = y, normed: Any = normed) -> None:
                for k, whole, part in zip(chunks, y, normed, strict=True):
                    sum_ref[b, k], normed_ref[b, k] = whole, part

    shapes = (x.shape, x.dtype), (x.shape, dtype), ((rows, blocks), jnp.bool_)
    run = shared.call(kernel, [jax.ShapeDtypeStruct(*s) for s in shapes], programs=blocks // some, warps=16,
                      interpret=interpret, name="add_norm_route")  # fmt: skip
    return tuple(run(x, scale, *router, *(() if delta is None else (delta,))))
