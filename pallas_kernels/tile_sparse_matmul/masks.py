"""What the backends make of a mask: zeros, or lists of what is active."""

import jax
import jax.numpy as jnp


def masked(values: jax.Array, mask: jax.Array, tile: int) -> jax.Array:
    """Zero where a token's tile does not use a block."""
    tokens, width = values.shape
    blocks = jnp.repeat(mask, tile, axis=0)[:tokens, :, None]
    split = values.reshape(tokens, mask.shape[1], width // mask.shape[1])
    return jnp.where(blocks, split, jnp.zeros((), values.dtype)).reshape(values.shape)


def sorted_by_use(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each line of a mask [L, N]: the active entries in order, then the others, int32 [L, N]; and how many are
    active, int32 [L]."""
    order = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
    return order, jnp.sum(mask, axis=1, dtype=jnp.int32)


def active(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each line of a mask [L, N]: the active entries in order, then the last of them again, int32 [L, N]; and how
    many there are, int32 [L]. A line with none lists 0."""
    order, count = sorted_by_use(mask)
    place = jnp.minimum(jnp.arange(mask.shape[1], dtype=jnp.int32)[None], jnp.maximum(count - 1, 0)[:, None])
    return jnp.take_along_axis(order, place, axis=1), count
