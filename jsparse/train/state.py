"""What a run carries from step to step, and where it lives on the mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jsparse import model
from jsparse.config import Dense, Fixed, LlamaConfig, Method, ProSparse, TrainConfig
from jsparse.methods import prosparse
from jsparse.model import Params
from jsparse.train.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    step: jax.Array  # int32 [], steps done, skipped ones too
    params: Params  # float32 masters
    opt_state: Any  # float32 moments
    control: prosparse.Control  # of the penalty's weight
    skipped: jax.Array  # int32 [], steps skipped in all
    skipped_in_a_row: jax.Array  # int32 [], up to now


def create(params: Params, config: TrainConfig, model_config: LlamaConfig, mesh: Mesh) -> TrainState:
    """The state before step 1, made in place on the shards. Takes over the buffers of `params`."""
    optimizer = make_optimizer(config.optimizer, model_config, config.hold)
    out = shardings(config, model_config, mesh)
    init = jax.jit(lambda p: _init(p, optimizer, config.method), out_shardings=out, donate_argnums=0)
    return init(jax.device_put(params, out.params))


def abstract(config: TrainConfig, model_config: LlamaConfig, mesh: Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings: what a step is compiled for and a checkpoint is read into."""
    shapes = _shapes(config, model_config)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                        shardings(config, model_config, mesh))  # fmt: skip


def shardings(config: TrainConfig, model_config: LlamaConfig, mesh: Mesh) -> TrainState:
    """The state's `NamedSharding`s: moments lie where their parameters lie, scalars everywhere."""
    everywhere = NamedSharding(mesh, P())
    shapes = _shapes(config, model_config)
    params = model.shardings(model_config, mesh)
    moments = optax.tree.map_params(
        make_optimizer(config.optimizer, model_config, config.hold),
        lambda _, sharding: sharding,
        shapes.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    rest = jax.tree.map(lambda _: everywhere, shapes)
    return TrainState(rest.step, params, moments, rest.control, rest.skipped, rest.skipped_in_a_row)


def _shapes(config: TrainConfig, model_config: LlamaConfig) -> TrainState:
    optimizer = make_optimizer(config.optimizer, model_config, config.hold)
    return jax.eval_shape(lambda p: _init(p, optimizer, config.method), model.abstract(model_config))


def _init(params: Params, optimizer: optax.GradientTransformation, method: Method) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), prosparse.init_control(weight(method)), zero, zero)


def weight(method: Method) -> Any:
    """The penalty's weight as configured; without a penalty, a weight fixed at 0."""
    match method:
        case ProSparse(weight=weight):
            return weight
        case Dense():
            return Fixed(0.0)
    raise TypeError(f"no such method: {method!r}")
