"""Block routing in the model: every mode against a plain formula, what it must leave alone, and where it may not go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import hf, model, parallel
from jsparse.config import ConfigError, MeshConfig, Router
from jsparse.inference import evaluate, generate
from jsparse.model import routing
from tests.helpers import assert_trees_close, random_params, tiny_config, tokens

pytestmark = pytest.mark.every_jax

DENSE = tiny_config(vocab_size=64)  # F = 48
IDS = tokens(DENSE, 2, 9)
forward = jax.jit(model.forward, static_argnames="config")


def routed(mode: str, threshold: float = 0.5, size: int = 8, seed: int = 0):
    """A model whose routers are random, and its dense twin's parameters."""
    config = dataclasses.replace(DENSE, router=Router(size, mode))  # type: ignore[arg-type]
    params = random_params(config, seed)
    ffn = params["layers"]["ffn"]
    ffn["router_threshold"] = jnp.full_like(ffn["router_threshold"], threshold)
    dense = {name: x for name, x in ffn.items() if not name.startswith("router")}
    return config, params, params | {"layers": params["layers"] | {"ffn": dense}}


def plain_ffn(trace, factors, size):
    """The layer's output with its hidden units times factors, computed from what the probe saw."""
    hidden = jax.nn.silu(trace.gate) * jnp.einsum("BTD,DF->BTF", trace.x, trace.params["up"])
    return jnp.einsum("BTF,FD->BTD", hidden * jnp.repeat(factors, size, axis=-1), trace.params["down"])


def top(scores, count):
    """Factors 1 at the `count` largest of scores [B, T, E]."""
    found = np.zeros(scores.shape, np.float32)
    np.put_along_axis(found, np.argsort(-np.asarray(scores), axis=-1, kind="stable")[..., :count], 1.0, axis=-1)
    return jnp.asarray(found)


def expected_factors(mode, trace, logits):
    hidden = jax.nn.silu(trace.gate) * jnp.einsum("BTD,DF->BTF", trace.x, trace.params["up"])
    sums = jnp.sum(jnp.abs(hidden).reshape(*hidden.shape[:2], 6, 8), axis=-1)
    match mode:
        case "off":
            return jnp.ones_like(logits)
        case "soft":
            return 1 / (1 + jnp.exp(-logits))
        case "hard":
            return (1 / (1 + jnp.exp(-logits)) > 0.4).astype(jnp.float32)
        case "top":
            return top(logits, 4)  # drops round(0.4 * 6) = 2 of 6 blocks
        case "oracle":
            return top(sums, 4)
        case "softmax":
            kept = top(logits, 4) * jnp.exp(logits)
            return 4 * kept / jnp.sum(kept, axis=-1, keepdims=True)


@pytest.mark.parametrize("mode", ["off", "soft", "hard", "top", "oracle", "softmax"])
def test_equals_plain_formula(mode):
    config, params, _ = routed(mode, 0.4)
    seen = []
    model.trunk(model.unstack(params), IDS, config, probe=seen.append)
    for trace in seen:
        logits = trace.logits
        if mode != "oracle":
            logits = jnp.einsum("BTD,DE->BTE", trace.x, trace.params["router"])
            np.testing.assert_allclose(trace.logits, logits, rtol=1e-5, atol=1e-5)
        factors = expected_factors(mode, trace, logits)
        np.testing.assert_allclose(trace.factors, factors, atol=1e-5)
        np.testing.assert_allclose(trace.output, plain_ffn(trace, factors, 8), rtol=1e-4, atol=1e-5)
        if mode not in ("off", "soft"):
            assert np.any(trace.factors == 0) and np.any(trace.hidden == 0)


@pytest.mark.parametrize("mode, threshold", [("off", 0.5), ("hard", -1.0), ("top", 0.0), ("oracle", 0.0)])
def test_all_blocks_on_is_the_dense_model(mode, threshold):
    config, params, dense = routed(mode, threshold)
    np.testing.assert_array_equal(forward(params, IDS, config).logits, forward(dense, IDS, DENSE).logits)


def test_scores_of_one_are_the_dense_model():
    config, params, dense = routed("soft")
    layer, dense_layer = (model.unstack(p)["layers"][0] for p in (params, dense))
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    expected, trace = model.run_block(dense_layer, x, DENSE)
    read = np.asarray(trace.ffn).reshape(18, 32)
    layer["ffn"]["router"] = jnp.asarray(np.linalg.pinv(read) @ np.full((18, 6), 40.0, np.float32))  # logits of 40
    np.testing.assert_allclose(model.run_block(layer, x, config)[0], expected, rtol=1e-5, atol=1e-5)


