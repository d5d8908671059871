"""Patterns of zeros in weights: which entries a pattern keeps, whether a model has it, and keeping it in training.

Matrices are seen as W [I, O], inputs first, attention's head axes joined. N:M means N kept of each M consecutive
entries along an axis. A ratio r means floor(r size) entries pruned of each line along an axis, or of the whole matrix.
Among equal scores the lower index is pruned first.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
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


MLP = ("ffn.gate", "ffn.up", "ffn.down")
ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.output")


def get(tree: Any, name: str) -> Any:
    """A block's leaf by its name."""
    part, leaf = name.split(".")
    return tree[part][leaf]


def replace(tree: Any, values: Mapping[str, Any]) -> Any:
    """The tree with other or new leaves under these names."""
    for name, value in values.items():
        part, leaf = name.split(".")
        tree = tree | {part: tree.get(part, {}) | {leaf: value}}
    return tree


def pick(layers: Any, i: int) -> Any:
    """What is of one block, of a stack or a list."""
    return _pick_of_stack(layers, i) if isinstance(layers, dict) else layers[i]


@jax.jit
def _pick_of_stack(layers: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: x[i], layers)


def joined(shape: tuple[int, ...], name: str) -> tuple[int, int]:
    """[I, O] of a parameter of one block: joins the head axes."""
    split = -1 if name.endswith("attention.output") else 1
    return math.prod(shape[:split]), math.prod(shape[split:])


def matrix(x: Any, name: str) -> Any:
    """W [I, O] of a parameter of one block."""
    return x.reshape(joined(x.shape, name))


def divides(shape: tuple[int, ...], name: str, axis: Axis, pattern: Pattern) -> bool:
    """Whether groups of M fill a parameter's axis."""
    return not isinstance(pattern, NofM) or joined(shape, name)[axis == "output"] % pattern.m == 0


def check_divides(shape: tuple[int, ...], where: str, axis: Axis, pattern: Pattern) -> None:
    """Raises ConfigError where they do not."""
    if not divides(shape, where, axis, pattern):
        size, m = joined(shape, where)[axis == "output"], getattr(pattern, "m", 1)
        raise ConfigError(f"{where}: pattern {pattern}: expected an {axis} axis that {m} divides, got {size}")


# --------------------------------------------------------------------------------------------------------------------
# Is it so, and does it stay so
# --------------------------------------------------------------------------------------------------------------------


class Broken(NamedTuple):
    """What a matrix says to a claimed pattern; scalars."""

    excess: jax.Array  # int32, entries kept beyond the pattern, or short of it, over all groups
    first: jax.Array  # int32, the first group that breaks it
    keeps: jax.Array  # int32, entries that this group keeps


def find_broken(weight: jax.Array, pattern: Pattern, axis: Axis) -> Broken:
    """The groups of W [I, O] that break a pattern.

    Of weights, what is not 0 counts as kept, and to keep fewer is no breach. Groups of a mask (bool) keep exactly N.
    """
    lines = weight.T if axis == "input" else weight.reshape(1, -1) if axis == "matrix" else weight
    size, limit = _limit(weight.shape, pattern, axis)
    kept = jnp.sum(lines.reshape(-1, size).astype(bool), axis=-1, dtype=jnp.int32)
    exact = weight.dtype == bool and isinstance(pattern, NofM)
    excess = jnp.abs(kept - limit) if exact else jnp.maximum(kept - limit, 0)
    first = jnp.argmax(excess > 0).astype(jnp.int32)
    return Broken(jnp.sum(excess, dtype=jnp.int32), first, kept[first])


