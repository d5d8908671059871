"""One-shot pruning, block by block: patterns, masks, streaming statistics, DaSS and the methods it is compared with.

    params, masks, report = prune(params, config, tokens, pattern=NofM(2, 4), mlp=Dass())

All matrices are seen as W [I, O], inputs first; attention's head axes are joined. X [I, tokens] is what W reads over
the calibration tokens, ||X_i|| the norm of one of its channels.

    method                                        score, larger is kept                     compared over
    Magnitude                                     |W_ij|                                    N:M: I; ratio: the matrix
    Wanda      Sun et al., arXiv 2306.11695       |W_ij| ||X_i||                            I
    RIA        Zhang et al., ICLR 2024            (|W_ij| / sum_j |W_ij|                    N:M: I; ratio: the matrix
               ("Plug-and-Play")                   + |W_ij| / sum_i |W_ij|) ||X_i||^0.5
    SparseGPT  Frantar, Alistarh, 2301.00774      W_ij^2 / U_ii^2, H^-1 = U^T U,            N:M: I; ratio: 128 inputs
               (the only one that moves weights)  H = 2 X X^T / sequences                   and all outputs
    DaSS       `jsparse.methods.dass`             gate, up: over O; down: over I

N:M means N kept of each M consecutive entries. A ratio r prunes floor(r size) entries of what is compared. Among equal
scores the lower index is pruned first. Two choices are not the first authors' code: magnitude and RIA by ratio prune
exactly so many entries of a matrix, however many tie at the threshold; SparseGPT keeps their rule, at least one more.

Statistics are taken of the dense block on what the pruned blocks before it put out, in float32; then the block is
pruned and its outputs go on to the next.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jsparse import model
from jsparse.config import LlamaConfig, check
from jsparse.methods import dass
from jsparse.methods.dass import Dass
from jsparse.methods.patterns import (
    ATTENTION,
    MLP,
    Axis,
    Broken,
    NofM,
    Pattern,
    check_divides,
    describe_broken,
    divides,
    find_broken,
    get,
    joined,
    keep_largest,
    matrix,
    pick,
    replace,
    shares,
)
from jsparse.methods.sparsegpt import SparseGpt, dampings, exact_dot, sparsegpt
from jsparse.model import Params
from jsparse.parallel import batch_shards, constrain, round_up

# --------------------------------------------------------------------------------------------------------------------
# What to prune and how
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Magnitude:
    type: ClassVar[str] = "magnitude"


@dataclass(frozen=True)
class Wanda:
    type: ClassVar[str] = "wanda"


@dataclass(frozen=True)
class Ria:
    type: ClassVar[str] = "ria"
    alpha: float = 0.5  # exponent of the input's norm

    def __post_init__(self) -> None:
        check(self.alpha >= 0, "alpha", "a number of at least 0", self.alpha)


Method = Dass | Wanda | SparseGpt | Magnitude | Ria
METHODS: dict[str, type[Method]] = {kind.type: kind for kind in (Dass, Wanda, SparseGpt, Magnitude, Ria)}

_READS = {  # the field of `BlockTrace` that a matrix reads
    "ffn.gate": "ffn", "ffn.up": "ffn", "ffn.down": "hidden", "attention.query": "attention",
    "attention.key": "attention", "attention.value": "attention", "attention.output": "heads",
}  # fmt: skip


def compared(name: str, method: Method, pattern: Pattern) -> Axis:
    """Over which axis of W [I, O] a method compares the entries of a matrix, and along which N:M groups run."""
    match method:
        case Dass():
            return "input" if name == "ffn.down" else "output"
        case Wanda():
            return "input"
    return "input" if isinstance(pattern, NofM) else "matrix"


def statistics(name: str, method: Method) -> str | None:
    """Which statistics a method needs of a matrix: the field of `BlockTrace` they are taken of, or None."""
    match method:
        case Magnitude():
            return None
        case Dass():
            return "hidden"
    return _READS[name]


# --------------------------------------------------------------------------------------------------------------------
# Masks and scores of one matrix
# --------------------------------------------------------------------------------------------------------------------


def wanda_scores(weight: jax.Array, squares: jax.Array) -> jax.Array:
    """float32 [I, O] of W [I, O] and its inputs' sums of squares, float32 [I]."""
    return dass.down_scores(weight, squares)