def test_threshold_is_strict_and_no_block_is_no_output():
    """Zero routers score 0.5 exactly: not above the threshold, and nothing steps in for a token without a block."""
    config, params, _ = routed("hard", 0.5)
    params["layers"]["ffn"]["router"] = jnp.zeros_like(params["layers"]["ffn"]["router"])
    assert not np.any(model.trunk(params, IDS, config, probe=lambda t: t.output)[1])


@pytest.mark.parametrize("mode", ["hard", "top", "oracle"])
def test_no_gradient_through_a_mask(mode):
    """Neither the router nor, by way of the router, its input learns from a 0/1 mask."""
    config, params, _ = routed(mode, 0.4)

    def loss(ffn, x):
        layer = jax.tree.map(lambda a: a[0], params["layers"]) | {"ffn": ffn}
        return jnp.sum(jnp.sin(model.run_block(layer, x, config)[0]))

    ffn = jax.tree.map(lambda a: a[0], params["layers"]["ffn"])
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    grads, d_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(ffn, x)
    assert not any(np.any(grads[name]) for name in ("router", "router_threshold") if name in grads)
    assert np.any(grads["gate"])
    if mode == "hard":  # the same mask by a router of another scale: the gradient of x knows nothing of it
        scaled = ffn | {"router": 3 * ffn["router"], "router_threshold": jax.nn.sigmoid(3 * jnp.log(0.4 / 0.6))}
        np.testing.assert_allclose(d_x, jax.jit(jax.grad(loss, argnums=1))(scaled, x), rtol=1e-6)


def test_soft_scores_have_the_gradient_of_the_formula():
    """The backward pass, which makes x1 again, against plain autodiff."""
    config, params, _ = routed("soft")
    ffn = jax.tree.map(lambda a: a[0], params["layers"]["ffn"])
    layer = jax.tree.map(lambda a: a[0], params["layers"])
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))

    def ours(ffn):
        return jnp.sum(jnp.sin(model.run_block(layer | {"ffn": ffn}, x, config)[0]))

    def plain(ffn):
        trace = model.run_block(layer, x, config)[1]
        after = model.run_block(layer | {"ffn": ffn | {"down": 0 * ffn["down"]}}, x, config)[0]
        hidden = jax.nn.silu(trace.ffn @ ffn["gate"]) * (trace.ffn @ ffn["up"])
        scores = jnp.repeat(jax.nn.sigmoid(trace.ffn @ ffn["router"]), 8, axis=-1)
        return jnp.sum(jnp.sin(after + (hidden * scores) @ ffn["down"]))

    assert_trees_close(jax.jit(jax.grad(ours))(ffn), jax.jit(jax.grad(plain))(ffn), 1e-5)


@pytest.mark.parametrize("mode, precision", [("hard", "HIGHEST"), ("top", "HIGHEST"), ("soft", "HIGH")])
def test_logits_are_exact_where_a_mask_hangs_on_them(mode, precision):
    product = lambda x, w: routing.router_logits(Router(8, mode), x, w)
    made = jax.make_jaxpr(product)(jnp.ones((1, 32)), jnp.ones((32, 6)))
    [dot] = [eqn for eqn in made.eqns if eqn.primitive.name == "dot_general"]
    assert dot.params["precision"] == (jax.lax.Precision[precision],) * 2


