"""Losses over a large vocabulary in pieces of tokens, one after another, so that no logits ever exist whole."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jsparse.parallel import batch_shards

CHUNK = 4096  # tokens whose logits exist at once on a device


def by_chunks(f: Callable[..., Any], *arrays: jax.Array, chunk: int = CHUNK) -> Any:
    """f(*arrays) of arrays [B, T, ...] in pieces [B, t, ...] of at most `chunk` tokens a device, one after another.

    What f returns, a tree of arrays [B, t, ...], is joined along T. So what exists within f, such as logits, never
    exists whole.
    """
    batch, length = arrays[0].shape[:2]
    pieces = min(length, math.ceil(max(1, batch // batch_shards()) * length / chunk))
    steps = math.ceil(length / pieces)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -length % steps), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, -1, steps, *x.shape[2:]), 1, 0)

    def join(y: jax.Array) -> jax.Array:
        return jnp.moveaxis(y, 0, 1).reshape(batch, -1, *y.shape[3:])[:, :length]

    return jax.tree.map(join, jax.lax.map(lambda part: f(*part), tuple(map(split, arrays))))


def nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log likelihood, nats, float32 [...], of targets [...] under logits [..., V].

    Targets are picked by comparison rather than by a gather, which a vocabulary split over devices would first have
    to collect.
    """
    ids = jnp.arange(logits.shape[-1], dtype=targets.dtype).reshape(*[1] * targets.ndim, -1)
    picked = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def kl(a: jax.Array, b: jax.Array) -> jax.Array:
    """KL(a || b), nats, float32 [...], of logits [..., V]."""
    log_a, log_b = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)
