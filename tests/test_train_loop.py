"""The loop: the run folder, going on, refusing what does not fit."""

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from etils import epath

from jsparse import config as configs
from jsparse import hf, model, parallel
from jsparse.config import (
    CheckpointConfig,
    ConfigError,
    CosineLr,
    Distill,
    Fixed,
    LogConfig,
    MeshConfig,
    ModelSource,
    OptimizerConfig,
    PaperCodeL1,
    ProSparse,
    Relu,
    Silu,
    Source,
    TrainConfig,
    WsdLr,
)
from jsparse.train import checkpoint, loop
from jsparse.train.host import Clock
from jsparse.train.loop import TrainingError, check_same_recipe, train
from jsparse.train.metrics import MetricsLog, Speed, flops_per_token, read_metrics
from tests.helpers import random_params, save_byte_tokenizer
from tests.train_helpers import MODEL, recipe

TIMES = {"tokens_per_second", "step_seconds", "data_wait", "mfu", "memory_peak"}


def replace(config, path, value):
    """`config` with the field of a dotted path replaced."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: replace(getattr(config, name), rest, value) if rest else value})


def lines(run):
    """metrics.jsonl without what depends on the clock."""
    return [
        {k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(epath.Path(run) / "metrics.jsonl")
    ]


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of eight steps on a 2x2x2 mesh with everything on, and how often its step was compiled."""
    folder = tmp_path_factory.mktemp("run")
    config = recipe(
        folder,
        method=ProSparse(Fixed(0.3)),
        mesh=MeshConfig(2, 2, 2, max_replicated=0.1),
        checkpoint=CheckpointConfig(every=2, keep=1, keep_every=4),
        log=LogConfig(every=3, tensorboard=True, eval_every=4, eval_tokens=300, profile=(3, 2)),
        compile_cache=str(folder / "xla"),
    )
    config = replace(config, "data.eval", config.data.train)
    compiled, make_step = [], loop.make_step

    class Counted:
        """A jitted step that can be compiled ahead of time and in no other way."""

        def __init__(self, *arguments):
            self.step = make_step(*arguments)

        def lower(self, *arguments):
            compiled.append(arguments)
            return self.step.lower(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", Counted)
        return config, train(config), compiled


@pytest.mark.every_jax
def test_step_is_compiled_once(done):
    assert len(done[2]) == 1


@pytest.mark.every_jax
def test_run_folder(done):
    config, summary, _ = done
    run = epath.Path(config.run)
    assert configs.from_dict(TrainConfig, yaml.safe_load((run / "config.yaml").read_text())) == config
    assert checkpoint.steps(run) == [4, 8]  # every fourth and the newest
    assert json.loads((run / "summary.json").read_text()) == dataclasses.asdict(summary)
    assert (summary.steps, summary.tokens, summary.skipped) == (8, 8 * 8 * 16, 0)
    assert summary.parameters == model.count(model.abstract(MODEL))
    assert list((run / "tensorboard").iterdir()) and list((run / "profile").glob("plugins/profile/*/*.xplane.pb"))

    found = lines(run)
    assert [(x["step"], "eval" in x) for x in found] == [
        (0, True), (3, False), (4, True), (6, False), (8, False), (8, True)
    ]  # fmt: skip
    assert found[1]["loss"] > found[4]["loss"] == summary.loss
    assert found[5]["eval"] == summary.eval
    assert len(found[1]["sparsity"]) == len(found[5]["eval"]["tokens.npy"]["dead"]) == MODEL.num_hidden_layers
    assert found[5]["eval"]["tokens.npy"]["perplexity"] < found[0]["eval"]["tokens.npy"]["perplexity"]
    assert all(
        read.keys() >= TIMES - {"mfu", "memory_peak"} for read in read_metrics(run / "metrics.jsonl") if "loss" in read
    )


def test_tensorboard_goes_without_torch(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    with MetricsLog(epath.Path(tmp_path), 0, tensorboard=True) as log:
        log.write(1, {"loss": 2.0})
    assert "tensorboardX" in sys.modules and "torch" not in sys.modules
    assert list((tmp_path / "tensorboard").iterdir())


def test_complete_run_is_left_alone(done, monkeypatch):
    config, summary, _ = done
    monkeypatch.setattr(loop, "make_step", None)
    before = lines(config.run)
    again = train(config)
    assert dataclasses.replace(again, seconds={}) == dataclasses.replace(summary, seconds={})
    assert lines(config.run) == before


@pytest.mark.every_jax
def test_load_run_reads_the_parameters_onto_any_mesh(done):
    config = done[0]
    _, on_one, info = checkpoint.load_run(config.run)
    assert info == {"step": 8, "tokenizer": None}
    model_config, on_all, _ = checkpoint.load_run(config.run, mesh=parallel.make_mesh(MeshConfig(1, 4, 2)))
    assert model_config == MODEL and same(on_one, on_all)
    assert on_one["embed"].dtype == np.float32 and len(on_all["embed"].sharding.device_set) == 8
    _, earlier, info = checkpoint.load_run(config.run, step=4)
    assert info["step"] == 4 and not np.array_equal(earlier["embed"], on_one["embed"])
    with pytest.raises(ConfigError, match=r"expected a checkpoint of step 5, got 4, 8$"):
        checkpoint.load_run(config.run, step=5)
    with pytest.raises(ConfigError, match=r"expected a run folder, but it has no model\.json$"):
        checkpoint.load_run(epath.Path(config.run).parent)


@pytest.mark.every_jax
def test_goes_on_on_another_mesh(done, tmp_path):
    """Four steps on 8x1x1, four more on 2x2x2: the losses of eight on 2x2x2."""
    config = dataclasses.replace(done[0], run=str(tmp_path / "run"), log=LogConfig(every=1, tensorboard=False))
    train(dataclasses.replace(config, steps=4, mesh=MeshConfig(8, 1, 1)))
    summary = train(config)
    losses = {line["step"]: line["loss"] for line in lines(config.run) if "loss" in line}
    assert sorted(losses) == list(range(1, 9))
    for line in lines(done[0].run):
        if "loss" in line:
            assert losses[line["step"]] == pytest.approx(line["loss"], rel=1e-5)
    assert summary.loss == losses[8]


def test_from_a_folder_with_a_teacher_on_packed_documents(tmp_path):
    """SiLU folder to a ReLU student of itself; documents of 3 to 40 tokens; bfloat16."""
    silu = dataclasses.replace(MODEL, activation=Silu())
    hf.save(tmp_path / "model", silu, random_params(silu))
    save_byte_tokenizer(tmp_path / "model")
    store, rng = tmp_path / "store", np.random.default_rng(0)
    store.mkdir()
    lengths = rng.integers(3, 40, 100)
    np.save(store / "tokens.npy", rng.integers(0, 64, lengths.sum()).astype(np.uint16))
    np.save(store / "offsets.npy", np.cumsum(lengths) - lengths)
    about = {"format": 1, "tokens": int(lengths.sum()), "documents": 100, "largest_id": 63}
    (store / "store.json").write_text(json.dumps(about))
    config = recipe(
        tmp_path,
        model=ModelSource(path=str(tmp_path / "model"), activation=Relu()),
        distill=Distill(str(tmp_path / "model")),
        mesh=MeshConfig(8),
        dtype="bfloat16",
        steps=2,
    )
    config = replace(config, "data.train", (Source(str(store)),))
    train(replace(config, "data.documents", "packed"))

    first, _ = lines(config.run)
    assert first["kl"] > 0 and 0.3 < np.mean(first["sparsity"]) < 0.7
    trained, params, info = checkpoint.load_run(config.run)
    assert trained == MODEL and info["tokenizer"] == str(tmp_path / "model")
    assert not same(params, random_params(silu))
    with pytest.raises(
        ConfigError, match=r"^distill\.teacher: expected a model of the same vocabulary \(64\), got 32$"
    ):
        small = dataclasses.replace(silu, vocab_size=32)
        hf.save(tmp_path / "small", small, random_params(small))
        train(dataclasses.replace(config, run=str(tmp_path / "other"), distill=Distill(str(tmp_path / "small"))))


def test_diverging_run_ends(tmp_path):
    config = recipe(tmp_path, optimizer=OptimizerConfig(lr=1e30, clip=np.inf, max_skipped=3), mesh=MeshConfig(8, 1, 1),
                    checkpoint=CheckpointConfig(every=1))  # fmt: skip
    with pytest.raises(TrainingError, match=r"^step 4: the loss or its gradient was not finite for 3 steps in a row"):
        train(config)
    _, params, info = checkpoint.load_run(config.run)
    assert info["step"] == 3 and all(np.isfinite(x).all() for x in jax.tree.leaves(params))


# ---- What does not fit is refused in one line, before anything heavy


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.seq_len", 65, r"data\.seq_len: expected at most the model's max_position_embeddings \(64\), got 65"),
        ("accumulate", 2, r"data\.batch_size: expected a multiple of accumulate x mesh.data x mesh.fsdp \(16\), got 8"),
        ("mesh", MeshConfig(3), r"mesh: .* does not divide 8 devices"),
        (
            "mesh",
            MeshConfig(1, 1, 8),
            r"mesh\.max_replicated: expected at least 0\.\d+, .*\(.*norm\.scale.*\), got 0\.02",
        ),
        ("optimizer.schedule", WsdLr(warmup_steps=9), r"optimizer\.schedule\.warmup_steps: expected 0 to 7.*, got 9"),
        ("model.activation", Silu(), r"model\.activation: expected one that makes zeros, .*, got 'silu'"),
        ("data.train", (Source("no.npy"),), r"no\.npy: no such file"),
    ],
)
def test_refused(tmp_path, monkeypatch, path, value, message):
    monkeypatch.setattr(loop, "starting_params", None)
    config = recipe(tmp_path, method=ProSparse(Fixed(0.1)), mesh=MeshConfig(8, 1, 1))
    with pytest.raises(ConfigError, match=f"^{message}$"):
        train(replace(config, path, value))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mesh", MeshConfig(1, 8, 1)),
        ("log.every", 3),
        ("checkpoint.keep", 9),
        ("remat", "full"),
        ("accumulate", 4),
        ("data.prefetch", 5),
        ("data.eval", (Source("other.npy"),)),
        ("optimizer.max_skipped", 1),
        ("steps", 9),
    ],
)
def test_recipe_may_change(tmp_path, path, value):
    check_same_recipe(_saved(recipe(tmp_path)), replace(recipe(tmp_path), path, value), step=4)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer.lr", 1.0, "optimizer.lr 0.003 -> 1.0"),
        ("data.seed", 3, "data.seed 0 -> 3"),
        ("dtype", "bfloat16", "dtype 'float32' -> 'bfloat16'"),
        ("model", ModelSource(path="elsewhere"), "model.path None -> 'elsewhere'"),
        ("steps", 3, "steps: expected at least the 4 that"),
        ("method", ProSparse(Fixed(0.1)), "method.type 'dense' -> 'prosparse'"),
    ],
)
def test_recipe_may_not_change(tmp_path, path, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_same_recipe(_saved(recipe(tmp_path)), replace(recipe(tmp_path), path, value), step=4)


def test_steps_may_change_while_the_learning_rate_so_far_does_not(tmp_path):
    wsd = replace(recipe(tmp_path, steps=20), "optimizer.schedule", WsdLr(warmup_steps=2, decay_steps=5))
    check_same_recipe(_saved(wsd), replace(wsd, "steps", 40), step=15)
    with pytest.raises(ConfigError, match="steps 20 -> 40"):
        check_same_recipe(_saved(wsd), replace(wsd, "steps", 40), step=16)
    cosine = replace(wsd, "optimizer.schedule", CosineLr(warmup_steps=2))
    with pytest.raises(ConfigError, match="steps 20 -> 40"):
        check_same_recipe(_saved(cosine), replace(cosine, "steps", 40), step=3)


def test_paper_code_penalty_ties_the_run_to_its_micro_batch(tmp_path):
    config = recipe(tmp_path, method=ProSparse(Fixed(0.1), PaperCodeL1()))
    with pytest.raises(ConfigError, match="accumulate 1 -> 2"):
        check_same_recipe(_saved(config), replace(config, "accumulate", 2), step=4)


def _saved(config):
    run = epath.Path(config.run)
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(configs.dump(config))
    return run


def test_flops_of_a_known_model():
    """SmolLM2-135M, tied: 134 515 008 parameters; attention 6 L N H T."""
    config = dataclasses.replace(
        MODEL, vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    assert flops_per_token(config, 2048) == 6 * 134_515_008 + 6 * 30 * 9 * 64 * 2048
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    assert flops_per_token(untied, 2048) == flops_per_token(config, 2048)


def test_speed(monkeypatch, tmp_path):
    """12 steps in 6 seconds, of which one went to an evaluation and one to waiting for data."""
    config, now = recipe(tmp_path), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock()
    h200 = SimpleNamespace(device_kind="NVIDIA H200")
    speed = Speed(config, MODEL, SimpleNamespace(devices=np.array([h200, h200]), size=2), clock, start=100)
    for activity, seconds in (("eval", 1.0), ("wait for data", 1.0), ("step", 4.0)):
        with clock(activity):
            now[0] += seconds
    values = speed(112)
    tokens = config.data.batch_size * config.data.seq_len
    assert values["tokens"] == 112 * tokens
    assert values["tokens_per_second"] == pytest.approx(12 * tokens / 5)
    assert values["step_seconds"] == pytest.approx(5 / 12)
    assert values["data_wait"] == pytest.approx(1 / 5)
    assert values["mfu"] == pytest.approx(12 * tokens / 5 * flops_per_token(MODEL, config.data.seq_len) / (2 * 989e12))