def ria_scores(weight: jax.Array, squares: jax.Array, alpha: float = 0.5) -> jax.Array:
    """Relative importance and activation, float32 [I, O]; `squares` as in `wanda_scores`."""
    w = jnp.abs(weight.astype(jnp.float32))

    def share(axis: int) -> jax.Array:
        total = jnp.sum(w, axis, keepdims=True)
        return w / jnp.where(total > 0, total, 1.0)

    return (share(0) + share(1)) * dass.norm_power(squares, alpha)[:, None]


# --------------------------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------------------------


class Stats(NamedTuple):
    """Sums over calibration tokens of what a matrix reads, C channels; float32."""

    squares: jax.Array  # [C]
    gram: jax.Array | None  # [C, C], X X^T; None where no method asks for it
    sequences: jax.Array  # []


Plan = tuple[tuple[str, Method], ...]  # the matrices of a block to prune, each with its method
Needs = tuple[tuple[str, bool], ...]  # fields of `BlockTrace` to measure, each with whether its Gram matrix is wanted


class Stream(NamedTuple):
    """What the calibration has come to: all batches, side by side."""

    x: jax.Array  # the residual stream [batches, B, T, D]
    counted: jax.Array  # bool [batches, B], rows that count


def needs(plan: Plan) -> Needs:
    """The statistics that a plan needs of a block."""
    found: dict[str, bool] = {}
    for name, method in plan:
        field = statistics(name, method)
        if field:
            found[field] = found.get(field, False) or isinstance(method, SparseGpt)
    return tuple(sorted(found.items()))


def measure(x: jax.Array, counted: jax.Array, gram: bool) -> Stats:
    """Statistics of x [B, T, C...], trailing axes joined, over the sequences counted, bool [B]."""
    x = x.reshape(*x.shape[:2], -1)
    x = jnp.where(counted[:, None, None], x, jnp.zeros((), x.dtype)).reshape(-1, x.shape[-1])
    squares = constrain(jnp.sum(x.astype(jnp.float32) ** 2, axis=0), None)  # whole everywhere: the host reads it
    return Stats(squares, exact_dot(x.T, x) if gram else None, jnp.sum(counted, dtype=jnp.float32))


def block_statistics(
    layer: Params, x: jax.Array, counted: jax.Array, config: LlamaConfig, needs: Needs
) -> tuple[jax.Array, dict[str, Stats]]:
    """The statistics of one block over one batch, for use under `jax.jit`.

    Args:
        layer: the block's parameters, in the dtype of x but for what stays float32.
        x: [B, T, D], what the block reads.
        counted: bool [B], sequences that count.
        needs: what to measure.

    Returns:
        The residual stream between attention and FFN, [B, T, D], and the statistics by field of `BlockTrace`.
    """
    middle, attention, heads = model.run_attention(layer, x, config)
    _, ffn, hidden = model.run_ffn(layer, middle, config)
    trace = model.BlockTrace(attention, heads, ffn, hidden)
    return middle, {field: measure(getattr(trace, field), counted, gram) for field, gram in needs}


# One program for all batches, which overwrites them one by one: the stream exists only once, and memory for what lies
# between is asked for once a block. Asked for with each batch, the system zeroes it each time: a sixth of a CPU's time.


@functools.partial(jax.jit, static_argnames=("config", "needs", "attend"), donate_argnames="x")
def stream_statistics(
    layer: Params, x: jax.Array, counted: jax.Array, config: LlamaConfig, needs: Needs, attend: bool
) -> tuple[jax.Array, dict[str, Stats]]:
    """The statistics of one block over a `Stream`, in whose dtype it computes; and the stream, where asked to `attend`
    taken to between attention and FFN."""
    layer = _cast(layer, x.dtype, config)
    shapes = jax.eval_shape(lambda: block_statistics(layer, x[0], counted[0], config, needs)[1])

    def batch(k: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        x, sums = carry
        middle, new = block_statistics(layer, _at(x, k), _at(counted, k), config, needs)
        return (_written(x, middle, k) if attend else x), jax.tree.map(jnp.add, sums, new)

    return jax.lax.fori_loop(0, len(x), batch, (x, jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)))


@functools.partial(jax.jit, static_argnames=("config", "attended"), donate_argnames="x")
def advance(layer: Params, x: jax.Array, config: LlamaConfig, attended: bool) -> jax.Array:
    """A stream's x after a block, of that before it or, where it has `attended`, before its FFN."""
    layer = _cast(layer, x.dtype, config)

    def batch(k: jax.Array, x: jax.Array) -> jax.Array:
        one = _at(x, k)
        if not attended:
            one, _, _ = model.run_attention(layer, one, config)
        return _written(x, model.run_ffn(layer, one, config)[0], k)

    return jax.lax.fori_loop(0, len(x), batch, x)


