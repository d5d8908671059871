"""What the packed N:M products compute, in float32 on the dense matrices."""

from typing import Any

import jax

from pallas_kernels.dense import exact
from pallas_kernels.ffn import Activation, activate
from pallas_kernels.nm_matmul.packing import PackedNM, unpack


def unsupported(x: jax.Array, *weights: PackedNM) -> str | None:
    return None


def nm_matmul(x: jax.Array, weight: PackedNM, interpret: Any = False, product: Any = exact) -> jax.Array:
    """x [B, I] times the matrix [I, O], float32 [B, O]."""
    return product(x, unpack(weight))


def nm_ffn(
    x: jax.Array,
    gate: PackedNM,
    up: PackedNM,
    down: PackedNM,
    residual: jax.Array | None,
    activation: Activation,
    interpret: Any = False,
    product: Any = exact,
) -> jax.Array:
    """(act(x gate) * (x up)) down, plus the residual, float32 [B, D]."""
    gate_product, up_product = (nm_matmul(x, weight, product=product) for weight in (gate, up))
    y = nm_matmul(activate(activation, gate_product) * up_product, down, product=product)
    return y if residual is None else residual + y
