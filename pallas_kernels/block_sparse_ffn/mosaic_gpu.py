"""The block-sparse FFN on Hopper: XLA scores the blocks, one persistent kernel streams the chosen ones."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu as shared
from pallas_kernels.block_sparse_ffn import reference
from pallas_kernels.block_sparse_ffn.reference import Router
from pallas_kernels.ffn import Activation, PackedFFN
from pallas_kernels.mosaic_gpu import Tuning


def unsupported(x: jax.Array, weights: PackedFFN, block_size: int) -> str | None:
    return shared.unsupported(x)


def active_blocks(x: jax.Array, choice: Router | jax.Array | None, blocks: int) -> jax.Array:
    """As `reference.active_blocks`, as row sums that XLA fuses with the comparison."""
    if not isinstance(choice, Router):
        return reference.active_blocks(x, choice, blocks)
    products = x.astype(jnp.float32)[:, None] * choice.weight.astype(jnp.float32)[None]
    return jax.nn.sigmoid(jnp.sum(products, axis=2)) > choice.threshold[0]


def block_sparse_ffn(
    x: jax.Array,
    weights: PackedFFN,
    choice: Router | jax.Array | None,
    *,
    residual: jax.Array | None,
    activation: Activation,
    block_size: int,
    most: bool = False,
    deterministic: bool = False,
    interpret: Any = False,
    tuning: Tuning | None = None,
) -> jax.Array:
    """As `reference.block_sparse_ffn`."""
    return shared.chosen_neurons_ffn(
        x,
        weights,
        active_blocks(x, choice, weights.gate.shape[0] // block_size),
        residual,
        activation=activation,
        deterministic=deterministic,
        interpret=interpret,
        tuning=tuning,
    )
