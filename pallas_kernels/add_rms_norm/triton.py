"""The residual addition with RMSNorm in one launch on an NVIDIA GPU: a program a row. Other programs ask for what the
next launch reads, as the memory is idle meanwhile.

With a router, a program scores some of its blocks, and each normalises all rows for itself: for a few rows that takes
no longer than its rows of the router take to arrive, and less than a launch. No load is moved across a store or a sum
over the program's threads, so all are issued before the first of these.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import triton as shared
from pallas_kernels import triton_prefetch
from pallas_kernels.block_sparse_ffn.reference import Router

WARM_BYTES = 0  # of the next launch's array that are asked for meanwhile,
WARMERS = 131  # and the programs that ask: a processor each, beside the one that has a row
BLOCKS = 2  # of a router that a program scores
LARGEST = 16_384  # values of a row that a program's registers hold


def unsupported(x: jax.Array) -> str | None:
    return None if x.shape[1] <= LARGEST else f"expected a width of at most {LARGEST}, got {x.shape[1]}"


def add_rms_norm(
    x: jax.Array,
    scale: jax.Array,
    eps: float,
    dtype: Any,
    delta: jax.Array | None,
    warm: jax.Array | None = None,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.add_rms_norm`."""
    rows, width = x.shape
    warps = 8 if width > 1024 else 4
    share = 0 if interpret else triton_prefetch.share(warm, WARM_BYTES, WARMERS * warps)
    operands = [x, scale] if delta is None else [x, scale, delta]
    kernel: Callable[..., None] = functools.partial(_kernel, eps=eps, size=pl.next_power_of_2(width), width=width)
    if share and warm is not None:
        kernel = _warming(kernel, len(operands), rows, warps, share)
        operands.append(warm)
    normed = jax.ShapeDtypeStruct(x.shape, dtype)
    found = shared.call(
        kernel,
        [normed] if delta is None else [normed, jax.ShapeDtypeStruct(x.shape, x.dtype)],
        programs=rows + (WARMERS if share else 0),
        warps=warps,
        aliases={} if delta is None else {0: 1},
        interpret=interpret,
        name="add_rms_norm",
    )(*operands)
    return (x if delta is None else found[1]), found[0]


def _warming(kernel: Callable[..., None], place: int, rows: int, warps: int, share: int) -> Callable[..., None]:
    """The kernel, whose programs beyond the rows ask for shares of operand `place`, which it does not have itself."""

    def body(*refs: Any) -> None:
        program = pl.program_id(0)
        pl.when(program < rows)(lambda: kernel(*refs[:place], *refs[place + 1 :]))
        first, all_warps = (program - rows) * warps, WARMERS * warps
        pl.when(program >= rows)(lambda: triton_prefetch.prefetch(refs[place], first, all_warps, share))

    return body


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
    some, chunks = shared.power_of_two(BLOCKS, blocks), shared.columns(width, 4096)

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
