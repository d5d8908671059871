"""The residual addition with RMSNorm in one launch on an NVIDIA GPU: a program a row."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

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
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    found = pl.pallas_call(
        functools.partial(_kernel, eps=eps, size=pl.next_power_of_2(width), width=width),
        grid=(rows,),
        in_specs=[pl.no_block_spec] * len(operands),
        out_specs=[pl.no_block_spec] * (1 if delta is None else 2),
        out_shape=[normed] if delta is None else [normed, jax.ShapeDtypeStruct(x.shape, x.dtype)],
        input_output_aliases={} if delta is None else {0: 1},
        compiler_params=plt.CompilerParams(num_warps=8 if width > 1024 else 4, num_stages=1),
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
    y = plt.load(x_ref.at[rows, columns], mask=mask, other=None if mask is None else 0.0)
    if len(refs) == 3:
        delta_ref, out_ref, sum_ref = refs
        y = y + plt.load(delta_ref.at[rows, columns], mask=mask, other=None if mask is None else 0.0)
        plt.store(sum_ref.at[rows, columns], y, mask=mask)
    else:
        (out_ref,) = refs
    scale = plt.load(scale_ref.at[columns], mask=mask, other=None if mask is None else 0.0)
    normed = y * jax.lax.rsqrt(jnp.sum(y * y) / width + eps) * scale
    plt.store(out_ref.at[rows, columns], normed.astype(out_ref.dtype), mask=mask)
