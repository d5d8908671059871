"""What the packed N:M products compute, in float32 on the dense matrices."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ffn import Activation, activate
from pallas_kernels.nm_matmul.packing import PackedNM, unpack


def unsupported(x: jax.Array, *weights: PackedNM) -> str | None:
    return None


def nm_matmul(x: jax.Array, weight: PackedNM, interpret: Any = False) -> jax.Array:
    """x [B, I] times the matrix [I, O], float32 [B, O]."""
    return jnp.dot(x.astype(jnp.float32), unpack(weight).astype(jnp.float32), precision="highest")


def nm_ffn(
    x: jax.Array,
    gate: PackedNM,
    up: PackedNM,
    down: PackedNM,
    residual: jax.Array | None,
    activation: Activation,
    interpret: Any = False,
) -> jax.Array:
    """(act(x gate) * (x up)) down, plus the residual, float32 [B, D]."""
    hidden = activate(activation, nm_matmul(x, gate)) * nm_matmul(x, up)
    y = nm_matmul(hidden, down)
    return y if residual is None else residual + y
