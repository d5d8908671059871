"""LTE: losses and costs against the paper's formulas, routers, thresholds for a target, and both stages as runs."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import model
from jsparse.config import (
    ConfigError,
    LlamaConfig,
    LogConfig,
    LteStage1,
    LteStage2,
    ModelSource,
    NoisyTopK,
    OptimizerConfig,
    Predictor,
    Router,
    Silu,
    Source,
    TrainConfig,
    from_dict,
)
from jsparse.methods import lte
from jsparse.methods.grouping import permute
from jsparse.model import FFNTrace
from jsparse.train import checkpoint, loop
from jsparse.train.loop import train
from jsparse.train.metrics import read_metrics
from jsparse.train.optimizer import make_optimizer
from jsparse.train.terms import training_config
from tests.helpers import assert_trees_close, random_params, tiny_config, tokens
from tests.train_helpers import MODEL, recipe

DENSE = dataclasses.replace(MODEL, activation=Silu())  # F = 64
IDS = tokens(DENSE, 4, 24)
LLAMA_7B = LlamaConfig()


def with_routers(mode="hard", **options):
    """A model of 2 layers of 8 blocks; routers are random unless `init` says how they start."""
    params, config = lte.add_routers(random_params(DENSE), DENSE, Router(8, mode), tokens=IDS, **options)
    if "init" not in options:
        ffn = params["layers"]["ffn"]
        ffn["router"] = jax.random.normal(jax.random.key(1), ffn["router"].shape)
    return params, config


def look(params, config):
    """What a probe sees of IDS: the blocks' factors [L, 4, 24, 8] and what each puts out."""
    return jax.device_get(_look(params, config))


@functools.partial(jax.jit, static_argnames="config")
def _look(params, config):

    def probe(trace):
        norms = jnp.linalg.norm(trace.params["down"], axis=-1)[None, None]
        put_out = jnp.sum((jnp.abs(trace.hidden) * norms).reshape(4, 24, 8, 8), axis=-1)
        return trace.factors, put_out

    return model.trunk(params, IDS, config, probe=probe)[1]


# --------------------------------------------------------------------------------------------------------------------
# Losses and costs
# --------------------------------------------------------------------------------------------------------------------


def test_losses_equal_the_formulas():
    scores = jax.random.uniform(jax.random.key(0), (2, 5, 6))
    mask = jnp.asarray([[True] * 5, [True] * 2 + [False] * 3])
    trace = FFNTrace(None, None, None, None, {"router_threshold": jnp.float32(0.4)}, None, scores)
    got = lte.probe(mask, epsilon=1e-3)(trace)
    rows = np.asarray(scores)[np.asarray(mask)]  # [7, 6]
    assert float(got.efficiency) == pytest.approx(np.mean(rows**2) * 7, rel=1e-5)
    assert float(got.separation) == pytest.approx(np.mean(1 / ((rows - 0.4) ** 2 + 1e-3)) * 7, rel=1e-4)
    assert float(got.off) == pytest.approx(np.mean(rows < 0.4) * 7, rel=1e-5)
    assert float(got.missing) == pytest.approx(np.mean(1 - rows) * 7, rel=1e-5)
    assert float(got.undecided) == pytest.approx(np.mean((rows > 0.1) & (rows < 0.9)) * 7, rel=1e-5)
    assert float(got.no_block) == np.sum(np.all(rows <= 0.4, axis=1))


def test_separation_is_finite_on_the_threshold_and_was_not_as_printed():
    trace = FFNTrace(None, None, None, None, {"router_threshold": jnp.float32(0.5)}, None, jnp.full((1, 1, 2), 0.5))
    assert float(lte.probe(epsilon=1e-2)(trace).separation) == pytest.approx(100)
    assert not np.isfinite(lte.probe(epsilon=0.0)(trace).separation)


def test_costs_of_llama_7b_are_the_papers():
    assert lte.gib(lte.flops_per_token(LLAMA_7B)) == pytest.approx(12.06, abs=0.005)
    routed = dataclasses.replace(LLAMA_7B, router=Router(32))
    cost = lte.flops_per_token(routed, 0.689)
    assert lte.gib(cost) == pytest.approx(6.59, abs=0.005)  # Table 1, WikiText-103
    assert cost.router / lte.flops_per_token(routed).ffn == pytest.approx(0.0104, abs=1e-4)
    assert lte.flops_per_token(routed, router=False) == lte.flops_per_token(LLAMA_7B)
    read = lte.bytes_per_token(LLAMA_7B)
    assert (read.ffn / 1e9, read.attention / 1e9, read.head / 1e9) == pytest.approx((8.66, 4.29, 0.26), abs=0.005)


