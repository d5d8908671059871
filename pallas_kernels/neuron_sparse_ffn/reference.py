"""What the neuron-sparse FFN computes, in float32 and without skipping anything."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dense import exact, native
from pallas_kernels.ffn import Activation, PackedFFN, masked_ffn


class Predictor(NamedTuple):
    """A low-rank guess of which neurons a token activates: neuron f where relu(down x) . up[f] > threshold[f].

    A bias b is the threshold -b; to ask a logistic predictor for a probability p, add log(p / (1 - p)). The matrices
    are of x's dtype or int8, numbers as they are: a scale of each row of `up` can go into the thresholds, and one of
    each row of `down`, being positive, into the columns of `up`.
    """

    down: jax.Array  # [R, D], R the rank
    up: jax.Array  # [F, R], neuron by neuron
    threshold: jax.Array  # [F] float32


def unsupported(x: jax.Array, weights: PackedFFN, predictor: Predictor | None, cutoff: jax.Array | None) -> str | None:
    return None


def project(x: jax.Array, predictor: Predictor) -> jax.Array:
    """relu(down x), rounded to x's dtype: x [B, D] -> [B, R]."""
    return jnp.maximum(native(x, predictor.down.astype(x.dtype), 1, 1), 0.0).astype(x.dtype)


def predicted_scores(x: jax.Array, predictor: Predictor) -> jax.Array:
    """What the predictor holds against its thresholds: x [B, D] -> float32 [B, F]."""
    return native(project(x, predictor), predictor.up.astype(x.dtype), 1, 1)


def predicted_neurons(x: jax.Array, predictor: Predictor) -> jax.Array:
    """The neurons that the predictor names: x [B, D] -> bool [B, F]."""
    return predicted_scores(x, predictor) > predictor.threshold[None]


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
    product: Any = exact,
) -> jax.Array:
    """As `api.neuron_sparse_ffn`, the result float32 [B, D]."""
    mask = None if predictor is None else predicted_neurons(x, predictor)
    return masked_ffn(x, weights, mask, cutoff, residual, activation, product)
