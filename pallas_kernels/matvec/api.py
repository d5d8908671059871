"""The public function of the dense product of few tokens: checks and choice of backend."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.backend import Implementation


def matvec(
    x: jax.Array,
    weight: jax.Array,
    *,
    dtype: Any = jnp.float32,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x weight^T, sums in float32.

    Args:
        x: [B, I]; 1 <= B <= 4 where a Pallas backend is to run it.
        weight: [O, I], outputs first, of x's dtype.
        dtype: of the result, to which the sums are rounded.
        implementation: a backend's name, which fails where it cannot run; None takes the best that can.
        interpret: runs a Pallas backend on the CPU.
    Returns:
        [B, O] of `dtype`.
    Raises:
        ValueError: arguments that do not fit each other, or that the named backend does not take.
    """
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        raise ValueError(f"x, weight: expected [B, I] and [O, I] of one dtype, got {x.dtype} {x.shape} and "
                         f"{weight.dtype} {weight.shape}")  # fmt: skip
    module = backend.choose(__package__, implementation, x, weight)
    return module.matvec(x, weight, dtype, interpret=interpret)