def _at(x: jax.Array, k: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, k, keepdims=False)


def _written(x: jax.Array, one: jax.Array, k: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, one, k, axis=0)


def _cast(layer: Params, dtype: Any, config: LlamaConfig) -> Params:
    islands = model.islands(config)["layers"]
    islands = islands if isinstance(islands, dict) else islands[0]
    return jax.tree.map(lambda island, x: x if island else x.astype(dtype), islands, layer)


@functools.partial(jax.jit, static_argnames="dtype")
def _embed(embed: jax.Array, ids: jax.Array, dtype: Any) -> jax.Array:
    """[batches, B, T, D] of ids [batches, B, T], batch by batch."""
    embed = constrain(embed, "vocab", None)
    return jax.lax.map(lambda ids: constrain(embed[ids].astype(dtype), "batch", "sequence", None), ids)


def embed(
    matrix: jax.Array, config: LlamaConfig, tokens: ArrayLike, batch_size: int
) -> list[tuple[jax.Array, jax.Array]]:
    """The residual stream before the first block by batches, for methods that go batch by batch.

    Args:
        matrix: the embedding [V, D], in the dtype to compute in.
        tokens: calibration sequences, int [sequences, T].
        batch_size: sequences a batch; the last batch is filled up with rows that do not count.

    Returns:
        Of each batch x [B, T, D], and which rows count, bool [B].

    Raises:
        ConfigError: the tokens do not fit the model.
    """
    ids, counted = _batches(config, tokens, batch_size)
    return [(_embed(matrix, ids[k : k + 1], matrix.dtype)[0], jnp.asarray(rows)) for k, rows in enumerate(counted)]


def _batches(config: LlamaConfig, tokens: ArrayLike, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [batches, B, T], and which rows count, bool [batches, B]."""
    ids = np.asarray(tokens)
    check(ids.ndim == 2 and ids.size > 0 and ids.dtype.kind in "iu", "tokens", "ids [sequences, T]",
          f"{ids.dtype}{list(ids.shape)}")  # fmt: skip
    check(batch_size > 0, "batch_size", "a positive number", batch_size)
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    check(not len(outside), "tokens", f"ids from 0 to {config.vocab_size - 1}", outside[:1].tolist())
    size = round_up(min(batch_size, len(ids)), batch_shards())
    places = np.arange(round_up(len(ids), size)).reshape(-1, size)
    return ids[np.minimum(places, len(ids) - 1)].astype(np.int32), places < len(ids)


# --------------------------------------------------------------------------------------------------------------------
# One block
# --------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("plan", "pattern"))
def prune_block(
    layer: Params, stats: Mapping[str, Stats], plan: Plan, pattern: Pattern
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """Prunes the matrices of one block.

    Args:
        layer: the block's parameters.
        stats: by field of `BlockTrace`, see `statistics`.
        plan: name and method of each matrix.
        pattern: of all of them.

    Returns:
        The new matrices and their masks (bool, True is kept) by name, in the parameters' shapes and dtypes; and for
        those by SparseGPT the place in `dampings` of the share that was used, int32 [].

    Raises:
        ConfigError: statistics that a method needs are not there, or a pattern does not divide.
    """
    weights, masks = {}, {}
    places: dict[str, jax.Array] = {}
    for (field, method), names in _by_input(plan).items():
        where = f"{names[0]} by {method.type}"
        check(field is None or field in stats, where, f"statistics of {field!r}", sorted(stats))
        found = stats[field] if field else None
        parts = [matrix(get(layer, name), name) for name in names]
        if isinstance(method, SparseGpt):
            check(found is not None and found.gram is not None, where, "a Gram matrix", None)
            pruned, place = _sparsegpt(parts, found, method, pattern)  # type: ignore[arg-type]
            places |= dict.fromkeys(names, constrain(place))
        else:
            pruned = [_masked(part, name, method, found, pattern) for part, name in zip(parts, names, strict=True)]
        for name, (weight, keep) in zip(names, pruned, strict=True):
            whole = get(layer, name)
            weights[name] = weight.astype(whole.dtype).reshape(whole.shape)
            masks[name] = keep.reshape(whole.shape)
    return weights, masks, places


def _by_input(plan: Plan) -> dict[tuple[str | None, Method], list[str]]:
    """The matrices that one method prunes by one statistic."""
    found: dict[tuple[str | None, Method], list[str]] = {}
    for name, method in plan:
        found.setdefault((statistics(name, method), method), []).append(name)
    return found


def _sparsegpt(
    parts: list[jax.Array], stats: Stats, method: SparseGpt, pattern: Pattern
) -> tuple[list[tuple[jax.Array, jax.Array]], jax.Array]:
    """Matrices that read the same input, side by side: its Gram matrix is factored once. And the damping's place."""
    whole = jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=1)
    widths = tuple(part.shape[1] for part in parts)
    hessian = 2.0 / stats.sequences * stats.gram  # type: ignore[operator]
    *found, place = sparsegpt(whole, hessian, pattern, damp=method.damp, block=method.block, parts=widths)
    ends = np.cumsum(widths)[:-1]
    return list(zip(*(jnp.split(x, ends, axis=1) for x in found), strict=True)), place