# --------------------------------------------------------------------------------------------------------------------
# Routers and thresholds
# --------------------------------------------------------------------------------------------------------------------


def test_how_routers_start():
    def scores(**options):
        return look(*with_routers("soft", **options))[0]

    assert np.all(scores(init="zeros") == 0.5)
    start = scores(init="open")
    assert start.mean() > 0.8 and np.mean(start > 0.5) > 0.8
    params, config = with_routers("soft", init="predictor", dropped=0.75)
    fitted, weighed = look(params, config)
    assert np.mean(fitted > 0.5) == pytest.approx(0.25, abs=0.1)
    put_out = weighed / fitted
    largest = put_out >= np.sort(put_out, axis=-1)[..., -2:-1]  # two of eight
    assert np.mean(largest[fitted > 0.5]) > 0.5  # a quarter by chance


def test_calibration_meets_the_target_and_keeps_the_layers_apart():
    params, config = with_routers()
    params["layers"]["ffn"]["router"] *= jnp.asarray([1.0, 3.0])[:, None, None]
    for target in (0.3, 0.8):
        thresholds = lte.calibrate(params, config, [IDS[:2], IDS[2:]], target)
        off = np.mean(look(lte.set_thresholds(params, thresholds), config)[0] == 0, axis=(1, 2, 3))
        assert off.mean() == pytest.approx(target, abs=0.005) and abs(off[0] - off[1]) > 0.05
    with pytest.raises(ConfigError, match="target_sparsity: expected a share between 0 and 1, got 1"):
        lte.calibrate(params, config, [IDS], 1.0)


def test_calibration_tells_scores_apart_that_lie_close_together():
    """Routers after a few steps from zero: all scores within a hair of the threshold."""
    params, config = with_routers()
    params["layers"]["ffn"]["router"] *= 1e-2
    thresholds = lte.calibrate(params, config, [IDS], 0.5)
    off = look(lte.set_thresholds(params, thresholds), config)[0] == 0
    assert off.mean() == pytest.approx(0.5, abs=0.01)


def test_thresholds_meet_a_goal_on_the_text_measured():
    params, config = with_routers()
    other = tokens(DENSE, 2, 24, seed=1)  # calibrated on other text than is measured
    calls = []

    def evaluate(params):
        calls.append(np.mean(look(params, config)[0] == 0, axis=(1, 2, 3)))
        return 10 * (1 + calls[-1].mean()), calls[-1]

    new, point = lte.solve_thresholds(evaluate, params, config, [other], sparsity=0.6, tolerance=5e-3)
    assert 0.6 <= point.mean_sparsity < 0.61 and len(set(point.sparsity)) == 2
    assert len(calls) <= 5
    np.testing.assert_array_equal(evaluate(new)[1], point.sparsity)
    calls.clear()
    _, point = lte.solve_thresholds(evaluate, params, config, [other], rise=0.3, tolerance=5e-3)
    assert 12.9 < point.perplexity <= 13
    assert calls[0].max() == 0  # a share of 0 keeps every block
    with pytest.raises(ConfigError, match="goal: expected one of sparsity, perplexity and rise"):
        lte.solve_thresholds(evaluate, params, config, [other], sparsity=0.5, rise=0.3)


