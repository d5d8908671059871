"""What the block-sparse product and its gradients compute, in float32 on the dense matrix."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.packing import BlockSparse, unpack_blocks
from pallas_kernels.dense import exact


def unsupported(x: jax.Array, weight: BlockSparse) -> str | None:
    return None


def matmul(x: jax.Array, weight: BlockSparse, interpret: Any = False, product: Any = exact) -> jax.Array:
    """x [T, I] times the matrix [I, O], [T, O] of x's dtype."""
    return product(x, unpack_blocks(weight)).astype(x.dtype)


def transposed_matmul(dy: jax.Array, weight: BlockSparse, interpret: Any = False, product: Any = exact) -> jax.Array:
    """dy [T, O] times the matrix transposed, [T, I] of dy's dtype."""
    return product(dy, unpack_blocks(weight), 1, 1).astype(dy.dtype)


def block_products(
    x: jax.Array, dy: jax.Array, weight: BlockSparse, interpret: Any = False, product: Any = exact
) -> jax.Array:
    """The blocks of x^T dy, [C, b, b] of the weight's dtype, zero where a place is spare."""
    size = weight.block_size
    dense = product(x, dy, 0, 0).astype(weight.values.dtype)
    dense = dense.reshape(x.shape[1] // size, size, dy.shape[1] // size, size)
    there = jnp.arange(len(weight.row)) < weight.column_start[-1]
    blocks = dense[weight.row, :, weight.column]
    return jnp.where(there[:, None, None], blocks, jnp.zeros((), blocks.dtype))
