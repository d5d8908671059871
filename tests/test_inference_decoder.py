"""The decode form against the model it is packed from, and every way to leave something out against computing it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import model
from jsparse.config import Cats, Cett, ConfigError, FatRelu, Gelu, Relu, Router, ShiftedRelu, Silu
from jsparse.inference import costs, decoder, generate, pack
from jsparse.methods.packing import pack_params
from pallas_kernels.neuron_sparse_ffn import Predictor
from tests.helpers import random_params, tiny_config

pytestmark = pytest.mark.every_jax

PROMPTS = [np.random.default_rng(0).integers(1, 67, size=n).tolist() for n in (9, 14)]
ROUTED = tiny_config(eos_token_id=None, router=Router(8))


def made(config, seed=0):
    """Parameters whose routers and thresholds are random too, and leave about half out."""
    params = random_params(config, seed)
    if config.router is not None:
        params["layers"]["ffn"]["router_threshold"] = jnp.full(2, 0.5)
    if isinstance(config.activation, Cett):
        threshold = params["layers"]["ffn"]["threshold"]
        params["layers"]["ffn"]["threshold"] = jnp.abs(threshold)
    return params


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(attention_bias=True, mlp_bias=True),
        tiny_config(activation=Cett(), tie_word_embeddings=True, num_key_value_heads=4),
        tiny_config(activation=Relu(), router=Router(8)),
        pytest.param(tiny_config(router=Router(16, mode="soft")), marks=pytest.mark.further),
        pytest.param(tiny_config(router=Router(4, mode="oracle")), marks=pytest.mark.further),
        tiny_config(router=Router(8, mode="softmax"), activation=Gelu()),
    ],
)
def test_packed_equals_model(config):
    """A prompt, then a token more, of two rows of which one is padded."""
    params = made(config)
    packed = pack(params, config)
    start = jnp.array([0, 3])
    prompt = jnp.asarray(np.random.default_rng(1).integers(67, size=(2, 8)), jnp.int32)

    @jax.jit
    def theirs(params):
        x, _, cache = model.trunk(params, prompt, config, cache=model.init_cache(params, 2, 12, start))
        y, _, _ = model.trunk(params, prompt[:, :1], config, cache=cache)
        return model.logits(jnp.concatenate([x, y], axis=1), params)

    @jax.jit
    def ours(packed):
        x, cache, _ = decoder.trunk(packed, prompt, config, decoder.empty_cache(packed, 2, 12, start, config))
        y, _ = decoder.step(packed, prompt[:, 0], config, cache)
        x = jnp.concatenate([x, y[:, None]], axis=1)
        return decoder.logits(x.reshape(-1, x.shape[-1]), packed).reshape(2, 9, -1)

    expected, got = theirs(params), ours(packed)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(got[1, 3:], expected[1, 3:], rtol=1e-5, atol=1e-4)


def test_half_precision_keeps_the_routers_own_choice():
    """A router that bfloat16 would round over its threshold names no block, packed as in the model."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), made(ROUTED))
    ffn = params["layers"]["ffn"]
    router = jnp.zeros(ffn["router"].shape, jnp.float32).at[:, 0].set(1.0).at[:, 1].set(-1.0 - 2.0**-10)
    ffn |= {"router": router, "router_threshold": jnp.full(2, 0.499)}
    packed = pack(params, ROUTED)
    x = jnp.zeros((1, ROUTED.hidden_size), jnp.bfloat16).at[:, :2].set(8.0)  # a score of 0.498, rounded 0.5
    np.testing.assert_array_equal(packed.layers[1].ffn.router, router[1].T)
    assert not jnp.any(decoder.dense_ffn(packed.layers[0].ffn, x, ROUTED))
    norm = jnp.full(ROUTED.hidden_size, (2 * 8.0**2 / ROUTED.hidden_size) ** 0.5)  # gives x back
    residual = x.astype(jnp.float32)
    for implementation in ("xla", "triton", "reference"):
        for chosen in (implementation, "dense"):
            y, delta = decoder.ffn_of_step(norm, packed.layers[0].ffn, residual, None, ROUTED, chosen, implementation)
            assert not jnp.any(y - residual if delta is None else y - residual + delta)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(
    "config",
    [
        ROUTED,
        tiny_config(eos_token_id=None, activation=Relu()),
        pytest.param(tiny_config(eos_token_id=None, activation=FatRelu(0.3)), marks=pytest.mark.further),
        pytest.param(tiny_config(eos_token_id=None, activation=Cats(0.2)), marks=pytest.mark.further),
        tiny_config(eos_token_id=None, activation=Cett()),
    ],
    ids=["blocks", "relu", "fatrelu", "cats", "cett"],
)
def test_skipping_gives_the_tokens_of_the_masked_dense_model(config, implementation):
    packed = pack(made(config), config)
    dense = generate(packed, config, PROMPTS, max_new_tokens=12, implementation="dense")
    sparse = generate(packed, config, PROMPTS, max_new_tokens=12, implementation=implementation)
    assert sparse.tokens == dense.tokens and sparse.implementation == implementation
    assert len({token for text in dense.tokens for token in text}) > 4  # not one token over and over


