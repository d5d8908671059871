"""The block-sparse product as dense ones: runs everywhere, in the dense time."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_matmul.packing import BlockSparse, unpack_blocks


def unsupported(x: jax.Array, weight: BlockSparse) -> str | None:
    return None


def matmul(x: jax.Array, weight: BlockSparse, interpret: Any = False) -> jax.Array:
    """As `reference.matmul`."""
    return _dot(x, unpack_blocks(weight), 1, 0).astype(x.dtype)


def transposed_matmul(dy: jax.Array, weight: BlockSparse, interpret: Any = False) -> jax.Array:
    """As `reference.transposed_matmul`."""
    return _dot(dy, unpack_blocks(weight), 1, 1).astype(dy.dtype)


def block_products(x: jax.Array, dy: jax.Array, weight: BlockSparse, interpret: Any = False) -> jax.Array:
    """As `reference.block_products`."""
    size = weight.block_size
    dense = _dot(x, dy, 0, 0).astype(weight.values.dtype).reshape(x.shape[1] // size, size, dy.shape[1] // size, size)
    there = jnp.arange(len(weight.row)) < weight.column_start[-1]
    blocks = dense[weight.row, :, weight.column]
    return jnp.where(there[:, None, None], blocks, jnp.zeros((), blocks.dtype))


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)
