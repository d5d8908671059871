"""Subnet search: genomes and sizes, mutation, evolution, the supernet, compact models, and the whole."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse import model, parallel
from jsparse.config import ConfigError, MeshConfig
from jsparse.methods import evolution, subnet
from jsparse.methods.evolution import Candidate, Evolution, Rates, State, evolve, mutate, mutate_masks
from jsparse.methods.importance import Fluctuation, Importance, Magnitude, Obs, RandomScore, importance, keep_top
from jsparse.methods.repair import repair_levels
from jsparse.methods.search import SearchConfig, draw_texts, search
from jsparse.methods.space import (
    Budget,
    Ground,
    SpaceConfig,
    Widths,
    adaptive,
    depth_only,
    fit,
    make_ground,
    make_space,
    of_widths,
    resize,
    starts,
    uniform,
)
from jsparse.methods.subnet import Genome, Sizes, compact, from_json, to_json, whole, zero_filled
from jsparse.methods.supernet import make_supernet, scorer, with_levels
from tests.helpers import random_params, tiny_config, tokens

CONFIG = tiny_config(vocab_size=68, num_hidden_layers=4, intermediate_size=64)
SPACE = SpaceConfig(ffn_low=0.25, ffn_multiple=8, attention_low=0.5, attention_multiple=2, depth=2, protected=1)
BUDGET = Budget(0.7, band=0.03)
SMALL = Evolution(epochs=3, population=12, mutants=6, crossovers=3, parents=4)
TEXT = np.random.default_rng(0).integers(68, size=2000)


def scores_of(config: Any = CONFIG, seed: int = 0) -> Importance:
    rng = np.random.default_rng(seed)
    return Importance(*(rng.lognormal(size=x.shape).astype(np.float32) for x in whole(config)[1:]))


@functools.cache
def ground_of(budget: Budget = BUDGET, space: SpaceConfig = SPACE) -> Ground:
    return make_ground(CONFIG, scores_of(), budget, make_space(CONFIG, budget.keep, space))


def random_genome(seed: int, ground: Ground) -> Genome:
    """A subnet of the space with random index sets."""
    rng = np.random.default_rng(seed)
    start = uniform(dataclasses.replace(ground, scores=scores_of(seed=seed)))
    rates = Rates(mask=1.0, ratio=0.5, depth=1.0)
    found = [mutate(start, rates, Evolution(sharpness=0.0), ground, rng) for _ in range(40)]
    return next(genome for genome in found if genome is not None and not genome.layers.all())


# --------------------------------------------------------------------------------------------------------------------
# Subnets
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_the_compact_model_is_the_masked_one(bias: bool) -> None:
    """Logits, and the number of parameters by formula; zero-filled weights are zero where the masks say so."""
    config = dataclasses.replace(CONFIG, attention_bias=bias, mlp_bias=bias, tie_word_embeddings=not bias)
    params, ids = random_params(config), tokens(config, 2, 12)
    genome = random_genome(3, ground_of())
    assert not genome.layers.all() and len(set(genome.ffn.sum(1))) > 1
    masked = zero_filled(params, genome)
    small, shapes = compact(params, config, genome)
    assert shapes.num_hidden_layers == genome.layers.sum() and shapes.layers is not None
    got, expected = model.forward(small, ids, shapes).logits, model.forward(masked, ids, config).logits
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(expected - model.forward(params, ids, config).logits).max() > 0.1
    count = Sizes.of(config).count(genome)
    assert count == model.count(small) == model.count(model.abstract(shapes))
    nonzero = sum(int(jnp.sum(x != 0)) for x in jax.tree.leaves(masked["layers"]["attention"]))
    assert nonzero == sum(int(np.sum(x != 0)) for layer in small["layers"] for x in jax.tree.leaves(layer["attention"]))


def test_everything_kept_is_the_model_itself() -> None:
    params = random_params(CONFIG)
    small, shapes = compact(params, CONFIG, whole(CONFIG))
    assert shapes == CONFIG and jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), small, params))
    genome = whole(CONFIG)
    genome.layers[1], genome.ffn[:, 40:] = False, False
    small, shapes = compact(params, CONFIG, genome)
    assert shapes == dataclasses.replace(CONFIG, num_hidden_layers=3, intermediate_size=40)  # plain again
    assert small["layers"]["ffn"]["up"].shape == (3, 32, 40)


def test_genomes_as_json_and_by_name() -> None:
    ground = ground_of()
    a, b = random_genome(0, ground), random_genome(1, ground)
    again = from_json(json.loads(json.dumps(to_json(a))), CONFIG)
    assert all((x == y).all() for x, y in zip(a, again, strict=True))
    assert subnet.digest(a) == subnet.digest(again) != subnet.digest(b)
    gone = int(np.flatnonzero(~a.layers)[0])
    again.ffn[gone] = ~again.ffn[gone]  # of no effect
    assert subnet.digest(again) == subnet.digest(a)


def test_widened_is_the_same_function() -> None:
    """With whole heads and FFN widths of a multiple, cut out of the zero-filled model."""
    config = dataclasses.replace(CONFIG, intermediate_size=72)
    params, genome = random_params(config), whole(config)
    genome.layers[2], genome.pairs[:, :, 1], genome.values[:, :, 3] = False, False, False
    genome.ffn[0, 5:] = genome.ffn[1, :40] = genome.ffn[3, 60:] = False
    masked = zero_filled(params, genome)
    small, shapes = compact(masked, config, subnet.widened(genome, 24))
    assert [(s.intermediate_size, s.value_dim, s.rope_pairs) for s in shapes.layer_shapes] == [
        (24, 8, None), (48, 8, None), (72, 8, None)]  # fmt: skip
    ids = tokens(config, 2, 9)
    got, expected = (model.forward(p, ids, c).logits for p, c in ((small, shapes), (masked, config)))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    with pytest.raises(ConfigError, match=r"layers\.3: expected an FFN width that goes up .* dense model's 72, got 60"):
        subnet.widened(genome, 50)


# --------------------------------------------------------------------------------------------------------------------
# Importance
# --------------------------------------------------------------------------------------------------------------------


def test_obs_scores_by_hand() -> None:
    """Against explicit inverses and loops over one layer's coupled rows and columns."""
    config = dataclasses.replace(CONFIG, attention_bias=True)
    params, ids = random_params(config), np.asarray(tokens(config, 5, 16))
    weights = functools.partial(Obs, pairs="weights")
    kinds = (weights(), Magnitude(), Fluctuation(), RandomScore(1), Obs(terms="output"), weights(terms="normalised"))
    survey = importance(params, config, ids, kinds, batch_size=2)
    layer = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["layers"])
    x = params["embed"][ids]
    y, trace = jax.jit(model.run_block, static_argnames="config")(
        jax.tree.map(lambda w: w[0], params["layers"]), x, config=config
    )
    reads = [np.asarray(t, np.float64).reshape(80, -1) for t in trace]

    def phi(weight: np.ndarray, read: np.ndarray) -> np.ndarray:
        gram = read.T @ read
        inverse = np.linalg.inv(gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram)))
        return weight.reshape(len(gram), -1) ** 2 / np.diag(inverse)[:, None]

    attention, ffn = layer["attention"], layer["ffn"]
    neurons = phi(ffn["gate"], reads[2]).sum(0) + phi(ffn["up"], reads[2]).sum(0) + phi(ffn["down"], reads[3]).sum(1)
    np.testing.assert_allclose(survey.scores[0].ffn[0], neurons, rtol=1e-3)
    query, key = (phi(attention[name], reads[0]).sum(0).reshape(-1, 8) for name in ("query", "key"))
    for head in range(2):
        for pair in range(4):
            both = [pair, pair + 4]
            expected = query[2 * head : 2 * head + 2, both].sum() + key[head, both].sum()
            np.testing.assert_allclose(survey.scores[0].pairs[0, head, pair], expected, rtol=1e-3)
            q, k = (np.einsum("td,dnh->tnh", reads[0], attention[name]) + attention[f"{name}_bias"]
                    for name in ("query", "key"))  # fmt: skip
            energies = (q[:, 2 * head : 2 * head + 2, both] ** 2).sum((1, 2)).mean(), (k[:, head, both] ** 2).sum(1)
            expected = math.sqrt(energies[0] * energies[1].mean())
            np.testing.assert_allclose(survey.scores[4].pairs[0, head, pair], expected, rtol=1e-4)
    value, output = phi(attention["value"], reads[0]).sum(0), phi(attention["output"], reads[1]).sum(1)
    expected = value.reshape(2, 8) + output.reshape(2, 2, 8).sum(1)
    np.testing.assert_allclose(survey.scores[0].values[0], expected, rtol=1e-3)

    squares = sum((layer["ffn"][n] ** 2).sum(0) for n in ("gate", "up")) + (ffn["down"] ** 2).sum(1)
    np.testing.assert_allclose(survey.scores[1].ffn[0], squares, rtol=1e-4)
    np.testing.assert_allclose(survey.scores[2].ffn[0], reads[3].var(0) * (ffn["down"] ** 2).sum(1), rtol=1e-2)
    assert survey.scores[3].ffn.min() >= 0 and not np.array_equal(survey.scores[3].ffn[0], survey.scores[3].ffn[1])
    np.testing.assert_allclose(survey.scores[4].ffn[0], phi(ffn["down"], reads[3]).sum(1), rtol=1e-3)
    for part, terms in zip(survey.scores[5], (3.0, 2.0, 2.0), strict=True):  # coupled matrices, each of sum 1
        np.testing.assert_allclose(part[0].sum(), terms, rtol=1e-5)
    a, b = (np.asarray(t, np.float64).reshape(80, -1) for t in (x, y))
    cosine = np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(survey.influence[0], 1 - cosine.mean(), rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Space and budget
# --------------------------------------------------------------------------------------------------------------------


def test_table_1() -> None:
    """The paper's ranges at its ratios, and between them."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=32, intermediate_size=1000, head_dim=100)
    for keep, attention, ffn, depth in ((0.9, 90, 600, 0), (0.8, 80, 400, 0), (0.7, 70, 200, 2), (0.5, 60, 100, 4)):
        space = make_space(config, keep, SpaceConfig(ffn_multiple=10, attention_multiple=2))
        assert (space.values[0], space.ffn[0], space.depth) == (attention, ffn, depth)
        assert (space.values[-1], space.pairs[-1], space.ffn[-1]) == (100, 50, 1000)
        assert np.flatnonzero(~space.removable).tolist() == [0, 1, 30, 31]
    assert make_space(config, 0.85, SpaceConfig(ffn_multiple=10)).ffn[0] == 500


@pytest.mark.parametrize("of", ["total", "decoder"])
def test_band(of: Any) -> None:
    """Every subnet that comes out is within the band of what its definition counts."""
    budget = Budget(0.6, of, 0.04)
    ground = ground_of(budget)
    dense = Sizes.of(CONFIG)
    fixed = dense.ends if of == "decoder" else 0
    whole_size = dense.count(whole(CONFIG)) - fixed
    spared = uniform(ground, spare_attention=True)
    assert spared.pairs.all() and spared.values.all() and not spared.ffn.all()
    for genome in (uniform(ground), spared, adaptive(ground), random_genome(0, ground), random_genome(1, ground)):
        share = (dense.count(genome) - fixed) / whole_size
        assert 0.56 <= share <= 0.6
        assert set(genome.ffn.sum(1)) <= set(ground.space.ffn.tolist())
        for part, grid in ((genome.pairs, ground.space.pairs), (genome.values, ground.space.values)):
            assert (part.sum(-1) == part[:, :1].sum(-1)).all() and set(part.sum(-1).flat) <= set(grid.tolist())


def test_a_band_without_room_for_a_second_start() -> None:
    """Steps of an FFN alone are too long for it, those of attention are not."""
    space = make_space(CONFIG, 0.7, dataclasses.replace(SPACE, ffn_multiple=16))
    ground = make_ground(CONFIG, scores_of(), Budget(0.7, band=0.015), space)
    with pytest.raises(ConfigError, match="band: expected a band of sizes"):
        uniform(ground, spare_attention=True)
    assert len(starts(ground)) == 1 and len(starts(ground_of())) == 2


def test_depth_alone() -> None:
    influence = np.array([3.0, 1.0, 2.0, 9.0])
    genome = depth_only(CONFIG, influence, Budget(0.62))
    assert genome.layers.tolist() == [True, False, False, True] and genome.ffn.all()
    with pytest.raises(ConfigError, match="keep: expected a ratio that one layer is not above"):
        depth_only(CONFIG, influence, Budget(0.1))


def test_what_the_space_refuses() -> None:
    with pytest.raises(ConfigError, match=r"keep: expected .* \(25\.7% to 100\.0% of total; .* widen it\), got 10\.0%"):
        ground_of(Budget(0.1, band=0.01))
    with pytest.raises(ConfigError, match="band: expected a band of sizes that a subnet of the space meets"):
        ground_of(Budget(0.7, band=1e-6))
    with pytest.raises(ConfigError, match=r"ffn: expected a multiple of 8 from 60\.8 to 62\.08"):
        make_space(CONFIG, 0.5, SpaceConfig(ffn_low=0.95, ffn_high=0.97, ffn_multiple=8))
    with pytest.raises(ConfigError, match="depth: expected at most the 2 layers that are not protected, got 3"):
        make_space(CONFIG, 0.5, SpaceConfig(depth=3, protected=1))
    with pytest.raises(ConfigError, match="attention_multiple: expected a positive even number"):
        SpaceConfig(attention_multiple=3)
    with pytest.raises(ConfigError, match="band: expected a share above 0, below keep"):
        Budget(0.5, band=0.5)
    with pytest.raises(ConfigError, match="mutants: expected mutants and crossovers within the population of 10"):
        Evolution(population=10)


# --------------------------------------------------------------------------------------------------------------------
# Mutation
# --------------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31), st.floats(0, 1), st.sampled_from([0.0, 1.0]), st.sampled_from(["constructive", "rejection"])
)
def test_masks_keep_their_size_and_overlap(seed: int, similarity: float, sharpness: float, masks: Any) -> None:
    ground = ground_of()
    genome = uniform(dataclasses.replace(ground, scores=scores_of(seed=seed % 7)))
    rng = np.random.default_rng(seed)
    options = Evolution(similarity=similarity, sharpness=sharpness, masks=masks, tries=50)
    changed = mutate_masks(genome, 1.0, options, ground, rng)
    for before, after in zip(genome[1:], changed[1:], strict=True):
        kept = before.sum(-1)
        assert (after.sum(-1) == kept).all()
        assert ((before & after).sum(-1) >= similarity * kept - 1e-6).all()
    untouched = mutate_masks(genome, 0.0, options, ground, rng)
    assert all((a == b).all() for a, b in zip(untouched, genome, strict=True))


def test_the_papers_rejection_seldom_moves() -> None:
    """At a ratio of 0.5 and alpha = 0.8 no set overlaps enough; the constructive change always moves."""
    ground = ground_of()
    genome = of_widths(Widths(np.ones(4, bool), *(np.full(4, i) for i in (2, 0, 0))), ground)
    for masks, moves in (("rejection", False), ("constructive", True)):
        changed = mutate_masks(genome, 1.0, Evolution(masks=masks), ground, np.random.default_rng(0))
        assert bool((changed.ffn != genome.ffn).any()) == moves


def test_sharpness_prefers_what_matters_least() -> None:
    """Neurons that leave have lower scores than those that stay, and those that come higher than those left out."""
    ground = ground_of()
    genome = of_widths(Widths(np.ones(4, bool), *(np.full(4, i) for i in (2, 0, 0))), ground)
    rng = np.random.default_rng(0)
    means = {}
    for sharpness in (0.0, 3.0):
        found = [mutate_masks(genome, 1.0, Evolution(sharpness=sharpness), ground, rng) for _ in range(50)]
        left = np.mean([ground.scores.ffn[genome.ffn & ~new.ffn].mean() for new in found])
        came = np.mean([ground.scores.ffn[~genome.ffn & new.ffn].mean() for new in found])
        means[sharpness] = left, came
    assert means[3.0][0] < 0.8 * means[0.0][0] and means[3.0][1] > 1.2 * means[0.0][1]


def test_resize_follows_importance() -> None:
    """From importance alone, changes of width commute with taking the most important."""
    ground = ground_of()
    up, down = (Widths(np.ones(4, bool), *(np.full(4, i) for i in level)) for level in ((5, 2, 2), (1, 1, 0)))
    there = resize(resize(of_widths(up, ground), down, ground), up, ground)
    assert all((a == b).all() for a, b in zip(there, of_widths(up, ground), strict=True))
    for row, kept, count in zip(ground.scores.ffn, there.ffn, there.ffn.sum(1), strict=True):
        assert (kept == keep_top(row, int(count))).all()


def test_equals_go_alike_with_and_without_levels() -> None:
    """Of equal scores the first is kept, by the search's steps as by `keep_top`, which levels are repaired for."""
    ground = dataclasses.replace(ground_of(), scores=Importance(*(np.round(x) for x in scores_of())))
    assert len(np.unique(ground.scores.ffn[0])) < 20
    up, down = (Widths(np.ones(4, bool), *(np.full(4, i) for i in level)) for level in ((5, 2, 2), (1, 1, 0)))
    moved = resize(resize(of_widths(up, ground), down, ground), up, ground)
    for mask, score in zip(moved[1:], ground.scores, strict=True):
        assert (mask == keep_top(score, int(mask.sum(-1).flat[0]))).all()


def test_layers_come_and_go_within_limits() -> None:
    ground, rng = ground_of(), np.random.default_rng(0)
    widths = ground.widths(uniform(ground))
    seen = set()
    for _ in range(200):
        evolution.mutate_depth(widths, ground.space, rng)
        seen.add(tuple(widths.layers.tolist()))
    assert seen == {(True, a, b, True) for a in (True, False) for b in (True, False)}


# --------------------------------------------------------------------------------------------------------------------
# Evolution
# --------------------------------------------------------------------------------------------------------------------


def fake_fitness(genomes: Any) -> np.ndarray:
    """Neurons at the front are worth keeping."""
    return np.array([4 - g.ffn[:, :16].mean() - g.pairs[:, :, 0].mean() for g in genomes])


class Stop(Exception):
    pass


def test_stops_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    ground = ground_of()
    begin = [uniform(ground), *starts(ground)]  # of equals one
    whole_run = evolve(begin, fake_fitness, ground, SMALL, folder=tmp_path / "whole").parents

    def stop(now: Any) -> None:
        if now.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        evolve(begin, fake_fitness, ground, SMALL, folder=tmp_path / "parts", progress=stop)
    log = tmp_path / "parts" / "candidates.jsonl"
    log.write_text(log.read_text() + '{"epoch": 2, "lo')  # a kill in the middle of a line
    again = evolve(begin, fake_fitness, ground, SMALL, folder=tmp_path / "parts").parents
    for a, b in zip(whole_run, again, strict=True):
        assert (a.origin, a.parameters, a.loss) == (b.origin, b.parameters, b.loss)
        assert all((x == y).all() for x, y in zip(a.genome, b.genome, strict=True))
    lines = log.read_text()
    assert lines == (tmp_path / "whole" / "candidates.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == len({row["digest"] for row in rows}) == 36  # none twice
    assert [row["origin"] for row in rows[:3]] == ["initial", "initial", "wild"]
    low, high = ground.bounds
    assert all(low <= row["parameters"] <= high for row in rows)
    assert {row["origin"] for row in rows[12:]} == {"mutant", "crossover", "wild"}
    assert min(row["loss"] for row in rows) == again[0].loss < rows[0]["loss"]
    assert rows[5]["perplexity"] == pytest.approx(math.exp(rows[5]["loss"]))


def test_what_is_not_finite_does_not_survive() -> None:
    ground = ground_of()

    def fitness(genomes: Any) -> np.ndarray:
        losses = fake_fitness(genomes)
        losses[::2] = np.inf
        return losses

    found = evolve([uniform(ground)], fitness, ground, SMALL).parents
    assert len(found) == 4 and all(math.isfinite(c.loss) for c in found)


def test_states_that_do_not_fit(tmp_path: Path) -> None:
    ground = ground_of()
    start = uniform(ground)
    evolution.save_state(tmp_path, State(1, (Candidate(start, "initial", 1, 2.0),), frozenset({"a"})))
    loaded = evolution.load_state(tmp_path, start)
    assert loaded is not None and loaded.epoch == 1 and loaded.parents[0].loss == 2.0
    with pytest.raises(ConfigError, match="expected a search of a model of shapes"):
        evolution.load_state(tmp_path, start._replace(ffn=start.ffn[:, :8]))
    (tmp_path / "state.npz").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"state\.npz: damaged"):
        evolution.load_state(tmp_path, start)


# --------------------------------------------------------------------------------------------------------------------
# The supernet
# --------------------------------------------------------------------------------------------------------------------


def cross_entropy(params: Any, config: Any, windows: np.ndarray) -> float:
    logits = model.forward(params, jnp.asarray(windows[:, :-1], jnp.int32), config).logits
    picked = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), windows[:, 1:, None], axis=-1)
    return -float(picked.mean())