def _masked(
    weight: jax.Array, name: str, method: Method, stats: Stats | None, pattern: Pattern
) -> tuple[jax.Array, jax.Array]:
    keep = keep_largest(_scores(weight, name, method, stats), pattern, compared(name, method, pattern))
    return jnp.where(keep, weight, jnp.zeros((), weight.dtype)), keep  # not a product: nan times 0 is nan


def _scores(weight: jax.Array, name: str, method: Method, stats: Stats | None) -> jax.Array:
    if stats is None:
        return jnp.abs(weight.astype(jnp.float32))
    match method:
        case Dass(alpha, alpha_down):
            if name == "ffn.down":
                return dass.down_scores(weight, stats.squares, alpha_down)
            return dass.input_scores(weight, stats.squares, alpha)
        case Ria(alpha):
            return ria_scores(weight, stats.squares, alpha)
    return wanda_scores(weight, stats.squares)


# --------------------------------------------------------------------------------------------------------------------
# Block after block
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixReport:
    name: str  # as in `layers.0.ffn.gate`
    method: str
    groups: Axis  # over what entries were compared
    weights: int
    zeros: int
    dead: int  # channels of the statistics that are 0 over the whole calibration
    damp: float | None = None  # SparseGPT: the share that its Hessian was damped by, see `sparsegpt.dampings`


class Pruned(NamedTuple):
    """One block, pruned."""

    weights: dict[str, jax.Array]  # by name, in the parameters' shapes and dtypes
    masks: dict[str, jax.Array]  # bool, True is kept
    rows: list[MatrixReport]


def prune_next(
    layer: Params, i: int, stream: Stream | None, config: LlamaConfig, plan: Plan, pattern: Pattern
) -> tuple[Pruned, Stream | None]:
    """Prunes block i by what comes to it, and takes the stream, which is overwritten, from before it to after it.

    Raises:
        ValueError: statistics or weights are not finite, or a group does not have the pattern; names its place.
    """
    stays = not any(name in ATTENTION for name, _ in plan)  # attention stays dense: its part of the pass is done once
    stats: dict[str, Stats] = {}
    shaped = config.of_layer(i)
    if stream:
        x, stats = stream_statistics(layer, *stream, shaped, needs(plan), stays)
        stream = stream._replace(x=x)
    weights, masks, places = prune_block(layer, stats, plan, pattern)
    seen = _look({name: get(layer, name) for name, _ in plan}, weights, plan, pattern)
    if stream and i < config.num_hidden_layers - 1:
        stream = stream._replace(x=advance(replace(layer, weights), stream.x, shaped, stays))
    return Pruned(weights, masks, _rows(i, stats, seen, weights, places, plan, pattern)), stream


class _Seen(NamedTuple):
    """What the host wants to know of a matrix; scalars."""

    finite_before: jax.Array
    finite: jax.Array
    zeros: jax.Array
    broken: Broken


@functools.partial(jax.jit, static_argnames=("plan", "pattern"))
def _look(before: Any, after: Any, plan: Plan, pattern: Pattern) -> dict[str, _Seen]:
    found = {
        name: _Seen(
            jnp.all(jnp.isfinite(before[name])),
            jnp.all(jnp.isfinite(after[name])),
            jnp.sum(after[name] == 0, dtype=jnp.int32),
            find_broken(matrix(after[name], name), pattern, compared(name, method, pattern)),
        )
        for name, method in plan
    }
    return jax.tree.map(constrain, found)


