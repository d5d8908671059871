"""Every command end to end on a small model, and what it answers to bad input."""

import dataclasses
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import jsparse
from jsparse import config, hf, model
from jsparse.cli import COMMANDS, Bench, BenchDecode, BenchFfn, BenchTrain, _continuation, run
from jsparse.config import Cats, FatRelu, Relu, Router, Silu
from jsparse.hf import gguf_tokenizer
from jsparse.methods import lte
from tests.helpers import random_params, save_byte_tokenizer, tiny_config

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 20


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a text, a ReLU model that knows a byte tokenizer, and a recipe that trains it."""
    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text(TEXT)
    (home / "tokenizer").mkdir()
    save_byte_tokenizer(home / "tokenizer")
    shape = tiny_config(vocab_size=258, activation=Relu(), eos_token_id=256, bos_token_id=None)
    hf.save(home / "model", shape, model.init(jax.random.key(0), shape), tokenizer=home / "tokenizer")
    (home / "recipe.yaml").write_text(f"""
run: {home}/run
model: {{path: {home}/model}}
data: {{train: [{{path: {home}/text.txt}}], seq_len: 32, batch_size: 8, cache: {home}/cache}}
steps: 3
method: {{type: prosparse, weight: {{type: fixed, value: 0.1}}}}
optimizer: {{lr: 1e-2}}
log: {{every: 1, tensorboard: false}}
dtype: float32
compile_cache: null
""")
    return home


@pytest.fixture(autouse=True)
def in_folder(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr("jsparse.cli.CACHE", str(home / "cache"))


def answer(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code of a command and what it said beside its settings."""
    capsys.readouterr()
    code = run(arguments)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    return code, "".join(line for line in lines if not line.startswith("settings: "))


def test_train_export_eval_report(home, capsys):
    assert run(["train", "recipe.yaml", "steps=4"]) == 0
    assert run(["export", "run", "exported"]) == 0
    found, _ = hf.load(home / "exported")
    assert found.activation == Relu()
    assert run(["eval", "exported", "--data", "text.txt", "--seq-len", "32", "--json", "eval.json"]) == 0
    values = json.loads((home / "eval.json").read_text())
    assert values["tokens"] == len(TEXT) and len(values["sparsity"]) == found.num_hidden_layers
    assert values["perplexity"] < 258
    assert run(["report", "run", "eval.json", "--out", "page"]) == 0
    assert "<html" in (home / "page" / "index.html").read_text()
    code, error = answer(capsys, "export", "run", "run-packed", "--packed")
    assert code == 2 and "--packed: expected matrices whose zeros make N:M" in error
    code, error = answer(capsys, "export", "run", "exported")
    assert code == 2 and "exported" in error and error.count("\n") == 1


def test_eval_names_its_result_and_never_replaces_one(home):
    for name in ("eval-model-text.txt.json", "eval-model-text.txt-1.json"):
        assert run(["eval", "model", "--data", "text.txt", "--max-tokens", "65", "--seq-len", "32"]) == 0
        assert (home / name).exists()


def test_generate(home, capsys):
    assert run(["generate", "model", "--prompt", "It was", "the age", "--max-new-tokens", "5", "--json", "g.json"]) == 0
    texts = json.loads((home / "g.json").read_text())["texts"]
    assert [t["prompt"] for t in texts] == ["It was", "the age"] and all(len(t["tokens"]) <= 5 for t in texts)
    assert "It was" + texts[0]["text"] in capsys.readouterr().out


def test_a_model_without_a_tokenizer(home, capsys):
    shape = tiny_config(vocab_size=258, activation=Relu())
    hf.save(home / "bare", shape, random_params(shape))
    np.save(home / "ids.npy", np.arange(200, dtype=np.uint16))
    shared = ["--data", "ids.npy", "--seq-len", "32"]
    assert run(["threshold", "bare", "bare-80", *shared, "--target-sparsity", "0.8", "--sweep", "0"]) == 0
    code, error = answer(capsys, "generate", "bare-80", "--prompt", "It was")
    assert (code, error.count("\n")) == (2, 1) and "bare-80: expected a model folder with a tokenizer" in error
    code, error = answer(capsys, "eval", "bare", "--data", "text.txt", "--seq-len", "32")
    assert (code, error.count("\n")) == (2, 1) and "expected a tokenizer folder to read text.txt, got none" in error
    assert run(["train", "recipe.yaml", "run=bare-run", "model.path=bare", "data.train=[{path: ids.npy}]"]) == 0
    assert run(["export", "bare-run", "bare-out"]) == 0


