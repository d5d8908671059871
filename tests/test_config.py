"""Settings in and out: what is written reads back equal, and whatever is wrong is answered by one line."""

import dataclasses
import types
import typing
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jsparse.config import (
    Cats,
    Cett,
    ConfigError,
    ConstantLr,
    CosineLr,
    Dense,
    FatRelu,
    Fixed,
    Gelu,
    Hold,
    LlamaConfig,
    LongRope,
    MeanL1,
    ModelSource,
    Relu,
    Router,
    ShiftedRelu,
    Silu,
    Source,
    Stages,
    Target,
    TrainConfig,
    WsdLr,
    describe,
    dump,
    from_dict,
    load,
    to_dict,
    with_threshold,
)

RECIPE: dict[str, Any] = {
    "run": "runs/a",
    "model": {"path": "models/a"},
    "data": {"train": [{"path": "a.txt"}], "batch_size": 8},
    "method": {"type": "prosparse", "weight": {"type": "stages", "peaks": [0.1, 0.2], "steps": [0, 5, 10]}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The recipe with one setting replaced."""
    tree = yaml.safe_load(yaml.safe_dump(RECIPE))
    *parents, last = path.split(".")
    inner = tree
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return tree


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


# --------------------------------------------------------------------------------------------------------------------
# Round trip
# --------------------------------------------------------------------------------------------------------------------

POSITIVE = st.integers(1, 2**40)
SHARE = st.floats(0, 1, exclude_min=True, exclude_max=True)


@st.composite
def stages(draw) -> Stages:
    peaks = draw(st.lists(SHARE, min_size=1, max_size=4))
    steps = draw(st.sets(st.integers(0, 10**6), min_size=len(peaks) + 1, max_size=len(peaks) + 1))
    return Stages(tuple(peaks), tuple(sorted(steps)))


# Fields whose values must fit each other.
FITTING: dict[tuple[type, str], st.SearchStrategy[Any]] = {
    (LlamaConfig, "num_attention_heads"): st.sampled_from([6, 12]),
    (LlamaConfig, "num_key_value_heads"): st.sampled_from([1, 2, 3]),
    (LlamaConfig, "head_dim"): st.just(4),
    (LlamaConfig, "layers"): st.none(),
    (Router, "block_size"): st.just(1),
    (Hold, "pattern"): st.text(),
    (LongRope, "short_factor"): st.tuples(SHARE, SHARE),
    (LongRope, "long_factor"): st.tuples(SHARE, SHARE),
    (Target, "start"): st.integers(0, 9),
    (Target, "reach"): st.integers(10, 99),
    (TrainConfig, "accumulate"): st.just(1),
}


def configs(kind: Any, field: tuple[type, str] | None = None) -> st.SearchStrategy[Any]:
    """Values of a setting's type, down to the leaves."""
    if field in FITTING:
        return FITTING[field]
    if kind is Stages:
        return stages()
    if kind is ModelSource:
        other = configs(LlamaConfig)
        return st.builds(ModelSource, path=st.text()) | st.builds(ModelSource, config=other, activation=st.just(Relu()))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{f.name: configs(hints[f.name], (kind, f.name)) for f in dataclasses.fields(kind)})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([configs(k) for k in args])
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return st.lists(configs(args[0]), max_size=3).map(tuple)
        return st.tuples(*[configs(k) for k in args])
    return {int: POSITIVE, float: SHARE, str: st.text(), bool: st.booleans(), types.NoneType: st.none()}[kind]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(configs(TrainConfig))
def test_what_is_written_reads_back_equal(config):
    assert from_dict(TrainConfig, to_dict(config)) == config
    assert from_dict(TrainConfig, yaml.safe_load(dump(config))) == config


@settings(max_examples=60, deadline=None)
@given(configs(LlamaConfig))
def test_a_models_config_reads_back_equal(config):
    assert from_dict(LlamaConfig, yaml.safe_load(dump(config))) == config


def test_every_default_is_written():
    written = to_dict(from_dict(TrainConfig, RECIPE))
    assert written["optimizer"]["schedule"] == {"type": "cosine", "warmup_steps": 0, "final": 0.1}
    assert written["method"]["penalty"] == {"type": "mean", "ff": "mean", "layers": "sum", "mask": "all", "scale": 1.0}
    assert written["distill"] is None and written["data"]["train"][0]["weight"] == 1.0
    lines = describe(TrainConfig).splitlines()
    assert "  optimizer.lr (float) = 3e-05  # at the peak" in lines
    assert "run (text)  # run folder: checkpoints, metrics, resolved config" in lines
    assert "optimizer  # AdamW with float32 moments. Norm scales, biases and thresholds are never decayed." in lines


def test_help_tells_the_choices_and_the_meaning_of_every_setting_of_a_recipe():
    lines = {line.split(" ")[0]: line for line in map(str.strip, describe(TrainConfig).splitlines())}
    told_above_the_field = "(windows | packed) = windows  # windows: documents joined by the end token"
    assert told_above_the_field in lines["data.documents"]
    assert "(list of 2 int | null) = null" in lines["log.profile"]
    assert lines["method.weight.type=fixed"].endswith("# The baseline: a constant weight after `start` steps.")
    silent = [name for name, line in lines.items() if "# " not in line and "(" in line]
    given = ("model.config.", "model.activation.")  # Hugging Face's own names, and numbers that their type explains
    told_by_type = ["method.weight.peaks", "method.weight.steps", "method.weight.value", "method.penalty.scale"]
    assert [name for name in silent if not name.startswith(given)] == told_by_type


def test_yaml_of_every_spelling():
    config = from_dict(TrainConfig, yaml.safe_load("""
        run: runs/b
        model: {config: {hidden_size: 64, rope: {type: linear, factor: 2}, activation: relu, eos_token_id: [2, 3]}}
        data: {}
        optimizer: {lr: 1e-4, schedule: {type: wsd, decay_steps: 10}, eps: 1E-9}
        method: dense
        log: {profile: [3, 2]}
    """))  # fmt: skip
    assert config.optimizer.lr == 1e-4 and config.optimizer.eps == 1e-9  # text in YAML 1.1
    assert config.optimizer.schedule == WsdLr(decay_steps=10)
    assert config.model.config.rope.factor == 2.0 and isinstance(config.model.config.rope.factor, float)
    assert config.model.config.activation == Relu() and config.model.config.eos_token_ids == (2, 3)
    assert config.method == Dense() and config.log.profile == (3, 2)
    assert LlamaConfig(eos_token_id=None).eos_token_ids == () and LlamaConfig(eos_token_id=7).eos_token_ids == (7,)


# --------------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------------

METHODS = "dense, prosparse, lte_stage1, lte_stage2, noisy_top_k, predictor"
BAD = [
    # Unknown, missing
    ("optimizer.learning_rte", 1, "unknown setting optimizer.learning_rte; known here: lr, schedule, "),
    ("optimizer.sched", "wsd", "unknown setting optimizer.sched (did you mean 'schedule'?); known here: lr, "),
    ("stepz", 3, "unknown setting stepz (did you mean 'steps'?); known here: run, model, "),
    ("method.weight.peak", [1], "unknown setting method.weight.peak (did you mean 'peaks'?); known here: peaks, steps"),
    ("data.train", [{"pth": "a"}], "unknown setting data.train[0].pth (did you mean 'path'?); known here: path, "),
    ("optimizer", {1: 2}, "unknown setting optimizer.1; known here: lr, "),
    ("data.train", [{}], "missing setting data.train[0].path"),
    ("method", "prosparse", "missing setting method.weight"),
    ("model", {}, "model.path: expected one of it, `model.run` and `model.config`, got []"),
    ("model.config", {}, "model.path: expected one of it, `model.run` and `model.config`, got ['path', 'config']"),
    # Wrong types
    ("steps", 1.5, "steps: expected a whole number, got 1.5"),
    ("steps", "10", "steps: expected a whole number, got '10'"),
    ("steps", True, "steps: expected a whole number, got True"),
    ("steps", None, "steps: expected a whole number, got None"),
    ("run", 5, "run: expected text, got 5"),
    ("optimizer.lr", "fast", "optimizer.lr: expected a number, got 'fast'"),
    ("optimizer.lr", True, "optimizer.lr: expected a number, got True"),
    ("optimizer.lr", float("nan"), "optimizer.lr: expected a number, got nan"),
    ("optimizer.lr", [1], "optimizer.lr: expected a number, got [1]"),
    ("log.tensorboard", 1, "log.tensorboard: expected true or false, got 1"),
    ("optimizer", None, "optimizer: expected a mapping of settings, got None"),
    ("data", [1], "data: expected a mapping of settings, got [1]"),
    ("data.train", {"path": "a"}, "data.train: expected a list, got {'path': 'a'}"),
    ("data.train", ["a.txt"], "data.train[0]: expected a mapping of settings, got 'a.txt'"),
    ("log.profile", [1], "log.profile: expected 2 values, got [1]"),
    ("log.profile", [1, "a\nb"], "log.profile[1]: expected a whole number, got 'a\\nb'"),
    ("checkpoint.keep_every", "often", "checkpoint.keep_every: expected a whole number, got 'often'"),
    # Wrong alternatives
    ("dtype", "bfloat17", "dtype: expected one of float32, bfloat16, got 'bfloat17' (did you mean 'bfloat16'?)"),
    ("dtype", [16], "dtype: expected one of float32, bfloat16, got [16]"),
    ("method", "prospars", f"method.type: expected one of {METHODS}, got 'prospars' (did you mean 'prosparse'?)"),
    ("method", ["dense"], f"method.type: expected one of {METHODS}, got ['dense']"),
    ("method.type", [1], f"method.type: expected one of {METHODS}, got [1]"),
    ("method", {}, f"method.type: expected one of {METHODS}, got None"),
    ("model.activation", "gelo", "model.activation.type: expected one of silu, gelu, relu, "),
    # Out of range
    ("steps", 0, "steps: expected a positive number, got 0"),
    ("accumulate", 0, "accumulate: expected a positive number, got 0"),
    ("accumulate", 3, "accumulate: expected a divisor of data.batch_size (8), got 3"),
    ("loss_chunk", 0, "loss_chunk: expected a positive number, got 0"),
    ("unroll", 0, "unroll: expected a positive number, got 0"),
    ("data.seq_len", 0, "data.seq_len: expected a positive number, got 0"),
    ("data.batch_size", -8, "data.batch_size: expected a positive number, got -8"),
    ("data.train", [{"path": "a", "weight": 0}], "data.train[0].weight: expected a positive number, got 0.0"),
    ("checkpoint.every", 0, "checkpoint.every: expected a positive number, got 0"),
    ("checkpoint.keep", 0, "checkpoint.keep: expected a positive number, got 0"),
    ("checkpoint.keep_every", 0, "checkpoint.keep_every: expected a positive number, got 0"),
    ("log.every", 0, "log.every: expected a positive number, got 0"),
    ("log.eval_every", 0, "log.eval_every: expected a positive number, got 0"),
    ("optimizer.lr", -1, "optimizer.lr: expected a number of at least 0, got -1.0"),
    ("optimizer.beta2", 1, "optimizer.beta2: expected at least 0 and below 1, got 1.0"),
    ("optimizer.clip", 0, "optimizer.clip: expected a positive number, got 0.0"),
    ("distill", {"teacher": "t", "temperature": 0}, "distill.temperature: expected a positive number, got 0.0"),
    ("hold", {"scope": "all"}, "hold.scope: expected a pattern beside it, got 'all'"),
    ("method.weight.steps", [0, 5], "method.weight.steps: expected one more than the 2 peaks, got (0, 5)"),
    ("method.weight.peaks", [], "method.weight.steps: expected one more than the 0 peaks, got (0, 5, 10)"),
    ("method.weight.steps", [0, 5, 5], "method.weight.steps: expected increasing steps, got (0, 5, 5)"),
    ("method.weight.peaks", [0.1, -1], "method.weight.peaks: expected weights of at least 0, got (0.1, -1.0)"),
    ("method.weight", {"type": "target", "sparsity": 80}, "method.weight.sparsity: expected a share between 0 and 1, "),
    ("method.weight", {"type": "target", "sparsity": 0.8, "start": 1000},
     "method.weight.reach: expected a step after start (1000), got 1000"),
    ("model", {"config": {"num_attention_heads": 0}},
     "model.config.num_attention_heads: expected a positive number, got 0"),
    ("model", {"config": {"num_key_value_heads": 5}},
     "model.config.num_key_value_heads: expected a divisor of num_attention_heads (32), got 5"),
    ("model", {"config": {"head_dim": 7}},
     "model.config.head_dim: expected an even number (RoPE rotates pairs), got 7"),
    ("model", {"config": {"head_dim": 4, "rope": {"type": "longrope", "short_factor": [1, 1], "long_factor": [1],
                                                  "original_max_position_embeddings": 8}}},
     "model.config.rope.long_factor: expected 2 factors (head_dim / 2), got 1"),
]  # fmt: skip


@pytest.mark.parametrize("path, value, message", BAD, ids=[f"{path}={value}" for path, value, _ in BAD])
def test_bad_setting_is_answered_by_one_line(path, value, message):
    with pytest.raises(ConfigError) as error:
        from_dict(TrainConfig, changed(path, value))
    answer = str(error.value)
    assert answer.startswith(message) if message.endswith(", ") else answer == message
    assert "\n" not in answer


@pytest.mark.parametrize("values", [None, "recipe", [RECIPE], 3])
def test_a_recipe_is_a_mapping(values):
    with pytest.raises(ConfigError, match=r"^TrainConfig: expected a mapping of settings, got "):
        from_dict(TrainConfig, values)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [p for key, x in inner for p in leaves(x, (*path, key))]


WHOLE = to_dict(from_dict(TrainConfig, changed("model", {"config": {}}) | {"distill": {"teacher": "t"}}))
ODD_TAGS = [{"type": "dense"}, {"type": []}, {"type": "wsd", "x": 1}]
ODD_NUMBERS = [True, 0, -1, 10**30, 0.5, float("inf"), float("nan"), "1e-4"]
JUNK = st.sampled_from([None, "", "x\ny", "dense", [], [[]], [None], {}, {None: 1}, *ODD_NUMBERS, *ODD_TAGS])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(leaves(WHOLE)), JUNK)
def test_any_setting_replaced_by_anything_reads_or_is_answered_by_one_line(path, junk):
    tree = yaml.safe_load(yaml.safe_dump(WHOLE))
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = junk
    try:
        config = from_dict(TrainConfig, tree)
    except ConfigError as error:
        assert "\n" not in str(error) and str(error)
    else:
        assert from_dict(TrainConfig, to_dict(config)) == config


