"""AdamW and the learning rate, built from optax's parts."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jsparse import model
from jsparse.config import (
    ConstantLr,
    CosineLr,
    Dense,
    Hold,
    LlamaConfig,
    LteStage1,
    Method,
    NoisyTopK,
    OptimizerConfig,
    Predictor,
    WsdLr,
    check,
)
from jsparse.methods.patterns import hold_zeros


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate, float32 [...], of steps [...] among 1, 2, ..., `steps`.

    Warm-up rises linearly and reaches the peak at step `warmup_steps`; a decay reaches its final value at the last
    step.

    Raises:
        ConfigError: warm-up and decay are longer than the run.
    """
    peak, schedule = config.lr, config.schedule
    warmup = schedule.warmup_steps
    check(0 <= warmup < steps, "optimizer.schedule.warmup_steps", f"0 to {steps - 1}, less than steps", warmup)
    boundaries: list[int] = []
    match schedule:
        case ConstantLr():
            pieces = [optax.constant_schedule(peak)]
        case CosineLr(final=final):
            pieces = [optax.cosine_decay_schedule(peak, steps - warmup, alpha=final)]
        case WsdLr(decay_steps=decay, final=final):
            room = steps - warmup
            check(0 <= decay <= room, "optimizer.schedule.decay_steps", f"0 to {room}, steps after the warm-up", decay)
            fall = optax.linear_schedule(peak, peak * final, max(decay, 1))
            pieces, boundaries = [optax.constant_schedule(peak), fall], [steps - decay]
    if warmup:
        pieces, boundaries = [optax.linear_schedule(0.0, peak, warmup), *pieces], [warmup, *boundaries]
    joined = optax.join_schedules(pieces, boundaries)

    def rate(step: Any) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # optax is not written for "strict"
            return jnp.asarray(joined(step), jnp.float32)

    return rate


def make_optimizer(
    config: OptimizerConfig, model_config: LlamaConfig, hold: Hold | None = None, method: Method = Dense()
) -> optax.GradientTransformation:
    """AdamW without its learning rate: gradients, clipped by global norm, to the direction that -lr multiplies.

    The learning rate stays outside because it belongs to the run's step, which also counts skipped steps; the moments'
    own count, which corrects their bias, does not. Held zeros have no gradient to begin with, so that they count
    neither in the norm nor in the moments.

    Routers are a partition of their own, clipped by their own norm, with their own rate relative to the model's; where
    the method does not train a part, its updates are zero. Routers' thresholds are never trained.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    model_part = optax.chain(
        *([] if hold is None else [hold_zeros()]),
        optax.clip_by_global_norm(config.clip),
        adam,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(model_config)),
    )
    if model_config.router is None:
        return model_part
    router_part = optax.set_to_zero()
    if isinstance(method, LteStage1 | NoisyTopK | Predictor):
        check(config.lr > 0, "optimizer.lr", f"a positive number for method {method.type}", config.lr)
        router_part = optax.chain(
            optax.clip_by_global_norm(config.clip),
            adam,
            optax.add_decayed_weights(method.router_weight_decay),
            optax.scale(method.router_lr / config.lr),
        )
    rest = optax.set_to_zero() if isinstance(method, Predictor) else model_part
    parts = {"router": router_part, "threshold": optax.set_to_zero(), "model": rest}
    return optax.partition(parts, _parts(model_config))


def _parts(config: LlamaConfig) -> Any:
    """Which partition each parameter belongs to."""
    names = {"router": "router", "router_threshold": "threshold"}
    return jax.tree_util.tree_map_with_path(lambda path, _: names.get(path[-1].key, "model"), model.islands(config))


def decay_mask(config: LlamaConfig) -> Any:
    """True at the parameters that decay: matrices and embeddings, not norm scales, thresholds or biases."""

    def decays(path: Any, island: bool) -> bool:
        return not island and not path[-1].key.endswith("bias")

    return jax.tree_util.tree_map_with_path(decays, model.islands(config))