def test_generated_text_keeps_the_space_that_sentencepiece_begins_words_with():
    backend = gguf_tokenizer._sentencepiece(["<unk>", "▁", "▁a", "a"], [0.0, -1.0, -2.0, -3.0], 0, True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    prompt = tokenizer("a").input_ids
    assert prompt == [2] and tokenizer.decode([2]) == "a"
    assert _continuation(tokenizer, prompt, [2, 3]) == " aa"


def test_predict_then_generate(home, capsys):
    shared = ["--data", "text.txt", "--seq-len", "32", "--held-out", "2", "--rank", "8", "--steps", "3"]
    shutil.copytree(home / "model", home / "relu")
    code, error = answer(capsys, "generate", "relu", "--prompt", "It", "--predictor")
    assert code == 2 and "jsparse predict makes it" in error
    assert run(["predict", "relu", *shared, "--recall", "0.9", "0.5", "--powerinfer", "powerinfer"]) == 0
    values = json.loads((home / "relu" / "predictor.json").read_text())
    exact, rows = values["perplexity"], values["chosen"]
    assert [row["wanted"] for row in rows] == [0.9, 0.5] and len(values["curves"]["8"]["recall"]) == 2
    assert all(len(row["layers"]) == 2 for row in rows) and rows[1]["share"] < rows[0]["share"]
    within = [row for row in rows if row["perplexity"] <= 1.02 * exact]
    best = min(within, key=lambda row: row["share"]) if within else min(rows, key=lambda row: row["perplexity"])
    assert values["kept"] == best["wanted"]
    assert {p.name for p in (home / "powerinfer").iterdir()} == {"config.json", "model_0.pt", "model_1.pt"}
    code, error = answer(capsys, "predict", "relu", *shared)
    assert code == 2 and "--overwrite" in error
    generated = ["generate", "relu", "--prompt", "It", "--max-new-tokens", "4", "--json", "predicted.json"]
    assert run([*generated, "--predictor", "--implementation", "xla"]) == 0
    assert json.loads((home / "predicted.json").read_text())["implementation"] == "xla"


def test_threshold_by_either_criterion(home):
    shared = ["--data", "text.txt", "--max-tokens", "257", "--seq-len", "32", "--target-sparsity", "0.8"]
    assert run(["threshold", "model", "fat", *shared, "--sweep", "0", "0.01"]) == 0
    found, _ = hf.load(home / "fat")
    assert isinstance(found.activation, FatRelu) and found.activation.threshold > 0
    assert run(["threshold", "model", "cett", *shared, "--criterion", "cett", "--sweep", "0", "0.1"]) == 0
    for name in ("fat", "cett"):
        values = json.loads((home / name / "threshold.json").read_text())
        assert np.mean(values["sparsity"]) >= 0.8 and len(values["points"]) == 2


def test_threshold_of_a_model_that_makes_no_zeros(home, capsys):
    shape = tiny_config(vocab_size=258, eos_token_id=256, bos_token_id=None)
    hf.save(home / "silu", shape, random_params(shape), tokenizer=home / "tokenizer")
    shared = ["--data", "text.txt", "--max-tokens", "257", "--seq-len", "32"]
    shared += ["--target-sparsity", "0.5", "--sweep", "0"]
    assert run(["threshold", "silu", "cats", *shared]) == 0
    found, _ = hf.load(home / "cats")
    assert isinstance(found.activation, Cats) and found.activation.threshold > 0
    values = json.loads((home / "cats" / "threshold.json").read_text())
    assert values["criterion"] == "cats" and np.mean(values["sparsity"]) >= 0.5
    for name, activation in (("fatrelu", Silu()), ("cett", Silu()), ("cats", Relu())):
        model = "silu" if activation == Silu() else "model"
        code, error = answer(capsys, "threshold", model, "left", *shared, "--criterion", name)
        assert (code, error.count("\n")) == (2, 1) and f"--criterion {name}: expected a model of activation" in error
        assert f"got {activation.type!r}" in error and not (home / "left").exists()
    code, error = answer(capsys, "threshold", "silu", "left", *shared, "--calibration", "text.txt")
    assert code == 2 and "--calibration: expected --criterion cett or lte beside it, got 'cats'" in error


def test_threshold_of_routers(home, capsys):
    dense = tiny_config(vocab_size=258, eos_token_id=256, bos_token_id=None)
    params, routed = lte.add_routers(random_params(dense), dense, Router(8), init="normal", key=jax.random.key(1))
    hf.save(home / "routed", routed, params, tokenizer=home / "tokenizer")
    shared = ["--data", "text.txt", "--max-tokens", "257", "--seq-len", "32"]
    goal = ["--target-sparsity", "0.6", "--sweep", "0", "0.3"]
    assert run(["threshold", "routed", "routed-60", *shared, *goal]) == 0
    values = json.loads((home / "routed-60" / "threshold.json").read_text())
    assert values["criterion"] == "lte" and 0.6 <= np.mean(values["sparsity"]) < 0.62
    assert np.mean(values["points"][0]["sparsity"]) == 0
    assert np.mean(values["points"][1]["sparsity"]) == pytest.approx(0.3, abs=0.05)
    assert run(["eval", "routed-60", *shared, "--json", "routed-60.json"]) == 0
    measured = json.loads((home / "routed-60.json").read_text())
    np.testing.assert_allclose(measured["block_sparsity"], values["sparsity"])
    assert measured["perplexity"] == pytest.approx(values["perplexity"])

    code, error = answer(capsys, "threshold", "model", "left", *shared, *goal, "--criterion", "lte")
    assert (code, error.count("\n")) == (2, 1) and "LTE's routers, mode 'hard', got 'no router'" in error
    top = dataclasses.replace(routed, router=Router(8, "top"))
    hf.save(home / "top", top, params, tokenizer=home / "tokenizer")
    code, error = answer(capsys, "threshold", "top", "left", *shared, *goal)
    assert (code, error.count("\n")) == (2, 1) and "mode 'hard', got 'top'" in error
    code, error = answer(capsys, "threshold", "model", "left", *shared, "--target-sparsity", "1")
    assert (code, error.count("\n")) == (2, 1) and "--target-sparsity: expected a share between 0 and 1, got 1" in error
    assert not (home / "left").exists()


def test_compare_proves_a_conversion(home, capsys):
    shared = ["--data", "text.txt", "--seq-len", "32", "--max-tokens", "65"]
    assert run(["compare", "model", "model", *shared, "--json", "same.json", "--max-kl", "0"]) == 0
    assert json.loads((home / "same.json").read_text())["max_abs_difference"] == 0
    other = tiny_config(vocab_size=258, activation=Relu(), eos_token_id=256, bos_token_id=None)
    hf.save(home / "other", other, model.init(jax.random.key(1), other), tokenizer=home / "tokenizer")
    code, error = answer(capsys, "compare", "model", "other", *shared, "--max-kl", "1e-9")
    assert code == 1 and "mean_kl: expected at most" in error


def test_prune(home, capsys):
    shared = ["--pattern", "2:4", "--calibration", "text.txt", "--seq-len", "32", "--samples", "6", "--batch-size", "2"]
    assert run(["prune", "model", "dass", "--method", "dass", *shared, "--scope", "all"]) == 0
    assert "50.00% of the MLP's weights are zero" in capsys.readouterr().out
    _, params = hf.load(home / "dass")
    values = json.loads((home / "dass" / "prune.json").read_text())
    gate = np.asarray(params["layers"]["ffn"]["gate"])  # groups of 4 outputs
    assert ((gate.reshape(*gate.shape[:2], -1, 4) != 0).sum(-1) == 2).all()
    query = np.asarray(params["layers"]["attention"]["query"])  # groups of 4 inputs
    assert ((query.reshape(2, -1, 4, *query.shape[2:]) != 0).sum(2) == 2).all()
    assert values["sequences"] == 6 and values["mlp_sparsity"] == 0.5 and len(values["matrices"]) == 14
    assert {row["method"] for row in values["matrices"]} == {"dass", "wanda"}
    assert run(["prune", "model", "small", "--method", "magnitude", "--pattern", "0.6"]) == 0
    _, params = hf.load(home / "small")
    assert (np.asarray(params["layers"]["ffn"]["up"]) == 0).mean() == pytest.approx(0.6, abs=1e-3)
    shared = ["--data", "text.txt", "--seq-len", "32", "--max-tokens", "65", "--json", "zeros.json", "--overwrite"]
    assert run(["eval", "dass", *shared, "--pattern", "2:4", "--scope", "all"]) == 0
    assert "50.00% of the MLP's" in (out := capsys.readouterr().out) and "2:4 output: 2 ffn.gate, 2 ffn.up;" in out, out
    weights = json.loads((home / "zeros.json").read_text())["weights"]
    assert weights["mlp_sparsity"] == 0.5 and weights["model_sparsity"] == values["model_sparsity"]
    code, error = answer(capsys, "eval", "small", *shared, "--pattern", "2:4")
    assert code == 1 and "layers.0.ffn.gate: pattern 2:4: " in error and "expected 2" in error


def test_prune_tells_a_raised_damping(home, capsys):
    shared = ["--pattern", "2:4", "--calibration", "text.txt", "--seq-len", "32", "--samples", "2"]
    shared += ["--method", "wanda", "--scope", "all", "--attention", "sparsegpt"]
    # the first layer's attention reads as many different vectors as the text has letters: fewer than channels
    code, told = answer(capsys, "prune", "model", "raised", *shared, "--damp", "1e-10")
    rows = {row["name"]: row for row in json.loads((home / "raised" / "prune.json").read_text())["matrices"]}
    damp = rows["layers.0.attention.query"]["damp"]
    assert code == 0 and 1e-10 < damp < 1e-3
    assert "damping raised" in told and "more matrices, see prune.json" in told
    code, told = answer(capsys, "prune", "model", "as-asked", *shared)
    rows = json.loads((home / "as-asked" / "prune.json").read_text())["matrices"]
    assert code == 0 and {row["damp"] for row in rows} == {None, 0.01} and "damping" not in told


def test_prune_packed(home, capsys):
    options = ["--method", "dass", "--pattern", "2:4", "--calibration", "text.txt", "--samples", "2", "--seq-len", "32"]
    assert run(["prune", "model", "packed", *options, "--packed"]) == 0
    assert " of dense" in capsys.readouterr().out
    assert run(["prune", "model", "zeros", *options]) == 0
    shared = ["--data", "text.txt", "--seq-len", "32", "--max-tokens", "65"]
    assert run(["compare", "packed", "zeros", *shared, "--json", "packed.json", "--max-kl", "0"]) == 0
    values = json.loads((home / "packed" / "prune.json").read_text())
    assert values["settings"]["packed"] and values["bytes"] < values["dense_bytes"]
    wider = ["--pattern", "2:32", "--method", "wanda", "--remainder", "skip"]
    assert run(["prune", "model", "skip", *options, *wider]) == 0
    assert "left dense, as 2:32 does not divide them: 2 matrices, first layers.0.ffn.down" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["dass", "2:4"], "--calibration: expected a text for dass"),
        (["dass", "2:5", "--calibration", "text.txt", "--seq-len", "32"], "layers.0.ffn.gate: pattern 2:5"),
        (["dass", "4:2", "--calibration", "text.txt"], "N:M with N kept of M"),
        (["dass", "half", "--calibration", "text.txt"], "such as 2:4"),
        (["dass", "2:4", "--calibration", "text.txt", "--axis", "input"], "DaSS would be Wanda"),
        (["dass", "2:4", "--calibration", "text.txt"], "--seq-len: expected 1 to the model's 64 positions, got 2048"),
        (["dass", "2:4", "--calibration", "short.txt", "--seq-len", "32"], "at least one window of 32 tokens, got 6"),
        (["dass", "2:4", "--calibration", "missing.txt", "--seq-len", "32"], "missing.txt"),
        (["wanda", "2:4", "--alpha", "1"], "--alpha: expected --method dass beside it"),
        (["wanda", "2:4", "--axis", "output"], "--axis: expected 'input'"),
        (["wanda", "2:4", "--attention", "ria"], "--attention: expected --scope all"),
        (["magnitude", "2:4", "--samples", "4"], "--samples: expected a --method that looks at text beside it"),
        (["magnitude", "2:4", "--scope", "all", "--attention", "wanda"], "--calibration: expected a text for wanda"),
    ],
)
def test_prune_refuses_in_one_line_and_leaves_nothing(home, arguments, told, capsys):
    (home / "short.txt").write_text("short")
    method, pattern, *rest = arguments
    code, error = answer(capsys, "prune", "model", "left", "--method", method, "--pattern", pattern, *rest)
    assert (code, error.count("\n")) == (2, 1) and told in error, error
    assert not [path for path in home.iterdir() if "left" in path.name]


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "model", "model", "--method", "magnitude", "--pattern", "2:4"],
        ["search", "model", "model", "--keep", "0.8", "--calibration", "text.txt"],
        ["search", "model", "other", "--zero-filled", "model", "--keep", "0.8", "--calibration", "text.txt"],
        ["threshold", "model", "model", "--data", "text.txt", "--target-sparsity", "0.5"],
    ],
)
def test_the_model_that_is_read_is_never_overwritten(home, command, capsys):
    before = {path.name: path.read_bytes() for path in (home / "model").iterdir()}
    code, error = answer(capsys, *command, "--overwrite")
    assert (code, error.count("\n")) == (2, 1) and "model: is the model that is read" in error
    assert {path.name: path.read_bytes() for path in (home / "model").iterdir()} == before


