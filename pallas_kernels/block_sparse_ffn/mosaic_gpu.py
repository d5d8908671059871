"""The block-sparse FFN on Hopper: persistent kernels stream the chosen blocks past the tokens.

Up to four tokens, XLA scores the blocks and one launch on the ordinary cores does the rest
(`pallas_kernels/mosaic_gpu.py`). More tokens are three launches on tensor cores (`mosaic_gpu_wgmma.py`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu as few_tokens
from pallas_kernels.block_sparse_ffn import mosaic_gpu_wgmma as more_tokens
from pallas_kernels.block_sparse_ffn import reference
from pallas_kernels.block_sparse_ffn.reference import Router
from pallas_kernels.ffn import Activation, PackedFFN


def unsupported(x: jax.Array, weights: PackedFFN, block_size: int) -> str | None:
    tokens = x.shape[0]
    if reason := few_tokens.too_old():
        return reason
    if not 1 <= tokens <= 16:
        return f"expected 1 to 16 tokens, got {tokens}"
    return few_tokens.unsupported(x) if tokens <= few_tokens.MOST else more_tokens.unsupported(x, block_size)


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
    tuning: few_tokens.Tuning | more_tokens.Tuning | None = None,
) -> jax.Array:
    """As `reference.block_sparse_ffn`. `tuning`: of the module that takes so many tokens."""
    how: dict[str, Any] = {"residual": residual, "activation": activation, "deterministic": deterministic,
                           "interpret": interpret, "tuning": tuning}  # fmt: skip
    if x.shape[0] > few_tokens.MOST:
        return more_tokens.ffn(x, weights, choice, block_size=block_size, **how)
    mask = active_blocks(x, choice, weights.gate.shape[0] // block_size)
    return few_tokens.chosen_neurons_ffn(x, weights, mask, **how)
