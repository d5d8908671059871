"""The public function of the residual addition with RMSNorm: checks and choice of backend."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.backend import Implementation
from pallas_kernels.block_sparse_ffn.reference import Router


def add_rms_norm(
    x: jax.Array,
    scale: jax.Array,
    eps: float,
    dtype: Any,
    *,
    delta: jax.Array | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """x + delta, and its RMSNorm: y = x + delta, y / sqrt(mean(y^2) + eps) * scale.

    Args:
        x: float32 [B, D], the residual stream. Its buffer is reused where the caller has no other use.
        scale: float32 [D].
        dtype: of the normalised values.
        delta: float32 [B, D], or None to add nothing.
        implementation: a backend's name, which fails where it cannot run; None takes the best that can.
        interpret: runs a Pallas backend on the CPU.
    Returns:
        y, float32 [B, D], and the normalised values [B, D].
    Raises:
        ValueError: arguments that do not fit each other, or that the named backend does not take.
    """
    _check(x, scale, delta)
    module = backend.choose(__package__, implementation, x)
    return module.add_rms_norm(x, scale, eps, dtype, delta, interpret=interpret)


def add_norm_route(
    x: jax.Array,
    scale: jax.Array,
    eps: float,
    dtype: Any,
    router: jax.Array,
    threshold: jax.Array,
    *,
    delta: jax.Array | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`add_rms_norm`, and the blocks of a block-sparse FFN that each row's normalised values choose.

    Args:
        router: [E, D], float32 or bfloat16; block e is chosen where sigmoid(router[e] . normed) > threshold. Sums are
            float32.
        threshold: float32 [], in score space.
    Returns:
        What `add_rms_norm` returns, and bool [B, E]: the mask of `block_sparse_ffn`.
    Raises:
        ValueError: arguments that do not fit each other, or that the named backend does not take.
    """
    _check(x, scale, delta)
    if router.ndim != 2 or router.shape[1] != x.shape[1]:
        raise ValueError(f"router: expected [E, {x.shape[1]}], got shape {router.shape}")
    module = backend.choose(__package__, implementation, x)
    return module.add_norm_route(x, scale, eps, dtype, Router(router, threshold.reshape(1)), delta, interpret=interpret)


def _check(x: jax.Array, scale: jax.Array, delta: jax.Array | None) -> None:
    for name, array, shape in (("x", x, x.shape[:1] + scale.shape), ("delta", delta, x.shape)):
        if array is not None and (array.shape != shape or array.dtype != jnp.float32):
            raise ValueError(f"{name}: expected float32 {shape}, got {array.dtype} {array.shape}")
    if scale.ndim != 1 or scale.dtype != jnp.float32:
        raise ValueError(f"scale: expected float32 [D], got {scale.dtype} {scale.shape}")
