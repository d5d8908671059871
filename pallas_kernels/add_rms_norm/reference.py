"""What the residual addition with RMSNorm computes."""

from typing import Any

import jax
import jax.numpy as jnp


def unsupported(x: jax.Array) -> str | None:
    return None


def add_rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, dtype: Any, delta: jax.Array | None, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """As `api.add_rms_norm`."""
    y = x if delta is None else x + delta
    normed = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale[None]
    return y, normed.astype(dtype)