def test_search(home, capsys, monkeypatch):
    """A subnet and its exports, which all compute the same; stopped, it goes on; every format loads again."""
    space = ["--keep", "0.8", "--band", "0.05", "--calibration", "text.txt", "--seq-len", "16", "--samples", "4"]
    space += ["--windows", "2", "--ffn-multiple", "8", "--attention-low", "0.5", "--attention-multiple", "2"]
    shared = [*space, "--epochs", "2", "--population", "6"]
    assert run(["search", "model", "sub", *shared, "--zero-filled", "filled"]) == 0
    told = capsys.readouterr().out
    assert "generation 2/2: 12 candidates, best" in told and "0 s left" in told and "repaired" in told
    assert "perplexity on the windows held out of the search, which chose among the last survivors: dense" in told
    config, params = hf.load(home / "sub")
    values = json.loads((home / "sub" / "subnet.json").read_text())
    assert values["parameters"] == model.count(params) and 0.75 <= values["keep"] <= 0.8
    assert len((home / "sub.search" / "candidates.jsonl").read_text().splitlines()) == 12
    filled, zeros = hf.load(home / "filled")
    ids = np.arange(10)[None] % config.vocab_size
    got, expected = (model.forward(p, ids, c).logits for p, c in ((params, config), (zeros, filled)))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert run(["eval", "sub", "--data", "text.txt", "--seq-len", "16", "--max-tokens", "40"]) == 0
    assert run(["generate", "sub", "--prompt", "a", "--max-new-tokens", "3"]) == 0
    assert run(["search", "model", "sub", *shared, "--overwrite"]) == 0  # nothing is left to search
    assert "generation" not in capsys.readouterr().out
    code, error = answer(capsys, "search", "model", "sub", *shared, "--overwrite", "--seed", "1")
    assert (code, error.count("\n")) == (2, 1) and "sub.search: a search with other settings began there" in error
    code, error = answer(capsys, "search", "model", "sub", *shared, "--overwrite", "--epochs", "1")
    assert (code, error.count("\n")) == (2, 1) and "epochs: expected at least the 2 that sub.search has done" in error
    assert run(["search", "model", "uniform", *space, "--method", "uniform", "--repair", "bias"]) == 0
    assert "perplexity on the windows held out of the search: dense" in capsys.readouterr().out
    assert not (home / "uniform.search").exists() and hf.read_config(home / "uniform").mlp_bias


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--keep", "0.8"], "--calibration"),
        (["--keep", "1.2", "--calibration", "text.txt"], "keep: expected a share above 0, up to 1, got 1.2"),
        (["--keep", "0.05", "--calibration", "text.txt", "--band", "0.01"], "keep: expected a ratio that the space"),
        (
            ["--keep", "0.9", "--calibration", "text.txt", "--band", "1e-7", "--ffn-low", "0.3"],
            "band: expected a band of sizes",
        ),
        (["--keep", "0.8", "--calibration", "short.txt"], "calibration: expected a text of at least 85 tokens"),
        (
            ["--keep", "0.8", "--calibration", "text.txt", "--ffn-low", "2"],
            "ffn_low: expected a share above 0",
        ),
        (["--keep", "0.8", "--calibration", "text.txt", "--population", "0"], "population: expected a positive number"),
        *(
            (["--keep", "0.8", "--calibration", "text.txt", *given], told)
            for given, told in (
                (["--method", "depth", "--levels"], "--levels: expected --method search beside it, got 'depth'"),
                (["--method", "random", "--fitness", "kl"], "--fitness: expected --method search beside it, got 'ran"),
                (["--method", "uniform", "--epochs", "3"], "--epochs: expected --method search beside it, got 'uni"),
                (["--method", "magnitude", "--run-folder", "x"], "--run-folder: expected --method search beside it"),
                (["--method", "depth", "--depth", "1"], "--depth: expected a --method that cuts widths beside it, got"),
                (["--levels", "--masks", "rejection"], "--masks: expected no --levels beside it, which fix the index"),
                (["--repair", "bias", "--damp", "0.2"], "--damp: expected --repair closed or admm beside it, got 'bi"),
            )
        ),
        (
            ["--keep", "0.8", "--calibration", "text.txt", "--decilm", "left2"],
            "--decilm: expected an FFN width that 256 divides",
        ),
    ],
)
def test_search_refuses_in_one_line_and_leaves_nothing(home, arguments, told, capsys):
    (home / "short.txt").write_text("short")
    shared = ["--seq-len", "16", "--windows", "2"]
    if "depth" not in arguments:
        shared += ["--ffn-multiple", "8", "--attention-multiple", "2"]
    code, error = answer(capsys, "search", "model", "left", *arguments, *shared)
    assert (code, error.count("\n")) == (2, 1) and told in error, error
    assert not [path for path in home.iterdir() if "left" in path.name]