def test_supernet_scores_the_compact_models() -> None:
    """Cross-entropy and KL, one by one, together, and with windows and devices that do not divide."""
    params, ground = random_params(CONFIG), ground_of()
    windows = TEXT[:51].reshape(3, 17)
    genomes = [random_genome(seed, ground) for seed in range(3)]
    expected = [cross_entropy(*compact(params, CONFIG, g), windows) for g in genomes]
    net = make_supernet(params, CONFIG, windows)
    np.testing.assert_allclose(scorer(net, CONFIG, batch=2)(genomes), expected, rtol=1e-5)
    np.testing.assert_allclose(scorer(net, CONFIG, batch=4, together=2)(genomes), expected, rtol=1e-5)
    with jax.set_mesh(parallel.make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))):
        there = jax.device_put(params, model.shardings(CONFIG, parallel.make_mesh(MeshConfig(data=4, tensor=2))))
        spread = make_supernet(there, CONFIG, windows)
        np.testing.assert_allclose(scorer(spread, CONFIG, batch=2)(genomes), expected, rtol=1e-5)

    kl = scorer(make_supernet(params, CONFIG, windows, kl=True), CONFIG, batch=4)([*genomes, whole(CONFIG)])
    ids = jnp.asarray(windows[:, :-1], jnp.int32)
    dense = np.asarray(jax.nn.log_softmax(model.forward(params, ids, CONFIG).logits), np.float64)
    masked = np.asarray(
        jax.nn.log_softmax(model.forward(zero_filled(params, genomes[0]), ids, CONFIG).logits), np.float64
    )
    np.testing.assert_allclose(kl[0], np.mean(np.sum(np.exp(dense) * (dense - masked), -1)), rtol=1e-4)
    assert abs(kl[3]) < 1e-5 < kl[:3].min()


