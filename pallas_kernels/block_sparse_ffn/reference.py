"""What the block-sparse FFN computes, in float32 and without skipping anything."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ffn import Activation, PackedFFN, activate


class Router(NamedTuple):
    """Block e is active for a token x where sigmoid(weight[e] . x) > threshold."""

    weight: jax.Array  # [E, D], float32 or bfloat16
    threshold: jax.Array  # [1] float32, in score space


def unsupported(x: jax.Array, weights: PackedFFN, block_size: int) -> str | None:
    return None


def active_blocks(x: jax.Array, choice: Router | jax.Array) -> jax.Array:
    """The blocks that each token uses: bool [B, E]."""
    if not isinstance(choice, Router):
        return choice
    x, weight = x.astype(jnp.float32), choice.weight.astype(jnp.float32)
    return jax.nn.sigmoid(jnp.dot(x, weight.T, precision="highest")) > choice.threshold[0]


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
    """As `api.block_sparse_ffn`; `choice` is a router or a mask, bool [B, E]; the result float32 [B, D]."""
    mask = jnp.repeat(active_blocks(x, choice), block_size, axis=1)
    gate, up, down = (w.astype(jnp.float32) for w in weights)
    x = x.astype(jnp.float32)
    hidden = activate(activation, jnp.dot(x, gate.T, precision="highest")) * jnp.dot(x, up.T, precision="highest")
    y = jnp.dot(jnp.where(mask, hidden, 0.0), down, precision="highest")
    return y if residual is None else residual + y
