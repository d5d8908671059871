"""Cross-entropy and distillation over a large vocabulary, in chunks of tokens.

The logits of a chunk live only while the chunk is worked on. Since the loss is a sum over tokens, its gradient with
respect to the hidden states and the head is known as soon as the chunk's logits are: it is taken in the same pass, so
that nothing is computed twice and nothing of size V is kept for the backward pass.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jsparse.parallel import batch_shards, constrain


class Teacher(NamedTuple):
    """Of a distillation: loss += weight * temperature^2 * KL(teacher || student) at the temperature."""

    x: jax.Array  # [B, T, D'] the teacher's hidden states
    head: jax.Array  # [D', V]
    weight: float
    temperature: float


class TokenLoss(NamedTuple):
    """Sums over the counted tokens, float32. Only `total` carries a gradient."""

    total: jax.Array  # nll, plus weight * temperature^2 * kl
    nll: jax.Array  # negative log likelihood, nats
    kl: jax.Array  # KL(teacher || student), nats; 0 without a teacher


def token_loss(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    chunk: int = 4096,
    teacher: Teacher | None = None,
) -> TokenLoss:
    """Loss of hidden states x [B, T, D] under the head [D, V], summed over tokens.

    Args:
        targets: int32 [B, T].
        mask: bool [B, T], which tokens count.
        chunk: tokens whose logits exist at once on a device.
        teacher: distils from another model's hidden states.
    """
    steps = _chunk_steps(x.shape[0], x.shape[1], chunk)
    weight, temperature = (teacher.weight, teacher.temperature) if teacher else (0.0, 1.0)
    states = (teacher.x, teacher.head) if teacher else None
    return _token_loss(steps, weight, temperature, x, head, targets, mask, states)


def _chunk_steps(batch: int, length: int, chunk: int) -> int:
    """Positions of a chunk [B, steps]: the fewest equal chunks that keep to the limit on each device."""
    tokens = max(1, batch // batch_shards()) * length
    return math.ceil(length / min(length, math.ceil(tokens / chunk)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _token_loss(
    steps: int, weight: float, temperature: float, x: Any, head: Any, targets: Any, mask: Any, teacher: Any
) -> TokenLoss:
    def body(sums: TokenLoss, part: Any) -> tuple[TokenLoss, None]:
        new, _ = _chunk_loss(False, weight, temperature, head, teacher, *part)
        return jax.tree.map(jnp.add, sums, new), None

    return jax.lax.scan(body, _zeros(), _split(steps, x, targets, mask, teacher))[0]


def _forward(
    steps: int, weight: float, temperature: float, x: Any, head: Any, targets: Any, mask: Any, teacher: Any
) -> tuple[TokenLoss, Any]:
    def body(carry: tuple[TokenLoss, jax.Array], part: Any) -> Any:
        sums, d_head = carry
        new, d_logits = _chunk_loss(True, weight, temperature, head, teacher, *part)
        d_x = jnp.einsum("BTV,DV->BTD", d_logits, head)
        d_head = d_head + jnp.einsum("BTD,BTV->DV", part[0], d_logits, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, new), constrain(d_head, "embed", "vocab")), d_x

    start = (_zeros(), jnp.zeros(head.shape, jnp.float32))
    (sums, d_head), d_x = jax.lax.scan(body, start, _split(steps, x, targets, mask, teacher))
    d_x = jnp.moveaxis(d_x, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, : x.shape[1]]
    return sums, (d_x, d_head.astype(head.dtype))


def _backward(steps: int, weight: float, temperature: float, saved: Any, cotangent: TokenLoss) -> Any:
    d_x, d_head = (d * cotangent.total.astype(d.dtype) for d in saved)
    return d_x, d_head, None, None, None


_token_loss.defvjp(_forward, _backward)


def _zeros() -> TokenLoss:
    return TokenLoss(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def _split(steps: int, x: jax.Array, targets: jax.Array, mask: jax.Array, teacher: Any) -> Any:
    """[B, T, ...] -> [chunks, B, steps, ...]; tokens that fill up the last chunk do not count."""

    def one(a: jax.Array) -> jax.Array:
        fill = [(0, 0)] * a.ndim
        fill[1] = (0, -a.shape[1] % steps)
        a = jnp.pad(a, fill)
        return jnp.moveaxis(a.reshape(a.shape[0], -1, steps, *a.shape[2:]), 1, 0)

    return one(x), one(targets), one(mask), None if teacher is None else one(teacher[0])


def _chunk_loss(
    grad: bool,
    weight: float,
    temperature: float,
    head: jax.Array,
    teacher: Any,
    x: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    teacher_x: jax.Array | None,
) -> tuple[TokenLoss, jax.Array | None]:
    """Sums of one chunk and the gradient of `total` with respect to its logits, in the dtype of x.

    Targets are picked by comparison rather than by a gather, which a vocabulary split over devices would first have
    to collect.
    """

    def log_probs(x: jax.Array, head: jax.Array, temperature: float) -> jax.Array:
        logits = jnp.einsum("BTD,DV->BTV", x, head, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(constrain(logits, "batch", "sequence", "vocab") / temperature, axis=-1)

    counted = mask[..., None].astype(jnp.float32)
    log_p = log_probs(x, head, 1.0)
    is_target = jnp.arange(head.shape[1], dtype=targets.dtype)[None, None] == targets[..., None]
    nll = -jnp.sum(jnp.where(is_target, log_p, 0.0) * counted)
    d_logits = jnp.exp(log_p) - is_target.astype(jnp.float32)
    kl = jnp.zeros((), jnp.float32)
    if teacher is not None:
        log_t = log_probs(teacher_x, teacher[1], temperature)  # type: ignore[arg-type]
        log_s = log_probs(x, head, temperature)
        kl = jnp.sum(jnp.exp(log_t) * (log_t - log_s) * counted)
        d_logits = d_logits + weight * temperature * (jnp.exp(log_s) - jnp.exp(log_t))
    total = nll + weight * temperature**2 * kl
    return TokenLoss(total, nll, kl), (d_logits * counted).astype(x.dtype) if grad else None
