"""One-shot pruning against golden vectors, PyTorch re-implementations, explicit elimination, and properties."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jsparse import model, parallel
from jsparse.config import ConfigError, MeshConfig
from jsparse.methods import dass
from jsparse.methods.dass import Dass
from jsparse.methods.patterns import (
    ATTENTION,
    MLP,
    NofM,
    Ratio,
    check_claim,
    check_pattern,
    hold,
    keep_largest,
    observe,
    parse_pattern,
    pick,
    shares,
)
from jsparse.methods.pruning import (
    Magnitude,
    Ria,
    Stats,
    Wanda,
    advance,
    block_statistics,
    compared,
    needs,
    prune,
    prune_block,
    ria_scores,
    stream_statistics,
    wanda_scores,
)
from jsparse.methods.sparsegpt import SparseGpt, dampings, sparsegpt
from tests.helpers import assert_trees_close, random_params, tiny_config, tokens

CONFIG = tiny_config(vocab_size=68)
fast_sparsegpt = jax.jit(sparsegpt, static_argnames=("pattern", "damp", "block"))


def bits(text: str) -> np.ndarray:
    """Rows of 0 and 1, one row an output as in PyTorch, to our mask [I, O]."""
    return np.array([[c == "1" for c in row.strip()] for row in text.split(",")]).T


# --------------------------------------------------------------------------------------------------------------------
# Golden vectors
# --------------------------------------------------------------------------------------------------------------------

I8, J4 = np.arange(8)[:, None], np.arange(4)[None]
GATE = ((7 * I8 + 3 * J4 + 5 * I8 * J4) % 23 - 11).T.astype(np.float32)  # [D = 4, F = 8]
UP = ((11 * I8 + 5 * J4 + 2 * I8 * J4 + 3) % 29 - 14).T.astype(np.float32)
DOWN = ((13 * J4.T + 9 * I8.T + 4 * J4.T * I8.T + 1) % 31 - 15).T.astype(np.float32)  # [F = 8, D = 4]
SQUARES = jnp.asarray([1, 4, 0.25, 16, 25, 100, 49, 64], jnp.float32)
GOLDEN = {
    "2:4": ("1110, 0011, 0000, 1101, 0010, 0111, 1000, 1101", "1000, 0111, 0001, 1110, 0101, 1010, 0101, 1010",
            "10010011, 01011010, 10101010, 01011001"),
    "4:8": ("0000, 0010, 0000, 1000, 1111, 0111, 1111, 1101", "1000, 0111, 0000, 1110, 0101, 1010, 0101, 1011",
            "00011011, 00011011, 00001111, 01001101"),
}  # fmt: skip
GOLDEN["0.5"] = GOLDEN["4:8"]


@pytest.mark.parametrize("pattern", GOLDEN)
def test_dass_golden(pattern):
    layer = {"ffn": {"gate": jnp.asarray(GATE), "up": jnp.asarray(UP), "down": jnp.asarray(DOWN)}}
    stats = {"hidden": Stats(SQUARES, None, jnp.float32(1))}
    weights, masks, _ = prune_block(layer, stats, tuple((name, Dass()) for name in MLP), parse_pattern(pattern))
    for name, expected in zip(MLP, GOLDEN[pattern], strict=True):
        np.testing.assert_array_equal(masks[name], bits(expected), name)
        original = layer["ffn"][name.split(".")[1]]
        np.testing.assert_array_equal(weights[name], np.where(bits(expected), original, 0), name)


@pytest.mark.parametrize(("alpha", "row"), [(0.0, "1100"), (0.5, "1110"), (1.0, "1010")])
def test_dass_exponent(alpha, row):
    mask = keep_largest(dass.input_scores(GATE, SQUARES, alpha), NofM(2, 4), "output")
    np.testing.assert_array_equal(mask[:, 0], bits(row)[:, 0])


def test_baselines_golden():
    magnitude = keep_largest(jnp.abs(GATE), NofM(2, 4), "input")
    np.testing.assert_array_equal(magnitude, bits("1100, 0110, 0110, 1001, 0011, 0011, 1001, 1001"))
    wanda = keep_largest(wanda_scores(GATE, jnp.asarray([9.0, 1, 4, 16])), NofM(2, 4), "input")
    np.testing.assert_array_equal(wanda, bits("1010, 0011, 0011, 1001, 1001, 0011, 1001, 1001"))


X20 = (3 * np.arange(8)[:, None] + 5 * np.arange(20) + 2 * np.arange(8)[:, None] * np.arange(20)) % 7 - 3
HESSIAN = (2 / 20 * X20 @ X20.T).astype(np.float32)
R3 = np.arange(3)[:, None]
W83 = ((5 * R3 + 7 * np.arange(8) + 3 * R3 * np.arange(8) + 2) % 13 - 6).T.astype(np.float32)


def test_sparsegpt_golden():
    w, mask, _ = fast_sparsegpt(W83, HESSIAN, NofM(2, 4))
    expected = [[-4, 0, 0, 4.74694, 0, 0, 6.58633, 15.83062], [0, 0, -5.33238, 5.16622, 0, 0, -6.78363, 3.71379],
                [0, 0, 4.0057, 6.99734, 0, 0, 6.95901, 9.95153]]  # fmt: skip
    np.testing.assert_allclose(w, np.transpose(expected), rtol=1e-3)
    np.testing.assert_array_equal(mask, bits("10010011, 00110011, 00110011"))
    assert not w[1].any()  # the input that is always 0
    _, mask, _ = fast_sparsegpt(W83, HESSIAN, Ratio(0.5))
    np.testing.assert_array_equal(mask, bits("00000111, 00000011, 00111111"))
    wanda = keep_largest(wanda_scores(W83, jnp.asarray((X20**2).sum(1), jnp.float32)), NofM(2, 4), "input")
    np.testing.assert_array_equal(wanda, bits("10010101, 00110011, 10100011"))


# --------------------------------------------------------------------------------------------------------------------
# Second formulations
# --------------------------------------------------------------------------------------------------------------------


def layer_of(inputs: int, outputs: int, samples: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """W [I, O] and correlated X [I, samples] of very different norms."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((inputs, samples)) * rng.uniform(0.2, 4, (inputs, 1))
    x = (rng.standard_normal((inputs, inputs)) * 0.3 + np.eye(inputs)) @ x
    return rng.standard_normal((inputs, outputs)).astype(np.float32), x.astype(np.float32)


