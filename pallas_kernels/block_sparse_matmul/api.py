"""The public function of the block-sparse product: checks, choice of backend, derivative."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.backend import Implementation
from pallas_kernels.block_sparse_matmul.packing import BlockSparse


def block_sparse_matmul(
    x: jax.Array,
    weight: BlockSparse,
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x [T, I] times a block-sparse matrix [I, O] -> [T, O] of x's dtype, sums in float32.

    Forward and both derivatives touch the blocks that are there alone: the derivative with respect to the weight is
    one of its values, and nothing is ever as large as the dense matrix. No sum is split over programs, so the same bits
    come out of every run.

    Args:
        x: float32, bfloat16 or float16; many tokens, as in training and prefill.
        weight: of x's dtype, as `pack_blocks` makes it.
        implementation: a backend's name, which fails where it cannot run; None takes the best that can.
        interpret: runs a Pallas backend on the CPU; True, or the backend's own interpreter parameters.
    Raises:
        ValueError: arguments that do not fit each other, or that the named backend does not take.
    """
    backend.check_tokens(x, "[T, I]")
    if weight.values.ndim != 3:
        raise ValueError(f"weight: expected one matrix, got values of shape {weight.values.shape}")
    if weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight: expected {x.shape[1]} inputs, got {weight.shape[0]}")
    if weight.values.dtype != x.dtype:
        raise ValueError(f"weight: expected the dtype of x, {x.dtype}, got {weight.values.dtype}")
    if not weight.values.size or not x.size:
        return jnp.zeros((x.shape[0], weight.shape[1]), x.dtype)
    x, weight = backend.vary_together((x, weight))
    module = backend.choose(__package__, implementation, x, weight, on_hopper=("mosaic_gpu", "triton"))
    return _matmul(module, interpret, x, weight)


def _call(module: Any, interpret: Any, x: jax.Array, weight: BlockSparse) -> jax.Array:
    return module.matmul(x, weight, interpret)


_matmul: Any = jax.custom_vjp(_call, nondiff_argnums=(0, 1))


def _forward(module: Any, interpret: Any, x: jax.Array, weight: BlockSparse) -> tuple[jax.Array, Any]:
    return _matmul(module, interpret, x, weight), (x, weight)


def _backward(module: Any, interpret: Any, operands: Any, dy: jax.Array) -> tuple[jax.Array, BlockSparse]:
    x, weight = operands
    none: Any = dict.fromkeys(field.name for field in dataclasses.fields(weight))
    dvalues = module.block_products(x, dy, weight, interpret)
    return module.transposed_matmul(dy, weight, interpret), BlockSparse(**none | {"values": dvalues})


_matmul.defvjp(_forward, _backward)
