"""The public function of the block-sparse FFN: checks and choice of backend."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.backend import Implementation
from pallas_kernels.block_sparse_ffn import xla
from pallas_kernels.block_sparse_ffn.reference import Router
from pallas_kernels.ffn import Activation, Body, PackedFFN, check_ffn, sparse_ffn


def block_sparse_ffn(
    x: jax.Array,
    weights: PackedFFN,
    router: jax.Array | None = None,
    threshold: float | jax.Array = 0.5,
    *,
    activation: Activation,
    block_size: int,
    mask: jax.Array | None = None,
    residual: jax.Array | None = None,
    most: bool = False,
    implementation: Implementation | None = None,
    deterministic: bool = False,
    interpret: Any = False,
) -> jax.Array:
    """A gated FFN of which every token uses the blocks of neurons that it chooses.

        y = sum over the active blocks e of (act(x Wg_e) * (x Wu_e)) Wd_e

    Block e is the neurons [e b, (e + 1) b), b the block size; E = F / b. It is active for a token where
    sigmoid(router[e] . x) > threshold, or where `mask` says so; without either it is always. The weights of a block are
    read if any token of the batch uses it, so that few tokens read little. Sums are float32.

    The derivative is with respect to x, the weights and the residual, through dense products; the choice of blocks has
    none, so router and threshold get zeros.

    Args:
        x: [B, D] float32, bfloat16 or float16, 1 <= B <= 16 where a Pallas backend is to run it.
        weights: of x's dtype, [F, D] each.
        router: [E, D], float32 or bfloat16.
        threshold: in score space, 0 to 1; may be traced.
        block_size: neurons a block.
        mask: bool [B, E], instead of a router.
        residual: float32 [B, D] to which the result is added.
        most: says that most blocks will be in use. The result is the same; on a GPU another tiling is faster then.
        implementation: a backend's name, which fails where it cannot run; None takes the best that can.
        deterministic: the same bits at every run. Kernels that add with atomics store partial sums instead.
        interpret: runs a Pallas backend on the CPU; True, or the backend's own interpreter parameters.
    Returns:
        [B, D]: float32 with a residual, otherwise of x's dtype.
    Raises:
        ValueError: arguments that do not fit each other, or that the named backend does not take.
    """
    check_ffn(x, weights, residual)
    (tokens, d), neurons = x.shape, weights.gate.shape[0]
    if neurons % block_size:
        raise ValueError(f"block_size: expected a divisor of the {neurons} neurons, got {block_size}")
    blocks = neurons // block_size
    if router is not None and mask is not None:
        raise ValueError("router, mask: expected at most one of them, got both")
    if router is not None and router.shape != (blocks, d):
        raise ValueError(f"router: expected shape {(blocks, d)}, got {router.shape}")
    if mask is not None and (mask.shape != (tokens, blocks) or mask.dtype != jnp.bool_):
        raise ValueError(f"mask: expected bool {(tokens, blocks)}, got {mask.dtype} {mask.shape}")

    choice = mask if router is None else Router(router, jnp.asarray(threshold, jnp.float32).reshape(1))
    operands = backend.vary_together((x, weights, (choice,), residual))
    # as measured: with fewer tokens Triton is faster
    on_hopper: tuple[Implementation, ...] = ("mosaic_gpu", "triton") if tokens > 4 else ()
    module = backend.choose(__package__, implementation, x, weights, block_size, on_hopper=on_hopper)
    settings = {"activation": activation, "block_size": block_size, "most": most or choice is None,
                "deterministic": deterministic, "interpret": interpret}  # fmt: skip
    y = sparse_ffn(Body(module.block_sparse_ffn, xla.block_sparse_ffn, tuple(settings.items())), *operands)
    return y if residual is not None else y.astype(x.dtype)
