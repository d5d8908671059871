"""The chunked loss against the plain formula, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse.train.loss import Teacher, token_loss

pytestmark = pytest.mark.every_jax

B, T, D, V = 2, 13, 8, 37


def _inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (B, T, D), dtype)
    head = jax.random.normal(keys[1], (D, V), dtype)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    mask = jax.random.bernoulli(keys[3], 0.7, (B, T))
    teacher = jax.random.normal(keys[4], (B, T, D + 3), dtype), jax.random.normal(keys[5], (D + 3, V), dtype)
    return x, head, targets, mask, teacher


def _plain(x, head, targets, mask, teacher=None, weight=0.0, temperature=1.0):
    logits = x @ head
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    total = jnp.sum(jnp.where(mask, nll, 0))
    if teacher is not None:
        t = jax.nn.softmax(teacher[0] @ teacher[1] / temperature)
        kl = jnp.sum(t * (jnp.log(t) - jax.nn.log_softmax(logits / temperature)), -1)
        total = total + weight * temperature**2 * jnp.sum(jnp.where(mask, kl, 0))
    return total


@pytest.mark.parametrize("chunk", [1, 4, 8, 1000])
@pytest.mark.parametrize("distil", [False, True])
def test_equals_plain_formula(chunk, distil):
    x, head, targets, mask, states = _inputs()
    teacher = Teacher(*states, weight=0.3, temperature=2.0) if distil else None
    plain = (states, 0.3, 2.0) if distil else ()

    def ours(x, head):
        return 0.5 * token_loss(x, head, targets, mask, chunk=chunk, teacher=teacher).total

    value, grads = jax.value_and_grad(ours, (0, 1))(x, head)
    expected, expected_grads = jax.value_and_grad(lambda x, h: 0.5 * _plain(x, h, targets, mask, *plain), (0, 1))(
        x, head
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_logits_never_exist_whole():
    x, head, targets, mask, _ = _inputs()

    def ours(x, head):
        return token_loss(x, head, targets, mask, chunk=4).total

    text = str(jax.make_jaxpr(jax.value_and_grad(ours, (0, 1)))(x, head))
    assert f"{B},{T},{V}]" not in text and f"{B},2,{V}]" in text


def test_bfloat16_gradient_is_bfloat16_matmul():
    x, head, targets, mask, _ = _inputs(jnp.bfloat16)
    d_x, d_head = jax.grad(lambda x, h: token_loss(x, h, targets, mask).total, (0, 1))(x, head)
    assert d_x.dtype == d_head.dtype == jnp.bfloat16
    f32 = jax.grad(lambda x, h: _plain(x, h, targets, mask), (0, 1))(x.astype(jnp.float32), head.astype(jnp.float32))
    for a, b in zip((d_x, d_head), f32, strict=True):
        assert np.linalg.norm(a.astype(np.float32) - b) < 1e-2 * np.linalg.norm(b)


def test_nothing_counted_is_zero_loss():
    x, head, targets, _, _ = _inputs()
    loss, grad = jax.value_and_grad(lambda x: token_loss(x, head, targets, jnp.zeros((B, T), bool)).total)(x)
    assert loss == 0 and not grad.any()
