"""The block-sparse FFN on a TPU: the router in XLA, then a stream of the active blocks."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic_tpu as shared
from pallas_kernels.block_sparse_ffn.reference import Router, active_blocks
from pallas_kernels.ffn import Activation, PackedFFN


def unsupported(x: jax.Array, weights: PackedFFN, block_size: int) -> str | None:
    width, rows = x.shape[1], shared.tile_rows(x.dtype)
    if x.dtype == jnp.float16:
        return "expected float32 or bfloat16, got float16"
    if block_size % rows:
        return f"expected a block size that {rows} divides, the rows of a tile of {x.dtype}, got {block_size}"
    if not shared.blocks_a_step(block_size, width, x.dtype):
        return f"blocks of {block_size} neurons of width {width} do not fit the memory on the chip twice"
    return None


def block_sparse_ffn(
    x: jax.Array,
    weights: PackedFFN,
    choice: Router | jax.Array | None,
    *,
    residual: jax.Array | None,
    activation: Activation,
    block_size: int,
    most: bool = False,
    deterministic: bool = True,
    interpret: Any = False,
) -> jax.Array:
    """As `reference.block_sparse_ffn`, the hidden values rounded to x's dtype; always deterministic."""
    scale = active_blocks(x, choice, weights.gate.shape[0] // block_size).T.astype(jnp.float32)[:, :, None]
    return shared.gathered_ffn(
        x, tuple(weights), scale, None, residual=residual, activation=activation, interpret=interpret
    )
