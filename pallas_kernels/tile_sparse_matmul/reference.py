"""What the tile-sparse product and its gradients compute, in float32 on masked dense arrays."""

from typing import Any

import jax

from pallas_kernels.dense import exact
from pallas_kernels.tile_sparse_matmul.api import Sparse
from pallas_kernels.tile_sparse_matmul.masks import masked


def unsupported(x: jax.Array, weight: jax.Array, mask: jax.Array, sparse: Sparse, tile: int) -> str | None:
    return None


def matmul(
    x: jax.Array,
    weight: jax.Array,
    mask: jax.Array,
    sparse: Sparse,
    tile: int,
    transposed: bool,
    interpret: Any = False,
    product: Any = exact,
) -> jax.Array:
    """x [T, I] times the weight [I, O], or, transposed, a weight [O, I]: [T, O] of x's dtype."""
    if sparse == "inputs":
        x = masked(x, mask, tile)
    y = product(x, weight, 1, int(transposed)).astype(x.dtype)
    return masked(y, mask, tile) if sparse == "outputs" else y


def weight_gradient(
    x: jax.Array,
    dy: jax.Array,
    mask: jax.Array,
    sparse: Sparse,
    tile: int,
    interpret: Any = False,
    product: Any = exact,
) -> jax.Array:
    """x^T dy, [I, O] of x's dtype, each block summed over the tiles that use it."""
    if sparse == "inputs":
        x = masked(x, mask, tile)
    else:
        dy = masked(dy, mask, tile)
    return product(x, dy, 0, 0).astype(x.dtype)
