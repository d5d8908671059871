"""The public function of the tile-sparse product: checks, choice of backend, derivative."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.backend import Implementation

Sparse = Literal["outputs", "inputs"]


def tile_sparse_matmul(
    x: jax.Array,
    weight: jax.Array,
    mask: jax.Array,
    *,
    sparse: Sparse,
    tile_size: int = 128,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x [T, I] times weight [I, O] -> [T, O] of x's dtype, for each tile of tokens in its active blocks alone.

    The mask is an array like any other, so the choice may come from the tokens. Forward and both derivatives skip what
    it leaves out; the weight's gradient sums, for each block, over the tiles that use it. The mask has no derivative.
    Sums are in float32 and none is split over programs, so the same bits come out of every run.

    Args:
        x: float32, bfloat16 or float16; many tokens, as in training and prefill.
        weight: dense, of x's dtype.
        mask: bool [tiles, E], True where a tile uses a block; E blocks divide the sparse axis of the weight.
        sparse: "outputs": y is zero outside the active blocks of O, as in gate and up of a block-sparse FFN;
            "inputs": y sums over the active blocks of I, and x is not read outside them, as in its down.
        tile_size: tokens of a tile; the last tile may have fewer.
        implementation: a backend's name, which fails where it cannot run; None takes the best that can.
        interpret: runs a Pallas backend on the CPU; True, or the backend's own interpreter parameters.
    Raises:
        ValueError: arguments that do not fit each other, or that the named backend does not take.
    """
    backend.check_tokens(x, "[T, I]")
    if weight.ndim != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight: expected [{x.shape[1]}, O], got shape {weight.shape}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: expected the dtype of x, {x.dtype}, got {weight.dtype}")
    if sparse not in ("outputs", "inputs"):
        raise ValueError(f"sparse: expected 'outputs' or 'inputs', got {sparse!r}")
    if tile_size < 1:
        raise ValueError(f"tile_size: expected at least 1, got {tile_size}")
    tiles, axis = -(-x.shape[0] // tile_size), weight.shape[sparse == "outputs"]
    if mask.dtype != jnp.bool_ or mask.ndim != 2 or mask.shape[0] != tiles:
        raise ValueError(f"mask: expected bool [{tiles}, blocks], got {mask.dtype} of shape {mask.shape}")
    if not mask.shape[1] or axis % mask.shape[1]:
        raise ValueError(f"mask: expected a number of blocks that divides {axis} {sparse}, got {mask.shape[1]}")
    if not x.size or not weight.size:
        return jnp.zeros((x.shape[0], weight.shape[1]), x.dtype)
    x, weight, mask = backend.vary_together((x, weight, mask))
    module = backend.choose(
        __package__, implementation, x, weight, mask, sparse, tile_size, on_hopper=("mosaic_gpu", "triton")
    )
    return _matmul(module, sparse, tile_size, interpret, x, weight, mask)


def _call(
    module: Any, sparse: Sparse, tile: int, interpret: Any, x: jax.Array, weight: jax.Array, mask: jax.Array
) -> jax.Array:
    return module.matmul(x, weight, mask, sparse, tile, False, interpret)


_matmul: Any = jax.custom_vjp(_call, nondiff_argnums=(0, 1, 2, 3))


def _forward(
    module: Any, sparse: Sparse, tile: int, interpret: Any, x: jax.Array, weight: jax.Array, mask: jax.Array
) -> tuple[jax.Array, Any]:
    return _matmul(module, sparse, tile, interpret, x, weight, mask), (x, weight, mask)


def _backward(
    module: Any, sparse: Sparse, tile: int, interpret: Any, operands: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, weight, mask = operands
    dx = module.matmul(dy, weight, mask, "inputs" if sparse == "outputs" else "outputs", tile, True, interpret)
    return dx, module.weight_gradient(x, dy, mask, sparse, tile, interpret), None


_matmul.defvjp(_forward, _backward)
