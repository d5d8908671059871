"""The step: against a plain formula, on every mesh, with accumulation, penalty, teacher and non-finite numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jsparse import model, parallel
from jsparse.config import (
    ConstantLr,
    Distill,
    Fixed,
    MeanL1,
    MeshConfig,
    OptimizerConfig,
    PaperCodeL1,
    ProSparse,
    Silu,
    Target,
)
from jsparse.train import state
from jsparse.train.step import make_step
from tests.helpers import assert_trees_close, random_params
from tests.train_helpers import MODEL, batches, recipe

ONE = parallel.single_device_mesh


def start(config, mesh, model_config=MODEL):
    return state.create(random_params(model_config), config, model_config, mesh)


def run(config, mesh, given, model_config=MODEL):
    """The state and the metrics after each batch."""
    with jax.set_mesh(mesh):
        step, now, found = make_step(config, model_config, mesh), start(config, mesh, model_config), []
        for batch in given:
            now, metrics = step(now, batch)
            found.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    return now, found


@pytest.mark.every_jax
@pytest.mark.parametrize("penalty", [MeanL1(mask="loss", layers="mean"), PaperCodeL1(scale=1e-3)])
def test_equals_plain_formula(tmp_path, penalty):
    """One step: loss as a mean over counted tokens, penalty by its definition, AdamW from optax whole."""
    config = recipe(tmp_path, method=ProSparse(Fixed(0.3), penalty), 
                    optimizer=OptimizerConfig(lr=1e-2, schedule=ConstantLr(), clip=0.1, eps=1e-4))  # fmt: skip
    mesh = ONE()
    [batch] = batches(1, mesh, packed=True)
    params = random_params(MODEL)

    def losses(params):
        output = model.forward(params, batch.tokens, MODEL, segments=batch.segments, probe=lambda trace: trace.hidden)
        nll = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch.targets)
        cross_entropy = jnp.sum(nll * batch.loss_mask.astype(jnp.float32)) / jnp.sum(batch.loss_mask).astype(
            jnp.float32
        )
        mask = batch.loss_mask if isinstance(penalty, MeanL1) and penalty.mask == "loss" else batch.segments > 0
        counted = mask[None, :, :, None].astype(jnp.float32)
        chosen = jnp.abs(output.aux) * counted  # [L, B, T, F]
        tokens, ff = jnp.sum(counted), MODEL.intermediate_size
        match penalty:
            case PaperCodeL1(scale):
                l1 = scale * jnp.sum(chosen)
            case MeanL1():
                l1 = jnp.sum(chosen) / tokens / ff / MODEL.num_hidden_layers
        zeros = 1 - jnp.sum((chosen != 0).astype(jnp.float32), axis=(1, 2, 3)) / tokens / ff
        return cross_entropy + 0.3 * l1, (cross_entropy, 0.3 * l1, zeros)

    (_, (cross_entropy, l1, zeros)), grads = jax.jit(jax.value_and_grad(losses, has_aux=True))(params)
    matrices = jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in str(path[-1]), params)
    clip, adamw = optax.clip_by_global_norm(0.1), optax.adamw(1e-2, 0.9, 0.95, 1e-4, weight_decay=0.1, mask=matrices)
    adamw = optax.chain(clip, adamw)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(adamw.update)(grads, adamw.init(params), params)

    now, [metrics] = run(config, mesh, [batch])
    assert_trees_close(now.params, optax.apply_updates(params, updates), 1e-5)
    expected = {
        "loss": cross_entropy,
        "perplexity": jnp.exp(cross_entropy),
        "penalty": l1,
        "penalty_weight": 0.3,
        "penalty_ratio": l1 / cross_entropy,
        "sparsity": zeros,
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(params),
        "lr": 1e-2,
        "skipped": 0,
        "skipped_in_a_row": 0,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    assert int(now.step) == 1


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    config = recipe(tmp_path_factory.mktemp("step"), method=ProSparse(Fixed(0.3)), accumulate=1)
    return config, *run(config, ONE(), batches(4, ONE(), packed=True))


@pytest.mark.every_jax
def test_accumulation_is_exact(on_one_device):
    """Rows with unequal numbers of counted tokens: the mean of micro-batch means would differ by percents."""
    config, whole, metrics = on_one_device
    parts, metrics_of_parts = run(dataclasses.replace(config, accumulate=4), ONE(), batches(4, ONE(), packed=True))
    assert_trees_close(parts.params, whole.params, 1e-6)
    for a, b in zip(metrics_of_parts, metrics, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)


@pytest.mark.every_jax
@pytest.mark.parametrize(
    "shape", [(1, 8, 1), (2, 2, 2), *(pytest.param(s, marks=pytest.mark.further) for s in [(8, 1, 1), (1, 1, 8)])]
)
def test_every_mesh_gives_the_same_losses(on_one_device, shape):
    config, expected_state, expected = on_one_device
    mesh = parallel.make_mesh(MeshConfig(*shape))
    now, metrics = run(config, mesh, batches(4, mesh, packed=True))
    for step, (a, b) in enumerate(zip(metrics, expected, strict=True), 1):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=f"{name} of step {step}")
    assert_trees_close(now.params, expected_state.params, 1e-4)
    places = model.shardings(MODEL, mesh)
    for tree in (now.params, now.opt_state[1].mu, now.opt_state[1].nu):  # moments lie where their parameters lie
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), tree, places))


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """The metrics of 40 steps on one batch, by no method."""
    return run(recipe(tmp_path_factory.mktemp("free")), ONE(), batches(1, ONE()) * 40)[1]


@pytest.mark.every_jax
def test_bfloat16_computes_float32_keeps(free, tmp_path):
    config, exact = recipe(tmp_path), free[0]
    with jax.numpy_dtype_promotion("standard"):  # jax's attention in bfloat16 cannot do with "strict"
        now, [rounded, *_] = run(dataclasses.replace(config, dtype="bfloat16"), ONE(), batches(1, ONE()))
    assert {x.dtype for x in jax.tree.leaves((now.params, now.opt_state[1].mu, now.opt_state[1].nu))} == {
        jnp.float32.dtype
    }
    assert 0 < abs(rounded["loss"] - exact["loss"]) < 1e-2


def test_non_finite_step_is_skipped(tmp_path):
    """Token 5's embedding is infinite: batches that hold it have no finite loss, others are as good as ever."""
    config = recipe(
        tmp_path,
        method=ProSparse(Target(0.9, start=0, reach=4)),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0),
    )
    mesh = ONE()
    good, bad = (dataclasses.replace(b, tokens=jnp.where(b.tokens == 5, 6, b.tokens)) for b in batches(2, mesh))
    bad = dataclasses.replace(bad, tokens=bad.tokens.at[3, 4].set(5))
    with jax.set_mesh(mesh):
        step, now = make_step(config, MODEL, mesh), start(config, mesh)
        now = dataclasses.replace(now, params=now.params | {"embed": now.params["embed"].at[5].set(jnp.inf)})
        for batch, row, total in ((good, 0, 0), (bad, 1, 1), (bad, 2, 2), (good, 0, 2), (bad, 1, 3)):
            before = jax.device_get(now)
            now, metrics = step(now, batch)
            assert (int(metrics["skipped_in_a_row"]), int(metrics["skipped"])) == (row, total)
            assert int(now.step) == before.step + 1
            learned = [(x.params, x.opt_state, x.control) for x in (now, before)]
            same = jax.tree.leaves(jax.tree.map(np.array_equal, *learned))
            assert all(same) if batch is bad else not any(same[:3])


