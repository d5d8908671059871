"""Mesh, rules and placement; and the same forward pass and gradient on every mesh of eight devices."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jsparse import model, parallel
from jsparse.config import ConfigError, MeshConfig
from tests.helpers import assert_trees_close, random_params, tiny_config, tokens
from tests.kernels import on_newest

pytestmark = pytest.mark.every_jax

CONFIG = tiny_config(vocab_size=64, num_attention_heads=8, num_key_value_heads=4, attention_bias=True, mlp_bias=True)
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "1x1x8": (1, 1, 8), "2x2x2": (2, 2, 2)}
MARKS = on_newest({"1x8x1", "2x2x2"}, MESHES)


def mesh(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return parallel.make_mesh(MeshConfig(data, fsdp, tensor))


# --------------------------------------------------------------------------------------------------------------------
# The mesh
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 2, -1), (1, 2, 4)),
        ((-1, 8, 1), (1, 8, 1)),
        ((2, 4, 1), (2, 4, 1)),
    ],
)
def test_minus_one_takes_what_is_left(sizes, expected):
    made = mesh(*sizes)
    assert made.axis_names == ("data", "fsdp", "tensor") and made.axis_types == (AxisType.Auto,) * 3
    assert tuple(made.shape.values()) == expected


def test_mesh_by_default_is_data_parallel_over_all_devices():
    assert tuple(parallel.make_mesh().shape.values()) == (8, 1, 1)
    assert tuple(parallel.make_mesh(devices=jax.devices()[:2]).shape.values()) == (2, 1, 1)
    assert parallel.single_device_mesh().devices.ravel().tolist() == jax.devices()[:1]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((-1, -1, 1), "mesh: expected at most one axis of -1, got {'data': -1, 'fsdp': -1, 'tensor': 1}"),
        ((0, 1, 1), "mesh: expected positive sizes, or -1, got {'data': 0, 'fsdp': 1, 'tensor': 1}"),
        ((-2, -2, 2), "mesh: expected positive sizes, or -1, got {'data': -2, 'fsdp': -2, 'tensor': 2}"),
        ((3, 1, 1), "mesh: {'data': 3, 'fsdp': 1, 'tensor': 1} does not divide 8 devices"),
        ((-1, 3, 1), "mesh: {'data': -1, 'fsdp': 3, 'tensor': 1} does not divide 8 devices"),
        ((2, 2, 1), "mesh: {'data': 2, 'fsdp': 2, 'tensor': 1} does not divide 8 devices"),
    ],
)
def test_impossible_meshes_are_one_line(sizes, message):
    with pytest.raises(ConfigError) as error:
        mesh(*sizes)
    assert str(error.value) == message


# --------------------------------------------------------------------------------------------------------------------
# Logical axes
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "logical, shape, sizes, expected",
    [
        (P("layers", "embed", "mlp"), (2, 32, 48), (2, 2, 2), P(None, "fsdp", "tensor")),
        (P("vocab", "embed"), (64, 32), (1, 2, 4), P("tensor", "fsdp")),
        (P("vocab", "embed"), (64, 32), (8, 1, 1), P(None, None)),
        (P("batch", "sequence", None), (8, 7, 5), (2, 2, 2), P(("data", "fsdp"), None, None)),
        (P("embed", "heads", "head_dim"), (32, 4, 8), (1, 2, 4), P("fsdp", "tensor", None)),
        (P("embed", "kv_heads", "head_dim"), (32, 4, 8), (1, 2, 4), P("fsdp", "tensor", None)),
        (P("embed", "kv_heads", "head_dim"), (32, 2, 8), (1, 2, 4), P("fsdp", None, None)),  # fewer than shards
        (P("batch", None), (1, 7), (8, 1, 1), P(None, None)),  # of size 1
        (P("norm"), (32,), (1, 2, 4), P(None)),
        (P(), (), (2, 2, 2), P()),
    ],
)
def test_rules(logical, shape, sizes, expected):
    assert parallel.spec(logical, shape, mesh(*sizes)) == expected


@pytest.mark.parametrize(
    "logical, shape, message",
    [
        (P("embed"), (32, 4), "w: expected 1 axes ('embed',), got (32, 4)"),
        (P("embd"), (32,), "w: unknown logical axis 'embd'; known: batch, embed, mlp, blocks, heads, kv_heads, vocab, "
                           "layers, sequence, head_dim, norm"),
        (P("vocab", "embed"), (67, 32), "mesh: w has 67 vocab, which tensor=2 does not divide"),
        (P("batch", "sequence"), (6, 8), "mesh: w has 6 batch, which ('data', 'fsdp')=4 does not divide"),
        (P("heads", "mlp"), (4, 48), "w: expected each mesh axis at most once, got ['tensor', 'tensor']"),
        (P("batch", "embed"), (4, 32), "w: expected each mesh axis at most once, got [('data', 'fsdp'), 'fsdp']"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_one_line(logical, shape, message):
    with pytest.raises(ConfigError) as error:
        parallel.spec(logical, shape, mesh(2, 2, 2), "w")
    assert str(error.value) == message


def test_a_parameter_that_the_mesh_does_not_divide_is_named():
    with pytest.raises(ConfigError) as error:
        model.shardings(tiny_config(vocab_size=64, intermediate_size=46), mesh(1, 2, 4))
    assert str(error.value) == "mesh: layers.ffn.down has 46 mlp, which tensor=4 does not divide"


def test_constrain_pins_to_the_mesh_in_context():
    x = jnp.ones((8, 6, 4))
    assert parallel.constrain(x, "batch", "sequence", "heads") is x
    with jax.set_mesh(parallel.single_device_mesh()):
        assert parallel.constrain(x, "batch", "sequence", "heads") is x
    made = mesh(2, 2, 2)
    with jax.set_mesh(made):
        pinned = jax.jit(lambda x: parallel.constrain(x, "batch", "sequence", "heads"))(x)
        with pytest.raises(ConfigError, match=r"^mesh: activation .* has 6 batch, which .*=4 does not divide$"):
            parallel.constrain(x[:6], "batch", "sequence", "heads")
    assert pinned.sharding.is_equivalent_to(NamedSharding(made, P(("data", "fsdp"), None, "tensor")), 3)


def test_batch_sharding_splits_over_data_and_fsdp():
    x = jax.device_put(jnp.ones((8, 5)), parallel.batch_sharding(mesh(2, 2, 2)))
    assert x.addressable_shards[0].data.shape == (2, 5)


def test_replicated_share_names_what_no_axis_splits():
    def share(*sizes):
        made = mesh(*sizes)
        return parallel.replicated_share(model.abstract(CONFIG), model.shardings(CONFIG, made), made)

    norms = {"layers.attention_norm.scale", "layers.ffn_norm.scale", "norm.scale", "layers.attention.output_bias",
             "layers.ffn.down_bias"}  # fmt: skip
    total = model.count(model.abstract(CONFIG))
    assert share(8, 1, 1) == (0.0, [])  # pure data parallelism replicates on purpose
    got, names = share(2, 2, 2)
    assert set(names) == norms and names[-1] == "norm.scale"  # the smallest comes last
    np.testing.assert_allclose(got, (4 * 2 * 32 + 32) / total)
    got, names = share(1, 1, 8)  # four key-value heads over eight shards stay whole, and they weigh
    key_value = ["layers.attention.value", "layers.attention.key"]
    assert names[:2] == key_value
    assert set(names) == norms | {*key_value, "layers.attention.key_bias", "layers.attention.value_bias"}
    np.testing.assert_allclose(got, (2 * 2 * 32 * 4 * 8 + 2 * 2 * 4 * 8 + 4 * 2 * 32 + 32) / total)


# --------------------------------------------------------------------------------------------------------------------
# The model on meshes
# --------------------------------------------------------------------------------------------------------------------


def loss(params, ids, segments):
    return jnp.mean(jax.nn.logsumexp(model.forward(params, ids, CONFIG, segments=segments).logits, axis=-1) ** 2)


T = 13  # a length that no other axis has


def batch() -> tuple[jax.Array, jax.Array]:
    return tokens(CONFIG, 8, T), jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) // 5, (8, T))


@pytest.fixture(scope="module")
def single_device():
    return jax.jit(jax.value_and_grad(loss))(random_params(CONFIG), *batch())


@pytest.mark.parametrize("sizes", [pytest.param(MESHES[name], id=name, marks=MARKS[name]) for name in MESHES])
def test_forward_and_gradient_equal_the_single_device(sizes, single_device):
    made = mesh(*sizes)
    shardings = model.shardings(CONFIG, made)
    with jax.set_mesh(made):
        params = jax.device_put(random_params(CONFIG), shardings)
        ids, segments = jax.device_put(batch(), parallel.batch_sharding(made))
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings)).lower(params, ids, segments).compile()
        value, gradients = step(params, ids, segments)
    _, fsdp, tensor = sizes
    for tree in (params, gradients):
        assert tree["layers"]["ffn"]["gate"].addressable_shards[0].data.shape == (2, 32 // fsdp, 48 // tensor)
        assert tree["layers"]["attention"]["output"].addressable_shards[0].data.shape == (2, 8 // tensor, 8, 32 // fsdp)
        assert tree["embed"].addressable_shards[0].data.shape == (64 // tensor, 32 // fsdp)
        assert tree["norm"]["scale"].is_fully_replicated
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", step.as_text())
    assert (len(gathered) > 0) == (fsdp > 1 or tensor > CONFIG.num_key_value_heads)
    if tensor <= CONFIG.num_key_value_heads:  # only parameters are gathered, never activations
        assert not any(str(T) in shape.split(",") for shape in gathered)
    expected_value, expected = single_device
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert_trees_close(gradients, expected, rtol=1e-5)


def test_init_makes_the_same_values_in_place():
    made = mesh(2, 2, 2)
    params = model.init(jax.random.key(0), CONFIG, made)
    placed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, model.shardings(CONFIG, made))
    assert all(jax.tree.leaves(placed))
    assert params["layers"]["ffn"]["up"].addressable_shards[0].data.shape == (2, 16, 24)
    jax.tree.map(np.testing.assert_array_equal, params, model.init(jax.random.key(0), CONFIG))


def test_decode_on_a_mesh_equals_the_single_device():
    ids = tokens(CONFIG, 8, 6)
    expected = jax.jit(model.forward, static_argnames="config")(random_params(CONFIG), ids, CONFIG).logits
    made = mesh(2, 2, 2)
    with jax.set_mesh(made):
        params = jax.device_put(random_params(CONFIG), model.shardings(CONFIG, made))
        forward = jax.jit(model.forward, static_argnames="config")
        start = forward(params, ids[:, :5], CONFIG, cache=model.init_cache(params, 8, 6))
        assert start.cache.layers[0].k.addressable_shards[0].data.shape == (2, 6, 2, 8)
        last = forward(params, ids[:, 5:], CONFIG, cache=start.cache)
    np.testing.assert_allclose(np.concatenate([start.logits, last.logits], 1), expected, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Start-up
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment, call",
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"SLURM_NTASKS": "4"}, ()),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ()),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, ()),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "SLURM_NTASKS": "4"},
            ("host:1", 2, 1),
        ),
    ],
)
def test_initialize_joins_only_jobs_of_several_processes(environment, call, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ | environment)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    parallel.initialize()
    assert calls == ([] if call is None else [call])