@pytest.mark.parametrize("config", [ROUTED, dataclasses.replace(ROUTED, router=None)], ids=["blocks", "plain"])
def test_dense_streams_through_the_kernels(config):
    """Every block, or those that the router names, by the tiling for most of them: XLA's dense FFN, to rounding."""
    layer = pack(made(config), config).layers[0]
    x, delta = jax.random.normal(jax.random.key(0), (2, 2, config.hidden_size))

    def step(rest):
        y, left = decoder.ffn_of_step(layer.ffn_norm, layer.ffn, x, delta, config, "dense", rest)
        return y if left is None else y + left

    np.testing.assert_allclose(step("triton"), step("xla"), rtol=1e-5, atol=1e-4)


def half_kept(config):
    """Parameters with 2:4 along the neurons, as DaSS prunes."""
    params, keep = made(config), np.arange(48) % 4 < 2
    for name, shape in (("gate", (1, 1, 48)), ("up", (1, 1, 48)), ("down", (1, 48, 1))):
        params["layers"]["ffn"][name] = jnp.where(keep.reshape(shape), params["layers"]["ffn"][name], 0.0)
    return params


def test_packed_matrices_give_the_tokens_of_the_dense_ones():
    config = tiny_config(eos_token_id=None)
    params = half_kept(config)
    packed = pack(pack_params(params), config)
    assert decoder.sparse_kind(packed.layers[0].ffn, config) == "packed"
    assert sum(x.nbytes for x in jax.tree.leaves(packed)) < sum(x.nbytes for x in jax.tree.leaves(pack(params, config)))
    dense = generate(pack(params, config), config, PROMPTS, max_new_tokens=8)
    for implementation in ("sparse", "auto"):
        found = generate(packed, config, PROMPTS, max_new_tokens=8, implementation=implementation)
        assert found.tokens == dense.tokens
    assert found.implementation == "dense"  # on a CPU no kernel makes it faster, so it is unpacked, and that once
    whole = decoder.unpacked(packed)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, pack(params, config))
    again = decoder.unpacked(whole)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True))  # no copies


