"""Predictors: that they learn what can be learnt, that their curve counts right, and the ways in and out of files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import model
from jsparse.config import ConfigError, Relu, Silu
from jsparse.inference import generate, pack
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
    return predictor.train(params, CONFIG, WINDOWS[:8], rank=32, steps=60, batch_size=4, lr=1e-2)


@pytest.fixture(scope="module")
def measured(trained, params):
    return predictor.curve(trained, params, CONFIG, WINDOWS[8:])


def test_training_beats_chance(trained, measured):
    """Half of the neurons are active: at a recall of 90 % a guess would be half right."""
    chosen, index = predictor.choose(trained, measured, 0.9)
    layers = range(2)
    assert (measured.recall[layers, index] >= 0.9).all()
    assert (measured.precision[layers, index] > 0.65).all() and (measured.active < 0.6).all()
    assert (measured.sparsity[layers, index] > 0.2).all()
    assert [float(p.threshold[0]) for p in chosen] == measured.threshold[index].tolist()


def test_curve_counts(trained, params, measured):
    """Against the model itself, at one threshold of one layer."""
    active, logits = [], []
    for window in WINDOWS[8:]:
        x, used = predictor._observe(params, window[None].astype(np.int32), CONFIG)
        active.append(np.asarray(used[1]))
        logits.append(np.maximum(np.asarray(x[1]) @ trained[1].down.T, 0) @ trained[1].up.T)
    active, logits = np.concatenate(active), np.concatenate(logits)
    i = 20
    predicted = logits > measured.threshold[i]
    assert measured.active[1] == pytest.approx(active.mean(), rel=1e-5)
    assert measured.recall[1, i] == pytest.approx((predicted & active).sum() / active.sum(), rel=1e-3)
    assert measured.precision[1, i] == pytest.approx((predicted & active).sum() / predicted.sum(), rel=1e-3)
    assert measured.sparsity[1, i] == pytest.approx(1 - predicted.mean(), rel=1e-3)
    assert (np.diff(measured.recall, axis=1) <= 0).all() and (np.diff(measured.sparsity, axis=1) >= 0).all()


def test_choose_takes_the_highest_threshold_that_recalls_enough(trained):
    levels = np.array([-1.0, 0.0, 1.0])
    recall = np.array([[1.0, 0.95, 0.5], [0.8, 0.7, 0.6]])
    found = predictor.Curve(levels, recall, recall, recall, recall[:, 0])
    chosen, index = predictor.choose(trained, found, 0.9)
    assert index.tolist() == [1, 0] and float(chosen[1].threshold[0]) == -1.0
    with pytest.raises(ConfigError, match="recall"):
        predictor.choose(trained, found, 0.0)


def test_perplexity_with_predictors_on(params, trained):
    text = WINDOWS[8:].reshape(-1)
    exact = evaluate(params, CONFIG, text, seq_len=32).perplexity

    def with_threshold(level):
        made = [p._replace(threshold=jnp.full_like(p.threshold, level)) for p in trained]
        return predicted_perplexity(pack(params, CONFIG, made), CONFIG, text, seq_len=32)

    assert with_threshold(-jnp.inf) == pytest.approx(exact, rel=1e-5)
    assert with_threshold(0.0) != pytest.approx(exact, rel=1e-4)


def test_generation_reads_the_folder(tmp_path, params, trained):
    predictor.save(tmp_path, trained)
    found = predictor.load(tmp_path, CONFIG)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)
    texts = [generate(pack(params, CONFIG, p), CONFIG, [[3, 5, 7]], max_new_tokens=6, implementation="xla").tokens
             for p in (found, trained)]  # fmt: skip
    assert texts[0] == texts[1]
    with pytest.raises(ConfigError, match=r"with predictor\.safetensors"):
        predictor.load(tmp_path / "other", CONFIG)
    with pytest.raises(ValueError, match=r"missing tensor layers\.2\.down"):
        predictor.load(tmp_path, tiny_config(num_hidden_layers=3))
    with pytest.raises(ValueError, match="do not fit width 16"):
        predictor.load(tmp_path, tiny_config(hidden_size=16))


def test_powerinfer_layout_decides_alike_on_the_residual_stream(tmp_path, params, trained):
    torch = pytest.importorskip("torch")
    predictor.powerinfer(tmp_path / "out", trained, params)
    assert (tmp_path / "out" / "config.json").read_text() == '{"sparse_threshold": 0.0}\n'
    residual = np.random.default_rng(3).standard_normal((16, CONFIG.hidden_size)).astype(np.float32)
    for i, ours in enumerate(trained):
        theirs = torch.load(tmp_path / "out" / f"model_{i}.pt", weights_only=True)
        assert {name: tuple(x.shape) for name, x in theirs.items()} == {"fc1.weight": (32, 32), "fc2.weight": (48, 32)}
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
    with pytest.raises(ConfigError, match="rank, steps"):
        predictor.train({}, CONFIG, WINDOWS, steps=0)
    assert Predictor._fields == ("down", "up", "threshold")  # the names in the file