def torch_wanda(w: Any, x: Any, pattern: Any) -> Any:
    """The authors' way, on a PyTorch Linear's weight [O, I] and its inputs [tokens, I]: True is kept."""
    torch = pytest.importorskip("torch")

    score = w.abs() * x.norm(dim=0)[None]
    drop = torch.zeros_like(w, dtype=torch.bool)
    if isinstance(pattern, Ratio):
        order = torch.sort(score, dim=1, stable=True)[1]
        return ~drop.scatter(1, order[:, : int(w.shape[1] * pattern.share)], True)
    for first in range(0, w.shape[1], pattern.m):
        order = torch.sort(score[:, first : first + pattern.m], dim=1, stable=True)[1]
        drop.scatter_(1, first + order[:, : pattern.m - pattern.n], True)
    return ~drop


def torch_sparsegpt(w: Any, x: Any, pattern: Any, sequences: int, block: int) -> tuple[Any, Any]:
    """The authors' way, in float64: weight [O, I], inputs [tokens, I]."""
    torch = pytest.importorskip("torch")

    w, x = w.double().clone(), x.double()
    h = 2 / sequences * x.T @ x
    dead = h.diagonal() == 0
    h[dead, dead], w[:, dead] = 1, 0
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    keep = torch.ones_like(w, dtype=torch.bool)
    for begin in range(0, w.shape[1], block):
        end = min(begin + block, w.shape[1])
        if isinstance(pattern, Ratio):
            score = w[:, begin:end] ** 2 / u.diagonal()[None, begin:end] ** 2
            keep[:, begin:end] = score > score.flatten().sort()[0][int(score.numel() * pattern.share)]
        for i in range(begin, end):
            if isinstance(pattern, NofM) and i % pattern.m == 0:
                here = slice(i, i + pattern.m)
                order = (w[:, here] ** 2 / u.diagonal()[None, here] ** 2).sort(dim=1, stable=True)[1]
                keep[:, here] = torch.ones_like(order, dtype=torch.bool).scatter(
                    1, order[:, : pattern.m - pattern.n], False
                )
            error = torch.where(keep[:, i], 0.0, w[:, i]) / u[i, i]
            w[:, i:] -= error[:, None] * u[i, i:][None]
            w[:, i] = torch.where(keep[:, i], w[:, i], 0.0)
    return w, keep


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(3, 8), Ratio(0.7)], ids=str)
def test_masks_agree_with_pytorch(pattern):
    torch = pytest.importorskip("torch")
    w, x = layer_of(40, 24)
    x[5] = 0  # a dead input
    tw, tx = torch.tensor(w.T), torch.tensor(x.T)
    wanda = keep_largest(wanda_scores(w, jnp.asarray((x**2).sum(1))), pattern, "input")
    np.testing.assert_array_equal(wanda, torch_wanda(tw, tx, pattern).numpy().T)
    block = 16  # 40 is no multiple: the last block is shorter
    count = 50_000  # of sequences, so many that the 1 of a dead input's diagonal counts in the damping
    expected, expected_keep = torch_sparsegpt(tw, tx, pattern, count, block)
    hessian = jnp.asarray(2 / count * x @ x.T)
    got, keep, _ = fast_sparsegpt(w, hessian, pattern, block=block)
    np.testing.assert_array_equal(keep, expected_keep.numpy().T)
    np.testing.assert_allclose(got, expected.numpy().T, atol=2e-4)