def test_stacked_and_unstacked_layers_pack_alike():
    params = made(ROUTED)
    for a, b in zip(*(jax.tree.leaves(pack(p, ROUTED)) for p in (params, model.unstack(params))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_predictors_decide_while_decoding():
    """One that names every neuron changes nothing, one that names none takes the FFN away from decoding alone."""
    config = tiny_config(eos_token_id=None, activation=Relu())
    params = made(config)

    def predictors(level):
        d, f = config.hidden_size, config.intermediate_size
        return [Predictor(jnp.ones((4, d)), jnp.ones((f, 4)), jnp.full(f, level))] * 2

    def text(packed, implementation):
        return generate(packed, config, PROMPTS, max_new_tokens=8, implementation=implementation).tokens

    exact = text(pack(params, config), "dense")
    assert text(pack(params, config, predictors(-jnp.inf)), "xla") == exact
    assert text(pack(params, config, predictors(jnp.inf)), "dense") == exact
    without = text(pack(params, config, predictors(jnp.inf)), "xla")
    silenced = params | {"layers": params["layers"] | {"ffn": jax.tree.map(jnp.zeros_like, params["layers"]["ffn"])}}
    assert [t[0] for t in without] == [t[0] for t in exact]  # the prompt's own token
    assert without != exact and without != text(pack(silenced, config), "dense")
    with pytest.raises(ConfigError, match="predictors: expected one, or None, of each of the 2 layers, got 1"):
        pack(params, config, predictors(0.0)[:1])


def test_used_share_is_of_the_union_over_rows():
    packed = pack(made(ROUTED), ROUTED)
    ffn = packed.layers[0].ffn
    x = jax.random.normal(jax.random.key(0), (3, 5, ROUTED.hidden_size))
    real = jnp.ones((3, 5), bool).at[0, :2].set(False).at[:, 0].set(False)
    scores = jax.nn.sigmoid(np.einsum("BTD,ED->BTE", x, ffn.router))
    used = ((scores > 0.5) & real[..., None]).any(axis=0)[1:]
    got = decoder.used_share(ffn, x, ROUTED, real)
    assert 0.5 < got < 1
    np.testing.assert_allclose(got, used.mean(), rtol=1e-6)


def test_padding_does_not_count_in_the_shares():
    config = tiny_config(activation=Relu())
    packed = pack(made(config), config)
    row = jnp.asarray([PROMPTS[0]], jnp.int32)

    @jax.jit
    def shares(tokens, start):
        cache = decoder.empty_cache(packed, 1, tokens.shape[1], start[None], config)
        return decoder.trunk(packed, tokens, config, cache)[2]

    padded = jnp.pad(row, ((0, 0), (4, 0)), constant_values=3)
    np.testing.assert_allclose(shares(padded, jnp.int32(4)), shares(row, jnp.int32(0)), rtol=1e-6)


def test_auto_takes_the_faster_path(monkeypatch):
    packed = pack(made(ROUTED), ROUTED)
    weights = 3 * 32 * 48 * 4
    assert costs.bytes_read(packed.layers[0].ffn, "blocks", 0.5) == weights / 2 + 6 * 32 * 4
    low, high = np.array([0.1, 0.3]), np.array([0.9, 1.0])
    assert costs.choose(packed, ROUTED, 1, low) == "dense"  # nothing is known of a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    lines = {"dense": {1: costs.Line(0.0, 1e3), 4: costs.Line(0.0, 1e3)}, "blocks": {2: costs.Line(5.0, 1e3)}}
    large = {"dense": {1: costs.Line(0.0, 1e9)}, "blocks": {1: costs.Line(1e9, 1e3)}}
    monkeypatch.setattr(costs, "LINES", {weights * 1000: large, weights * 10: lines})  # the nearer size counts
    assert costs.choose(packed, ROUTED, 1, low) == "sparse"
    assert costs.choose(packed, ROUTED, 1, high) == "dense"
    assert costs.choose(packed, ROUTED, 3, low) == "dense"  # more rows than were measured
    plain = tiny_config(activation=Silu())
    assert costs.choose(pack(made(plain), plain), plain, 1, low) == "dense"

    half, ones = pack(pack_params(half_kept(plain)), plain), np.ones(2)
    monkeypatch.setattr(costs, "LINES", {weights: {"dense": lines["dense"], "packed": {1: costs.Line(0.0, 1e3)}}})
    assert costs.choose(half, plain, 1, ones) == "sparse"
    assert costs.choose(half, plain, 2, ones) == "dense"  # packed, more rows were not measured


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        pytest.param(tiny_config(activation=ShiftedRelu()), marks=pytest.mark.further),
        pytest.param(tiny_config(activation=Relu(), mlp_bias=True), marks=pytest.mark.further),
        tiny_config(router=Router(8, mode="soft")),
    ],
)
def test_nothing_to_leave_out(config):
    with pytest.raises(ConfigError, match="implementation: expected auto or dense, as no kernel knows"):
        generate(pack(made(config), config), config, PROMPTS, max_new_tokens=2, implementation="sparse")
    assert generate(made(config), config, PROMPTS, max_new_tokens=2).implementation == "dense"


def test_bfloat16_keeps_the_residual_stream_in_float32():
    config = dataclasses.replace(ROUTED, router=None)
    params = made(config)
    exact = _hidden(pack(params, config), config)
    half = _hidden(pack(model.cast(params, config, "bfloat16"), config), config)
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half, np.float32) - exact)
    assert error.mean() < 0.02 * np.abs(exact).mean()


def _hidden(packed, config):
    tokens = jnp.asarray([PROMPTS[0]], jnp.int32)
    cache = decoder.empty_cache(packed, 1, tokens.shape[1], jnp.zeros(1, jnp.int32), config)
    return decoder.trunk(packed, tokens, config, cache)[0]
