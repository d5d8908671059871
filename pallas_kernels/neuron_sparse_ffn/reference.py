"""What the neuron-sparse FFN computes, in float32 and without skipping anything."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ffn import Activation, PackedFFN, activate


class Predictor(NamedTuple):
    """A low-rank guess of which neurons a token activates: neuron f where (x down) . up[f] > threshold[f].

    A bias b is the threshold -b; to ask a logistic predictor for a probability p, add log(p / (1 - p)).
    """

    down: jax.Array  # [D, R], R the rank, of any float dtype; x is converted to it
    up: jax.Array  # [F, R], neuron by neuron
    threshold: jax.Array  # [F] float32


def unsupported(x: jax.Array, weights: PackedFFN, predictor: Predictor | None) -> str | None:
    return None


def predicted_neurons(x: jax.Array, predictor: Predictor) -> jax.Array:
    """x [B, D] -> bool [B, F]. The projection is rounded to the predictor's dtype."""
    dtype = predictor.down.dtype
    z = jnp.dot(x.astype(dtype), predictor.down, preferred_element_type=jnp.float32).astype(dtype)
    return jnp.dot(z, predictor.up.T, preferred_element_type=jnp.float32) > predictor.threshold[None]


def neuron_sparse_ffn(
    x: jax.Array,
    weights: PackedFFN,
    predictor: Predictor | None,
    *,
    residual: jax.Array | None,
    activation: Activation,
    deterministic: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """As `api.neuron_sparse_ffn`, the result float32 [B, D]."""
    gate, up, down = (w.astype(jnp.float32) for w in weights)
    x32 = x.astype(jnp.float32)
    hidden = activate(activation, jnp.dot(x32, gate.T, precision="highest")) * jnp.dot(x32, up.T, precision="highest")
    if predictor is not None:
        hidden = jnp.where(predicted_neurons(x, predictor), hidden, 0.0)
    y = jnp.dot(hidden, down, precision="highest")
    return y if residual is None else residual + y
