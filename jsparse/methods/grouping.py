"""Neurons into blocks of equal size, and the permutation that makes each block contiguous.

    kmeans         balanced k-means of the neurons' input weights, the columns of W_gate, at unit length (LTE section
                   4.2, MoEfication's parameter clustering): neurons that read alike
    coactivation   balanced k-means of the neurons' |x1| over sample tokens, at unit length: neurons that act together
    random         the baseline

Balanced k-means is Lloyd's algorithm with an assignment under equal sizes: prices on the clusters, raised where too
many points go and lowered where too few, until the cheapest choices come out nearly even (dual ascent of the transport
problem); the rest moves where it costs least, and pairs are swapped while that helps.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jsparse import model
from jsparse.config import LlamaConfig, check
from jsparse.model import Params

Grouping = Literal["kmeans", "coactivation", "random"]

# --------------------------------------------------------------------------------------------------------------------
# Clusters of equal size
# --------------------------------------------------------------------------------------------------------------------


def balanced_kmeans(points: np.ndarray, clusters: int, *, seed: int = 0, iterations: int = 20) -> np.ndarray:
    """Labels, int [n], of points [n, d]: each cluster gets n / clusters of them, near their mean.

    Raises ConfigError where `clusters` does not divide n.
    """
    n = len(points)
    check(0 < clusters <= n and n % clusters == 0, "clusters", f"a divisor of the {n} points", clusters)
    points = np.ascontiguousarray(points, np.float32)
    centers = points[np.random.default_rng(seed).permutation(n)[:clusters]]
    labels, prices, best = np.zeros(n, int), np.zeros(clusters, np.float32), np.inf
    for _ in range(iterations):
        costs = np.sum(centers * centers, axis=1)[None] - 2 * points @ centers.T  # squared distance less ||point||^2
        found, prices = assign(costs, prices)
        centers = points[np.argsort(found, kind="stable")].reshape(clusters, -1, points.shape[1]).mean(axis=1)
        error = inertia(points, centers, found)
        if error >= best * (1 - 1e-5):
            break
        labels, best = found, error
    return labels


def inertia(points: np.ndarray, centers: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squared distances of points [n, d] to the centers [k, d] of their labels."""
    return float(sum(np.sum((points[labels == j] - center) ** 2) for j, center in enumerate(centers)))


