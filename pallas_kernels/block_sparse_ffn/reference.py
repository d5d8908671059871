"""What the block-sparse FFN computes, in float32 and without skipping anything."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dense import exact
from pallas_kernels.ffn import Activation, PackedFFN, masked_ffn


class Router(NamedTuple):
    """Block e is active for a token x where sigmoid(weight[e] . x) > threshold."""

    weight: jax.Array  # [E, D], float32 or bfloat16
    threshold: jax.Array  # [1] float32, in score space


def unsupported(x: jax.Array, weights: PackedFFN, block_size: int) -> str | None:
    return None


def active_blocks(x: jax.Array, choice: Router | jax.Array | None, blocks: int) -> jax.Array:
    """The blocks that each token uses: bool [B, E]."""
    if choice is None:
        return jnp.ones((x.shape[0], blocks), bool)
    if not isinstance(choice, Router):
        return choice
    return jax.nn.sigmoid(exact(x, choice.weight, 1, 1)) > choice.threshold[0]


def block_sparse_ffn(
    x: jax.Array,
    weights: PackedFFN,
    choice: Router | jax.Array | None,
    *,
    residual: jax.Array | None,
    activation: Activation,
    block_size: int,
    most: bool = False,
    deterministic: bool = True,
    interpret: bool = False,
    product: Any = exact,
) -> jax.Array:
    """As `api.block_sparse_ffn`; `choice` is a router, a mask, bool [B, E], or None for every block; the result float32
    [B, D]."""
    mask = jnp.repeat(active_blocks(x, choice, weights.gate.shape[0] // block_size), block_size, axis=1)
    return masked_ffn(x, weights, mask, None, residual, activation, product)
