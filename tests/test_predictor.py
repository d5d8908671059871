"""Predictors: that they learn what can be learnt, that their curve counts right, and the ways in and out of files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import model
from jsparse.config import ConfigError, Relu, Silu
from jsparse.inference import decoder, generate, pack
from jsparse.inference.perplexity import evaluate, predicted_perplexity
from jsparse.methods import predictor
from pallas_kernels.neuron_sparse_ffn import Predictor
from tests.helpers import random_params, tiny_config

CONFIG = tiny_config(activation=Relu(), eos_token_id=None)
WINDOWS = np.random.default_rng(0).integers(67, size=(12, 32))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def trained(params):
    return predictor.train(params, CONFIG, WINDOWS[:8], ranks=(8, 32), steps=60, batch_size=4, lr=1e-2)


@pytest.fixture(scope="module")
def measured(trained, params):
    return predictor.curves(trained, params, CONFIG, WINDOWS[8:])


def at(level, layers):
    """Predictors of int8 at one threshold."""
    return [predictor.quantise(p._replace(threshold=jnp.full_like(p.threshold, level))) for p in layers]


def test_training_beats_chance(measured):
    """Half of the neurons are active: at a recall of 90 % a guess would be half right."""
    curve = measured[32]
    assert (curve.active < 0.6).all()
    for layer in range(2):
        best = np.flatnonzero(curve.recall[layer] >= 0.9)[-1]
        assert curve.precision[layer, best] > 0.65 and curve.sparsity[layer, best] > 0.2
        assert curve.sparsity[layer, best] > measured[8].sparsity[layer, measured[8].recall[layer] >= 0.9].max()


def test_curve_counts(trained, params, measured):
    """Against the model itself and the predictor as it decodes, at one threshold of one layer."""
    curve, i = measured[8], 20
    named = at(curve.threshold[i], trained[8])[1]
    active, predicted = [], []
    for window in WINDOWS[8:]:
        x, used = predictor._observe(params, window[None].astype(np.int32), CONFIG)
        active.append(np.asarray(used[1]))
        predicted.append(np.asarray(decoder.predicted_neurons(x[1], named)))
    active, predicted = np.concatenate(active), np.concatenate(predicted)
    assert curve.active[1] == pytest.approx(active.mean(), rel=1e-5)
    assert curve.recall[1, i] == pytest.approx((predicted & active).sum() / active.sum(), rel=1e-3)
    assert curve.precision[1, i] == pytest.approx((predicted & active).sum() / predicted.sum(), rel=1e-3)
    assert curve.sparsity[1, i] == pytest.approx(1 - predicted.mean(), rel=1e-3)
    assert (np.diff(curve.recall, axis=1) <= 0).all() and (np.diff(curve.sparsity, axis=1) >= 0).all()


def test_int8_names_the_same_neurons():
    """Rows of very different sizes, and one of zeros."""
    rng = np.random.default_rng(1)
    x, down, up = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((64, 32), (16, 32), (48, 16)))
    sizes = jnp.geomspace(0.3, 3, 16).at[3].set(0.0)
    exact = Predictor(down * sizes[:, None], up * jnp.geomspace(0.1, 10, 48)[:, None], jnp.linspace(-1, 1, 48))
    rounded = predictor.quantise(exact)
    assert rounded.down.dtype == rounded.up.dtype == jnp.int8 and rounded.threshold.dtype == jnp.float32
    named = decoder.predicted_neurons(x, exact)
    assert 0.3 < named.mean() < 0.7
    assert np.mean(np.asarray(named != decoder.predicted_neurons(x, rounded))) < 0.01


def test_choose_reads_the_fewest_bytes():
    levels, layers = np.array([-1.0, 0.0, 1.0]), dataclasses.replace(CONFIG, num_hidden_layers=3)

    def curve(recall, sparsity, active):
        return predictor.Curve(levels, np.array(recall), np.array(recall), np.array(sparsity), np.array(active))

    active, rising = [0.1, 0.1, 0.4], [0.0, 0.4, 0.9]
    small = curve([[1.0, 0.95, 0.5], [0.9, 0.8, 0.7], [1.0, 0.9, 0.8]], [rising] * 3, active)
    large = curve([[1.0, 1.0, 0.9], [1.0, 0.95, 0.9], [1.0, 0.9, 0.8]],
                  [[0.0, 0.5, 0.6], [0.0, 0.7, 0.9], rising], active)  # fmt: skip
    picks = predictor.choose({8: small, 16: large}, layers, 0.9, jnp.float32)
    # Of 3 x 32 x 48 weights of 4 bytes. Layer 0: 0.6 of them and rank 8, or 0.4 and rank 16, or without one 0.4.
    assert [pick.rank for pick in picks] == [0, 16, 0]
    assert picks[1] == predictor.Pick(16, 1.0, 0.9, 0.9, 0.9, pytest.approx(0.1 + 16 * 80 / (3 * 32 * 48 * 4)))
    assert picks[0] == predictor.Pick(0, 0.0, 1.0, 1.0, 0.9, pytest.approx(0.4))
    assert predictor.choose({8: small}, layers, 0.97)[1].rank == 0  # which never recalls as much
    made = {rank: [Predictor(jnp.ones((rank, 32)), jnp.ones((48, rank)), jnp.zeros(48))] * 3 for rank in (8, 16)}
    none, chosen, _ = predictor.assemble(made, picks)
    assert none is None and chosen.down.shape == (16, 32) and (chosen.threshold > 0).all()
    with pytest.raises(ConfigError, match="recall"):
        predictor.choose({8: small}, layers, 0.0)


def test_perplexity_with_predictors_on(params, trained):
    text = WINDOWS[8:].reshape(-1)
    exact = evaluate(params, CONFIG, text, seq_len=32).perplexity
    run = lambda predictors: predicted_perplexity(pack(params, CONFIG, predictors), CONFIG, text, seq_len=32)
    everything, guessed = at(-jnp.inf, trained[8]), at(0.0, trained[8])
    assert run([everything[0], None]) == pytest.approx(exact, rel=1e-5)
    assert run([None, guessed[1]]) != pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_decoding_equals_the_dense_model_masked_by_the_predictors(params, trained, implementation):
    """The second layer has none: its gate decides."""
    packed = pack(params, CONFIG, [at(2.0, trained[8])[0], None])
    prompt = [3, 5, 7, 11]
    tokens = generate(packed, CONFIG, [prompt], max_new_tokens=6, implementation=implementation).tokens[0]

    @jax.jit
    def masked(packed, text):
        """Of each position, where the prompt is dense, the likeliest next token."""
        start = jnp.zeros(1, jnp.int32)
        _, cache, _ = decoder.trunk(packed, text[:, :4], CONFIG, decoder.empty_cache(packed, 1, 16, start, CONFIG))
        x, _, _ = decoder.trunk(packed, text[:, 4:], CONFIG, cache, predicted=True)
        return jnp.argmax(decoder.logits(x[0], packed), axis=-1)

    assert masked(packed, jnp.asarray([prompt + tokens], jnp.int32)).tolist()[:-1] == tokens[1:]
    assert tokens != generate(packed, CONFIG, [prompt], max_new_tokens=6, implementation="dense").tokens[0]


def test_the_folder_keeps_what_was_chosen(tmp_path, trained):
    chosen = [at(0.5, trained[32])[0], None]
    predictor.save(tmp_path, chosen)
    found = predictor.load(tmp_path, CONFIG)
    assert found[1] is None
    for a, b in zip(found[0], chosen[0], strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    with pytest.raises(ConfigError, match=r"with predictor\.safetensors"):
        predictor.load(tmp_path / "other", CONFIG)
    with pytest.raises(ValueError, match="expected predictors of 3 layers, got 2"):
        predictor.load(tmp_path, tiny_config(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"layers\.0: expected down \[rank, 16\].*got \(32, 32\)"):
        predictor.load(tmp_path, tiny_config(hidden_size=16))


def test_powerinfer_layout_decides_alike_on_the_residual_stream(tmp_path, params, trained):
    torch = pytest.importorskip("torch")
    ranked = [trained[32][0], trained[8][1]]
    predictor.powerinfer(tmp_path / "out", ranked, params)
    assert (tmp_path / "out" / "config.json").read_text() == '{"sparse_threshold": 0.0}\n'
    residual = np.random.default_rng(3).standard_normal((16, CONFIG.hidden_size)).astype(np.float32)
    for i, ours in enumerate(ranked):
        theirs = torch.load(tmp_path / "out" / f"model_{i}.pt", weights_only=True)
        assert {name: tuple(x.shape) for name, x in theirs.items()} == dict(
            zip(("fc1.weight", "fc2.weight"), (ours.down.shape, ours.up.shape), strict=True)
        )
        fc1, fc2 = (theirs[f"fc{n}.weight"].float() for n in (1, 2))
        got = torch.relu(torch.tensor(residual) @ fc1.T) @ fc2.T
        scale = params["layers"]["ffn_norm"]["scale"][i]
        normed = model.rms_norm(jnp.asarray(residual)[:, None], scale, CONFIG.rms_norm_eps)[:, 0]
        expected = jax.nn.relu(normed @ ours.down.T) @ ours.up.T
        clear = np.abs(expected) > 0.02 * np.abs(expected).max()
        np.testing.assert_array_equal((got.numpy() > 0)[clear], (np.asarray(expected) > 0)[clear])


def test_bad_models():
    with pytest.raises(ConfigError, match="activation: expected one with exact zeros"):
        predictor.train({}, tiny_config(activation=Silu()), WINDOWS)
    with pytest.raises(ConfigError, match="ranks, steps"):
        predictor.train({}, CONFIG, WINDOWS, steps=0)
    with pytest.raises(ConfigError, match="rank: expected positive multiples of 8, got 12"):
        predictor.train({}, CONFIG, WINDOWS, ranks=(8, 12))
    assert predictor.default_ranks(dataclasses.replace(CONFIG, hidden_size=4096)) == (128, 256, 512, 1024)
    assert predictor.default_ranks(CONFIG) == (8,)
    assert Predictor._fields == ("down", "up", "threshold")  # the names in the file