def test_distillation_reduces_kl(tmp_path):
    teacher_config = dataclasses.replace(MODEL, hidden_size=16, activation=Silu())
    teacher = random_params(teacher_config, seed=7)
    config = recipe(tmp_path, distill=Distill("given below", weight=20.0, temperature=2.0), steps=40)
    mesh = ONE()
    [batch] = batches(1, mesh)
    with jax.set_mesh(mesh):
        step, now, kl = make_step(config, MODEL, mesh, teacher_config), start(config, mesh), []
        for _ in range(40):
            now, metrics = step(now, batch, teacher)
            kl.append(float(metrics["kl"]))
    log_p, log_q = (
        jax.nn.log_softmax(model.forward(p, batch.tokens, c).logits / 2)[batch.loss_mask]
        for p, c in ((teacher, teacher_config), (random_params(MODEL), MODEL))
    )
    assert kl[0] == pytest.approx(float(jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))), rel=1e-5)
    assert kl[-1] < kl[0] / 2


def test_penalty_raises_sparsity(free, tmp_path):
    _, held = run(recipe(tmp_path, method=ProSparse(Fixed(20.0))), ONE(), batches(1, ONE()) * 40)
    assert free[0]["sparsity"] == pytest.approx(held[0]["sparsity"])
    assert held[-1]["sparsity"].mean() > free[-1]["sparsity"].mean() + 0.1


def test_dense_activation_has_no_sparsity(tmp_path):
    _, [metrics] = run(recipe(tmp_path), ONE(), batches(1, ONE()), dataclasses.replace(MODEL, activation=Silu()))
    assert not {"sparsity", "penalty", "penalty_weight"} & metrics.keys()
