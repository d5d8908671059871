"""What a method has a training step observe, and what it adds to the loss.

Statistics are sums over the counted tokens of a micro-batch, so that they add up over micro-batches and devices; what a
method adds is linear in them and therefore as exact.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jsparse.config import (
    Activation,
    Dense,
    Fixed,
    Gelu,
    LlamaConfig,
    LteStage1,
    LteStage2,
    MeanL1,
    Method,
    NoisyTopK,
    Predictor,
    ProSparse,
    Router,
    Silu,
    Stages,
    Target,
    TrainConfig,
    check,
)
from jsparse.methods import lte, prosparse
from jsparse.model import Probe

AddsRouters = LteStage1 | NoisyTopK | Predictor  # methods that start from a model without routers
Metrics = dict[str, jax.Array]


def makes_zeros(activation: Activation) -> bool:
    """Whether the activation has exact zeros, so that sparsity is worth measuring and penalising."""
    return not isinstance(activation, Silu | Gelu)


class Terms(NamedTuple):
    probe: Callable[[jax.Array], Probe] | None  # of bool [B, T], the tokens that count; None: nothing is observed
    observed: Callable[[Any, jax.Array], Metrics]  # of summed statistics and the number of counted tokens
    penalty: Callable[..., jax.Array] | None = None  # of statistics, weight, that number and the share of steps done
    controlled: str = "sparsity"  # the metric that a controller of the weight holds
    loss_tokens: bool = False  # the tokens that count are those that take loss, not all real ones
    task: bool = True  # whether the model's own loss counts


def make_terms(config: TrainConfig, model_config: LlamaConfig, shards: int) -> Terms:
    """The terms of a recipe's method. `shards`: devices that split the batch."""
    layers = model_config.num_hidden_layers
    ff = jnp.asarray([shape.intermediate_size for shape in model_config.layer_shapes], jnp.float32)

    def zeros(stats: Any, tokens: jax.Array) -> Metrics:
        return {"sparsity": prosparse.sparsity(stats, tokens, ff)}

    match config.method:
        case ProSparse(penalty=penalty):

            def l1(stats: Any, weight: jax.Array, tokens: jax.Array, progress: jax.Array) -> jax.Array:
                scale = prosparse.penalty_scale(penalty, tokens=tokens, ff=ff, layers=layers,
                                                micro_batches=config.accumulate * shards)  # fmt: skip
                return jnp.sum(stats.l1 * weight * scale)

            return Terms(prosparse.probe, zeros, l1, loss_tokens=isinstance(penalty, MeanL1) and penalty.mask == "loss")
        case LteStage1(separation=separation, separation_ramp=ramp, epsilon=epsilon) as method:

            def losses(stats: Any, weight: jax.Array, tokens: jax.Array, progress: jax.Array) -> jax.Array:
                risen = prosparse.half_cosine(progress / jnp.maximum(ramp, 1e-9))
                total = weight * jnp.sum(stats.efficiency) + separation * risen * jnp.sum(stats.separation)
                return total / (tokens * layers)

            def scores(stats: lte.LayerStats, tokens: jax.Array) -> Metrics:
                return {
                    "sparsity": stats.off / tokens,
                    "missing": stats.missing / tokens,
                    "undecided": stats.undecided / tokens,
                    "no_block": stats.no_block / tokens,
                    "efficiency": jnp.mean(stats.efficiency) / tokens,
                    "separation": jnp.mean(stats.separation) / tokens,
                }

            # Scores that are still on their way to the threshold show in their mean, not in the share below it.
            return Terms(lambda mask: lte.probe(mask, epsilon=epsilon), scores, losses, controlled="missing",
                         loss_tokens=method.tokens == "loss")  # fmt: skip
        case Predictor(select="router"):

            def cross_entropy(stats: Any, weight: jax.Array, tokens: jax.Array, progress: jax.Array) -> jax.Array:
                return weight * jnp.sum(stats.cross_entropy) / (tokens * layers)

            def hits(stats: lte.PredictorStats, tokens: jax.Array) -> Metrics:
                return {"sparsity": stats.off / tokens, "hit": stats.hit / tokens}

            return Terms(lte.predictor_probe, hits, cross_entropy, task=False)
        case _ if model_config.router is not None:

            def masks(stats: lte.MaskStats, tokens: jax.Array) -> Metrics:
                return {"sparsity": stats.off / tokens, "no_block": stats.no_block / tokens}

            return Terms(lte.mask_probe, masks)
        case _:
            return Terms(prosparse.probe if makes_zeros(model_config.activation) else None, zeros)


def training_config(method: Method, model_config: LlamaConfig) -> LlamaConfig:
    """The config to train a model with: with the routers that the method adds, in the mode it trains them in.

    Raises:
        ConfigError: stage 2 of LTE and a model without LTE's routers, or a block size that does not divide F.
    """
    match method:
        case LteStage1():
            return replace(model_config, router=Router(method.block_size, "soft"))
        case NoisyTopK():
            return replace(model_config, router=Router(method.block_size, "noisy_softmax"))
        case Predictor(select=select):
            return replace(model_config, router=Router(method.block_size, "off" if select == "router" else "oracle"))
        case LteStage2():
            mode = model_config.router.mode if model_config.router else "no router"
            check(mode == "hard", "model.run", "stage 1's run, whose model has LTE's routers, mode 'hard', for method "
                  "lte_stage2", mode)  # fmt: skip
    return model_config


def penalty_weight(config: TrainConfig) -> Stages | Fixed | Target:
    """The weight of what the method adds, as a schedule or for the controller; without a penalty, fixed at 0."""
    match config.method:
        case ProSparse(weight=weight):
            return weight
        case LteStage1(target_sparsity=target, eta=eta, reach=reach):
            if target is None:
                return Fixed(eta)
            # Quicker than a penalty on activations is held: runs may be short, and a batch has many thousand scores.
            return Target(target, reach=max(1, round(reach * config.steps)), initial=eta, settle=0.1 * config.steps,
                          smoothing=0.7)  # fmt: skip
        case Predictor():
            return Fixed(1.0)
        case Dense() | LteStage2() | NoisyTopK():
            return Fixed(0.0)
    raise TypeError(f"no such method: {config.method!r}")
