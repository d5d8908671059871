"""What the neuron-sparse FFN computes, in float32 and without skipping anything."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ffn import Activation, PackedFFN, activate


class Predictor(NamedTuple):
    """A low-rank guess of which neurons a token activates: neuron f where relu(down x) . up[f] > threshold[f].

    A bias b is the threshold -b; to ask a logistic predictor for a probability p, add log(p / (1 - p)).
    """

    down: jax.Array  # [R, D], R the rank, of any float dtype; x is converted to it
    up: jax.Array  # [F, R], neuron by neuron
    threshold: jax.Array  # [F] float32


def unsupported(x: jax.Array, weights: PackedFFN, predictor: Predictor | None, cutoff: jax.Array | None) -> str | None:
    return None


def project(x: jax.Array, predictor: Predictor) -> jax.Array:
    """relu(down x), rounded to the predictor's dtype: x [B, D] -> [B, R]."""
    z = jnp.dot(x.astype(predictor.down.dtype), predictor.down.T, preferred_element_type=jnp.float32)
    return jnp.maximum(z, 0.0).astype(predictor.down.dtype)


def predicted_neurons(x: jax.Array, predictor: Predictor) -> jax.Array:
    """The neurons that the predictor names: x [B, D] -> bool [B, F]."""
    scores = jnp.dot(project(x, predictor), predictor.up.T, preferred_element_type=jnp.float32)
    return scores > predictor.threshold[None]


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
    """As `api.neuron_sparse_ffn`, the result float32 [B, D]."""
    gate, up, down = (w.astype(jnp.float32) for w in weights)
    x32 = x.astype(jnp.float32)
    hidden = activate(activation, jnp.dot(x32, gate.T, precision="highest")) * jnp.dot(x32, up.T, precision="highest")
    if cutoff is not None:
        hidden = jnp.where(jnp.abs(hidden) >= cutoff[None], hidden, 0.0)
    if predictor is not None:
        hidden = jnp.where(predicted_neurons(x, predictor), hidden, 0.0)
    y = jnp.dot(hidden, down, precision="highest")
    return y if residual is None else residual + y
