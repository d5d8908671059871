"""The product of few tokens with a matrix in one launch on an NVIDIA GPU: a program streams some rows of weights.

Nothing is tuned while compiling, no partial sums go through memory, and nothing is added up in a second kernel.
"""

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl

from pallas_kernels import triton as shared
from pallas_kernels.backend import like

ROWS = 8  # outputs a program
CHUNK = 2048  # columns that are loaded together
MOST = 4  # tokens; with more, tensor cores are the better place


def unsupported(x: jax.Array, weight: jax.Array) -> str | None:
    if not 1 <= x.shape[0] <= MOST:
        return f"expected 1 to {MOST} tokens, got {x.shape[0]}"
    if x.shape[1] % 16:
        return f"expected a width that 16 divides, got {x.shape[1]}"
    return None


def matvec(x: jax.Array, weight: jax.Array, dtype: Any, *, interpret: Any = False) -> jax.Array:
    """As `reference.matvec`."""
    rows = shared.power_of_two(ROWS, weight.shape[0])
    kernel = functools.partial(_kernel, rows=rows)
    out = like(x, (x.shape[0], weight.shape[0]), dtype)
    run = shared.call(kernel, out, programs=weight.shape[0] // rows, warps=8, interpret=interpret)
    return run(x, weight)


def _kernel(x_ref: Any, weight_ref: Any, out_ref: Any, *, rows: int) -> None:
    chunks = shared.columns(x_ref.shape[1], CHUNK)
    x, mine = shared.load_tokens(x_ref, chunks), pl.ds(pl.program_id(0) * rows, rows)
    [products] = shared.row_products([weight_ref], mine, x, chunks)
    for b, y in enumerate(products):
        out_ref[b, mine] = y.astype(out_ref.dtype)