def test_levels_are_the_repaired_weights() -> None:
    """A genome scored with levels is the model whose matrices are repaired for just its widths."""
    params, ground = random_params(CONFIG), ground_of()
    ids = np.asarray(tokens(CONFIG, 6, 16))
    levels = repair_levels(params, CONFIG, ids, ground.scores, ground.space.values.tolist(), ground.space.ffn.tolist())
    genome, windows = uniform(ground), TEXT[:34].reshape(2, 17)
    net = make_supernet(params, CONFIG, windows, levels=levels)
    one = repair_levels(
        params, CONFIG, ids, ground.scores, [int(genome.values[0, 0].sum())], [int(genome.ffn[0].sum())]
    )
    picked = {"attention": {"output": one.output[0, 0]}, "ffn": {"down": one.down[0, 0]}}
    kept = genome.ffn[0]
    assert not picked["ffn"]["down"][~kept].any() and picked["ffn"]["down"][kept].any()
    got = with_levels(params, levels, Genome(*map(jnp.asarray, genome)))["layers"]
    np.testing.assert_allclose(got["ffn"]["down"][0], picked["ffn"]["down"], atol=1e-5)
    np.testing.assert_allclose(got["attention"]["output"][0], picked["attention"]["output"], atol=1e-5)
    loss = scorer(net, CONFIG, batch=1)([genome])[0]
    filled = zero_filled(params | {"layers": got}, genome)
    np.testing.assert_allclose(loss, cross_entropy(filled, CONFIG, windows), rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# The whole
# --------------------------------------------------------------------------------------------------------------------

SETTINGS = SearchConfig(budget=BUDGET, space=SPACE, evolution=SMALL)
TEXTS = draw_texts(TEXT, seq_len=16, calibration=20, windows=2)


def test_search_resumes_and_refuses_other_settings(tmp_path: Path) -> None:
    params = random_params(CONFIG)
    stages: list[str] = []
    found = search(params, CONFIG, TEXTS, SETTINGS, folder=tmp_path, on_stage=stages.append)
    assert stages == ["importance", "search", "repair"] and found.report.candidates == 36
    again = search(params, CONFIG, TEXTS, SETTINGS, folder=tmp_path)
    assert again.report == found.report
    assert Sizes.of(CONFIG).count(found.genome) == found.report.parameters
    assert all(row.after <= row.before * (1 + 1e-5) for row in found.report.repair)
    for changed, message in (
        (
            dataclasses.replace(SETTINGS, budget=Budget(0.8, band=0.03)),
            r"other settings began there: budget\.keep: expected 0\.7, got 0\.8",
        ),
        (
            dataclasses.replace(SETTINGS, evolution=dataclasses.replace(SMALL, seed=1)),
            r"evolution\.seed: expected 0, got 1",
        ),
        (  # what was asked for, before what follows from it
            dataclasses.replace(
                SETTINGS, evolution=dataclasses.replace(SMALL, population=99, crossovers=SMALL.mutants)
            ),
            rf"evolution\.population: expected {SMALL.population}, got 99; .*--run-folder",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            search(params, CONFIG, TEXTS, changed, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"model: expected '[0-9a-f]{16}', got '[0-9a-f]{16}'"):
        search(random_params(CONFIG, seed=1), CONFIG, TEXTS, SETTINGS, folder=tmp_path)


@pytest.mark.parametrize("method", ["uniform", "fluctuation", "depth"])
def test_baselines(method: Any) -> None:
    budget = Budget(0.7, band=0.03)
    found = search(random_params(CONFIG), CONFIG, TEXTS, dataclasses.replace(SETTINGS, method=method, budget=budget))
    assert found.report.keep <= 0.7 and found.report.candidates == 0
    assert (found.genome.layers.sum() < 4) == (method == "depth")
    assert len(found.report.repair) == 2 * found.genome.layers.sum()


def test_texts() -> None:
    assert [part.shape for part in TEXTS] == [(20, 16), (2, 17), (2, 17)]
    rows = {row[:16].tobytes() for part in TEXTS for row in part.astype(np.int64)}
    assert len(rows) == 24  # disjoint
    with pytest.raises(ConfigError, match=r"calibration: expected a text of at least 85 tokens .* got 84"):
        draw_texts(TEXT[:84], seq_len=16, windows=2)


def test_what_search_refuses() -> None:
    params = random_params(CONFIG)
    small, shapes = compact(params, CONFIG, random_genome(0, ground_of()))
    with pytest.raises(ConfigError, match="model: expected a model whose layers are of one shape, got 'layers of diff"):
        search(small, shapes, TEXTS, SETTINGS)
    with pytest.raises(ConfigError, match="keep: expected a ratio that the space reaches"):
        search(params, CONFIG, TEXTS, dataclasses.replace(SETTINGS, budget=Budget(0.05, band=0.01)))
    with pytest.raises(ConfigError, match="levels: expected the method search beside it, got 'depth'"):
        SearchConfig(method="depth", levels=True)
    assert fit(ground_of().widths(uniform(ground_of())), ground_of(), np.random.default_rng(0))