def torch_drop(score: Any, count: int) -> Any:
    """True at the `count` smallest of each row, the lower index among equals."""
    torch = pytest.importorskip("torch")
    order = torch.sort(score, dim=1, stable=True)[1]
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order[:, :count], True)


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(3, 8), Ratio(0.6)], ids=str)
def test_blocks_agree_with_pytorch(pattern):
    """DaSS, RIA and magnitude of a block's FFN, on PyTorch weights [out, in]."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    linear = {name: torch.tensor(rng.standard_normal(shape), dtype=torch.float32)
              for name, shape in (("ffn.gate", (16, 8)), ("ffn.up", (16, 8)), ("ffn.down", (8, 16)))}  # fmt: skip
    x, h = (torch.tensor(rng.standard_normal((30, n)) * rng.uniform(0.1, 5, n), dtype=torch.float32) for n in (8, 16))
    x[:, 3] = 0

    def rows(score: Any) -> Any:  # groups along the last axis
        if isinstance(pattern, Ratio):
            return torch_drop(score, int(score.shape[1] * pattern.share))
        return torch_drop(score.reshape(-1, pattern.m), pattern.m - pattern.n).reshape(score.shape)

    def whole(w: Any, score: Any) -> Any:  # what magnitude and RIA do by a ratio; ours counts along inputs first
        if isinstance(pattern, NofM):
            return rows(score)
        return torch_drop(score.T.reshape(1, -1), int(w.numel() * pattern.share)).reshape(score.T.shape).T

    def expected(name: str, method: Any) -> Any:
        w, read = linear[name], h if name == "ffn.down" else x
        match method:
            case Magnitude():
                return whole(w, w.abs())
            case Ria():
                share = w.abs() / w.abs().sum(0, keepdim=True) + w.abs() / w.abs().sum(1, keepdim=True)
                return whole(w, share * read.norm(dim=0)[None] ** 0.5)
        if name == "ffn.down":
            return rows(w.abs() * h.norm(dim=0)[None])
        return rows((w.abs() * (h**2).sum(0)[:, None] ** 0.25).T).T  # each input's outputs

    layer = {"ffn": {name.split(".")[1]: jnp.asarray(w.numpy().T) for name, w in linear.items()}}
    squares = {"ffn": (x**2).sum(0), "hidden": (h**2).sum(0)}
    stats = {field: Stats(jnp.asarray(s.numpy()), None, jnp.float32(1)) for field, s in squares.items()}
    for method in (Dass(), Ria(), Magnitude()):
        _, masks, _ = prune_block(layer, stats, tuple((name, method) for name in MLP), pattern)
        for name in MLP:
            np.testing.assert_array_equal(masks[name], ~expected(name, method).numpy().T, f"{method} {name}")


def test_sparsegpt_is_explicit_obs():
    """Each input's removal is the optimal one among the inputs after it: least squares, solved anew each time."""
    w, x = layer_of(8, 3)
    h = (2 / 10 * x @ x.T).astype(np.float64)
    got, keep, _ = fast_sparsegpt(w, jnp.asarray(h, jnp.float32), NofM(2, 4))
    h += 0.01 * np.mean(np.diag(h)) * np.eye(8)
    expected = w.astype(np.float64)
    for i in range(8):
        inverse = np.linalg.inv(h[i:, i:])  # of what is still free
        for o in range(3):
            if not keep[i, o]:
                expected[i:, o] -= expected[i, o] / inverse[0, 0] * inverse[:, 0]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_sparsegpt_loses_less_than_wanda_and_magnitude():
    w, x = layer_of(40, 24)
    masks = [keep_largest(scores, NofM(2, 4), "input") for scores in (np.abs(w), wanda_scores(w, (x**2).sum(1)))]
    outputs = [np.where(mask, w, 0) for mask in masks]
    outputs.append(fast_sparsegpt(w, jnp.asarray(2 / 8 * x @ x.T), NofM(2, 4), block=16)[0])
    magnitude, wanda, moved = (np.square((np.asarray(v) - w).T @ x).sum() for v in outputs)
    assert moved < wanda < magnitude


