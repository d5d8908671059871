"""What the residual addition with RMSNorm computes."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_ffn.reference import Router, active_blocks


def unsupported(x: jax.Array) -> str | None:
    return None


def add_rms_norm(
    x: jax.Array, scale: jax.Array, eps: float, dtype: Any, delta: jax.Array | None, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """As `api.add_rms_norm`."""
    y = x if delta is None else x + delta
    normed = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale[None]
    return y, normed.astype(dtype)


def add_norm_route(
    x: jax.Array,
    scale: jax.Array,
    eps: float,
    dtype: Any,
    router: Router,
    delta: jax.Array | None,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `api.add_norm_route`."""
    y, normed = add_rms_norm(x, scale, eps, dtype, delta)
    return y, normed, active_blocks(normed, router, router.weight.shape[0])
