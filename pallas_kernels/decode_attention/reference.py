"""What decode attention computes, step by step."""

from typing import Any

import jax
import jax.numpy as jnp


def unsupported(qkv: jax.Array, keys: jax.Array) -> str | None:
    return None


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [B, heads, H] by the angles of its rows [B, H/2], rounded to x's dtype."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def append(
    qkv: jax.Array, keys: jax.Array, values: jax.Array, cos: jax.Array, sin: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The rotated queries [B, N, H], and the cache with the new token in slot `length`."""
    rows, _, kv_heads, head_dim = keys.shape
    x = qkv.reshape(rows, -1, head_dim)
    q, k, v = jnp.split(x, (x.shape[1] - 2 * kv_heads, x.shape[1] - kv_heads), axis=1)
    place = (0, length, 0, 0)
    keys = jax.lax.dynamic_update_slice(keys, rotate(k, cos, sin)[:, None], place)
    return rotate(q, cos, sin), keys, jax.lax.dynamic_update_slice(values, v[:, None], place)


def visible(keys: jax.Array, start: jax.Array, length: jax.Array) -> jax.Array:
    """The slots that each row attends to: bool [B, S]."""
    slots = jnp.arange(keys.shape[1], dtype=jnp.int32)[None]
    return ((slots >= start[:, None]) & (slots <= length)) | (slots == length)


def decode_attention(
    qkv: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `api.decode_attention`, every product in float32."""
    q, keys, values = append(qkv, keys, values, cos, sin, length)
    kv_heads, head_dim = keys.shape[2:]
    group = q.reshape(q.shape[0], kv_heads, -1, head_dim).astype(jnp.float32)
    scores = jnp.einsum("BKGH,BSKH->BKGS", group, keys.astype(jnp.float32), precision="highest")
    scores = jnp.where(visible(keys, start, length)[:, None, None], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    y = jnp.einsum("BKGS,BSKH->BKGH", weights, values.astype(jnp.float32), precision="highest")
    return y.reshape(qkv.shape[0], -1).astype(qkv.dtype), keys, values
