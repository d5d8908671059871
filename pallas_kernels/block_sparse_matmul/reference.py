"""What the block-sparse product and its gradients compute, in float32 on the dense matrix."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.packing import BlockSparse, unpack_blocks


def unsupported(x: jax.Array, weight: BlockSparse) -> str | None:
    return None


def matmul(x: jax.Array, weight: BlockSparse, interpret: Any = False) -> jax.Array:
    """x [T, I] times the matrix [I, O], [T, O] of x's dtype."""
    return _dot(x, unpack_blocks(weight)).astype(x.dtype)


def transposed_matmul(dy: jax.Array, weight: BlockSparse, interpret: Any = False) -> jax.Array:
    """dy [T, O] times the matrix transposed, [T, I] of dy's dtype."""
    return _dot(dy, unpack_blocks(weight).T).astype(dy.dtype)


def block_products(x: jax.Array, dy: jax.Array, weight: BlockSparse, interpret: Any = False) -> jax.Array:
    """The blocks of x^T dy, [C, b, b] of the weight's dtype, zero where a place is spare."""
    size = weight.block_size
    dense = _dot(x.T, dy).reshape(x.shape[1] // size, size, dy.shape[1] // size, size)
    there = jnp.arange(len(weight.row)) < weight.column_start[-1]
    blocks = dense[weight.row, :, weight.column]
    return jnp.where(there[:, None, None], blocks, 0.0).astype(weight.values.dtype)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
