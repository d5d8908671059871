"""Which neuron blocks of an FFN a token uses, and by what factor: the modes of `jsparse.config.Router`.

Block e holds the neurons [e b, (e + 1) b), b the block size, so that an array over F is one over [E, b] by its shape
alone. Everything here is float32: half precision would put scores exactly on a threshold.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jsparse.config import Router

SERVED: dict[Any, Any] = {"soft": "hard", "noisy_softmax": "softmax", "off": "top"}  # what follows on a training mode


def router_logits(router: Router, x: jax.Array, weights: jax.Array) -> jax.Array:
    """float32 [..., E] of the FFN's normalised input x [..., D] and a router's weights [D, E].

    In full float32 where the model is used: prompts, decoding and the kernels then take a logit to the same side of a
    threshold, but for the order of their sums. In training, which has two such products more in its backward pass,
    three bfloat16 passes on a TPU and TF32 on a GPU: exact in x where that is bfloat16.
    """
    precision = "high" if router.mode in SERVED else "highest"
    return jnp.einsum("...D,DE->...E", x.astype(jnp.float32), weights, precision=precision)


def gates(router: Router, logits: jax.Array, threshold: jax.Array) -> jax.Array:
    """The factor of each block, float32 [..., E].

    Args:
        logits: float32 [..., E], of a router; in mode "oracle" what `block_sums` makes of the layer's activations.
        threshold: float32 [], a score (soft and hard) or the share of blocks to drop (the others). May be traced.
    """
    match router.mode:
        case "off":
            return jnp.ones_like(logits)
        case "soft":
            return jax.nn.sigmoid(logits)
        case "hard":  # no gradient by straight-through or otherwise: the indicator's is zero
            return jax.lax.stop_gradient((jax.nn.sigmoid(logits) > threshold).astype(jnp.float32))
        case "top" | "oracle":
            return jax.lax.stop_gradient(keep_largest(logits, threshold).astype(jnp.float32))
        case "noisy_softmax":
            logits = logits + _noise(logits)
    kept = keep_largest(logits, threshold)
    share = jax.nn.softmax(logits, axis=-1, where=kept)  # 0 where not kept
    return share * jnp.sum(kept, axis=-1, keepdims=True, dtype=jnp.float32)


def keep_largest(scores: jax.Array, dropped: jax.Array) -> jax.Array:
    """bool [..., E]: all but round(dropped * E) of the largest scores [..., E]; of equal ones the first is kept."""
    blocks = scores.shape[-1]
    kept = blocks - jnp.round(dropped * blocks).astype(jnp.int32)
    order = jnp.argsort(scores, axis=-1, descending=True, stable=True)
    return jnp.argsort(order, axis=-1) < kept


def block_sums(x1: jax.Array, block_size: int) -> jax.Array:
    """Sum of |x1| over each block, float32 [..., E] of [..., F]: what decides about a block in hindsight."""
    return jnp.sum(jnp.abs(_blocks(x1, block_size)), axis=-1, dtype=jnp.float32)


def scale(x1: jax.Array, factors: jax.Array, block_size: int) -> jax.Array:
    """x1 [..., F] with each block times its factor, float32 [..., E]; in x1's dtype."""
    return (_blocks(x1, block_size) * factors[..., None].astype(x1.dtype)).reshape(x1.shape)


def _blocks(x: jax.Array, block_size: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, block_size)


def _noise(logits: jax.Array) -> Any:
    """Normal noise of deviation 1/E (Riquelme et al., arXiv 2106.05974). Its seed is the sum of the logits' own bits:
    another one for every layer, batch and step, with nothing to hand through the forward pass."""
    seed = jnp.sum(jax.lax.bitcast_convert_type(jax.lax.stop_gradient(logits), jnp.uint32))
    return jax.random.normal(jax.random.key(seed), logits.shape) / logits.shape[-1]
