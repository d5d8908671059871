"""The public function of the residual addition with RMSNorm: checks and choice of backend."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.backend import Implementation


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
    for name, array, shape in (("x", x, x.shape[:1] + scale.shape), ("delta", delta, x.shape)):
        if array is not None and (array.shape != shape or array.dtype != jnp.float32):
            raise ValueError(f"{name}: expected float32 {shape}, got {array.dtype} {array.shape}")
    if scale.ndim != 1 or scale.dtype != jnp.float32:
        raise ValueError(f"scale: expected float32 [D], got {scale.dtype} {scale.shape}")
    module = backend.choose(__package__, implementation, x)
    return module.add_rms_norm(x, scale, eps, dtype, delta, interpret=interpret)