# --------------------------------------------------------------------------------------------------------------------
# Recipes and overrides
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, found",
    [
        (["steps=7"], {"steps": 7}),
        (["steps=7", "steps=8"], {"steps": 8}),
        (["optimizer.lr=1e-4", "optimizer.clip=.inf"], {"optimizer.lr": 1e-4, "optimizer.clip": float("inf")}),
        (["optimizer.schedule=wsd"], {"optimizer.schedule": WsdLr()}),
        (["optimizer.schedule=wsd", "optimizer.schedule.decay_steps=5"], {"optimizer.schedule": WsdLr(decay_steps=5)}),
        (["optimizer.schedule.type=constant"], {"optimizer.schedule": ConstantLr()}),
        (["optimizer.schedule.warmup_steps=3", "optimizer.schedule.type=cosine"], {"optimizer.schedule": CosineLr()}),
        (["method=dense"], {"method": Dense()}),
        (["method.weight.type=fixed", "method.weight.value=0.5"], {"method.weight": Fixed(0.5)}),
        (["method.weight={type: fixed, value: 1e-3}"], {"method.weight": Fixed(1e-3)}),
        (["method.weight.type=stages"], {"method.weight": Stages((0.1, 0.2), (0, 5, 10))}),  # no change of type
        (["method.weight.peaks=[1, 2]"], {"method.weight": Stages((1.0, 2.0), (0, 5, 10))}),
        (["method.penalty.layers=mean", "method.penalty.type=mean"], {"method.penalty": MeanL1()}),
        (["method.penalty.type=mean", "method.penalty.layers=mean"], {"method.penalty": MeanL1(layers="mean")}),
        (["model.activation=relu"], {"model.activation": Relu()}),
        (["model.activation.type=fatrelu", "model.activation.threshold=0.2"], {"model.activation": FatRelu(0.2)}),
        (["data.tokenizer=null", "data.train=[{path: b.txt, weight: 2}]"], {"data.train": (Source("b.txt", 2.0),)}),
        (["distill.teacher=models/a"], {"distill.teacher": "models/a", "distill.weight": 1.0}),
        (["run=a=b"], {"run": "a=b"}),
    ],
    ids=str,
)
def test_overrides(recipe, overrides, found):
    config = load(recipe, overrides)
    for path, value in found.items():
        got = config
        for name in path.split("."):
            got = getattr(got, name)
        assert got == value