def _rows(
    i: int,
    stats: Mapping[str, Stats],
    seen: Any,
    weights: Mapping[str, jax.Array],
    places: Mapping[str, jax.Array],
    plan: Plan,
    pattern: Pattern,
) -> list[MatrixReport]:
    """The report on one block. Here the host waits for the devices, once a block."""
    squares, seen, places = jax.device_get(({field: s.squares for field, s in stats.items()}, seen, places))
    dead = {field: _dead(values, f"layers.{i}.{field}") for field, values in squares.items()}
    rows = []
    for name, method in plan:
        where, axis, field = f"layers.{i}.{name}", compared(name, method, pattern), statistics(name, method)
        shape, found = weights[name].shape, seen[name]
        if not found.finite_before:
            raise ValueError(f"{where}: weights are not finite before pruning")
        if not found.finite:
            raise ValueError(f"{where}: weights are not finite after pruning: more damping may help")
        if found.broken.excess:
            raise ValueError(f"{where}: {describe_broken(found.broken, joined(shape, name), pattern, axis)}")
        size, none = weights[name].size, dead[field] if field else 0
        damp = dampings(method.damp)[places[name]] if isinstance(method, SparseGpt) else None
        rows.append(MatrixReport(where, method.type, axis, size, int(found.zeros), none, damp))
    return rows


def _dead(squares: np.ndarray, where: str) -> int:
    """Channels that are always 0. Raises ValueError where a statistic is not finite."""
    bad = np.flatnonzero(~np.isfinite(squares))
    if len(bad):
        raise ValueError(f"{where}: expected finite statistics of the calibration, got {squares[bad[0]]} in channel "
                         f"{bad[0]} ({len(bad)} of {len(squares)} channels are not finite)")  # fmt: skip
    return int(np.sum(squares == 0))


# --------------------------------------------------------------------------------------------------------------------
# A whole model
# --------------------------------------------------------------------------------------------------------------------

Remainder = Literal["refuse", "skip"]  # what to do with a matrix that groups of M do not fill


@dataclass(frozen=True)
class Report:
    """What was pruned. `dataclasses.asdict` gives plain JSON values."""

    pattern: str
    sequences: int  # of calibration
    seq_len: int
    matrices: tuple[MatrixReport, ...]
    skipped: tuple[str, ...]  # matrices that groups of M do not fill, left dense
    mlp_sparsity: float  # zeros among the weights of gate, up and down
    model_sparsity: float  # the same zeros and attention's, among all parameters


def plans(
    config: LlamaConfig, pattern: Pattern, mlp: Method, attention: Method | None, remainder: Remainder
) -> tuple[list[Plan], tuple[str, ...]]:
    """What to prune of each layer, and the matrices that are skipped.

    Raises ConfigError where a pattern does not divide a matrix and is not to skip it, and for DaSS on attention.
    """
    check(not isinstance(attention, Dass), "attention", "wanda, sparsegpt, magnitude or ria, as DaSS is of FFNs",
          "dass")  # fmt: skip
    wanted: Plan = tuple((name, mlp) for name in MLP)
    wanted += tuple((name, attention) for name in ATTENTION) if attention else ()
    found, skipped = [], []
    for i, layer in enumerate(jax.eval_shape(model.unstack, model.abstract(config))["layers"]):
        plan = []
        for name, method in wanted:
            where, shape, axis = f"layers.{i}.{name}", get(layer, name).shape, compared(name, method, pattern)
            if remainder == "refuse":
                check_divides(shape, where, axis, pattern)
            if divides(shape, name, axis, pattern):
                plan.append((name, method))
            else:
                skipped.append(where)
        found.append(tuple(plan))
    check(any(found), "pattern", "one that divides at least one matrix", str(pattern))
    return found, tuple(skipped)