def test_every_recipe_parses_and_round_trips():
    for path in (Path(__file__).parent.parent / "configs").glob("*.yaml"):
        recipe = config.load(path)
        assert config.from_dict(config.TrainConfig, config.to_dict(recipe)) == recipe


def options(command: type) -> Iterator[str]:
    """The flags of a command, those of its groups included."""
    for field in dataclasses.fields(command):
        if dataclasses.is_dataclass(field.default):
            yield from options(type(field.default))
        elif "Positional" not in str(field.type):
            yield "--" + field.name.replace("_", "-")


@pytest.mark.parametrize(
    ("words", "command"),
    [(name, kind) for name, kind in COMMANDS.items() if kind is not Bench]
    + [("bench train", BenchTrain), ("bench ffn", BenchFfn), ("bench decode", BenchDecode)],
)
def test_help_tells_what_every_option_means(words, command, capsys):
    with pytest.raises(SystemExit) as stop:
        run([*words.split(), "--help"])
    assert stop.value.code == 0
    shown = " ".join(re.sub("[╭╮╰╯│─]+", " ", line).strip() for line in capsys.readouterr().out.splitlines())
    assert [flag for flag in options(command) if f" {flag}" not in shown] == []
    kind = r"(?: \{[^}]*\}(?:\|\S+)?| [A-Z.\[\]]+)*"  # what an option takes
    assert re.findall(rf"--[\w-]+(?:, --no-[\w-]+)?{kind} +\((?:default|required)", shown) == []  # and no word of it
    if words == "train":
        assert "optimizer.weight_decay (float) = 0.1" in shown and "# largest global norm" in shown


