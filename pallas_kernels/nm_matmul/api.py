"""The public functions over packed N:M weights: checks, choice of backend, derivative."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.backend import Implementation
from pallas_kernels.ffn import Activation
from pallas_kernels.nm_matmul import xla
from pallas_kernels.nm_matmul.packing import PackedNM


def nm_matmul(
    x: jax.Array,
    weight: PackedNM,
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x [B, I] times a packed matrix [I, O] -> [B, O] of x's dtype, sums in float32.

    Reads the packed bytes where a Pallas backend runs it: made for decoding, whose time is the weights' bytes. The
    derivative, with respect to x and the values kept, goes through the dense matrix.

    Args:
        x: float32, bfloat16 or float16, 1 <= B <= 16 where a Pallas backend is to run it.
        weight: of x's dtype, as `pack` makes it.
        implementation: a backend's name, which fails where it cannot run; None takes the best that can.
        interpret: runs a Pallas backend on the CPU; True, or the backend's own interpreter parameters.
    Raises:
        ValueError: arguments that do not fit each other, or that the named backend does not take.
    """
    _check(x, "weight", weight, x.shape[-1])
    x, weight = backend.vary_together((x, weight))
    module = backend.choose(__package__, implementation, x, weight)
    return _matmul(module, interpret, x, weight).astype(x.dtype)


def nm_ffn(
    x: jax.Array,
    gate: PackedNM,
    up: PackedNM,
    down: PackedNM,
    *,
    activation: Activation,
    residual: jax.Array | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> jax.Array:
    """A gated FFN of packed matrices, (act(x gate) * (x up)) down, in two kernels.

    DaSS groups all three along the neurons: gate and up by outputs, down by inputs. Any other axes will do, as long as
    gate and up have the same.

    Args:
        x: [B, D], as in `nm_matmul`.
        gate, up: [D, F] of the same pattern and axis.
        down: [F, D].
        residual: float32 [B, D] to which the result is added.
        implementation, interpret: as in `nm_matmul`.
    Returns:
        [B, D]: float32 with a residual, otherwise of x's dtype.
    Raises:
        ValueError: arguments that do not fit each other, or that the named backend does not take.
    """
    _check(x, "gate", gate, x.shape[-1])
    _check(x, "up", up, x.shape[-1])
    _check(x, "down", down, gate.shape[1])
    if (up.axis, up.values.shape, up.m) != (gate.axis, gate.values.shape, gate.m):
        raise ValueError(f"up: expected gate's pattern and shape, {_words(gate)}, got {_words(up)}")
    if down.shape[1] != x.shape[-1]:
        raise ValueError(f"down: expected {x.shape[-1]} outputs, the width of x, got {down.shape[1]}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != jnp.float32):
        raise ValueError(f"residual: expected float32 {x.shape}, got {residual.dtype} {residual.shape}")
    operands = backend.vary_together((x, gate, up, down, residual))
    module = backend.choose(__package__, implementation, x, gate, up, down)
    y = _ffn(module, activation, interpret, *operands)
    return y if residual is not None else y.astype(x.dtype)


def _check(x: jax.Array, name: str, weight: PackedNM, inputs: int) -> None:
    backend.check_tokens(x, "[B, I]")
    if weight.values.ndim != 3:
        raise ValueError(f"{name}: expected one matrix, got values of shape {weight.values.shape}")
    if weight.shape[0] != inputs:
        raise ValueError(f"{name}: expected {inputs} inputs, got {weight.shape[0]}")
    if weight.dtype != x.dtype:
        raise ValueError(f"{name}: expected the dtype of x, {x.dtype}, got {weight.dtype}")


def _words(weight: PackedNM) -> str:
    return f"{weight.n}:{weight.m} along the {weight.axis}s of {weight.shape}"


def _call_matmul(module: Any, interpret: Any, x: jax.Array, weight: PackedNM) -> jax.Array:
    return module.nm_matmul(x, weight, interpret)


def _call_ffn(module: Any, activation: Activation, interpret: Any, *operands: Any) -> jax.Array:
    return module.nm_ffn(*operands, activation, interpret)


_matmul: Any = jax.custom_vjp(_call_matmul, nondiff_argnums=(0, 1))
_ffn: Any = jax.custom_vjp(_call_ffn, nondiff_argnums=(0, 1, 2))
_matmul.defvjp(
    lambda *args: (_matmul(*args), args[2:]),
    lambda module, interpret, operands, dy: jax.vjp(xla.nm_matmul, *operands)[1](dy),
)
_ffn.defvjp(
    lambda *args: (_ffn(*args), args[3:]),
    lambda module, activation, interpret, operands, dy: jax.vjp(
        lambda *operands: _call_ffn(xla, activation, interpret, *operands), *operands
    )[1](dy),
)