def nearly_constant(channels, tokens):
    """Activations [tokens, channels] that differ from token to token by a few small directions, in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 3)
    same = jax.random.normal(keys[0], (channels,))
    moved = jax.random.normal(keys[1], (tokens, 3)) @ jax.random.normal(keys[2], (3, channels))
    return (same[None] + 1e-3 * moved).astype(jnp.bfloat16)


def test_sparsegpt_damps_a_hessian_that_is_not_positive_definite_until_it_is():
    w = jax.random.normal(jax.random.key(1), (256, 8))
    x = nearly_constant(256, 1024).astype(jnp.float32)
    h = 2 / 8 * x.T @ x
    h = h - 0.02 * jnp.mean(jnp.diag(h)) * jnp.eye(256)  # as rounding leaves it with more channels and tokens
    got, keep, place = fast_sparsegpt(w, h, NofM(2, 4))
    assert dampings(0.01) == [0.01, 0.1, 1.0] and place == 1
    expected, expected_keep, place = fast_sparsegpt(w, h, NofM(2, 4), damp=0.1)
    assert place == 0
    np.testing.assert_array_equal(keep, expected_keep)
    np.testing.assert_array_equal(got, expected)
    masked = np.where(keep, w, 0)
    lost, lost_by_mask = (np.square(x @ (v - w)).sum() for v in (got, masked))
    assert np.isfinite(got).all() and lost < 0.1 * lost_by_mask  # it still makes up for what is pruned


def test_prune_tells_a_raised_damping():
    layer = pick(random_params(CONFIG)["layers"], 0)
    plan = (("ffn.gate", SparseGpt()),)
    gram = jnp.ones((CONFIG.hidden_size,) * 2) - 0.05 * jnp.eye(CONFIG.hidden_size)
    stats = {"ffn": Stats(jnp.diag(gram), gram, jnp.float32(2))}
    *_, places = prune_block(layer, stats, plan, NofM(2, 4))
    assert {name: int(place) for name, place in places.items()} == {"ffn.gate": 1}
    *_, found = pruned(SparseGpt(), Wanda(), NofM(2, 4))
    assert {(row.method, row.damp) for row in found.matrices} == {("sparsegpt", 0.01), ("wanda", None)}


def test_sparsegpt_by_groups_does_not_depend_on_the_block():
    w, x = layer_of(40, 24)
    h = jnp.asarray(2 / 8 * x @ x.T)
    results = [fast_sparsegpt(w, h, NofM(2, 4), block=block) for block in (16, 128)]
    for got, keep, _ in results[1:]:
        np.testing.assert_array_equal(keep, results[0][1])
        np.testing.assert_allclose(got, results[0][0], atol=1e-4)


def test_ria_scores():
    w, x = layer_of(6, 4)
    expected = np.empty((6, 4))
    for i in range(6):
        for o in range(4):
            share = abs(w[i, o]) / np.abs(w[:, o]).sum() + abs(w[i, o]) / np.abs(w[i]).sum()
            expected[i, o] = share * np.linalg.norm(x[i]) ** 0.5
    np.testing.assert_allclose(ria_scores(w, jnp.asarray((x**2).sum(1))), expected, rtol=1e-5)
    zero_row = w.copy()
    zero_row[2] = 0
    assert np.isfinite(ria_scores(zero_row, jnp.asarray((x**2).sum(1)))).all()


# --------------------------------------------------------------------------------------------------------------------
# Properties
# --------------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_group_keeps_its_largest(data):
    m = data.draw(st.sampled_from([2, 4, 8]))
    n = data.draw(st.integers(1, m - 1))
    axis = data.draw(st.sampled_from(["input", "output"]))
    scores = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 4, (16, 8)).astype(np.float32)  # ties
    for pattern, size in [(NofM(n, m), m), (Ratio(n / m), 16 if axis == "input" else 8)]:
        keep = np.asarray(keep_largest(scores, pattern, axis))
        lines, kept = (scores.T, keep.T) if axis == "input" else (scores, keep)
        drop = size - n if isinstance(pattern, NofM) else int(size * n / m)
        drop = m - n if isinstance(pattern, NofM) else drop
        for group, mask in zip(lines.reshape(-1, size), kept.reshape(-1, size), strict=True):
            order = sorted(range(size), key=lambda i, g=group: (g[i], i))  # the lower index goes first
            assert sorted(np.flatnonzero(~mask)) == sorted(order[:drop])


def test_groups_come_out_whole_whatever_the_scores():
    """Ranks must be a permutation by construction: compiled comparisons of scores need not agree with each other, as
    those with nan do not, and as scores that XLA rounds in two ways do not (quantised weights, with fused rounding)."""
    scores = jnp.asarray([[np.nan, np.nan, np.nan, 1.0], [np.inf, np.inf, np.inf, -np.inf], [0.0, -0.0, np.nan, 0.0]])
    assert (keep_largest(scores, NofM(2, 4), "output").sum(axis=1) == 2).all()
    assert (keep_largest(scores, Ratio(0.5), "input").sum(axis=0) == 2).all()


def test_of_equal_scores_the_lower_index_goes():
    for pattern in (NofM(2, 4), Ratio(0.5)):
        keep = keep_largest(jnp.ones((4, 1)), pattern, "input")
        assert keep[:, 0].tolist() == [False, False, True, True]
    keep = keep_largest(jnp.ones((2, 2)), Ratio(0.5), "matrix")
    assert keep.tolist() == [[False, False], [True, True]]


def test_what_cannot_matter_to_dass_does_not():
    """The inputs' norms, a common factor of s, and the inputs' order."""
    w, _ = layer_of(6, 16)
    rng = np.random.default_rng(1)
    s = jnp.asarray(rng.uniform(0.1, 10, 16), jnp.float32)
    order, norms = rng.permutation(6), rng.uniform(0.1, 10, (6, 1)).astype(np.float32)
    mask = keep_largest(dass.input_scores(w, s), NofM(2, 4), "output")
    for scores, expected in [(dass.input_scores(w, s) * norms, mask), (dass.input_scores(w, 16 * s), mask),
                             (dass.input_scores(w[order], s), mask[order])]:  # fmt: skip
        np.testing.assert_array_equal(keep_largest(scores, NofM(2, 4), "output"), expected)
    dead = keep_largest(dass.input_scores(w, 0 * s), NofM(2, 4), "output")
    np.testing.assert_array_equal(dead, keep_largest(np.abs(w), NofM(2, 4), "output"))


# --------------------------------------------------------------------------------------------------------------------
# Whole models
# --------------------------------------------------------------------------------------------------------------------


def axes(mlp: Any, attention: Any, pattern: Any) -> dict[str, Any]:
    plan = [(name, mlp) for name in MLP] + [(name, attention) for name in ATTENTION if attention]
    return {name: compared(name, method, pattern) for name, method in plan}


WAYS: Any = dict(pattern=NofM(2, 4), mlp=Dass(), attention=Wanda(), batch_size=2)  # of most runs: compiled once


@functools.cache
def pruned(mlp: Any, attention: Any, pattern: Any) -> Any:
    ids = tokens(CONFIG, 5, 16)
    return prune(random_params(CONFIG), CONFIG, ids, pattern=pattern, mlp=mlp, attention=attention, batch_size=2)


@pytest.mark.parametrize(
    ("mlp", "attention", "pattern"),
    [(Dass(), Wanda(), NofM(2, 4)), (SparseGpt(), Wanda(), NofM(2, 4)), (Ria(), SparseGpt(), Ratio(0.5)),
     (Magnitude(), None, Ratio(0.5))],
    ids=lambda x: getattr(x, "type", str(x)),
)  # fmt: skip
def test_every_method_prunes_a_model(mlp, attention, pattern):
    params, masks, report = pruned(mlp, attention, pattern)
    original = random_params(CONFIG)
    assert jax.tree.structure(params) == jax.tree.structure(original)
    check_pattern(params, pattern, axes(mlp, attention, pattern))
    check_pattern(masks, pattern, axes(mlp, attention, pattern))
    assert masks["embed"] is None and masks["layers"]["ffn_norm"]["scale"] is None
    names = MLP + ATTENTION if attention else MLP
    for name in names:
        part, leaf = name.split(".")
        before, after, mask = (np.asarray(t["layers"][part][leaf]) for t in (original, params, masks))
        assert mask.shape == after.shape == before.shape and not after[~mask].any()
        if not isinstance(attention if name in ATTENTION else mlp, SparseGpt):
            np.testing.assert_array_equal(after[mask], before[mask])
    assert len(report.matrices) == 2 * len(names) and abs(report.mlp_sparsity - 0.5) < 0.01
    zeros = sum(int((np.asarray(x) == 0).sum()) for x in jax.tree.leaves(params))
    assert report.model_sparsity == zeros / model.count(params)


@pytest.mark.parametrize("attention", [Wanda(), None], ids=["all", "mlp"])
def test_streaming_equals_the_whole_model(attention):
    """Statistics of the last block, from batches through pruned blocks, are those of one forward pass of a model whose
    earlier blocks are pruned; those of the first block are the dense model's. With attention dense, its part of the
    pass is done once."""
    ids = tokens(CONFIG, 5, 16)
    params, masks, _ = pruned(Dass(), attention, NofM(2, 4))
    dense = random_params(CONFIG)
    probe = jax.tree_util.Partial(lambda trace: jnp.sum(trace.hidden**2, (0, 1)))
    forward = jax.jit(functools.partial(model.forward, config=CONFIG, probe=probe))
    for i in range(2):
        mixed = jax.tree.map(lambda a, b, i=i: jnp.concatenate([a[:i], b[i:]]), params["layers"], dense["layers"])
        output = forward(dense | {"layers": mixed}, ids)
        layer = dense["layers"]["ffn"]
        for name in ("gate", "up"):
            expected = keep_largest(dass.input_scores(layer[name][i], output.aux[i]), NofM(2, 4), "output")
            np.testing.assert_array_equal(masks["layers"]["ffn"][name][i], expected)
        expected = keep_largest(dass.down_scores(layer["down"][i], output.aux[i]), NofM(2, 4), "input")
        np.testing.assert_array_equal(masks["layers"]["ffn"]["down"][i], expected)


def test_the_stream_exists_once():
    """Batches are overwritten in place: what a program asks for beside its arguments does not grow with them."""
    layer = pick(random_params(CONFIG)["layers"], 0)
    plan = tuple((name, Wanda()) for name in MLP)

    def scratch(batches: int) -> list[int]:
        x, counted = jnp.zeros((batches, 2, 16, CONFIG.hidden_size)), jnp.ones((batches, 2), bool)
        programs = (stream_statistics.lower(layer, x, counted, CONFIG, needs(plan), True),
                    advance.lower(layer, x, CONFIG, True))  # fmt: skip
        return [program.compile().memory_analysis().temp_size_in_bytes for program in programs]

    assert scratch(2) == scratch(9)


def test_statistics_of_attention():
    """What output and down read, times them, is what the block adds."""
    params = random_params(CONFIG)
    layer = jax.tree.map(lambda x: x[0], params["layers"])
    x = params["embed"][tokens(CONFIG, 3, 8)]
    y, trace = jax.jit(model.run_block, static_argnames="config")(layer, x, config=CONFIG)
    attended = jnp.einsum("BTNH,NHD->BTD", trace.heads, layer["attention"]["output"])
    fed = jnp.einsum("BTF,FD->BTD", trace.hidden, layer["ffn"]["down"])
    np.testing.assert_allclose(y, x + attended + fed, rtol=1e-4, atol=1e-4)
    plan = (("attention.query", SparseGpt()), ("attention.output", Wanda()))
    measured = jax.jit(block_statistics, static_argnames=("config", "needs"))
    middle, stats = measured(layer, x, jnp.asarray([True, True, False]), config=CONFIG, needs=needs(plan))
    np.testing.assert_allclose(middle, x + attended, rtol=1e-4, atol=1e-4)
    assert set(stats) == {"attention", "heads"} and stats["heads"].gram is None
    a = np.asarray(trace.attention[:2]).reshape(16, -1)
    np.testing.assert_allclose(stats["attention"].gram, a.T @ a, rtol=1e-4, atol=1e-4)
    heads = np.asarray(trace.heads[:2]).reshape(16, -1)
    np.testing.assert_allclose(stats["heads"].squares, (heads**2).sum(0), rtol=1e-4)
    assert stats["heads"].sequences == 2


@pytest.mark.parametrize("change", ["batch_size", "unstacked", "donated", "sharded"])
def test_the_same_by_another_way(change):
    ids, params = tokens(CONFIG, 5, 16), random_params(CONFIG)
    how: dict[str, Any] = dict(pattern=NofM(2, 4), mlp=SparseGpt(), attention=Wanda(), batch_size=2)
    expected, expected_masks, _ = pruned(SparseGpt(), Wanda(), NofM(2, 4))
    if change == "batch_size":
        got, masks, _ = prune(params, CONFIG, ids, **how | {"batch_size": 5})
        assert_trees_close(params, random_params(CONFIG), 0)  # the caller's own are as they were
    elif change == "unstacked":
        got, masks, _ = prune(model.unstack(params), CONFIG, ids, **how)
        assert isinstance(got["layers"], list) and masks["layers"][0]["attention_norm"]["scale"] is None
        got, masks = model.stack(got), jax.tree.map(lambda *x: jnp.stack(x), *masks["layers"])
        masks = {"layers": masks}
    elif change == "donated":
        got, masks, _ = prune(params, CONFIG, ids, **how, donate=True)
        assert params["layers"]["ffn"]["gate"].is_deleted() and not params["embed"].is_deleted()
    else:
        mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        shardings = model.shardings(CONFIG, mesh)
        with jax.set_mesh(mesh):
            got, masks, _ = prune(jax.device_put(params, shardings), CONFIG, ids, **how)
        for name in ("gate", "down"):
            here = shardings["layers"]["ffn"][name]
            assert got["layers"]["ffn"][name].sharding == masks["layers"]["ffn"][name].sharding == here
    for name in MLP + ATTENTION:
        part, leaf = name.split(".")
        np.testing.assert_array_equal(masks["layers"][part][leaf], expected_masks["layers"][part][leaf], name)
        np.testing.assert_allclose(got["layers"][part][leaf], expected["layers"][part][leaf], atol=1e-3)


def test_bfloat16_is_scored_in_float32():
    gate = random_params(CONFIG)["layers"]["ffn"]["gate"][0].astype(jnp.bfloat16)
    weights, _, _ = prune_block({"ffn": {"gate": gate}}, {}, (("ffn.gate", Magnitude()),), NofM(2, 4))
    assert weights["ffn.gate"].dtype == jnp.bfloat16
    expected = keep_largest(jnp.abs(gate.astype(jnp.float32)), NofM(2, 4), "input")
    np.testing.assert_array_equal(weights["ffn.gate"] != 0, expected)


def test_dead_channels_are_counted():
    params = random_params(CONFIG)
    params["layers"]["ffn"]["up"] = params["layers"]["ffn"]["up"].at[1, :, 5].set(0.0)
    _, masks, report = prune(params, CONFIG, tokens(CONFIG, 2, 16), **WAYS)
    assert {row.name: row.dead for row in report.matrices if row.dead} == {f"layers.1.{name}": 1 for name in MLP}
    assert not masks["layers"]["ffn"]["gate"][1, :, 5].any()


# --------------------------------------------------------------------------------------------------------------------
# Checking and holding
# --------------------------------------------------------------------------------------------------------------------


def test_check_names_the_first_broken_group():
    params, masks, _ = pruned(Dass(), Wanda(), NofM(2, 4))
    claim = axes(Dass(), Wanda(), NofM(2, 4))

    def broken(tree: Any, part: str, leaf: str, at: Any, value: Any) -> Any:
        x = tree["layers"][part][leaf].at[at].set(value)
        return tree | {"layers": tree["layers"] | {part: tree["layers"][part] | {leaf: x}}}

    with pytest.raises(ValueError, match=r"layers\.1\.ffn\.gate: input 3, outputs 8 to 11, keeps 4, expected 2"):
        check_pattern(broken(params, "ffn", "gate", (1, 3, slice(8, 12)), 1.0), NofM(2, 4), claim)
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.down: output 7, inputs 4 to 7, keeps 0, expected 2"):
        check_pattern(broken(masks, "ffn", "down", (0, slice(4, 8), 7), False), NofM(2, 4), claim)
    check_pattern(broken(params, "ffn", "down", (0, slice(4, 8), 7), 0.0), NofM(2, 4), claim)  # fewer will do
    mlp_only = masks | {"layers": masks["layers"] | {"attention": dict.fromkeys(masks["layers"]["attention"])}}
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.query: expected a mask for 2:4, got None"):
        check_pattern(mlp_only, NofM(2, 4), {"attention.query": "input"})
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.output: output 2, inputs 0 to 3, keeps 4"):
        check_pattern(broken(params, "attention", "output", (0, 0, slice(0, 4), 2), 1.0), NofM(2, 4), claim)
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.gate: the matrix keeps \d+, expected 768"):
        check_pattern(random_params(CONFIG), Ratio(0.5), {"ffn.gate": "matrix"})
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.down: output 0 keeps 48, expected 24"):
        check_pattern(random_params(CONFIG), Ratio(0.5), {"ffn.down": "input"})


def test_claims_and_what_zeros_make():
    """A claim without axes holds along either; the broken group is named along the axis that was meant."""
    params, _, report = pruned(Dass(), Wanda(), NofM(2, 4))
    rows = observe(params)
    assert {(row.name.split(".", 2)[2], row.pattern) for row in rows} == {
        (name, f"2:4 {axis}") for name, axis in axes(Dass(), Wanda(), NofM(2, 4)).items()
    }
    assert shares(rows, params) == (report.mlp_sparsity, report.model_sparsity)
    assert observe(model.unstack(params)) == rows
    assert {row.pattern for row in observe(pruned(Magnitude(), None, Ratio(0.5))[0])} == {None}
    check_claim(params, NofM(2, 4), MLP + ATTENTION)
    check_claim(pruned(Magnitude(), None, Ratio(0.5))[0], Ratio(0.5))
    gate = params["layers"]["ffn"]["gate"].at[1, 3, 8:12].set(1.0)
    broken = params | {"layers": params["layers"] | {"ffn": params["layers"]["ffn"] | {"gate": gate}}}
    told = r"layers\.1\.ffn\.gate: pattern 2:4: input 3, outputs 8 to 11, keeps 4, expected 2"
    with pytest.raises(ValueError, match=told):
        check_claim(broken, NofM(2, 4))
    with pytest.raises(ValueError, match=r"layers\.0\.ffn\.gate: pattern 0\.7: .* keeps \d+, expected"):
        check_claim(params, Ratio(0.7))
    with pytest.raises(ConfigError, match=r"layers\.0\.ffn\.gate: pattern 2:5: expected an input axis that 5 divides"):
        check_claim(params, NofM(2, 5))


def test_hold_keeps_zeros_through_training():
    params, masks, _ = pruned(Dass(), Wanda(), NofM(2, 4))
    optimizer = optax.chain(optax.adamw(1e-2, weight_decay=0.1), hold(masks))

    def loss(params: Any) -> jax.Array:  # wants every weight to be 1
        return sum(jnp.sum((x - 1.0) ** 2) for x in jax.tree.leaves(params))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    trained, state = jax.tree.map(jnp.copy, params), optimizer.init(params)
    lowered = step.lower(trained, state).as_text()
    assert "xi1>" not in "".join(line for line in lowered.splitlines() if "constant" in line)  # masks are arguments
    for _ in range(3):
        trained, state = step(trained, state)
    check_pattern(trained, NofM(2, 4), axes(Dass(), Wanda(), NofM(2, 4)))
    gate, mask = trained["layers"]["ffn"]["gate"], masks["layers"]["ffn"]["gate"]
    assert (np.asarray(gate != params["layers"]["ffn"]["gate"]) == np.asarray(mask)).all()
    assert (np.asarray(trained["embed"]) != np.asarray(params["embed"])).any()
    misfit = masks | {"embed": jnp.ones((3, 3), bool)}
    with pytest.raises(ValueError, match=r"embed: expected a mask of shape \(68, 32\), got \(3, 3\)"):
        hold(misfit).init(params)
    with pytest.raises(ValueError, match=r"masks: expected the parameters' form .* got \d+ leaves for \d+$"):
        hold(masks).init(model.unstack(params))


# --------------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:", "x", "1.5", "0", "nan"])
def test_patterns_that_are_none(text):
    with pytest.raises(ConfigError, match="pattern: expected"):
        parse_pattern(text)
    assert parse_pattern("2:4") == NofM(2, 4) and parse_pattern("0.5") == Ratio(0.5)


def test_dass_refuses_the_input_axis():
    with pytest.raises(ConfigError, match=r"axis: expected 'output' for DaSS.*would be Wanda"):
        Dass(axis="input")


def test_what_prune_refuses():
    params, ids = random_params(CONFIG), tokens(CONFIG, 2, 8)
    refuse = functools.partial(prune, params, CONFIG)
    with pytest.raises(ConfigError, match=r"layers\.0\.ffn\.gate: pattern 2:5: expected an output axis that 5 div.*48"):
        refuse(ids, pattern=NofM(2, 5))
    with pytest.raises(ConfigError, match=r"layers\.0\.ffn\.down: pattern 2:32: expected an input axis .* got 48"):
        refuse(ids, pattern=NofM(2, 32), mlp=Wanda())
    with pytest.raises(ConfigError, match=r"tokens: expected calibration tokens for dass"):
        refuse(pattern=NofM(2, 4))
    with pytest.raises(ConfigError, match="attention: expected wanda"):
        refuse(ids, pattern=NofM(2, 4), attention=Dass())
    with pytest.raises(ConfigError, match="tokens: expected ids from 0 to 67"):
        refuse(ids + 60, pattern=NofM(2, 4))
    with pytest.raises(ConfigError, match=r"ffn\.gate by sparsegpt: expected a Gram matrix"):
        layer = jax.tree.map(lambda x: x[0], params["layers"])
        prune_block(layer, {"ffn": Stats(jnp.ones(32), None, jnp.float32(1))}, (("ffn.gate", SparseGpt()),), NofM(2, 4))
    with pytest.raises(ConfigError, match=r"ffn\.gate by wanda: expected statistics of 'ffn', got \[\]"):
        prune_block(layer, {}, (("ffn.gate", Wanda()),), NofM(2, 4))


def test_what_is_not_finite_is_named():
    params, ids = random_params(CONFIG), tokens(CONFIG, 2, 16)
    up = params["layers"]["ffn"]["up"]
    with pytest.raises(ValueError, match=r"layers\.1\.hidden: expected finite statistics .* inf in channel 7"):
        bad = params["layers"] | {"ffn": params["layers"]["ffn"] | {"up": up.at[1, :, 7].set(1e30)}}
        prune(params | {"layers": bad}, CONFIG, ids, **WAYS)
    with pytest.raises(ValueError, match=r"layers\.1\.ffn\.up: weights are not finite before pruning"):
        bad = params["layers"] | {"ffn": params["layers"]["ffn"] | {"up": up.at[1, 2, 7].set(np.nan)}}
        prune(params | {"layers": bad}, CONFIG, pattern=NofM(2, 4), mlp=Magnitude())
    w, x = layer_of(8, 4, samples=2)
    assert np.isnan(fast_sparsegpt(w, jnp.asarray(x @ x.T) - 1e-2 * jnp.eye(8), NofM(2, 4), damp=0.0)[0]).any()


def test_remainders_are_refused_or_skipped():
    params, ids = random_params(CONFIG), tokens(CONFIG, 2, 8)
    with pytest.raises(ConfigError, match=r"layers\.0\.ffn\.down: pattern 2:32: expected an input axis .* got 48"):
        prune(params, CONFIG, ids, pattern=NofM(2, 32), mlp=Wanda())
    got, _, report = prune(params, CONFIG, ids, pattern=NofM(2, 32), mlp=Wanda(), remainder="skip")
    assert report.skipped == ("layers.0.ffn.down", "layers.1.ffn.down")
    np.testing.assert_array_equal(got["layers"]["ffn"]["down"], params["layers"]["ffn"]["down"])
    assert (np.asarray(got["layers"]["ffn"]["up"]) == 0).mean() == 30 / 32
    assert report.mlp_sparsity == 30 / 32 * 2 / 3 and len(report.matrices) == 4
    with pytest.raises(ConfigError, match="pattern: expected one that divides at least one matrix, got '1:5'"):
        prune(params, CONFIG, ids, pattern=NofM(1, 5), remainder="skip")
