"""The block-sparse FFN as dense matrix products and a mask: runs everywhere, saves nothing."""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_ffn.reference import Router, active_blocks
from pallas_kernels.ffn import Activation, PackedFFN, activate


def unsupported(x: jax.Array, weights: PackedFFN, block_size: int) -> str | None:
    return None


def block_sparse_ffn(
    x: jax.Array,
    weights: PackedFFN,
    choice: Router | jax.Array,
    *,
    residual: jax.Array | None,
    activation: Activation,
    block_size: int,
    deterministic: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """As `reference.block_sparse_ffn`; the hidden values are rounded to x's dtype."""
    mask = jnp.repeat(active_blocks(x, choice), block_size, axis=1)
    gate = jnp.dot(x, weights.gate.T, preferred_element_type=jnp.float32)
    up = jnp.dot(x, weights.up.T, preferred_element_type=jnp.float32)
    hidden = jnp.where(mask, activate(activation, gate) * up, 0.0)
    y = jnp.dot(hidden.astype(x.dtype), weights.down, preferred_element_type=jnp.float32)
    return y if residual is None else residual + y