def test_keep_largest_counts_and_breaks_ties_by_order():
    scores = jnp.asarray([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert routing.keep_largest(scores, jnp.float32(0.5)).tolist() == [
        [False, True, True, False],
        [True, True, False, False],
    ]
    assert routing.keep_largest(scores, jnp.float32(0.75)).sum(axis=-1).tolist() == [1, 1]


def test_noise_is_drawn_anew_for_other_logits_and_repeats_for_the_same():
    router, half = Router(8, "noisy_softmax"), jnp.float32(0.5)
    a = jax.random.normal(jax.random.key(0), (2, 50, 6)) * 1e-6
    again, same, other = (routing.gates(router, x, half) for x in (a, a, a[:, ::-1]))
    np.testing.assert_array_equal(again, same)
    assert np.any((again > 0) != (other[:, ::-1] > 0))
    np.testing.assert_allclose(jnp.sum(again, axis=-1), 3, rtol=1e-5)


def test_decode_equals_the_masked_forward():
    """Greedy text, token by token through the cache, is that of one masked forward pass over it."""
    config, params, _ = routed("hard", 0.5)
    prompts = [[5, 9, 11, 3], [8]]
    found = generate(params, config, prompts, max_new_tokens=6, stop_ids=()).tokens
    texts = [(prompt + new + [0] * 3)[:9] for prompt, new in zip(prompts, found, strict=True)]
    likeliest = jnp.argmax(forward(params, jnp.asarray(texts), config).logits, axis=-1).tolist()
    for prompt, new, row in zip(prompts, found, likeliest, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + 5] == new


def test_evaluation_reports_blocks():
    config, params, _ = routed("hard", 0.7)
    ids = np.asarray(tokens(config, 1, 24))[0]  # a window of 13 tokens, and one of 10 beside its padding
    found = evaluate(params, config, ids, seq_len=13, batch_size=2)
    windows = np.pad(ids[:-1], (0, 3)).reshape(2, 13)
    off = model.trunk(params, jnp.asarray(windows), config, probe=lambda t: t.factors == 0)[1]
    off = np.asarray(off).reshape(2, 26, 6)[:, :23]
    assert found.block_sparsity == pytest.approx(off.mean(axis=(1, 2)))
    assert found.no_block == pytest.approx(off.all(axis=-1).mean(axis=1)) and np.any(found.no_block)
    assert found.block_sparsity == pytest.approx(found.sparsity)  # SiLU makes no zeros of its own
    unstacked = evaluate(model.unstack(params), config, ids, seq_len=13, batch_size=2)
    assert unstacked.block_sparsity == pytest.approx(found.block_sparsity)


def test_folder_round_trip(tmp_path):
    config, params, _ = routed("hard", 0.3)
    params["layers"]["ffn"]["router_threshold"] = jnp.asarray([0.3, 0.6])
    hf.save(tmp_path / "model", config, params, dtype="bfloat16")
    again_config, again = hf.load(tmp_path / "model")
    assert again_config == config
    for name in ("router", "router_threshold"):
        assert again["layers"]["ffn"][name].dtype == jnp.float32
        np.testing.assert_array_equal(again["layers"]["ffn"][name], params["layers"]["ffn"][name])
    hf.save(tmp_path / "unstacked", config, model.unstack(params))
    assert_trees_close(hf.load(tmp_path / "unstacked")[1], params, 0)
    with pytest.raises(ConfigError, match=r"format 'llama' cannot hold routers; formats that can: jsparse"):
        hf.save(tmp_path / "llama", config, params, format="llama")


def test_routers_lie_where_their_neurons_lie():
    config, _, _ = routed("hard")
    mesh = parallel.make_mesh(MeshConfig(1, 4, 2))
    places = model.shardings(config, mesh)["layers"]["ffn"]
    assert tuple(places["router"].spec) == (None, "fsdp", "tensor")
    params = model.init(jax.random.key(0), config)
    assert not np.any(params["layers"]["ffn"]["router"])
    assert params["layers"]["ffn"]["router_threshold"].tolist() == [0.5, 0.5]
    cast = model.cast(params, config, jnp.bfloat16)["layers"]["ffn"]
    assert cast["router"].dtype == cast["router_threshold"].dtype == jnp.float32


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match=r"router.block_size: expected a divisor of intermediate_size \(48\), got 32"):
        dataclasses.replace(DENSE, router=Router(32))
    with pytest.raises(ConfigError, match=r"block_size: expected a positive number, got 0"):
        Router(0)
    with pytest.raises(ConfigError, match=r"mesh: layers.ffn.router has 6 blocks, which tensor=4 does not divide"):
        model.shardings(routed("hard")[0], parallel.make_mesh(MeshConfig(2, 1, 4)))
    config, params, _ = routed("hard")
    hf.save(tmp_path / "model", config, params)
    text = (tmp_path / "model/config.json").read_text()
    (tmp_path / "model/config.json").write_text(text.replace('"block_size": 8', '"block_size": 16'))
    with pytest.raises(ValueError, match=r"mlp.router.weight: expected shape \(3, 32\), got \(6, 32\)"):
        hf.load(tmp_path / "model")
