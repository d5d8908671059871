"""The optimizer against PyTorch's AdamW, and the schedules' values."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jsparse import model
from jsparse.config import ConfigError, ConstantLr, CosineLr, OptimizerConfig, WsdLr
from jsparse.train.optimizer import decay_mask, learning_rate, make_optimizer
from tests.helpers import assert_trees_close, tiny_config

pytestmark = pytest.mark.every_jax

WARM = CosineLr(warmup_steps=3, final=0.1)


def test_equals_torch():
    """Ten steps with clipping at work on some and not on others, biases and norms not decayed."""
    torch = pytest.importorskip("torch")
    model_config = tiny_config(attention_bias=True, mlp_bias=True)
    config = OptimizerConfig(lr=1e-2, schedule=WARM, weight_decay=0.3, clip=1.0, beta2=0.97, eps=1e-7)
    steps = 10
    params = model.init(jax.random.key(0), model_config)
    leaves, tree = jax.tree.flatten(params)
    decays = jax.tree.leaves(decay_mask(model_config))

    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in leaves]
    groups = [{"params": [p for p, d in zip(theirs, decays, strict=True) if d == decayed],
               "weight_decay": config.weight_decay if decayed else 0.0} for decayed in (True, False)]  # fmt: skip
    adam = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)

    optimizer = make_optimizer(config, model_config)
    schedule = learning_rate(config, steps)
    rng = np.random.default_rng(0)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        for step in range(1, steps + 1):
            scale = 0.001 if step % 2 else 1.0
            grads = [np.asarray(rng.normal(0, scale, x.shape), np.float32) for x in leaves]
            updates, state = update(tree.unflatten(map(jnp.asarray, grads)), state, params)
            params = optax.apply_updates(params, optax.tree.scale(-schedule(step), updates))
            for p, g in zip(theirs, grads, strict=True):
                p.grad = torch.tensor(g)
            torch.nn.utils.clip_grad_norm_(theirs, config.clip)
            for group in adam.param_groups:
                group["lr"] = float(schedule(step))
            adam.step()
    assert_trees_close(params, tree.unflatten([p.detach().numpy() for p in theirs]), 1e-5)


def test_decay_mask():
    decays = jax.tree_util.tree_leaves_with_path(decay_mask(tiny_config(attention_bias=True, mlp_bias=True)))
    kept = {jax.tree_util.keystr(path, simple=True, separator=".") for path, yes in decays if not yes}
    assert kept == {
        "norm.scale",
        "layers.attention_norm.scale",
        "layers.ffn_norm.scale",
        *(f"layers.attention.{name}_bias" for name in ("query", "key", "value", "output")),
        *(f"layers.ffn.{name}_bias" for name in ("gate", "up", "down")),
    }


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ConstantLr(), {1: 1, 2: 1, 20: 1}),
        (ConstantLr(warmup_steps=4), {1: 0.25, 2: 0.5, 4: 1, 5: 1, 20: 1}),
        (CosineLr(warmup_steps=4, final=0.2), {1: 0.25, 4: 1, 12: 0.6, 20: 0.2,
                                               8: 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2}),
        (CosineLr(final=0.0), {10: 0.5, 20: 0}),
        (WsdLr(warmup_steps=2, decay_steps=10), {1: 0.5, 2: 1, 10: 1, 11: 0.9, 15: 0.5, 20: 0}),
        (WsdLr(warmup_steps=2, decay_steps=5, final=0.5), {15: 1, 16: 0.9, 20: 0.5}),
        (WsdLr(), {1: 1, 20: 1}),
    ],
)  # fmt: skip
def test_schedules(schedule, expected):
    peak = 3e-4
    rate = learning_rate(OptimizerConfig(lr=peak, schedule=schedule), steps=20)
    with jax.numpy_dtype_promotion("standard"):
        for step, share in expected.items():
            assert float(rate(step)) == pytest.approx(peak * share, rel=1e-6, abs=1e-12), step


@pytest.mark.parametrize("schedule", [ConstantLr(20), CosineLr(20), WsdLr(8, 13), WsdLr(0, -1), CosineLr(-1)])
def test_schedule_that_does_not_fit_is_refused(schedule):
    config = dataclasses.replace(OptimizerConfig(), schedule=schedule)
    with pytest.raises(ConfigError, match=r"^optimizer\.schedule\.(warmup|decay)_steps: expected"):
        learning_rate(config, steps=20)
