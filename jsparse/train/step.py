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
from jsparse.config import LlamaConfig, TrainConfig
from jsparse.data import Batch
from jsparse.methods import prosparse
from jsparse.model import Params
from jsparse.parallel import batch_sharding
from jsparse.train import state as train_state
from jsparse.train.loss import Teacher, token_loss
from jsparse.train.optimizer import learning_rate, make_optimizer
from jsparse.train.state import TrainState
from jsparse.train.terms import Metrics, make_terms, penalty_weight


def make_step(
    config: TrainConfig, model_config: LlamaConfig, mesh: Mesh, teacher_config: LlamaConfig | None = None
) -> Any:
    """The jitted step(state, batch, teacher_params=None) -> (state, metrics). Trace it under `jax.set_mesh(mesh)`.

    The state is donated. A step whose loss or gradient is not finite leaves parameters, moments and the penalty's
    controller as they were and is counted in `skipped` and `skipped_in_a_row`.

    Metrics are device scalars: `loss` (cross-entropy, nats a token), `perplexity`, `lr`, `grad_norm` (before clipping),
    `update_norm`, `param_norm`, `skipped`, `skipped_in_a_row`; with an activation that makes zeros, or with routers,
    `sparsity` [L]; with routers whatever `terms.py` says of the method; with a penalty `penalty` (as added to the
    loss), `penalty_weight` and `penalty_ratio` (penalty / loss); with a teacher `kl` (nats a token).
    """
    shardings = train_state.shardings(config, model_config, mesh)
    teacher_shardings = None if teacher_config is None else model.shardings(teacher_config, mesh)
    return jax.jit(
        make_update(config, model_config, mesh, teacher_config),
        in_shardings=(shardings, batch_sharding(mesh), *([teacher_shardings] if teacher_shardings else [])),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def make_update(
    config: TrainConfig, model_config: LlamaConfig, mesh: Mesh, teacher_config: LlamaConfig | None = None
) -> Any:
    """What `make_step` compiles. Numbers of the method that say so in `jsparse.config` may be traced values."""
    optimizer = make_optimizer(config.optimizer, model_config, config.hold, config.method)
    lr_of = learning_rate(config.optimizer, config.steps)
    weight = penalty_weight(config)
    terms = make_terms(config, model_config, mesh.shape["data"] * mesh.shape["fsdp"])
    shardings = train_state.shardings(config, model_config, mesh)

    def observed_tokens(batch: Any) -> jax.Array:
        """bool [B, T], the tokens whose activations count."""
        if terms.loss_tokens:
            return batch.loss_mask
        return jnp.ones_like(batch.loss_mask) if batch.segments is None else batch.segments > 0

    def micro_loss(params: Params, batch: Any, teacher_params: Any, per_token: Any, *penalised: jax.Array) -> Any:
        forward = functools.partial(model.trunk, tokens=batch.tokens, segments=batch.segments, attend=config.attention)
        probe = terms.probe(observed_tokens(batch)) if terms.probe else None
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
        total = loss.total * per_token if terms.task else jnp.zeros(())
        if terms.penalty is not None:
            total = total + terms.penalty(stats, *penalised)
        return total, (loss, stats)

    def step(state: TrainState, batch: Batch, teacher_params: Params | None = None) -> tuple[TrainState, Metrics]:
        number = state.step + 1
        tokens = jnp.maximum(jnp.sum(batch.loss_mask, dtype=jnp.float32), 1.0)
        observed = jnp.maximum(jnp.sum(observed_tokens(batch), dtype=jnp.float32), 1.0)
        strength = prosparse.penalty_weight(weight, number, state.control)
        penalised = strength, observed, number.astype(jnp.float32) / config.steps
        params = model.cast(state.params, model_config, config.dtype)

        def micro_step(grads: Params, batch: Batch) -> tuple[Params, Any]:
            new, sums = jax.grad(micro_loss, has_aux=True)(params, batch, teacher_params, 1 / tokens, *penalised)
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
        if terms.probe is not None:
            metrics |= terms.observed(stats, observed)
            control = prosparse.update_control(weight, number, control, metrics[terms.controlled])
        added = jnp.zeros(())
        if terms.penalty is not None:
            added = terms.penalty(stats, *penalised)
            metrics |= {"penalty_weight": strength, "penalty": added, "penalty_ratio": added / metrics["loss"]}
        if teacher_params is not None:
            metrics["kl"] = loss.kl / tokens

        good = jnp.isfinite(loss.total / tokens + added) & jnp.isfinite(metrics["grad_norm"])
        done = dataclasses.replace(state, params=optax.apply_updates(state.params, updates), opt_state=opt_state,
                                   control=control, skipped_in_a_row=jnp.zeros_like(state.skipped))  # fmt: skip
        skip = dataclasses.replace(state, skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1)
        state = jax.tree.map(lambda a, b: jnp.where(good, a, b), done, skip)
        state = dataclasses.replace(state, step=number)
        return state, metrics | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}

    return step


def _micro_batches(batch: Batch, accumulate: int, mesh: Mesh) -> Batch:
    """[B, T] -> [accumulate, B / accumulate, T], each device keeping the rows it has."""
    rows = NamedSharding(mesh, P(None, ("data", "fsdp")))

    def split(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(x, rows)

    return jax.tree.map(split, batch)
