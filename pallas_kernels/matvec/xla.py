"""The product of few tokens with a matrix by XLA, which tunes it for the device while compiling."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.matvec.reference import unsupported

__all__ = ["matvec", "unsupported"]


def matvec(x: jax.Array, weight: jax.Array, *, interpret: Any = False) -> jax.Array:
    """As `reference.matvec`."""
    return jnp.dot(x, weight.T, preferred_element_type=jnp.float32)
