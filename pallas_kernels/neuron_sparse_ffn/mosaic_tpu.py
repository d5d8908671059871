"""The neuron-sparse FFN on a TPU: the gate or the predictor in XLA, then a stream of the tiles of neurons in which one
is active.

A TPU fetches tiles of rows, 16 of bfloat16. Where active neurons are spread evenly, few tiles are without one; where a
permutation has gathered neurons that fire together, many are.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_tpu as shared
from pallas_kernels.ffn import Activation, PackedFFN, activate
from pallas_kernels.neuron_sparse_ffn.reference import Predictor, predicted_neurons


def unsupported(x: jax.Array, weights: PackedFFN, predictor: Predictor | None, cutoff: jax.Array | None) -> str | None:
    rows = shared.tile_rows(x.dtype)
    if x.dtype == jnp.float16:
        return "expected float32 or bfloat16, got float16"
    if weights.gate.shape[0] % rows:
        return f"expected a number of neurons that {rows} divides, the rows of a tile, got {weights.gate.shape[0]}"
    if not shared.blocks_a_step(rows, x.shape[1], x.dtype):
        return f"tiles of width {x.shape[1]} do not fit the memory on the chip twice"
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
    interpret: Any = False,
) -> jax.Array:
    """As `reference.neuron_sparse_ffn`, the hidden values rounded to x's dtype; always deterministic."""
    if predictor is None:
        precision = "highest" if x.dtype == jnp.float32 else None
        gate = jnp.dot(x, weights.gate.T, precision=precision, preferred_element_type=jnp.float32)
        scale, matrices = activate(activation, gate), tuple(weights)[1:]
    else:
        scale, matrices = predicted_neurons(x, predictor).astype(jnp.float32), tuple(weights)
    tiles = scale.reshape(x.shape[0], -1, shared.tile_rows(x.dtype)).swapaxes(0, 1)
    return shared.gathered_ffn(
        x, matrices, tiles, cutoff, residual=residual, activation=activation, interpret=interpret
    )
