"""Decode attention by jax's own: runs everywhere, in ten or so kernels."""

from typing import Any

import jax

from pallas_kernels.decode_attention.reference import append, visible


def unsupported(qkv: jax.Array, keys: jax.Array) -> str | None:
    return None


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
    """As `reference.decode_attention`, products in the arguments' dtype."""
    q, keys, values = append(qkv, keys, values, cos, sin, length)
    mask = visible(keys, start, length)[:, None, None]
    with jax.numpy_dtype_promotion("standard"):  # jax's own code is not written for "strict"
        y = jax.nn.dot_product_attention(q[:, None], keys, values, mask=mask, implementation="xla")
    return y.reshape(qkv.shape[0], -1), keys, values
