"""The order of windows: a bijection, mixtures in proportion, packing that loses nothing."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jsparse.data.order import Mixture, best_fit, permute

KEYS = st.lists(st.integers(0, 2**40), min_size=1, max_size=3)


@given(size=st.integers(1, 3000), key=KEYS)
@example(size=1, key=[0])
@example(size=4, key=[0])
@example(size=5, key=[0])
@settings(deadline=None, max_examples=60)
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@given(size=st.integers(2, 2**50), key=KEYS, index=st.lists(st.integers(0, 2**50), min_size=2, max_size=40))
@settings(deadline=None, max_examples=60)
def test_permute_of_any_size_is_pointwise_and_one_to_one(size, key, index):
    index = np.unique(np.array(index) % size)
    out = permute(index, size, key)
    assert len(np.unique(out)) == len(index) and out.min() >= 0 and out.max() < size
    assert [permute(i, size, key).item() for i in index] == out.tolist()


def test_permute_never_changes():
    """Golden values: a resumed run must see the order it started with."""
    assert permute(np.arange(10), 10, (7, 0, 0)).tolist() == [0, 4, 2, 5, 3, 6, 8, 7, 9, 1]
    assert permute(np.array([0, 1, 2**40]), 10**13, (0, 1, 2)).tolist() == [9414429505315, 8013873656463, 7297230972344]


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_permute_is_uniform(size):
    """Over many keys, element 0 lands in each of eight equal bins equally often (chi-squared, 7 degrees: 99.99 %)."""
    bins = np.array([permute(0, size, (k,)).item() * 8 // size for k in range(4000)])
    expected = 4000 * np.bincount(np.arange(size) * 8 // size, minlength=8) / size
    chi2 = np.sum((np.bincount(bins, minlength=8) - expected)[expected > 0] ** 2 / expected[expected > 0])
    assert chi2 < 31


def test_permute_shuffles_well_within_an_epoch():
    order = permute(np.arange(20_000), 20_000, (3, 0, 0))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03
    assert np.mean(np.diff(order) == 1) < 0.001
    assert np.mean(order == permute(np.arange(20_000), 20_000, (3, 0, 1))) < 0.001


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), start=st.integers(0, 10**7))
@settings(deadline=None, max_examples=60)
def test_mixture_counts_up_each_source_in_proportion(weights, start):
    mixture = Mixture(weights)
    examples = np.arange(start, start + 5000)
    source, index = mixture(examples)
    shares = np.array(weights) / sum(weights)
    for k, share in enumerate(shares):
        mine = index[source == k]
        assert np.array_equal(mine, mine[0] + np.arange(len(mine))) if len(mine) else share < 0.001
        # `index` is also the number of examples before it: the proportions hold from example 0 on
        rounding = (start + 5000) * len(weights) / 2**16
        assert np.all(np.abs(mine - share * examples[source == k]) <= len(weights) + rounding)


def test_mixture_is_exact_for_simple_weights():
    mixture = Mixture([3, 1])
    assert mixture.counts.tolist() == [3, 1]
    source, index = mixture(np.arange(8))
    assert np.bincount(source[:4]).tolist() == np.bincount(source[4:]).tolist() == [3, 1]
    assert index[source == 0].tolist() == list(range(6)) and index[source == 1].tolist() == [0, 1]


def test_mixture_keeps_the_smallest_source():
    source, _ = Mixture([1e9, 1.0])(np.arange(2**17))
    assert 1 <= np.sum(source == 1) <= 2


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """A second formulation, quadratic: look at every window."""
    room: list[int] = []
    window_of = [0] * len(lengths)
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [(r, w) for w, r in enumerate(room) if r >= lengths[piece]]
        if not fits:
            room.append(capacity)
            fits = [(capacity, len(room) - 1)]
        window_of[piece] = min(fits)[1]
        room[window_of[piece]] -= lengths[piece]
    return sorted(room)


@given(capacity=st.integers(1, 40), data=st.data())
@settings(deadline=None, max_examples=100)
def test_best_fit_overfills_no_window_and_matches_a_search(capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), np.int64)
    window_of = best_fit(lengths, capacity)
    filled = np.bincount(window_of, weights=lengths)
    assert np.all(filled <= capacity) and np.all(filled > 0)
    assert sorted(capacity - filled) == slow_best_fit(lengths.tolist(), capacity)


def test_best_fit_fills_windows():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1.2, 3000), 1, 1024).astype(np.int64)  # as documents are
    window_of = best_fit(lengths, 1024)
    assert lengths.sum() / 1024 / (window_of.max() + 1) > 0.99
