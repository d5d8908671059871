"""Patterns of zeros in weights: which entries a pattern keeps, whether a model has it, and keeping it in training.

Matrices are seen as W [I, O], inputs first, attention's head axes joined. N:M means N kept of each M consecutive
entries along an axis. A ratio r means floor(r size) entries pruned of each line along an axis, or of the whole matrix.
Among equal scores the lower index is pruned first.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jsparse.config import ConfigError, check


@dataclass(frozen=True)
class NofM:
    """`n` kept of each `m` consecutive entries."""

    n: int
    m: int

    def __post_init__(self) -> None:
        check(0 < self.n < self.m, "pattern", "N:M with N kept of M, 0 < N < M", str(self))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Ratio:
    """A share of the entries pruned, wherever they are."""

    share: float

    def __post_init__(self) -> None:
        check(0 < self.share < 1, "pattern", "a share to prune between 0 and 1", self.share)

    def __str__(self) -> str:
        return f"{self.share:g}"

    def pruned(self, size: int) -> int:
        return int(size * self.share)


Pattern = NofM | Ratio
Axis = Literal["input", "output", "matrix"]  # over what entries are compared


def parse_pattern(text: str) -> Pattern:
    """Reads "2:4" (2 kept of 4) or "0.5" (half pruned). Raises ConfigError for anything else."""
    n, colon, m = text.partition(":")
    try:
        return NofM(int(n), int(m)) if colon else Ratio(float(text))
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"pattern: expected N:M such as 2:4, or a share such as 0.5, got {text!r}") from None


def keep_largest(scores: jax.Array, pattern: Pattern, axis: Axis) -> jax.Array:
    """The mask of a matrix, bool [I, O], True is kept, of finite scores [I, O]."""
    if axis == "input":
        return keep_largest(scores.T, pattern, "output").T
    if axis == "matrix" and isinstance(pattern, Ratio):
        return _rank(scores.reshape(-1)).reshape(scores.shape) >= pattern.pruned(scores.size)
    match pattern:
        case Ratio():
            return _rank(scores) >= pattern.pruned(scores.shape[-1])
        case NofM(n, m):
            check(axis == "output", "axis", "'input' or 'output' for N:M groups", axis)
            check(scores.shape[-1] % m == 0, "pattern", f"an axis that {m} divides", scores.shape[-1])
            groups = scores.reshape(*scores.shape[:-1], -1, m)
            return (_rank(groups) >= m - n).reshape(scores.shape)


def _rank(scores: jax.Array) -> jax.Array:
    """How many entries of the last axis go before each one: a permutation, whatever the scores.

    Counting smaller scores pair by pair would not be: XLA may compute a score twice, each time rounded otherwise, and
    then of two that tie both or neither go.
    """
    return jnp.argsort(jnp.argsort(scores, axis=-1, stable=True), axis=-1)


# --------------------------------------------------------------------------------------------------------------------
# A model's matrices, by names such as "ffn.gate"
# --------------------------------------------------------------------------------------------------------------------


def get(tree: Any, name: str) -> Any:
    """A block's leaf by its name."""
    part, leaf = name.split(".")
    return tree[part][leaf]


def replace(tree: Any, values: Mapping[str, Any]) -> Any:
    """The tree with other leaves under these names."""
    for name, value in values.items():
        part, leaf = name.split(".")
        tree = tree | {part: tree[part] | {leaf: value}}
    return tree


def matrix(x: Any, name: str) -> Any:
    """W [I, O] of a parameter of one block: joins the head axes."""
    return x.reshape(-1, x.shape[-1]) if name == "attention.output" else x.reshape(x.shape[0], -1)


def check_divides(shape: tuple[int, ...], where: str, axis: Axis, pattern: Pattern) -> None:
    """Raises ConfigError where groups of M do not fill a parameter's axis, heads joined."""
    if isinstance(pattern, NofM):
        split = -1 if where.endswith("attention.output") else 1
        size = math.prod(shape[:split] if axis == "input" else shape[split:])
        check(size % pattern.m == 0, f"{where}: pattern {pattern}", f"an {axis} axis that {pattern.m} divides", size)