def describe_broken(broken: Broken, shape: tuple[int, int], pattern: Pattern, axis: Axis) -> str:
    """The first broken group of W [I, O] in words: its place, what it keeps and what was expected."""
    size, limit = _limit(shape, pattern, axis)
    line, group = divmod(int(broken.first), shape[axis == "output"] // size if isinstance(pattern, NofM) else 1)
    across = "output" if axis == "input" else "input"
    place = "the matrix" if axis == "matrix" else f"{across} {line}"
    if isinstance(pattern, NofM):
        place += f", {axis}s {group * size} to {(group + 1) * size - 1},"
    return f"{place} keeps {int(broken.keeps)}, expected {limit}"


def _limit(shape: tuple[int, ...], pattern: Pattern, axis: Axis) -> tuple[int, int]:
    """Entries of a group, and how many a pattern lets it keep."""
    line = shape[0] if axis == "input" else shape[1] if axis == "output" else math.prod(shape)
    return (pattern.m, pattern.n) if isinstance(pattern, NofM) else (line, line - pattern.pruned(line))


def check_pattern(tree: Any, pattern: Pattern, axes: Mapping[str, Axis]) -> None:
    """Raises ValueError for the first group that breaks a claimed pattern, with its place.

    ConfigError (also a ValueError) where the pattern does not divide a matrix.

    Args:
        tree: parameters, where what is not 0 counts as kept, or masks, whose groups must also keep no less than N.
        pattern: the claim.
        axes: along what the groups of each matrix run, such as {"ffn.down": "input"}; matrices not named may be
            anything. `pruning.compared` tells for a method.
    """
    found = []
    for where, name, x in each_matrix(tree, axes):
        if x is None:
            raise ValueError(f"{where}: expected a mask for {pattern}, got None")
        check_divides(x.shape, where, axes[name], pattern)
        found.append((where, x.shape, axes[name], _find_broken(x, name, pattern, axes[name])))
    for where, shape, axis, broken in jax.device_get(found):  # all are on their way before the first is read
        if broken.excess:
            raise ValueError(f"{where}: {describe_broken(broken, joined(shape, where), pattern, axis)}")


def each_matrix(tree: Any, names: Iterable[str]) -> Iterator[tuple[str, str, Any]]:
    """The named matrices of every layer, one at a time: where ("layers.0.ffn.gate"), name and the parameter, or mask,
    of that layer."""
    layers = tree["layers"]
    count = len(jax.tree.leaves(layers)[0]) if isinstance(layers, dict) else len(layers)
    for i in range(count):
        for name in names:
            x = _pick_of_stack(get(layers, name), i) if isinstance(layers, dict) else get(layers[i], name)
            yield f"layers.{i}.{name}", name, x


@functools.partial(jax.jit, static_argnames=("name", "pattern", "axis"))
def _find_broken(x: jax.Array, name: str, pattern: Pattern, axis: Axis) -> Broken:
    return find_broken(matrix(x, name), pattern, axis)


def check_claim(params: Any, pattern: Pattern, names: Iterable[str] = MLP) -> None:
    """Raises ValueError for the first group that breaks a pattern, where nobody says along what the groups run.

    A matrix keeps a claim that holds along its inputs, along its outputs or, of a ratio, over the whole of it. Of one
    that does not, the axis along which least is missing is the one that is spoken of.
    """
    axes: tuple[Axis, ...] = ("input", "output") if isinstance(pattern, NofM) else ("input", "output", "matrix")
    found = []
    for where, name, x in each_matrix(params, names):
        fitting = [axis for axis in axes if divides(x.shape, name, axis, pattern)]
        if not fitting:
            check_divides(x.shape, where, axes[0], pattern)
        found.append((where, x.shape, {axis: _find_broken(x, name, pattern, axis) for axis in fitting}))
    for where, shape, by_axis in jax.device_get(found):
        axis, broken = min(by_axis.items(), key=lambda item: item[1].excess)
        if broken.excess:
            raise ValueError(
                f"{where}: pattern {pattern}: {describe_broken(broken, joined(shape, where), pattern, axis)}"
            )


@dataclass(frozen=True)
class MatrixZeros:
    """What zeros a matrix has."""

    name: str  # as in `layers.0.ffn.gate`
    weights: int
    zeros: int
    pattern: str | None  # the N:M that they make, if one, and along what: "2:4 input"


GROUPS = (2, 4, 8, 16, 32)  # group sizes that `observe` looks for


def observe(params: Any) -> tuple[MatrixZeros, ...]:
    """The zeros of the blocks' matrices, and the exact N:M pattern that they make where they make one: no group keeps
    more than N, and the matrix has no more zeros, by more than a hundredth, than that asks for."""
    names = MLP + ATTENTION
    sizes, zeros = {}, {}
    for where, _, x in each_matrix(params, names):
        sizes[where], zeros[where] = x.size, _zeros(x)
    zeros = jax.device_get(zeros)
    sparse = {where for where, size in sizes.items() if zeros[where] > 0.01 * size}
    most = {where: _most_kept(x, name) for where, name, x in each_matrix(params, names) if where in sparse}
    most = jax.device_get(most)
    rows = []
    for where, size in sizes.items():
        share = zeros[where] / size
        exact = [f"{n}:{m} {axis}" for (m, axis), n in most.get(where, {}).items()
                 if 0 < n < m and share - (1 - n / m) < 0.01]  # fmt: skip
        rows.append(MatrixZeros(where, size, int(zeros[where]), exact[0] if exact else None))
    return tuple(rows)


@jax.jit
def _zeros(x: jax.Array) -> jax.Array:
    return jnp.sum(x == 0, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames="name")
def _most_kept(x: jax.Array, name: str) -> dict[tuple[int, str], jax.Array]:
    """The most that any group of M keeps, by M and axis."""
    kept = matrix(x, name) != 0
    most = {}
    for m in GROUPS:
        for axis, lines in (("input", kept.T), ("output", kept)):
            if lines.shape[1] % m == 0:
                most[m, axis] = jnp.max(jnp.sum(lines.reshape(-1, m), axis=1, dtype=jnp.int32))
    return most


def shares(rows: Iterable[Any], params: Any) -> tuple[float, float]:
    """The zeros of rows with a `name` and `zeros`, as a share of the MLPs' weights (of the rows that are theirs) and of
    all parameters; `params` may be shapes alone."""
    zeros = {row.name: row.zeros for row in rows}
    mlp = sum(n for name, n in zeros.items() if name.split(".", 2)[2] in MLP)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    mlp_size = sum(x.size for path, x in leaves if _name(path) in MLP)
    return mlp / mlp_size, sum(zeros.values()) / sum(x.size for _, x in leaves)


def _name(path: Any) -> str:
    return ".".join(str(getattr(key, "key", "")) for key in path[-2:])


class HoldState(NamedTuple):
    """The masks, in the optimizer's state: an argument of the step like all of it, so never compiled into it, and saved
    and sharded with it."""

    masks: Any


def hold(masks: Any) -> optax.GradientTransformation:
    """Keeps pruned weights at 0 while a pruned model is trained on: the last link of an optimizer's chain.

        optimizer = optax.chain(optax.adamw(1e-4), hold(masks))

    Args:
        masks: as `pruning.prune` returns them: the parameters' tree, bool (True is kept) or None where dense. They are
            copied, so that the optimizer's state can be donated.

    Raises:
        ValueError: from `init`, where the masks are not of the parameters' form or one does not fit its parameter.
    """

    def init(params: Any) -> HoldState:
        form: Any = jax.tree.structure(masks, is_leaf=_is_none)
        expected: Any = jax.tree.structure(params)
        if form != expected:
            raise ValueError(f"masks: expected the parameters' form (layers stacked, or a list, as they are), got "
                             f"{form.num_leaves} leaves for {expected.num_leaves}")  # fmt: skip

        def fit(path: Any, mask: Any, x: Any) -> None:
            if mask is not None and mask.shape != x.shape:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(f"{name}: expected a mask of shape {x.shape}, got {mask.shape}")

        jax.tree_util.tree_map_with_path(fit, masks, params, is_leaf=_is_none)
        return HoldState(jax.tree.map(jnp.copy, masks))

    def update(updates: Any, state: HoldState, params: Any = None) -> tuple[Any, HoldState]:
        def held(mask: Any, x: Any) -> Any:
            return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))

        return jax.tree.map(held, state.masks, updates, is_leaf=_is_none), state

    return optax.GradientTransformation(init, update)


def hold_zeros() -> optax.GradientTransformation:
    """Keeps at 0 what is 0 in the blocks' matrices: `hold` without masks, which are read off the parameters.

    The first link of a chain, so that what is held counts neither in a norm nor in moments; an optimizer whose update
    of a weight 0 with gradients 0 is 0, as Adam's with weight decay is, then leaves it there.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        def held(path: Any, x: Any, weight: Any) -> Any:
            return jnp.where(weight != 0, x, jnp.zeros((), x.dtype)) if _name(path) in MLP + ATTENTION else x

        return jax.tree_util.tree_map_with_path(held, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _is_none(x: Any) -> bool:
    return x is None
