"""Blocks of equal size: balanced, near the best, and the same model afterwards."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from jsparse.config import ConfigError
from jsparse.methods import grouping
from tests.helpers import random_params, tiny_config, tokens


def exact(costs):
    """The balanced assignment of least cost: each cluster as many columns as it has places."""
    size = len(costs) // costs.shape[1]
    return linear_sum_assignment(np.repeat(costs, size, axis=1))[1] // size


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(1, 9), st.integers(0, 2**32 - 1), st.booleans())
def test_assignment_is_balanced_and_nearly_the_best(clusters, size, seed, skewed):
    rng = np.random.default_rng(seed)
    costs = rng.random((clusters * size, clusters)).astype(np.float32)
    if skewed:  # one cluster is everyone's favourite
        costs[:, 0] -= 5
    labels, _ = grouping.assign(costs)
    assert np.all(np.bincount(labels, minlength=clusters) == size)
    rows = np.arange(len(costs))
    best, worst = costs[rows, exact(costs)].sum(), costs[rows, exact(-costs)].sum()
    assert costs[rows, labels].sum() <= best + 0.05 * (worst - best) + 1e-4


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_no_exchange_of_two_points_is_left_that_lowers_the_cost(clusters, size, seed):
    rng = np.random.default_rng(seed)
    costs = rng.random((clusters * size, clusters)).astype(np.float32)
    labels = grouping._swap(costs, rng.permutation(np.arange(len(costs)) % clusters), size)
    assert np.all(np.bincount(labels, minlength=clusters) == size)
    moved = costs[:, labels]  # [i, j]: point i in j's place
    stays = np.diagonal(moved)
    assert np.min(moved + moved.T - stays[:, None] - stays[None]) >= -1e-5


def test_kmeans_is_within_five_per_cent_of_exact_assignments(monkeypatch):
    """Points around eight centers, in unequal numbers, so that balance costs something."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((8, 12))[rng.choice(8, 160, p=np.arange(1, 9) / 36)] + 0.4 * rng.standard_normal(
        (160, 12)
    )

    def inertia():
        labels = grouping.balanced_kmeans(points, 8)
        assert np.all(np.bincount(labels) == 20)
        centers = np.stack([points[labels == j].mean(axis=0) for j in range(8)])
        return grouping.inertia(points, centers, labels)

    ours = inertia()
    monkeypatch.setattr(grouping, "assign", lambda costs, prices: (exact(costs), prices))
    assert ours <= 1.05 * inertia()


@pytest.mark.parametrize("kind", ["kmeans", "coactivation", "random"])
def test_groups_are_orders_of_all_neurons(kind):
    config = tiny_config()
    params = random_params(config)
    order = grouping.group(params, config, 8, kind, tokens=tokens(config, 1, 20))  # type: ignore[arg-type]
    assert np.shape(order) == (2, 48) and np.all(np.sort(order, axis=1) == np.arange(48))
    again = grouping.group(params, config, 8, kind, tokens=tokens(config, 1, 20))  # type: ignore[arg-type]
    np.testing.assert_array_equal(order, again)


def test_kmeans_finds_neurons_that_read_alike():
    """Planted: neuron i reads along direction i % 6, at any length."""
    config = tiny_config()
    params = random_params(config)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 32))[np.arange(48) % 6] * rng.uniform(0.5, 2, (48, 1))
    params["layers"]["ffn"]["gate"] = jax.numpy.asarray(np.stack([rows.T] * 2), jax.numpy.float32)
    order = grouping.group(params, config, 8, seed=3)
    assert sum(len(set(block % 6)) == 1 for block in order[0].reshape(6, 8)) >= 3


def test_bad_input():
    config = tiny_config()
    with pytest.raises(ConfigError, match=r"block_size: expected a divisor of intermediate_size \(48\), got 32"):
        grouping.group(random_params(config), config, 32)
    with pytest.raises(ConfigError, match="tokens: expected sample text for coactivation, got None"):
        grouping.group(random_params(config), config, 8, "coactivation")
    with pytest.raises(ConfigError, match="clusters: expected a divisor of the 10 points, got 3"):
        grouping.balanced_kmeans(np.zeros((10, 2)), 3)