# --------------------------------------------------------------------------------------------------------------------
# Is it so, and does it stay so
# --------------------------------------------------------------------------------------------------------------------


def check_pattern(tree: Any, pattern: Pattern, axes: Mapping[str, Axis]) -> None:
    """Raises ValueError for the first group that breaks a claimed pattern, with its place.

    ConfigError (also a ValueError) where the pattern does not divide a matrix.

    Args:
        tree: parameters, where what is not 0 counts as kept, or masks, whose groups must also keep no less than N.
        pattern: the claim.
        axes: along what the groups of each matrix run, such as {"ffn.down": "input"}; matrices not named may be
            anything. `pruning.compared` tells for a method.
    """
    layers = tree["layers"]
    count = len(layers) if isinstance(layers, list | tuple) else len(get(layers, next(iter(axes))))
    for i in range(count):
        for name, axis in axes.items():
            # of a stack only this matrix is cut out, not its block
            x = get(layers, name)[i] if isinstance(layers, dict) else get(layers[i], name)
            where = f"layers.{i}.{name}"
            if x is None:
                raise ValueError(f"{where}: expected a mask for {pattern}, got None")
            check_divides(x.shape, where, axis, pattern)
            exact = x.dtype == bool and isinstance(pattern, NofM)
            kept, limit = _kept(matrix(x, name), pattern, axis)
            broken, at, found = jax.device_get(_first_broken(kept, limit, exact))
            if broken:
                index = np.unravel_index(int(at), kept.shape)
                raise ValueError(f"{where}: {_place(index, pattern, axis)} keeps {int(found)}, expected {limit}")


def _kept(weight: jax.Array, pattern: Pattern, axis: Axis) -> tuple[jax.Array, int]:
    """Entries kept in each group, int32 [outputs or inputs, groups], and how many are allowed."""
    lines = weight.T if axis == "input" else weight.reshape(1, -1) if axis == "matrix" else weight
    size = pattern.m if isinstance(pattern, NofM) else lines.shape[-1]
    limit = pattern.n if isinstance(pattern, NofM) else size - pattern.pruned(size)
    return jnp.sum(lines.reshape(lines.shape[0], -1, size).astype(bool), axis=-1, dtype=jnp.int32), limit


@functools.partial(jax.jit, static_argnames=("limit", "exact"))
def _first_broken(kept: jax.Array, limit: int, exact: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    broken = ((kept != limit) if exact else (kept > limit)).reshape(-1)
    at = jnp.argmax(broken)
    return broken[at], at, kept.reshape(-1)[at]


def _place(index: Any, pattern: Pattern, axis: Axis) -> str:
    line, group = map(int, index)
    other = "output" if axis == "input" else "input"
    if axis == "matrix":
        return "the matrix"
    if isinstance(pattern, Ratio):
        return f"{other} {line}"
    return f"{other} {line}, {axis}s {group * pattern.m} to {(group + 1) * pattern.m - 1},"


def hold(masks: Any) -> optax.GradientTransformation:
    """Keeps pruned weights at 0 while a pruned model is trained on: the last link of an optimizer's chain.

        optimizer = optax.chain(optax.adamw(1e-4), hold(masks))

    Args:
        masks: as `pruning.prune` returns them: the parameters' tree, bool (True is kept) or None where dense.

    Raises:
        ValueError: from `init`, where a mask does not fit its parameter.
    """

    def init(params: Any) -> optax.EmptyState:
        def fit(path: Any, mask: Any, x: Any) -> None:
            if mask is not None and mask.shape != x.shape:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(f"{name}: expected a mask of shape {x.shape}, got {mask.shape}")

        jax.tree_util.tree_map_with_path(fit, masks, params, is_leaf=_is_none)
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        def held(mask: Any, x: Any) -> Any:
            return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))

        return jax.tree.map(held, masks, updates, is_leaf=_is_none), state

    return optax.GradientTransformation(init, update)


def _is_none(x: Any) -> bool:
    return x is None
