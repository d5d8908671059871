"""One optimizer step: (state, batch) -> (state, metrics).

Numbers: the loss is the sum over the counted target tokens of the whole global batch divided by their count, so that
neither micro-batches nor devices change it. float32 masters are cast to the computation's dtype once a step;
gradients are summed over micro-batches in float32.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jsparse import model
from jsparse.config import Activation, Gelu, LlamaConfig, MeanL1, ProSparse, Silu, TrainConfig
from jsparse.data import Batch
from jsparse.methods import prosparse
from jsparse.model import Params
from jsparse.parallel import batch_sharding
from jsparse.train import state as train_state
from jsparse.train.loss import Teacher, token_loss
from jsparse.train.optimizer import learning_rate, make_optimizer
from jsparse.train.state import TrainState

Metrics = dict[str, jax.Array]


def makes_zeros(activation: Activation) -> bool:
    """Whether the activation has exact zeros, so that sparsity is worth measuring and penalising."""
    return not isinstance(activation, Silu | Gelu)


def make_step(
    config: TrainConfig, model_config: LlamaConfig, mesh: Mesh, teacher_config: LlamaConfig | None = None
) -> Any:
    """The jitted step(state, batch, teacher_params=None) -> (state, metrics). Trace it under `jax.set_mesh(mesh)`.

    The state is donated. A step whose loss or gradient is not finite leaves parameters, moments and the penalty's
    controller as they were and is counted in `skipped` and `skipped_in_a_row`.

    Metrics are device scalars: `loss` (cross-entropy, nats a token), `perplexity`, `lr`, `grad_norm` (before clipping),
    `update_norm`, `param_norm`, `skipped`, `skipped_in_a_row`; with an activation that makes zeros `sparsity` [L];
    with a penalty `penalty` (as added to the loss), `penalty_weight` and `penalty_ratio` (penalty / loss); with a
    teacher `kl` (nats a token).
    """
    optimizer = make_optimizer(config.optimizer, model_config, config.hold)
    lr_of = learning_rate(config.optimizer, config.steps)
    weight = train_state.weight(config.method)
    penalty = config.method.penalty if isinstance(config.method, ProSparse) else None
    observes = makes_zeros(model_config.activation)
    layers = model_config.num_hidden_layers
    ff = jnp.asarray([shape.intermediate_size for shape in model_config.layer_shapes], jnp.float32)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    shardings = train_state.shardings(config, model_config, mesh)

    def observed_tokens(batch: Any) -> jax.Array:
        """bool [B, T], the tokens whose activations count."""
        if isinstance(penalty, MeanL1) and penalty.mask == "loss":
            return batch.loss_mask
        return jnp.ones_like(batch.loss_mask) if batch.segments is None else batch.segments > 0

    def micro_loss(params: Params, batch: Any, teacher_params: Params | None, per_token: Any, per_l1: Any) -> Any:
        forward = functools.partial(model.trunk, tokens=batch.tokens, segments=batch.segments, attend=config.attention)
        probe = prosparse.probe(observed_tokens(batch)) if observes else None
        x, stats, _ = forward(params, config=model_config, probe=probe, remat=config.remat, unroll=config.unroll)
        if isinstance(stats, list):
            stats = jax.tree.map(lambda *s: jnp.stack(s), *stats)
        teacher = None
        if config.distill is not None and teacher_config is not None and teacher_params is not None:
            states, _, _ = forward(teacher_params, config=teacher_config, unroll=config.unroll)
            teacher = Teacher(jax.lax.stop_gradient(states), model.head(teacher_params), config.distill.weight,
                              config.distill.temperature)  # fmt: skip
        loss = token_loss(x, model.head(params), batch.targets, batch.loss_mask, chunk=config.loss_chunk,
                          teacher=teacher)  # fmt: skip
        total = loss.total * per_token
        if penalty is not None:
            total = total + jnp.sum(stats.l1 * per_l1)
        return total, (loss, stats)

    def step(state: TrainState, batch: Batch, teacher_params: Params | None = None) -> tuple[TrainState, Metrics]:
        number = state.step + 1
        tokens = jnp.maximum(jnp.sum(batch.loss_mask, dtype=jnp.float32), 1.0)
        observed = jnp.maximum(jnp.sum(observed_tokens(batch), dtype=jnp.float32), 1.0)
        penalty_weight = prosparse.penalty_weight(weight, number, state.control)
        per_l1 = jnp.zeros(layers)
        if penalty is not None:
            per_l1 = penalty_weight * prosparse.penalty_scale(penalty, tokens=observed, ff=ff, layers=layers,
                                                              micro_batches=config.accumulate * shards)  # fmt: skip

        params = model.cast(state.params, model_config, config.dtype)

        def micro_step(grads: Params, batch: Batch) -> tuple[Params, Any]:
            new, sums = jax.grad(micro_loss, has_aux=True)(params, batch, teacher_params, 1 / tokens, per_l1)
            grads = jax.tree.map(lambda g, n: g + n.astype(jnp.float32), grads, new)
            return jax.lax.with_sharding_constraint(grads, shardings.params), sums

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, sums = jax.lax.scan(micro_step, zeros, _micro_batches(batch, config.accumulate, mesh))
        loss, stats = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)

        lr = lr_of(number)
        with jax.numpy_dtype_promotion("standard"):  # optax is not written for "strict"
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = optax.tree.scale(-lr, updates)
        metrics = {
            "loss": loss.nll / tokens,
            "perplexity": jnp.exp(loss.nll / tokens),
            "lr": lr,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(state.params),
        }
        control = state.control
        if observes:
            metrics["sparsity"] = prosparse.sparsity(stats, observed, ff)
            control = prosparse.update_control(weight, number, control, metrics["sparsity"])
        if penalty is not None:
            metrics["penalty_weight"] = penalty_weight
            metrics["penalty"] = jnp.sum(stats.l1 * per_l1)
            metrics["penalty_ratio"] = metrics["penalty"] / metrics["loss"]
        if teacher_params is not None:
            metrics["kl"] = loss.kl / tokens

        objective = loss.total / tokens + (jnp.sum(stats.l1 * per_l1) if penalty is not None else 0.0)
        good = jnp.isfinite(objective) & jnp.isfinite(metrics["grad_norm"])
        done = dataclasses.replace(state, params=optax.apply_updates(state.params, updates), opt_state=opt_state,
                                   control=control, skipped_in_a_row=jnp.zeros_like(state.skipped))  # fmt: skip
        skip = dataclasses.replace(state, skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1)
        state = jax.tree.map(lambda a, b: jnp.where(good, a, b), done, skip)
        state = dataclasses.replace(state, step=number)
        return state, metrics | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}

    teacher_shardings = None if teacher_config is None else model.shardings(teacher_config, mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), *([teacher_shardings] if teacher_shardings else [])),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def _micro_batches(batch: Batch, accumulate: int, mesh: Mesh) -> Batch:
    """[B, T] -> [accumulate, B / accumulate, T], each device keeping the rows it has."""
    rows = NamedSharding(mesh, P(None, ("data", "fsdp")))

    def split(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(x, rows)

    return jax.tree.map(split, batch)