def prune(
    params: Params,
    config: LlamaConfig,
    tokens: ArrayLike | None = None,
    *,
    pattern: Pattern,
    mlp: Method = Dass(),
    attention: Method | None = None,
    remainder: Remainder = "refuse",
    batch_size: int = 8,
    dtype: Any = None,
    donate: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Params, Any, Report]:
    """Prunes a model in one pass over its blocks, without training.

    Holds beside the parameters the residual stream of the calibration tokens, the statistics of one block and the
    masks. `jsparse.hf.prune_folder` does the same with the parameters of one block. Under a mesh (`jax.set_mesh`) the
    sequences are split over "data" and "fsdp", and the results have the parameters' shardings.

    Args:
        params: stacked or unstacked; statistics and scores are float32 whatever their dtype.
        tokens: calibration sequences, int [sequences, T]; None will do for magnitude.
        pattern: of every matrix that is pruned.
        mlp: method for gate, up and down.
        attention: method for query, key, value and output; None leaves them dense. DaSS knows none.
        remainder: "skip" leaves a matrix dense whose axis groups of M do not fill; "refuse" raises.
        batch_size: sequences a forward pass.
        dtype: of the forward passes; by default the embedding's.
        donate: writes into the arrays of stacked `params` instead of new ones, so that the model exists only once; the
            caller's tree is of no use afterwards.
        progress: called after each block with the number of blocks done and of all.

    Returns:
        The pruned parameters in the form given, the masks (a tree of that form: bool, True is kept, None for what
        stays dense) and a report.

    Raises:
        ConfigError: a pattern that does not divide a matrix, or tokens that are missing or do not fit the model.
        ValueError: statistics or weights are not finite; names the matrix, or the block and the channel.
    """
    todo, skipped = plans(config, pattern, mlp, attention, remainder)
    layers = params["layers"]
    stacked = isinstance(layers, dict)
    stream = start(params["embed"], config, tokens, todo, batch_size, dtype)
    if stacked and not donate:
        layers = replace(layers, {name: jnp.copy(get(layers, name)) for name, _ in todo[0]})
    elif not stacked:
        layers = list(layers)
    masks = _empty_masks(layers, todo[0])
    rows: list[MatrixReport] = []
    for i, plan in enumerate(todo):
        found, stream = prune_next(pick(layers, i), i, stream, config, plan, pattern)
        layers, masks = _put(layers, i, found.weights), _put(masks, i, found.masks)
        rows += found.rows
        if progress:
            progress(i + 1, config.num_hidden_layers)
    masks = jax.tree.map(lambda _: None, params) | {"layers": masks}
    return params | {"layers": layers}, masks, report(config, pattern, rows, skipped, stream, tokens)


def start(
    matrix: jax.Array, config: LlamaConfig, tokens: ArrayLike | None, todo: list[Plan], batch_size: int, dtype: Any
) -> Stream | None:
    """The stream before the first block, computed in `dtype` or else in the embedding's; None where no statistics are
    needed. Arguments else and errors as `embed` has them, and ConfigError where tokens are needed and there are
    none."""
    users = [f"{method.type} ({name})" for plan in todo for name, method in plan if statistics(name, method)]
    check(tokens is not None or not users, "tokens", f"calibration tokens for {users[0] if users else ''}", None)
    if not users or tokens is None:
        return None
    ids, counted = _batches(config, tokens, batch_size)
    return Stream(_embed(matrix, ids, jnp.dtype(dtype or matrix.dtype)), jnp.asarray(counted))


def report(
    config: LlamaConfig,
    pattern: Pattern,
    rows: list[MatrixReport],
    skipped: tuple[str, ...],
    stream: Stream | None,
    tokens: ArrayLike | None,
) -> Report:
    sequences, seq_len = np.shape(tokens) if stream else (0, 0)  # type: ignore[arg-type, misc]
    return Report(str(pattern), sequences, seq_len, tuple(rows), skipped, *shares(rows, model.abstract(config)))


def _put(layers: Any, i: int, values: Mapping[str, Any]) -> Any:
    """Writes one block's matrices into a stack, in place, or a list."""
    if isinstance(layers, dict):
        stacks = {name: get(layers, name) for name in values}
        written = _write_in_place(stacks, values, i)
        return replace(layers, jax.device_put(written, jax.tree.map(lambda x: x.sharding, stacks)))
    return [*layers[:i], replace(layers[i], values), *layers[i + 1 :]]


@functools.partial(jax.jit, donate_argnums=0)
def _write_in_place(stacks: Any, values: Any, i: Any) -> Any:
    return jax.tree.map(lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, i, axis=0), stacks, values)


def _empty_masks(layers: Any, plan: Plan) -> Any:
    masks = jax.tree.map(lambda _: None, layers)
    if isinstance(layers, dict):
        stacks = {name: get(layers, name) for name, _ in plan}
        masks = replace(masks, {name: jnp.zeros(x.shape, bool, device=x.sharding) for name, x in stacks.items()})
    return masks
