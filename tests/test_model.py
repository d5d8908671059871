"""The model against transformers' `LlamaForCausalLM` (float32, eager attention), and against itself where two ways of
computing must agree: alone and packed, at once and token by token, stacked and unstacked, narrow and zero-filled."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jsparse import model
from jsparse.config import (
    Cats,
    Cett,
    ConfigError,
    DefaultRope,
    DynamicRope,
    FatRelu,
    Gelu,
    LinearRope,
    Llama3Rope,
    LlamaConfig,
    LongRope,
    Relu,
    ShiftedRelu,
    YarnRope,
)
from jsparse.model import modules
from tests.helpers import (
    assert_trees_close,
    from_torch,
    random_params,
    tiny_config,
    tokens,
    torch_gradients,
    torch_model,
)

pytestmark = pytest.mark.every_jax

T = 24  # beyond the original context of 16 that the scaled rotary embeddings below have
YARN = YarnRope(factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.1)
LONG = LongRope((1.0, 1.1, 1.3, 1.5), (1.5, 2.0, 3.0, 4.0), original_max_position_embeddings=16)
VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 16},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "norm_eps": {"rms_norm_eps": 0.1},
    "theta": {"rope": DefaultRope(theta=500_000.0)},
    "linear": {"rope": LinearRope(factor=4.0), "max_position_embeddings": 16},
    "dynamic": {"rope": DynamicRope(factor=4.0), "max_position_embeddings": 16},
    "llama3": {"rope": Llama3Rope(8.0, low_freq_factor=0.2, high_freq_factor=4.0, original_max_position_embeddings=16)},
    "yarn": {"rope": YARN},
    "yarn_attention": {"rope": dataclasses.replace(YARN, attention_factor=0.7)},
    "yarn_mscale": {"rope": dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=1.3)},
    "yarn_untruncated": {"rope": dataclasses.replace(YARN, truncate=False), "head_dim": 16},
    "longrope": {"rope": LONG},
    "longrope_attention": {"rope": dataclasses.replace(LONG, attention_factor=1.3)},
    "longrope_within": {"rope": dataclasses.replace(LONG, original_max_position_embeddings=32)},
    "gelu": {"activation": Gelu()},
    "gelu_tanh": {"activation": Gelu(approximate=True)},
    "relu": {"activation": Relu()},
    "everything": {"tie_word_embeddings": True, "head_dim": 16, "attention_bias": True, "mlp_bias": True,
                   "rope": YARN, "activation": Relu(), "num_hidden_layers": 3},
}  # fmt: skip

STATIC = ("config", "probe", "remat", "attend")
forward = jax.jit(model.forward, static_argnames=STATIC)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the labels that are not -100; the logits at t predict the label at t + 1."""
    logp = jax.nn.log_softmax(logits[:, :-1])
    counts = labels[:, 1:] != -100
    picked = jnp.take_along_axis(logp, jnp.where(counts, labels[:, 1:], 0)[..., None], axis=-1)[..., 0]
    return -jnp.mean(picked, where=counts)


def loss_and_gradients(params, tokens, labels, config, **options):
    def loss(params):
        output = model.forward(params, tokens, config, **options)
        return cross_entropy(output.logits, labels), output.logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return value, logits, gradients


jitted_loss_and_gradients = jax.jit(loss_and_gradients, static_argnames=STATIC)


def torch_loss_and_gradients(reference, config, tokens, labels, **options):
    """PyTorch's loss, logits and gradients, the last in our tree."""
    import torch

    as_tensor = lambda x: torch.tensor(np.asarray(x), dtype=torch.long)
    options = {k: as_tensor(v) for k, v in options.items()}
    output = reference(as_tensor(tokens), labels=as_tensor(labels), use_cache=False, **options)
    reference.zero_grad()
    output.loss.backward()
    return output.loss.item(), output.logits.detach().numpy(), torch_gradients(reference, config)


