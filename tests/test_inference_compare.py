"""Comparisons against NumPy on whole logits, and with PyTorch itself."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from jsparse import model, parallel
from jsparse.config import ConfigError, MeshConfig, Relu, Silu
from jsparse.inference import compare, compare_torch, evaluate
from tests.helpers import from_torch, tiny_config, torch_model

CONFIG = tiny_config(initializer_range=0.2)
OTHER = dataclasses.replace(CONFIG, intermediate_size=40, activation=Relu())
TEXT = np.random.default_rng(0).integers(CONFIG.vocab_size, size=101)


@pytest.fixture(scope="module")
def a():
    return model.init(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def b():
    return model.init(jax.random.key(1), OTHER)


def plain(params, config, starts, length):
    """float64 logits [B, T, V] of windows of the text."""
    windows = np.stack([TEXT[s : s + length] for s in starts])
    return np.asarray(model.forward(params, windows, config).logits, np.float64)


def test_equals_numpy(a, b):
    logits_a, logits_b = plain(a, CONFIG, range(0, 100, 25), 25), plain(b, OTHER, range(0, 100, 25), 25)
    log_a, log_b = log_softmax(logits_a, axis=-1), log_softmax(logits_b, axis=-1)
    kl = np.sum(np.exp(log_a) * (log_a - log_b), axis=-1)
    found = compare(a, CONFIG, b, OTHER, TEXT, seq_len=25, batch_size=3)
    assert found.tokens == 100 and found.windows == 4
    assert found.mean_kl == pytest.approx(kl.mean(), rel=1e-5)
    assert found.max_kl == pytest.approx(kl.max(), rel=1e-5)
    assert found.max_abs_difference == pytest.approx(np.abs(logits_a - logits_b).max(), rel=1e-5)
    assert found.top1_agreement == np.mean(logits_a.argmax(-1) == logits_b.argmax(-1))
    assert 0 < found.top1_agreement < 1


def test_perplexities_are_those_of_evaluate(a, b):
    """Partial windows, overlap and BOS: what is padded or not counted takes no part."""
    protocol = {"seq_len": 32, "stride": 20, "bos": 1, "batch_size": 2}
    found = compare(a, CONFIG, model.unstack(b), OTHER, TEXT, **protocol)
    assert found.perplexity_a == pytest.approx(evaluate(a, CONFIG, TEXT, **protocol).perplexity, rel=1e-5)
    assert found.perplexity_b == pytest.approx(evaluate(b, OTHER, TEXT, **protocol).perplexity, rel=1e-5)
    assert found.tokens == 100 and (found.seq_len, found.stride, found.bos) == (32, 20, 1)


def test_uncounted_positions_take_no_part(a, b):
    """Where the last window ends, zeros follow: were they counted, a short text would differ like a long one."""
    short = TEXT[:4]
    found = compare(a, CONFIG, b, OTHER, short, seq_len=32)
    log_a, log_b = (
        log_softmax(np.asarray(model.forward(p, short[None, :3], c).logits, np.float64), axis=-1)
        for p, c in ((a, CONFIG), (b, OTHER))
    )
    assert found.tokens == 3
    assert found.max_kl == pytest.approx(np.sum(np.exp(log_a) * (log_a - log_b), axis=-1).max(), rel=1e-5)


def test_a_model_equals_itself(a):
    found = compare(a, CONFIG, a, CONFIG, TEXT, seq_len=32)
    assert (found.max_abs_difference, found.mean_kl, found.max_kl, found.top1_agreement) == (0, 0, 0, 1)


def test_not_a_number_is_reported_not_hidden(a):
    broken = a | {"embed": a["embed"].at[int(TEXT[3])].set(np.nan)}
    found = compare(a, CONFIG, broken, CONFIG, TEXT, seq_len=32)
    assert np.isnan([found.max_abs_difference, found.mean_kl, found.max_kl, found.perplexity_b]).all()


def test_under_a_mesh():
    config = dataclasses.replace(CONFIG, vocab_size=72)
    first, second = (model.init(jax.random.key(k), config) for k in range(2))
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    alone = compare(first, config, second, config, TEXT, seq_len=16)
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(p, model.shardings(config, mesh)) for p in (first, second)]
        found = compare(sharded[0], config, sharded[1], config, TEXT, seq_len=16)
    assert dataclasses.astuple(found)[:-1] == pytest.approx(dataclasses.astuple(alone)[:-1], rel=1e-4)


def test_with_pytorch(tmp_path):
    config = dataclasses.replace(CONFIG, activation=Silu())
    theirs = torch_model(config)
    theirs.save_pretrained(tmp_path)
    params = from_torch(theirs.state_dict(), config)
    found = compare_torch(tmp_path, params, config, TEXT, seq_len=32, stride=20, bos=1)
    assert found.max_abs_difference < 1e-4 and found.max_kl < 1e-6 and found.top1_agreement == 1
    assert found.tokens == 100
    assert found.perplexity_a == pytest.approx(found.perplexity_b, rel=1e-5)
    params["norm"]["scale"] = params["norm"]["scale"].at[0].add(0.5)
    spoilt = compare_torch(tmp_path, params, config, TEXT, seq_len=32, stride=20, bos=1)
    both = compare(from_torch(theirs.state_dict(), config), config, params, config, TEXT, seq_len=32, stride=20, bos=1)
    assert spoilt.mean_kl == pytest.approx(both.mean_kl, rel=1e-4) and spoilt.mean_kl > 1e-3
    assert spoilt.max_abs_difference == pytest.approx(both.max_abs_difference, rel=1e-4)


def test_bad_input_is_one_line():
    wide = dataclasses.replace(CONFIG, vocab_size=68)
    with pytest.raises(ConfigError, match=r"^vocab_size: expected the same in both models \(67\), got 68$"):
        compare({}, CONFIG, {}, wide, TEXT)
    short = dataclasses.replace(CONFIG, max_position_embeddings=16)
    with pytest.raises(ConfigError, match=r"^seq_len: expected at most the model's 16 positions, got 32$"):
        compare({}, CONFIG, {}, short, TEXT, seq_len=32)


def test_what_transformers_cannot_load_is_one_line(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"transformers cannot load it: .+") as error:
        compare_torch(tmp_path / "nowhere", {}, CONFIG, TEXT)
    assert "\n" not in str(error.value)
