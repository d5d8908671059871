"""Perplexity and sparsity against plain PyTorch and NumPy, by the window protocol written out a second time."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from jsparse import model, parallel
from jsparse.config import ConfigError, FatRelu, MeshConfig, Relu
from jsparse.inference import evaluate, perplexity
from jsparse.model import chunks
from tests.helpers import from_torch, tiny_config, torch_model

CONFIG = tiny_config(activation=Relu(), num_hidden_layers=3)
TEXT = np.random.default_rng(0).integers(CONFIG.vocab_size, size=131)


@pytest.fixture(scope="module")
def theirs():
    return torch_model(CONFIG)


@pytest.fixture(scope="module")
def params():
    return model.init(jax.random.key(0), dataclasses.replace(CONFIG, initializer_range=0.2))


def plain(model, text, seq_len, stride, bos):
    """One window at a time, as the protocol reads: nats of every prediction, and x1 of every predicting position."""
    import torch

    x1 = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        for layer, seen in zip(model.model.layers, x1, strict=True)
    ]
    prefix = [] if bos is None else [bos]
    held = seq_len - len(prefix)
    losses, kept, predicted, start = [], [[] for _ in x1], 1, 0
    while predicted < len(text):
        shown = text[start : start + held]
        shown = shown[: len(text) - 1 - start]  # the last token has nothing to predict
        with torch.no_grad():
            logits = model(torch.tensor([[*prefix, *shown]])).logits[0].double()
        log_p = torch.log_softmax(logits, -1)[len(prefix) :]
        for i in range(len(shown)):
            if start + i + 1 >= predicted:
                losses.append(-log_p[i, text[start + i + 1]].item())
                for layer, seen in zip(kept, x1, strict=True):
                    layer.append(seen[-1][len(prefix) + i].numpy())
        predicted = start + len(shown) + 1
        start += held if stride is None else stride
    for hook in hooks:
        hook.remove()
    return losses, np.array(kept)


@pytest.mark.parametrize(
    ("length", "seq_len", "stride", "bos"),
    [
        (129, 32, None, None),  # windows that come out even
        (131, 32, None, None),  # a last window of 2 predictions
        (130, 32, None, None),  # and of 1
        (131, 32, None, 1),
        (131, 32, 8, None),
        (131, 32, 13, 1),
        (131, 32, 1, None),
        (20, 64, None, None),  # shorter than a window
        (20, 64, 5, 1),
        (2, 16, None, None),
        (9, 1, None, None),  # windows of one token
        (9, 2, None, 1),
    ],
)
def test_equals_pytorch(theirs, length, seq_len, stride, bos):
    params = from_torch(theirs.state_dict(), CONFIG)
    text = TEXT[:length]
    losses, x1 = plain(theirs, text, seq_len, stride, bos)
    found = evaluate(params, CONFIG, text, seq_len=seq_len, stride=stride, bos=bos, batch_size=3)
    assert found.tokens == len(losses) == length - 1
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    np.testing.assert_allclose(found.sparsity, np.mean(x1 == 0, axis=(1, 2)), atol=1e-4)
    np.testing.assert_array_equal(found.dead, np.sum(np.all(x1 == 0, axis=1), axis=1))
    assert found.neurons == (CONFIG.intermediate_size,) * 3


def test_dead_neurons_are_found(params):
    dead = jax.tree.map(lambda x: x, params)
    dead["layers"]["ffn"]["up"] = dead["layers"]["ffn"]["up"].at[1, :, :5].set(0)
    before = evaluate(params, CONFIG, TEXT, seq_len=32)
    found = evaluate(dead, CONFIG, TEXT, seq_len=32)
    assert before.dead == (0, 0, 0) and found.dead == (0, 5, 0)
    assert found.sparsity[1] > before.sparsity[1]


def test_unstacked_layers_of_different_widths(params):
    layers = model.unstack(params)["layers"]
    ffn = layers[1]["ffn"]
    narrow = {"gate": ffn["gate"][:, :20], "up": ffn["up"][:, :20], "down": ffn["down"][:20]}
    zeroed = {name: w.at[20:].set(0) if name == "down" else w.at[:, 20:].set(0) for name, w in ffn.items()}

    def with_ffn(ffn):
        return params | {"layers": [layers[0], layers[1] | {"ffn": ffn}, layers[2]]}

    found = evaluate(with_ffn(narrow), CONFIG, TEXT, seq_len=32)
    full = evaluate(with_ffn(zeroed), CONFIG, TEXT, seq_len=32)
    assert found.neurons == (48, 20, 48)
    assert found.loss == pytest.approx(full.loss, rel=1e-6)
    assert full.dead[1] == found.dead[1] + 28
    assert 48 * (1 - full.sparsity[1]) == pytest.approx(20 * (1 - found.sparsity[1]))


def test_threshold_sweep_compiles_once(params, monkeypatch):
    traces = []
    monkeypatch.setattr(perplexity, "trunk", lambda *a, **k: traces.append(1) or model.trunk(*a, **k))
    config = dataclasses.replace(CONFIG, rms_norm_eps=1.1e-5)  # nobody else's compiled function
    sweep = [evaluate(params, config, TEXT, seq_len=32, batch_size=2, threshold=t) for t in (0.0, 0.1, 0.5)]
    assert len(traces) == 1
    assert sweep[0].sparsity[0] < sweep[1].sparsity[0] < sweep[2].sparsity[0]
    fixed = dataclasses.replace(config, activation=FatRelu(0.5))
    assert evaluate(params, fixed, TEXT, seq_len=32, batch_size=2) == sweep[2]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_under_a_mesh(sizes):
    config = dataclasses.replace(CONFIG, vocab_size=72)
    params = model.init(jax.random.key(0), config)
    alone = evaluate(params, config, TEXT, seq_len=16, batch_size=1)
    mesh = parallel.make_mesh(MeshConfig(*sizes))
    sharded = jax.device_put(params, model.shardings(config, mesh))
    with jax.set_mesh(mesh):
        found = evaluate(sharded, config, TEXT, seq_len=16, batch_size=3)
    assert found.loss == pytest.approx(alone.loss, rel=1e-5)
    assert found.sparsity == pytest.approx(alone.sparsity, abs=1e-4)
    assert found.dead == alone.dead and found.windows == alone.windows


def test_result_is_plain_json(params):
    seen = []
    found = evaluate(params, CONFIG, TEXT, seq_len=16, batch_size=4, progress=lambda *a: seen.append(a))
    assert seen == [(4, 9), (8, 9), (9, 9)] and found.windows == 9
    assert json.loads(json.dumps(dataclasses.asdict(found)))["stride"] == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [5]}, "tokens: expected at least 2 tokens, got 1"),
        ({"tokens": [5, 67, 3]}, "tokens: expected ids from 0 to 66, got [67]"),
        ({"tokens": [5, -1, 3]}, "tokens: expected ids from 0 to 66, got [-1]"),
        ({"tokens": [[5, 3]]}, "tokens: expected a 1-D array of token ids, got 'int64[1, 2]'"),
        ({"tokens": [0.5, 3]}, "tokens: expected a 1-D array of token ids, got 'float64[2]'"),
        ({"seq_len": 65}, "seq_len: expected at most the model's 64 positions, got 65"),
        ({"seq_len": 1, "bos": 1}, "seq_len: expected room for a token of the text, got 1"),
        ({"stride": 33}, "stride: expected from 1 to 32, the text tokens of a window, got 33"),
        ({"stride": 0}, "stride: expected from 1 to 32, the text tokens of a window, got 0"),
        ({"stride": 32, "bos": 1}, "stride: expected from 1 to 31, the text tokens of a window, got 32"),
        ({"bos": 67}, "bos: expected ids from 0 to 66, got [67]"),
        ({"batch_size": 0}, "batch_size: expected a positive number, got 0"),
    ],
)
def test_bad_input_is_one_line(changes, message):
    with pytest.raises(ConfigError) as error:
        evaluate({}, CONFIG, **{"tokens": [1, 2, 3], "seq_len": 32} | changes)
    assert str(error.value) == message


def test_chunks_hold_few_logits(params):
    def losses(x, targets):
        return chunks.by_chunks(lambda x, t: chunks.nll(model.logits(x, params), t), x, targets, chunk=8)

    x = jax.random.normal(jax.random.key(0), (2, 15, CONFIG.hidden_size))
    targets = jax.random.randint(jax.random.key(1), (2, 15), 0, CONFIG.vocab_size)
    text = str(jax.make_jaxpr(losses)(x, targets))
    assert "[2,4,67]" in text and "[2,15,67]" not in text
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(model.logits(x, params))), targets[..., None], -1)
    np.testing.assert_allclose(losses(x, targets), expected[..., 0], rtol=1e-4, atol=1e-5)
