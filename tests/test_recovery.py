"""Recovery training: a pruned model trained on by `jsparse train`, its zeros held."""

import numpy as np
import pytest

from jsparse import hf
from jsparse.config import ConfigError, Distill, Hold, ModelSource
from jsparse.methods.patterns import NofM, check_claim, observe
from jsparse.methods.pruning import Magnitude, prune
from jsparse.train.checkpoint import load_run
from jsparse.train.loop import train
from tests.helpers import random_params
from tests.train_helpers import MODEL, recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A dense model's folder and a pruned one's, with a zero row in the embedding: not every zero is pruned."""
    home = tmp_path_factory.mktemp("recovery")
    params = random_params(MODEL)
    params["embed"] = params["embed"].at[3].set(0.0)
    hf.save(home / "dense", MODEL, params)
    hf.save(home / "pruned", MODEL, prune(params, MODEL, pattern=NofM(2, 4), mlp=Magnitude())[0])
    return home


def of(home, name, **changes):
    return recipe(home, run=str(home / name), steps=3, **{"model": ModelSource(path=str(home / "pruned"))} | changes)


def test_zeros_stay_and_the_rest_learns(home):
    config = of(home, "run", hold=Hold("2:4"), distill=Distill(str(home / "dense")))
    train(config)
    _, after, _ = load_run(config.run)
    _, before = hf.load(home / "pruned")
    for name in ("gate", "up", "down"):
        was, now = (np.asarray(x["layers"]["ffn"][name]) for x in (before, after))
        np.testing.assert_array_equal(now == 0, was == 0)
        assert (now != was)[was != 0].all()
    assert np.asarray(after["embed"])[3].any()  # a zero elsewhere is only a number
    assert {row.pattern for row in observe(after) if "ffn" in row.name} == {"2:4 input"}
    check_claim(after, NofM(2, 4))


def test_without_hold_they_do_not(home):
    config = of(home, "free")
    train(config)
    assert not any(row.zeros for row in observe(load_run(config.run)[1]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hold": Hold("2:5")}, r"hold\.pattern: layers\.0\.ffn\.gate: pattern 2:5: expected an input axis"),
        ({"hold": Hold("1:4")}, r"hold\.pattern: layers\.0\.ffn\.gate: pattern 1:4: output 0, inputs 0 to 3, keeps 2"),
        ({"hold": Hold("2:4", "all")}, r"hold\.pattern: layers\.0\.attention\.query: pattern 2:4: .*keeps"),
        ({"hold": Hold("half")}, r"pattern: expected N:M"),
        ({"hold": Hold(), "model": "dense"}, r"hold: expected a starting model with zeros .* got 0"),
    ],
)
def test_what_cannot_be_held(home, changes, told):
    if "model" in changes:
        changes = changes | {"model": ModelSource(path=str(home / changes["model"]))}
    with pytest.raises(ConfigError, match=told):
        train(of(home, "bad", **changes))
    assert not (home / "bad").exists()
