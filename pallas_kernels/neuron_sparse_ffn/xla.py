"""The neuron-sparse FFN as dense matrix products: runs everywhere, saves nothing."""

import jax
import jax.numpy as jnp

from pallas_kernels.ffn import Activation, PackedFFN, activate
from pallas_kernels.neuron_sparse_ffn.reference import Predictor, predicted_neurons


def unsupported(x: jax.Array, weights: PackedFFN, predictor: Predictor | None, cutoff: jax.Array | None) -> str | None:
    return None


def neuron_sparse_ffn(
    x: jax.Array,
    weights: PackedFFN,
    predictor: Predictor | None,
    cutoff: jax.Array | None,
    *,
    residual: jax.Array | None,
    activation: Activation,
    deterministic: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """As `reference.neuron_sparse_ffn`; the hidden values are rounded to x's dtype."""
    gate = jnp.dot(x, weights.gate.T, preferred_element_type=jnp.float32)
    up = jnp.dot(x, weights.up.T, preferred_element_type=jnp.float32)
    hidden = activate(activation, gate) * up
    if cutoff is not None:
        hidden = jnp.where(jnp.abs(hidden) >= cutoff[None], hidden, 0.0)
    if predictor is not None:
        hidden = jnp.where(predicted_neurons(x, predictor), hidden, 0.0)
    y = jnp.dot(hidden.astype(x.dtype), weights.down, preferred_element_type=jnp.float32)
    return y if residual is None else residual + y