def test_version_is_that_of_the_package(capsys):
    written = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["version"]
    assert jsparse.__version__ == written
    with pytest.raises(SystemExit) as stop:
        run(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"jsparse {written}, jax {jax.__version__}, Python 3.")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["evl"], 2, "evl"),
        (["eval", "model"], 2, "jsparse: Missing from jsparse eval: --data STR\n"),
        (["prune", "model"], 2, "Missing from jsparse prune: OUT, --method {dass,wanda,sparsegpt,magnitude,ria}, --"),
        (["eval", "model", "--data", "text.txt", "--dtype", "int8"], 2, "Expected one of ('float32', 'bfloat16').\n"),
        (["eval", "nothing", "--data", "text.txt"], 2, "nothing"),
        (["eval", "model", "--data", "nothing.txt"], 2, "nothing.txt"),
        (["eval", "model", "--data", "text.txt", "--seq-len", "65"], 2, "seq_len"),
        (["train", "recipe.yaml", "optimizer.lrr=1"], 2, "did you mean 'lr'"),
        (["train", "recipe.yaml", "run=other", "data.seq_len=100"], 2, "seq_len"),
        (["train", "nothing.yaml"], 2, "no such recipe"),
        (["generate", "model", "--prompt", "x", "--top-p", "2"], 2, "top_p"),
        (["threshold", "model", "new", "--data", "text.txt"], 2, "--target-sparsity"),
        (["threshold", "model", "model", "--data", "text.txt", "--target-sparsity", "0.9"], 2, "that is read"),
        (["generate", "model", "--prompt", ""], 2, "--prompt: expected a text of at least one token"),
        (["generate", "model", "--prompt", "x", "--seed", "1"], 2, "--seed: expected --temperature above 0 beside it"),
        (["eval", "model", "--data", "text.txt", "--scope", "all"], 2, "--scope: expected --pattern beside it"),
        (["compare", "model", "model", "--data", "text.txt", "--trust-remote-code"], 2, "expected --torch beside it"),
        (["generate", "nothing", "--prompt", "x"], 2, "nothing: not a model folder"),
        (["compare", "model", "--data", "text.txt"], 2, "--torch"),
        (["export", "nothing", "out"], 2, "nothing"),
        (["import", "text.txt", "out"], 1, "text.txt"),
        (["report", "nothing", "--out", "page2"], 2, "nothing"),
        (["report", "--out", "page2"], 2, "PATH: expected a run folder or a result file, or more, got 'none'"),
        (["bench", "train", "--shape", "llama9"], 2, "smollm2-135m"),
        (["bench", "ffn", "--shape", "llama9"], 2, "smollm2-135m"),
        (["bench", "ffn", "--batch", "0"], 2, "--batch: expected a positive number, got 0"),
        (["bench", "ffn", "--sparsity", "1.5"], 2, "--sparsity: expected shares"),
        (["bench", "decode", "--context", "0"], 2, "--context: expected a positive number, got 0"),
        (["bench", "decode", "--variant", "LTE"], 2, "LTE 50 %"),
        (["eval", "model", "--data", "text.txt", "--seq-len", "32", "--mesh", "3", "1", "1"], 2, "mesh"),
    ],
)
def test_bad_input_is_one_line(arguments, code, told, capsys):
    got, error = answer(capsys, *arguments)
    assert (got, error.count("\n")) == (code, 1) and told in error, error