def assign(costs: np.ndarray, prices: np.ndarray | None = None, rounds: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] of nearly least total cost, n / k of each, for costs [n, k]; and the clusters' prices [k].

    Args:
        prices: where to start: those of a similar problem save rounds.
    """
    n, k = costs.shape
    size = n // k
    prices = np.zeros(k, np.float32) if prices is None else prices
    step = float(np.mean(costs.std(axis=1)))
    labels = np.argmin(costs + prices[None], axis=1)
    for _ in range(rounds):
        counts = np.bincount(labels, minlength=k)
        if np.all(counts == size):
            break
        prices = prices + np.float32(step) * np.clip((counts - size) / size, -1, 1).astype(np.float32)
        labels = np.argmin(costs + prices[None], axis=1)
        step *= 0.93
    labels = _swap(costs, _even(costs, labels, size), size)
    return labels, prices


def _even(costs: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """Moves points out of clusters that hold more than `size` into ones that hold fewer, the cheapest moves first."""
    labels, counts = labels.copy(), np.bincount(labels, minlength=costs.shape[1])
    while np.any(counts > size):
        free = np.flatnonzero(counts < size)
        movable = np.flatnonzero(counts[labels] > size)
        extra = costs[np.ix_(movable, free)] - costs[movable, labels[movable]][:, None]
        to = free[np.argmin(extra, axis=1)]
        for i in np.argsort(np.min(extra, axis=1)):
            point, old, new = movable[i], labels[movable[i]], to[i]
            if counts[old] > size and counts[new] < size:
                labels[point] = new
                counts[old] -= 1
                counts[new] += 1
    return labels


def _swap(costs: np.ndarray, labels: np.ndarray, size: int, rounds: int = 30) -> np.ndarray:
    """Exchanges a point of one cluster with one of another wherever that lowers the total cost."""
    k = costs.shape[1]
    for _ in range(rounds):
        members = np.argsort(labels, kind="stable").reshape(k, size)
        extra = costs - np.take_along_axis(costs, labels[:, None], axis=1)  # of moving a point, [n, k]
        extra = extra[members]  # [k, size, k]
        leaves = np.argmin(extra, axis=1)  # who of cluster a goes to b most cheaply, [k, k]
        least = np.min(extra, axis=1)
        gain = least + least.T
        used = np.zeros(k, bool)
        for pair in np.argsort(gain, axis=None):
            a, b = divmod(int(pair), k)
            if gain[a, b] >= -1e-6:
                break
            if not (used[a] or used[b]):
                labels[members[a, leaves[a, b]]], labels[members[b, leaves[b, a]]] = b, a
                used[[a, b]] = True
        if not np.any(used):
            break
    return labels


# --------------------------------------------------------------------------------------------------------------------
# The neurons of a model
# --------------------------------------------------------------------------------------------------------------------


def group(
    params: Params,
    config: LlamaConfig,
    block_size: int,
    grouping: Grouping = "kmeans",
    *,
    tokens: Any = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """The order of each layer's neurons, int [F], that puts each block side by side; see `permute`.

    In a job of several processes all call it and get what the first one found.

    Args:
        params: stacked or unstacked.
        tokens: int32 [B, T], sample text for "coactivation"; a thousand tokens will do.
        progress: called after each layer with the number of layers done and of all.

    Raises:
        ConfigError: a block size that does not divide F, or no tokens for "coactivation".
    """
    widths = [shape.intermediate_size for shape in config.layer_shapes]
    for f in widths:
        check(block_size > 0 and f % block_size == 0, "block_size", f"a divisor of intermediate_size ({f})", block_size)
    check(grouping != "coactivation" or tokens is not None, "tokens", "sample text for coactivation", None)
    acts = None
    if grouping == "coactivation":
        acts = model.trunk(params, jnp.asarray(tokens), config, probe=lambda trace: jnp.abs(trace.hidden))[1]
    orders = []
    for i, f in enumerate(widths):
        if block_size in (1, f):
            labels = np.zeros(f, int)
        elif grouping == "random":
            labels = np.random.default_rng((seed, i)).permutation(np.repeat(np.arange(f // block_size), block_size))
        else:
            source = _layer(params["layers"], i) if acts is None else acts[i].reshape(-1, f)
            features = _host(source).astype(np.float32).T  # [F, D] or [F, tokens]
            features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-20)
            labels = balanced_kmeans(features, f // block_size, seed=seed)
        orders.append(np.argsort(labels, kind="stable"))
        if progress:
            progress(i + 1, len(widths))
    return multihost_utils.broadcast_one_to_all(orders) if jax.process_count() > 1 else orders


def permute(params: Params, order: Sequence[np.ndarray]) -> Params:
    """The same model with the neurons of layer l in the order order[l], int [F]: outputs change by rounding alone.

    Args:
        params: stacked or unstacked, sharded or not; the result is as they are. Has no routers yet.
    """
    layers = params["layers"]
    if isinstance(layers, dict):
        return params | {"layers": layers | {"ffn": _permute(layers["ffn"], jnp.asarray(np.stack(order)))}}
    ffns = [_permute(layer["ffn"], jnp.asarray(row)) for layer, row in zip(layers, order, strict=True)]
    return params | {"layers": [layer | {"ffn": ffn} for layer, ffn in zip(layers, ffns, strict=True)]}


_NEURON_AXIS = {"gate": -1, "up": -1, "down": -2, "gate_bias": -1, "up_bias": -1, "threshold": -1}


@jax.jit
def _permute(ffn: dict[str, jax.Array], order: jax.Array) -> dict[str, jax.Array]:
    """Of one layer, order [F], or of a stack, order [L, F]."""

    def one(x: jax.Array, axis: int) -> jax.Array:
        take = functools.partial(jnp.take, axis=axis)
        return jax.vmap(take)(x, order) if order.ndim == 2 else take(x, order)

    return {name: one(x, _NEURON_AXIS[name]) if name in _NEURON_AXIS else x for name, x in ffn.items()}


def _layer(layers: Any, i: int) -> jax.Array:
    return layers["ffn"]["gate"][i] if isinstance(layers, dict) else layers[i]["ffn"]["gate"]


def _host(x: jax.Array) -> np.ndarray:
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
