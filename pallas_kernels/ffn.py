"""What the sparse feed-forward operations share: packed weights, activations, the dense form and its derivative."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp


class PackedFFN(NamedTuple):
    """A gated FFN, neuron by neuron: row f of each matrix [F, D] is what neuron f reads or writes.

    A neuron's weights are contiguous in all three, and so are those of a block of neurons, so that what is skipped is
    never fetched. To shard it, split F.
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array


def pack_ffn(gate: jax.Array, up: jax.Array, down: jax.Array) -> PackedFFN:
    """Packs gate [D, F], up [D, F] and down [F, D], inputs first, as models hold them."""
    f, d = down.shape
    if gate.shape != (d, f) or up.shape != (d, f):
        raise ValueError(f"gate and up: expected shape {(d, f)} beside down {(f, d)}, got {gate.shape} and {up.shape}")
    return PackedFFN(gate.T, up.T, down)


@dataclass(frozen=True)
class Activation:
    """The gate's activation. `threshold` is read by two of them:

    fatrelu: g where g >= threshold, else 0 (ProSparse Eq. 3)
    cats:    silu(g) where |silu(g)| >= threshold, else 0
    """

    kind: Literal["silu", "gelu", "gelu_tanh", "relu", "fatrelu", "cats"]
    threshold: float = 0.0

    def __post_init__(self) -> None:
        kinds = ("silu", "gelu", "gelu_tanh", "relu", "fatrelu", "cats")
        if self.kind not in kinds:
            raise ValueError(f"activation: expected one of {', '.join(kinds)}, got {self.kind!r}")


def activate(activation: Activation, g: jax.Array, erf: Any = jax.lax.erf) -> jax.Array:
    """The activation of g, float32, elementwise. `erf`: for backends without one of their own."""
    match activation.kind:
        case "silu":
            return g * jax.lax.logistic(g)
        case "gelu":
            return 0.5 * g * (1.0 + erf(g * 0.5**0.5))
        case "gelu_tanh":
            return 0.5 * g * (1.0 + jnp.tanh((2 / jnp.pi) ** 0.5 * (g + 0.044715 * g * g * g)))
        case "relu":
            return jnp.maximum(g, 0.0)
        case "fatrelu":
            return jnp.where(g >= activation.threshold, g, 0.0)
        case "cats":
            score = g * jax.lax.logistic(g)
            return jnp.where(jnp.abs(score) >= activation.threshold, score, 0.0)


def check_ffn(x: jax.Array, weights: PackedFFN, residual: jax.Array | None) -> None:
    """Raises ValueError, naming the argument, where shapes or dtypes do not fit."""
    if x.ndim != 2:
        raise ValueError(f"x: expected [B, D], got shape {x.shape}")
    b, d = x.shape
    f = weights.gate.shape[0]
    for name, w in weights._asdict().items():
        if w.shape != (f, d):
            raise ValueError(f"weights.{name}: expected shape {(f, d)} (neurons, width of x), got {w.shape}")
        if w.dtype != x.dtype:
            raise ValueError(f"weights.{name}: expected the dtype of x, {x.dtype}, got {w.dtype}")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")
    if residual is not None and (residual.shape != (b, d) or residual.dtype != jnp.float32):
        raise ValueError(f"residual: expected float32 {(b, d)}, got {residual.dtype} {residual.shape}")


def masked_ffn(
    x: jax.Array,
    weights: PackedFFN,
    mask: jax.Array | None,
    cutoff: jax.Array | None,
    residual: jax.Array | None,
    activation: Activation,
    product: Any,
) -> jax.Array:
    """The dense form of the sparse operations: every neuron is computed, and some of them count, float32 [B, D].

    Args:
        mask: bool [B, F], the neurons that count; None: all.
        cutoff: float32 [F] or None; what is smaller in magnitude counts as zero.
        product: of `pallas_kernels.dense`.
    """
    hidden = activate(activation, product(x, weights.gate, 1, 1)) * product(x, weights.up, 1, 1)
    if cutoff is not None:
        hidden = jnp.where(jnp.abs(hidden) >= cutoff[None], hidden, 0.0)
    if mask is not None:
        hidden = jnp.where(mask, hidden, 0.0)
    y = product(hidden, weights.down)
    return y if residual is None else residual + y


@dataclass(frozen=True)
class Body:
    """A backend's function with its settings, and the dense function whose derivative it has."""

    run: Callable[..., jax.Array]
    dense: Callable[..., jax.Array]
    settings: tuple[tuple[str, Any], ...]  # arguments by name


def _sparse_ffn(
    body: Body, x: jax.Array, weights: PackedFFN, choice: tuple[Any, ...], residual: jax.Array | None
) -> jax.Array:
    """The body's result, float32 [B, D]. `choice`, what says which neurons count, has no derivative."""
    return body.run(x, weights, *choice, residual=residual, **dict(body.settings))


def _forward(body: Body, *operands: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return sparse_ffn(body, *operands), operands


def _backward(body: Body, operands: tuple[Any, ...], dy: jax.Array) -> tuple[Any, ...]:
    x, weights, choice, residual = operands
    dense = replace(body, run=body.dense)
    _, vjp = jax.vjp(lambda x, weights, residual: _sparse_ffn(dense, x, weights, choice, residual),
                     x, weights, residual)  # fmt: skip
    dx, dweights, dresidual = vjp(dy)
    return dx, dweights, None, dresidual


sparse_ffn: Any = jax.custom_vjp(_sparse_ffn, nondiff_argnums=(0,))
sparse_ffn.defvjp(_forward, _backward)