# --------------------------------------------------------------------------------------------------------------------
# Against PyTorch
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_loss_and_every_gradient_equal_pytorch(changes):
    config = tiny_config(**changes)
    reference = torch_model(config)
    params = from_torch(reference.state_dict(), config)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, model.abstract(config))
    ids = tokens(config, 2, T)
    # Op by op: the variants share most ops, while each would have to be compiled for itself.
    loss, logits, gradients = loss_and_gradients(model.unstack(params), ids, ids, config)
    gradients = model.stack(gradients)
    expected_loss, expected_logits, expected_gradients = torch_loss_and_gradients(reference, config, ids, ids)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_trees_close(gradients, expected_gradients, rtol=1e-4)


def test_abstract_trees_are_the_callers_own():
    config = tiny_config()
    del model.abstract(config)["layers"]["ffn"]["gate"]
    assert model.abstract(config)["layers"]["ffn"]["gate"].shape == (2, 32, 48)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_pytorch(side):
    config = tiny_config()
    reference = torch_model(config)
    lengths = np.array([[T], [17], [9]])
    real = np.arange(T) < lengths if side == "right" else np.arange(T) >= T - lengths
    ids = tokens(config, 3, T)
    first = real & (np.cumsum(real, axis=1) == 1)  # nothing but padding predicts a text's first token
    labels = jnp.where(real & ~first, ids, -100)
    segments = jnp.asarray(real, jnp.int32)
    params = from_torch(reference.state_dict(), config)
    loss, logits, gradients = jitted_loss_and_gradients(params, ids, labels, config, segments=segments)
    expected_loss, expected_logits, expected_gradients = torch_loss_and_gradients(
        reference, config, ids, labels, attention_mask=real, position_ids=np.maximum(np.cumsum(real, axis=1) - 1, 0)
    )
    np.testing.assert_allclose(np.asarray(logits)[real], expected_logits[real], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_trees_close(gradients, expected_gradients, rtol=1e-4)


DOCUMENTS = ((9, 11, 4), (24,), (5, 14, 5))  # lengths that fill rows of T
SEGMENTS = jnp.asarray([np.repeat(np.arange(1, len(row) + 1), row) for row in DOCUMENTS], jnp.int32)
RESTARTING = jnp.asarray([np.concatenate([np.arange(n) for n in row]) for row in DOCUMENTS], jnp.int32)


def test_packed_documents_equal_pytorch():
    """transformers finds the documents of a row by the positions that restart."""
    config = tiny_config()
    reference = torch_model(config)
    ids = tokens(config, 3, T)
    params = from_torch(reference.state_dict(), config)
    loss, logits, gradients = jitted_loss_and_gradients(params, ids, ids, config, segments=SEGMENTS)
    expected_loss, expected_logits, expected = torch_loss_and_gradients(
        reference, config, ids, ids, position_ids=RESTARTING
    )
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert_trees_close(gradients, expected, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Documents and positions
# --------------------------------------------------------------------------------------------------------------------


def test_packed_documents_equal_each_alone():
    config = tiny_config()
    params, ids = random_params(config), tokens(config, 3, T)
    packed = forward(params, ids, config, segments=SEGMENTS).logits
    for row, start, end in ((0, 0, 9), (0, 9, 20), (0, 20, 24), (1, 0, 24)):
        alone = forward(params, ids[row : row + 1, start:end], config).logits
        np.testing.assert_allclose(packed[row : row + 1, start:end], alone, rtol=0, atol=1e-5)


def test_a_documents_loss_does_not_reach_another_document():
    config = tiny_config()
    ids = jnp.arange(T, dtype=jnp.int32)[None]  # every position has an embedding of its own
    ids = jnp.concatenate([ids, 0 * ids, 0 * ids])
    second = (SEGMENTS == 2).at[1:].set(False)
    after_first = second & jnp.roll(second, 1)  # the label at t is what t - 1 predicts
    labels = jnp.where(after_first, ids, -100)
    _, _, gradients = jitted_loss_and_gradients(random_params(config), ids, labels, config, segments=SEGMENTS)
    reached = np.abs(gradients["embed"][1:T]).max(axis=1) > 0  # token 0 fills the other rows
    np.testing.assert_array_equal(reached, second[0, 1:] & (np.arange(1, T) < 19))  # the last token predicts nothing


def test_positions_default_to_the_count_from_each_start():
    config = tiny_config()
    params, ids = random_params(config), tokens(config, 3, T)
    steps = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (3, T))
    plain = forward(params, ids, config, positions=steps).logits
    np.testing.assert_array_equal(plain, forward(params, ids, config).logits)
    explicit = forward(params, ids, config, segments=SEGMENTS, positions=RESTARTING).logits
    np.testing.assert_array_equal(explicit, forward(params, ids, config, segments=SEGMENTS).logits)
    assert np.abs(forward(params, ids, config, positions=2 * steps).logits - plain).max() > 0.1  # positions matter


# --------------------------------------------------------------------------------------------------------------------
# Decoding with a cache
# --------------------------------------------------------------------------------------------------------------------


def decoded(params, ids, config, chunks, start=None) -> np.ndarray:
    """Logits of every token, fed to a cache with room to spare in chunks of the given sizes."""
    cache = model.init_cache(params, ids.shape[0], ids.shape[1] + 3, start)
    found = []
    for size in chunks:
        done = sum(x.shape[1] for x in found)
        output = forward(params, ids[:, done : done + size], config, cache=cache)
        cache = output.cache
        found.append(output.logits)
    assert int(cache.length) == ids.shape[1]
    return np.concatenate(found, axis=1)


ONE_BY_ONE = (1,) * 10
CHUNKED = (4, 4, 1, 1)


@pytest.mark.parametrize("length", [20, 34])
def test_causal_attention_by_stretches(monkeypatch, length):
    """What a CPU does with long sequences, stretch by stretch, the last one shorter: values and gradients. Of 34 tokens
    the stretches are longer than asked for, as there are 16 at most."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, length, heads, 4)) for i, heads in enumerate((4, 2, 2)))

    def whole(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=0.3)

    def loss(attend):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v))), argnums=(0, 1, 2)))

    monkeypatch.setattr(modules, "_STRETCH", 8 if length == 20 else 2)
    with jax.numpy_dtype_promotion("standard"):
        got, expected = loss(lambda *x: modules._causal_by_stretches(*x, 0.3))(q, k, v), loss(whole)(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


@pytest.mark.parametrize("chunks", [ONE_BY_ONE, CHUNKED], ids=["one_by_one", "chunked"])
@pytest.mark.parametrize("form", ["stacked", "unstacked"])
def test_decode_equals_full_forward(form, chunks):
    config = tiny_config()
    params, ids = random_params(config), tokens(config, 3, 10)
    full = forward(params, ids, config).logits
    params = model.unstack(params) if form == "unstacked" else params
    np.testing.assert_allclose(decoded(params, ids, config, chunks), full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunks", [ONE_BY_ONE, CHUNKED], ids=["one_by_one", "chunked"])
@pytest.mark.parametrize("rope", [DefaultRope(), DynamicRope(factor=4.0)], ids=["default", "dynamic"])
def test_decode_of_unequal_prompts_equals_full_forward(rope, chunks):
    """Row b is left-padded by start[b]; a whole chunk of a row may be padding. Also where keys are rotated late."""
    config = tiny_config(rope=rope)
    params, ids = model.unstack(random_params(config)), tokens(config, 3, 10)
    start = jnp.array([0, 3, 6], jnp.int32)
    steps = decoded(params, ids, config, chunks, start)
    real = np.arange(10) >= np.asarray(start)[:, None]
    full = forward(params, ids, config, segments=jnp.asarray(real, jnp.int32)).logits
    assert np.isfinite(steps).all()
    np.testing.assert_allclose(steps[real], full[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama3", "yarn_attention"])
def test_decode_equals_full_forward_beyond_the_context(name):
    config = tiny_config(**VARIANTS[name])
    params, ids = model.unstack(random_params(config)), tokens(config, 1, 20)
    full = forward(params, ids, config).logits
    np.testing.assert_allclose(decoded(params, ids, config, (15, 1, 1, 1, 1, 1)), full, rtol=0, atol=1e-5)


def test_longrope_decode_equals_full_forward_once_the_prompt_is_long():
    """The long factors then hold for every step, as they do for the full forward."""
    config = tiny_config(**VARIANTS["longrope"])
    params, ids = model.unstack(random_params(config)), tokens(config, 2, 20)
    full = forward(params, ids, config).logits
    np.testing.assert_allclose(decoded(params, ids, config, (17, 1, 1, 1)), full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_one_layer_decodes_exactly_across_the_context(name):
    """Where frequencies follow the length, decode rotates every cached key by the current ones, so that one layer
    equals the full forward at its last token; deeper layers' cached keys come from hidden states that saw shorter
    lengths, and equal it only approximately."""
    config = tiny_config(**VARIANTS[name], num_hidden_layers=1)
    params, ids = model.unstack(random_params(config)), tokens(config, 1, 20)
    steps = decoded(params, ids, config, (15, 1, 1, 1, 1, 1))
    for length in (16, 17, 20):
        full = forward(params, ids[:, :length], config).logits
        np.testing.assert_allclose(steps[:, length - 1], full[:, -1], rtol=0, atol=1e-5)


def test_forward_refuses_what_does_not_fit():
    config = tiny_config(**VARIANTS["dynamic"])
    params, ids = random_params(config), tokens(config, 1, 6)
    cache = model.init_cache(params, 1, 5)
    with pytest.raises(ConfigError, match=r"tokens: expected ids \[B, T\], got 'shape \(3,\)'"):
        model.forward(params, jnp.zeros(3, jnp.int32), config)
    with pytest.raises(ConfigError, match="cache: expected slots for 6 tokens, got 5"):
        model.forward(params, ids, config, cache=cache)
    with pytest.raises(ConfigError, match="segments: expected none with a cache"):
        model.forward(params, ids[:, :5], config, cache=cache, segments=jnp.ones((1, 5), jnp.int32))
    with pytest.raises(ConfigError, match="positions: expected none with a cache whose keys are rotated late"):
        model.forward(params, ids[:, :5], config, cache=cache, positions=jnp.ones((1, 5), jnp.int32))


# --------------------------------------------------------------------------------------------------------------------
# Forms of the tree, rematerialisation, probes
# --------------------------------------------------------------------------------------------------------------------


def dots(jaxpr) -> int:
    """Matrix products in a jaxpr, those of inner jaxprs included."""
    return sum(1 for e in equations(jaxpr) if e.primitive.name == "dot_general")


def equations(jaxpr):
    for e in jaxpr.eqns:
        yield e
        for inner in jaxprs_in_params(e.params):
            yield from equations(inner)


def test_remat_policies_agree():
    config = tiny_config()
    params, ids = random_params(config), tokens(config, 2, T)
    listed = model.unstack(params)
    _, _, expected = loss_and_gradients(listed, ids, ids, config)
    for remat in ("dots", "attention", "full"):
        _, _, gradients = loss_and_gradients(listed, ids, ids, config, remat=remat)
        assert_trees_close(gradients, expected, rtol=1e-5)
    _, _, gradients = jitted_loss_and_gradients(params, ids, ids, config, remat="dots")
    assert_trees_close(gradients, model.stack(expected), rtol=1e-5)


@pytest.mark.parametrize("form", [model.stack, model.unstack])
def test_remat_policies_recompute_more_and_more(form):
    config = tiny_config()
    params, ids = form(random_params(config)), tokens(config, 2, 8)
    products = []
    for remat in ("none", "dots", "attention", "full"):
        gradient = functools.partial(loss_and_gradients, config=config, remat=remat)
        products.append(dots(jax.make_jaxpr(gradient)(params, ids, ids).jaxpr))
    assert products == sorted(set(products)), f"none, dots, attention, full compute {products} products"


@pytest.mark.parametrize("changes", [{}, VARIANTS["everything"]], ids=["default", "everything"])
def test_unstacked_equals_stacked(changes):
    config = tiny_config(**changes)
    params, ids = random_params(config), tokens(config, 2, 8)
    listed = model.unstack(params)
    assert len(listed["layers"]) == config.num_hidden_layers
    jax.tree.map(np.testing.assert_array_equal, model.stack(listed), params)
    assert model.unstack(listed) is listed and model.stack(params) is params
    logits = forward(params, ids, config).logits
    np.testing.assert_allclose(forward(listed, ids, config).logits, logits, rtol=0, atol=1e-5)
    unrolled = jax.jit(functools.partial(model.trunk, config=config, unroll=2))(params, ids)[0]
    np.testing.assert_allclose(model.logits(unrolled, params), logits, rtol=0, atol=1e-5)


def trace(t: model.FFNTrace) -> Any:
    return {"zeros": jnp.mean(t.hidden == 0), "trace": t}


def test_probe_sees_every_layers_ffn():
    config = tiny_config(activation=Relu(), mlp_bias=True)
    params, ids = random_params(config), tokens(config, 2, 8)
    aux = forward(params, ids, config, probe=trace).aux
    assert aux["zeros"].shape == (2,) and 0.3 < aux["zeros"].min() < aux["zeros"].max() < 0.7
    seen, ffn = aux["trace"], params["layers"]["ffn"]
    assert seen.x.shape == seen.output.shape == (2, 2, 8, 32) and seen.gate.shape == seen.hidden.shape == (2, 2, 8, 48)
    jax.tree.map(np.testing.assert_array_equal, seen.params, ffn)
    gate = np.einsum("LBTD,LDF->LBTF", seen.x, ffn["gate"]) + np.asarray(ffn["gate_bias"])[:, None, None]
    up = np.einsum("LBTD,LDF->LBTF", seen.x, ffn["up"]) + np.asarray(ffn["up_bias"])[:, None, None]
    np.testing.assert_allclose(seen.gate, gate, atol=1e-5)
    np.testing.assert_allclose(seen.hidden, np.maximum(gate, 0) * up, atol=1e-5)
    output = np.einsum("LBTF,LFD->LBTD", seen.hidden, ffn["down"]) + np.asarray(ffn["down_bias"])[:, None, None]
    np.testing.assert_allclose(seen.output, output, atol=1e-4)

    by_layer = forward(model.unstack(params), ids, config, probe=trace).aux
    assert isinstance(by_layer, list) and len(by_layer) == 2
    assert_trees_close(jax.tree.map(lambda *x: jnp.stack(x), *by_layer), aux, rtol=1e-4)
    cached = forward(params, ids, config, probe=trace, cache=model.init_cache(params, 2, 8)).aux
    assert_trees_close(cached, aux, rtol=1e-4)
    assert forward(params, ids, config).aux is None


# --------------------------------------------------------------------------------------------------------------------
# Layers of different widths
# --------------------------------------------------------------------------------------------------------------------

KEPT = [(slice(0, 30), slice(0, 1)), (slice(5, 48), slice(0, 2)), (slice(40, 48), slice(1, 2))]  # neurons, kv heads


def narrow_and_zero_filled(config: LlamaConfig) -> tuple[model.Params, model.Params]:
    """The same subnet twice: with layers of their own widths, and at full width with zeros."""
    group = config.num_attention_heads // config.num_key_value_heads
    full = model.unstack(random_params(config))
    narrow, filled = [], []
    for layer, (neurons, kv) in zip(full["layers"], KEPT, strict=True):
        heads = slice(group * kv.start, group * kv.stop)
        a, f = layer["attention"], layer["ffn"]
        zeroed = {"output": jnp.zeros_like(a["output"]).at[heads].set(a["output"][heads])}
        filled.append(
            layer
            | {"attention": a | zeroed}
            | {"ffn": f | {"down": jnp.zeros_like(f["down"]).at[neurons].set(f["down"][neurons])}}
        )
        cut = {"query": a["query"][:, heads], "key": a["key"][:, kv], "value": a["value"][:, kv],
               "output": a["output"][heads]}  # fmt: skip
        cut_ffn = {"gate": f["gate"][:, neurons], "up": f["up"][:, neurons], "down": f["down"][neurons]}
        narrow.append(layer | {"attention": cut, "ffn": cut_ffn})
    return full | {"layers": narrow}, full | {"layers": filled}


def test_layers_of_different_widths_equal_their_zero_filled_selves():
    config = tiny_config(num_hidden_layers=3)
    narrow, filled = narrow_and_zero_filled(config)
    ids = tokens(config, 2, 8)
    assert model.count(narrow) < model.count(filled)
    expected = forward(filled, ids, config).logits
    np.testing.assert_allclose(forward(narrow, ids, config).logits, expected, rtol=0, atol=1e-5)
    gradients = jax.eval_shape(functools.partial(loss_and_gradients, config=config), narrow, ids, ids)[2]
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, narrow)
    np.testing.assert_allclose(decoded(narrow, ids, config, (7, 1)), expected, rtol=0, atol=1e-5)
    widths = jax.eval_shape(functools.partial(model.forward, config=config, probe=lambda t: t.hidden), narrow, ids).aux
    assert [x.shape for x in widths] == [(2, 8, 30), (2, 8, 43), (2, 8, 8)]
    half = model.cast(narrow, config, jnp.bfloat16)
    assert half["layers"][2]["ffn"]["gate"].dtype == jnp.bfloat16
    assert half["layers"][2]["ffn_norm"]["scale"].dtype == jnp.float32


# --------------------------------------------------------------------------------------------------------------------
# Activations that PyTorch's LLaMA lacks
# --------------------------------------------------------------------------------------------------------------------


def test_activations_by_their_definitions():
    gate = jnp.array([-1.0, -0.1, 0.0, 0.05, 0.1, 0.2, 3.0])
    np.testing.assert_allclose(model.activate(ShiftedRelu(0.1), gate), [0, 0, 0, 0, 0, 0.1, 2.9], atol=1e-7)
    np.testing.assert_allclose(model.activate(ShiftedRelu(0.1, 0.2), gate), [0, 0, 0, 0, 0, 0, 2.9], atol=1e-7)
    np.testing.assert_allclose(model.activate(FatRelu(0.1), gate), [0, 0, 0, 0, 0.1, 0.2, 3.0])
    np.testing.assert_allclose(model.activate(FatRelu(0.0), gate), model.activate(Relu(), gate))
    np.testing.assert_allclose(model.activate(Cett(), gate), model.activate(Relu(), gate))
    silu = gate / (1 + np.exp(-gate))
    expected = np.where(np.abs(silu) >= 0.06, silu, 0)
    np.testing.assert_allclose(model.activate(Cats(0.06), gate), expected, atol=1e-7)
    assert expected.astype(bool).tolist() == [True, False, False, False, False, True, True]  # by magnitude
    with pytest.raises(TypeError, match="no such activation"):
        model.activate("relu", gate)


def test_fatrelu_compares_in_float32():
    """bfloat16 rounds 0.01 up to 0.01001, which must not drop the gates between."""
    gate = jnp.array([0.00994873046875, 0.010009765625], jnp.bfloat16)
    got = model.activate(FatRelu(0.01), gate)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), [0.0, 0.010009765625])


def test_a_threshold_may_be_traced():
    config = tiny_config(activation=Relu())
    params, ids = random_params(config), tokens(config, 1, 8)

    @jax.jit
    def at(threshold):
        fat = dataclasses.replace(config, activation=FatRelu(threshold))
        return model.forward(params, ids, fat, probe=lambda t: jnp.mean(t.hidden == 0))

    np.testing.assert_allclose(at(0.0).logits, forward(params, ids, config).logits, atol=1e-5)
    zeros = [at(x).aux.mean() for x in (0.0, 0.5, 2.0)]
    assert zeros == sorted(zeros) and zeros[0] < zeros[1] < zeros[2]
    assert at._cache_size() == 1


def test_cett_drops_neurons_below_their_own_threshold():
    relu, cett = tiny_config(activation=Relu()), tiny_config(activation=Cett())
    params, ids = random_params(relu), tokens(relu, 1, 8)
    assert jax.tree.structure(model.abstract(cett)) == jax.tree.structure(model.islands(cett))
    hidden = lambda t: t.hidden
    everything = forward(params, ids, relu, probe=hidden).aux

    def at(thresholds):
        ffn = params["layers"]["ffn"] | {"threshold": thresholds}
        return forward(params | {"layers": params["layers"] | {"ffn": ffn}}, ids, cett, probe=hidden).aux

    np.testing.assert_array_equal(at(jnp.zeros((2, 48))), everything)
    thresholds = jnp.zeros((2, 48)).at[0, :24].set(0.3)
    expected = np.where(np.abs(everything[0]) >= np.asarray(thresholds[0]), everything[0], 0)
    got = at(thresholds)[0]
    np.testing.assert_array_equal(got, expected)
    assert (got[..., :24] == 0).mean() > (everything[0][..., :24] == 0).mean() + 0.1


# --------------------------------------------------------------------------------------------------------------------
# Precision
# --------------------------------------------------------------------------------------------------------------------


def test_bfloat16_keeps_float32_islands():
    config = tiny_config(activation=Cett())
    params = model.cast(random_params(config), config, jnp.bfloat16)
    kept = {p for p, x in jax.tree_util.tree_leaves_with_path(params) if x.dtype == jnp.float32}
    names = sorted(jax.tree_util.keystr(p, simple=True, separator=".") for p in kept)
    assert names == ["layers.attention_norm.scale", "layers.ffn.threshold", "layers.ffn_norm.scale", "norm.scale"]

    ids = tokens(config, 1, 8)
    hidden, _, _ = model.trunk(params, ids, config)
    assert hidden.dtype == jnp.bfloat16
    assert model.forward(params, ids, config).logits.dtype == jnp.float32
    assert model.init_cache(params, 1, 8).layers[0].k.dtype == jnp.bfloat16
    jaxpr = jax.make_jaxpr(functools.partial(model.forward, config=config))(params, ids).jaxpr
    islands = [e for e in equations(jaxpr) if e.primitive.name in ("rsqrt", "exp", "cos", "sin", "reduce_sum")]
    assert {e.primitive.name for e in islands} == {"rsqrt", "exp", "cos", "sin", "reduce_sum"}
    assert {e.invars[0].aval.dtype for e in islands} == {jnp.dtype(jnp.float32)}
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert {x.aval.dtype for e in products for x in e.invars} == {jnp.dtype(jnp.bfloat16)}


def test_bfloat16_stays_close_to_float32():
    config = tiny_config()
    params, ids = random_params(config), tokens(config, 3, T)
    half = model.cast(params, config, jnp.bfloat16)
    exact = forward(jax.tree.map(lambda x: x.astype(jnp.float32), half), ids, config).logits
    error = np.std(forward(half, ids, config).logits - exact) / np.std(exact)
    assert 1e-5 < error < 0.03
    with jax.numpy_dtype_promotion("standard"):  # lowering attention's backward pass promotes within jax
        value, _, gradients = jitted_loss_and_gradients(half, ids, ids, config)
    assert np.isfinite(value) and all(np.isfinite(x.astype(jnp.float32)).all() for x in jax.tree.leaves(gradients))
    assert jax.tree.map(lambda x: x.dtype, gradients) == jax.tree.map(lambda x: x.dtype, half)


# --------------------------------------------------------------------------------------------------------------------
# The declaration: shapes, counts, initial values
# --------------------------------------------------------------------------------------------------------------------

SIZES = {  # published parameter counts
    "llama-1-7b": (LlamaConfig(max_position_embeddings=2048, rms_norm_eps=1e-6), 6_738_415_616),
    "llama-2-13b": (
        LlamaConfig(hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40, num_attention_heads=40,
                    num_key_value_heads=40),
        13_015_864_320,
    ),
    "llama-2-70b": (
        LlamaConfig(hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
                    num_key_value_heads=8),
        68_976_648_192,
    ),
    "llama-3-8b": (
        LlamaConfig(vocab_size=128_256, intermediate_size=14_336, num_key_value_heads=8),
        8_030_261_248,
    ),
    "smollm2-135m": (
        LlamaConfig(vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                    num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True),
        134_515_008,
    ),
}  # fmt: skip


@pytest.mark.parametrize("config, published", SIZES.values(), ids=SIZES)
def test_abstract_trees_of_any_size_count_as_published(config, published):
    d, f, v, h = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    by_hand = config.num_hidden_layers * (d * h * heads + 3 * d * f + 2 * d) + d + v * d
    by_hand += 0 if config.tie_word_embeddings else v * d
    assert model.count(model.abstract(config)) == by_hand == published
    half = model.abstract(config, jnp.bfloat16)
    assert half["embed"].dtype == jnp.bfloat16 and half["norm"]["scale"].dtype == jnp.float32


def test_axes_name_every_dimension():
    config = tiny_config(attention_bias=True, mlp_bias=True, activation=Cett())
    ranks = jax.tree.map(lambda x: x.ndim, model.abstract(config))
    named = jax.tree.map(len, model.logical_axes(config), is_leaf=lambda x: not isinstance(x, dict))
    assert named == ranks
    sizes = {"layers": 2, "embed": 32, "norm": 32, "mlp": 48, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 67}
    axes = jax.tree.leaves(model.logical_axes(config), is_leaf=lambda x: not isinstance(x, dict))
    for names, x in zip(axes, jax.tree.leaves(model.abstract(config)), strict=True):
        assert tuple(sizes[name] for name in names) == x.shape


def test_initial_values():
    config = tiny_config(hidden_size=128, intermediate_size=256, vocab_size=500, head_dim=32, attention_bias=True,
                         mlp_bias=True, initializer_range=0.03)  # fmt: skip
    params = model.init(jax.random.key(0), config)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.abstract(config))
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert x.dtype == jnp.float32
        if "norm" in name:
            np.testing.assert_array_equal(x, 1)
        elif "bias" in name:
            np.testing.assert_array_equal(x, 0)
        else:
            np.testing.assert_allclose((x.std(), x.mean()), (0.03, 0), rtol=0.03, atol=1e-3, err_msg=name)
    weights = [w for w in jax.tree.leaves(params) if w.std() > 0]
    weights += [w[1] for w in jax.tree.leaves(params["layers"]) if w.std() > 0]
    starts = np.array([w.ravel()[:4] for w in weights])
    assert len(np.unique(starts, axis=0)) == len(starts)  # no two matrices, nor two layers, are the same draw
    again = model.init(jax.random.key(0), config)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert np.abs(model.init(jax.random.key(1), config)["embed"] - params["embed"]).max() > 0.01