def test_union_density_grows_with_the_batch():
    params, config = with_routers()
    used = look(params, config)[0] > 0  # [L, 4, T, E]
    found = lte.union_density(params, config, IDS, (1, 2, 4))
    np.testing.assert_allclose(found[1], used.mean(axis=(1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found[4], used.any(axis=1).mean(axis=(1, 2)), rtol=1e-6)
    assert np.all(found[1] < found[2]) and np.all(found[2] < found[4])
    with pytest.raises(ConfigError, match="batches: expected divisors of the 4 rows, got 3"):
        lte.union_density(params, config, IDS, (3,))


def test_only_the_router_learns_from_a_predictors_loss():
    params, config = with_routers("off", threshold=0.5)

    def loss(params):
        return jnp.sum(model.trunk(params, IDS, config, probe=lte.predictor_probe())[1].cross_entropy)

    grads = jax.jit(jax.grad(loss))(params)
    router = grads["layers"]["ffn"].pop("router")
    assert np.any(router) and not any(np.any(g) for g in jax.tree.leaves(grads))


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def test_partitions_have_their_own_rates():
    """Adam's first update is its rate, whatever the gradient's size."""
    config = training_config(LteStage1(block_size=8), DENSE)
    params = random_params(config)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), params)
    router = lambda tree: tree["layers"]["ffn"]["router"]

    def update(method):
        with jax.numpy_dtype_promotion("standard"):
            optimizer = make_optimizer(OptimizerConfig(lr=1e-4, weight_decay=0.0, eps=1e-12), config, None, method)
            return jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params)[0])(grads)

    first = update(LteStage1(block_size=8, router_lr=1e-2))
    np.testing.assert_allclose(router(first), 100, rtol=1e-4)  # times the step's 1e-4: 1e-2
    np.testing.assert_allclose(first["layers"]["ffn"]["gate"], 1, rtol=1e-4)
    assert not np.any(first["layers"]["ffn"]["router_threshold"])
    second = update(LteStage2())
    assert not np.any(router(second)) and np.all(second["embed"] != 0)
    beside = update(Predictor(0.5, block_size=8))
    assert np.any(router(beside)) and not np.any(beside["embed"])


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Both stages as runs, on tokens that a small model learns."""
    folder = tmp_path_factory.mktemp("lte")
    base = recipe(folder)
    base = dataclasses.replace(
        base,
        model=ModelSource(config=DENSE),
        data=dataclasses.replace(base.data, seq_len=32, batch_size=32, eval=(Source(base.data.train[0].path),)),
        log=LogConfig(every=1, tensorboard=False, eval_every=8, eval_tokens=2000),
    )
    first = dataclasses.replace(base, run=str(folder / "stage1"), method=LteStage1(0.5, block_size=8))
    second = dataclasses.replace(base, run=str(folder / "stage2"), model=ModelSource(run=first.run),
                                 method=LteStage2(0.5), steps=4)  # fmt: skip
    return first, train(first), second, train(second)


def test_stages_reach_the_target_on_held_out_text(stages):
    for summary in stages[1], stages[3]:
        [found] = summary.eval.values()
        assert np.mean(found["block_sparsity"]) == pytest.approx(0.5, abs=0.02)
    assert {"soft_loss", "soft_to_hard"} <= stages[1].eval["tokens.npy"].keys()


def test_stage_1_adds_the_papers_losses(stages):
    """The penalty of every step, from the means that its line tells: lambda rises as half a cosine."""
    lines = [row for row in read_metrics(stages[1].run + "/metrics.jsonl") if "loss" in row]
    assert all({"sparsity", "undecided", "no_block", "missing"} <= row.keys() for row in lines)
    for step, row in enumerate(lines, start=1):
        rise = (1 - np.cos(np.pi * min(1, step / 8 / 0.8))) / 2
        expected = row["penalty_weight"] * row["efficiency"] + 0.2 * rise * row["separation"]
        assert row["penalty"] == pytest.approx(expected, rel=1e-4)
    assert lines[0]["penalty_weight"] != lines[-1]["penalty_weight"]  # the controller's work
    beside = [row for row in read_metrics(stages[3].run + "/metrics.jsonl") if "loss" in row]
    assert all("penalty" not in row and len(row["no_block"]) == len(row["sparsity"]) == 2 for row in beside)


def test_stage_2_starts_from_stage_1_and_leaves_its_routers(stages):
    config, before, _ = checkpoint.load_run(stages[0].run)
    after_config, after, _ = checkpoint.load_run(stages[2].run)
    assert config == after_config and config.router == Router(8, "hard")
    np.testing.assert_array_equal(before["layers"]["ffn"]["router"], after["layers"]["ffn"]["router"])
    assert np.any(before["layers"]["ffn"]["gate"] != after["layers"]["ffn"]["gate"])


def test_stage_1_resumes_to_the_bit_and_is_not_taken_half_done(stages, tmp_path):
    first = stages[0]
    again = dataclasses.replace(first, run=str(tmp_path / "again"))
    shutil.copytree(first.run, again.run)
    shutil.rmtree(tmp_path / "again/checkpoints/8")
    second = dataclasses.replace(stages[2], run=str(tmp_path / "second"), model=ModelSource(run=again.run))
    with pytest.raises(ConfigError, match=r"^model.run: expected a complete run .* got '.*again after 4 of 8 steps'"):
        train(second)
    asked = dataclasses.replace(second, model=ModelSource(run=again.run, step=4))
    assert loop.describe_model(asked, tmp_path / "second", 0)[0].router == Router(8, "hard")
    with pytest.raises(ConfigError, match=r"cannot go on from step 4 with another recipe \(steps 8 -> 12\)"):
        train(dataclasses.replace(again, steps=12))
    train(again)
    assert_trees_close(checkpoint.load_run(again.run)[1], checkpoint.load_run(first.run)[1], 0)


@pytest.mark.parametrize("method, mode", [
    (NoisyTopK(0.5, 8), "softmax"), (Predictor(0.75, block_size=8), "top"), (Predictor(0.5, "oracle", 1), "oracle")
])  # fmt: skip
def test_baselines_are_runs_too(tmp_path, method, mode):
    config = recipe(tmp_path, method=method, model=ModelSource(config=DENSE), steps=2)
    train(config)
    routed, params, _ = checkpoint.load_run(config.run)
    assert routed.router == Router(method.block_size, mode)
    assert np.all(params["layers"]["ffn"]["router_threshold"] == method.sparsity)
    lines = [row for row in read_metrics(config.run + "/metrics.jsonl") if "loss" in row]
    assert np.mean(lines[-1]["sparsity"]) == pytest.approx(method.sparsity)


def test_permuted_neurons_are_the_same_model():
    config = tiny_config(mlp_bias=True)
    params = random_params(config)
    order = np.stack([np.random.default_rng(i).permutation(48) for i in range(2)])
    forward = jax.jit(lambda p: model.forward(p, tokens(config, 1, 7), config).logits)
    for tree in (params, model.unstack(params)):
        a, b = forward(tree), forward(permute(tree, order))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert np.any(permute(params, order)["layers"]["ffn"]["gate"] != params["layers"]["ffn"]["gate"])


def test_bad_input(tmp_path):
    def answer(**changes):
        with pytest.raises(ConfigError) as error:
            train(recipe(tmp_path, **changes))
        return str(error.value)

    shape = ModelSource(config=DENSE)
    assert answer(model=shape, method=LteStage1(0.5, block_size=24)) == (
        "router.block_size: expected a divisor of intermediate_size (64), got 24"
    )
    assert answer(model=shape, method=LteStage2()) == (
        "model.run: expected stage 1's run, whose model has LTE's routers, mode 'hard', for method lte_stage2, "
        "got 'no router'"
    )
    top = ModelSource(config=dataclasses.replace(DENSE, router=Router(8, "top")))
    assert "for method lte_stage2, got 'top'" in answer(model=top, method=LteStage2())
    routed = ModelSource(config=dataclasses.replace(DENSE, router=Router(8)))
    assert answer(model=routed, method=LteStage1()) == (
        "model: expected one without routers for method lte_stage1, got 'routers'"
    )
    assert "expected a run folder" in answer(model=ModelSource(run=str(tmp_path / "none")), method=LteStage2())
    for target in (0.0, 1.0, 1.5):
        with pytest.raises(ConfigError, match=r"method.target_sparsity: expected a share between 0 and 1"):
            method = {"type": "lte_stage1", "target_sparsity": target}
            from_dict(TrainConfig, {"run": "r", "model": {"path": "m"}, "data": {}, "method": method})
    for name in ("eta", "separation", "separation_ramp", "epsilon"):
        with pytest.raises(ConfigError, match=f"{name}: expected a number of at least 0, got -1"):
            LteStage1(**{name: -1.0})
    with pytest.raises(ConfigError, match=r"model.step: expected none without `model.run`, got 3"):
        from_dict(TrainConfig, {"run": "r", "model": {"path": "m", "step": 3}, "data": {}})
