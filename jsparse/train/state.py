"""What a run carries from step to step, and where it lives on the mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jsparse import model
from jsparse.config import LlamaConfig, TrainConfig
from jsparse.methods import prosparse
from jsparse.model import Params
from jsparse.train.optimizer import make_optimizer
from jsparse.train.terms import penalty_weight


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
    optimizer = make_optimizer(config.optimizer, model_config, config.hold, config.method)
    out = shardings(config, model_config, mesh)
    init = jax.jit(lambda p: _init(p, optimizer, config), out_shardings=out, donate_argnums=0)
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
        make_optimizer(config.optimizer, model_config, config.hold, config.method),
        lambda moment, sharding: moment if isinstance(moment, optax.MaskedNode) else sharding,  # of other partitions
        shapes.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    rest = jax.tree.map(lambda _: everywhere, shapes)
    return TrainState(rest.step, params, moments, rest.control, rest.skipped, rest.skipped_in_a_row)


def _shapes(config: TrainConfig, model_config: LlamaConfig) -> TrainState:
    optimizer = make_optimizer(config.optimizer, model_config, config.hold, config.method)
    return jax.eval_shape(lambda p: _init(p, optimizer, config), model.abstract(model_config))


def _init(params: Params, optimizer: optax.GradientTransformation, config: TrainConfig) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    control = prosparse.init_control(penalty_weight(config))
    return TrainState(zero, params, optimizer.init(params), control, zero, zero)