@pytest.mark.parametrize(
    "override, message",
    [
        ("steps", "steps: expected an override of the form field.sub=value, got 'steps'"),
        ("=3", "=3: expected an override of the form field.sub=value, got '=3'"),
        ("stepz=3", "unknown setting stepz (did you mean 'steps'?); known here: "),
        ("type=3", "unknown setting type (did you mean 'dtype'?); known here: "),
        ("optimizer.lrr=3", "unknown setting optimizer.lrr (did you mean 'lr'?); known here: "),
        ("data.seq_len.x=3", "data.seq_len: expected a whole number, got {'x': 3}"),
        ("run.x=3", "run: expected text, got "),
        (
            "data.train.0.path=b",
            "data.train.0.path=b: expected a mapping of settings at train, got [{'path': 'a.txt'}]",
        ),
        ("data.batch_size.x=3", "data.batch_size.x=3: expected a mapping of settings at batch_size, got 8"),
        ("steps=[", "steps=[: not YAML: "),
        ("method.weight.type=fixd", "method.weight.type: expected one of stages, fixed, target, got 'fixd' "),
        ("method.weight.type=fixed", "missing setting method.weight.value"),
        ("steps=", "steps: expected a whole number, got None"),
    ],
)
def test_bad_override_is_answered_by_one_line(recipe, override, message):
    with pytest.raises(ConfigError) as error:
        load(recipe, [override])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_unreadable_recipes_are_answered_by_one_line(tmp_path):
    files = {
        "empty.yaml": ("", "missing setting run"),
        "list.yaml": ("- a", "{}: expected a mapping of settings, got ['a']"),
        "broken.yaml": ("a: [1,\nb: }", "{}: not YAML: "),
        "tag.yaml": ("a: !!python/object/apply:os.getcwd []", "{}: not YAML: "),
    }
    for name, (text, message) in files.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError) as error:
            load(tmp_path / name)
        assert str(error.value).startswith(message.format(tmp_path / name)) and "\n" not in str(error.value)
    (tmp_path / "latin.yaml").write_bytes(b"run: \xff")
    for name, message in (("none.yaml", "no such recipe"), ("latin.yaml", "not a readable"), (".", "not a readable")):
        with pytest.raises(ConfigError) as error:
            load(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: {message}") and "\n" not in str(error.value)


def test_thresholds_of_activations():
    assert with_threshold(Relu(), 0.1) == with_threshold(FatRelu(0.5), 0.1) == FatRelu(0.1)
    assert with_threshold(Silu(), 0.1) == with_threshold(Cats(0.5), 0.1) == Cats(0.1)
    assert with_threshold(ShiftedRelu(0.3), 0.1) == ShiftedRelu(0.3, 0.1)
    for activation in (Gelu(), Cett()):
        with pytest.raises(ConfigError, match=f"^activation: expected relu, .* got {activation.type}$"):
            with_threshold(activation, 0.1)
