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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jsparse import model
from jsparse.config import LlamaConfig, check
from jsparse.methods import dass
from jsparse.methods.dass import Dass
from jsparse.methods.patterns import (
    Axis,
    NofM,
    Pattern,
    check_divides,
    check_pattern,
    get,
    keep_largest,
    matrix,
    replace,
)
from jsparse.methods.sparsegpt import SparseGpt, exact_dot, sparsegpt
from jsparse.model import Params
from jsparse.parallel import batch_shards, constrain

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

MLP = ("ffn.gate", "ffn.up", "ffn.down")
ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.output")

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


def measure(x: jax.Array, counted: jax.Array, gram: bool) -> Stats:
    """Statistics of x [B, T, C...], trailing axes joined, over the sequences counted, bool [B]."""
    x = x.reshape(*x.shape[:2], -1).astype(jnp.float32)
    x = jnp.where(counted[:, None, None], x, 0.0).reshape(-1, x.shape[-1])
    squares = constrain(jnp.sum(x * x, axis=0), None)  # whole everywhere: the host reads it
    return Stats(squares, exact_dot(x.T, x) if gram else None, jnp.sum(counted, dtype=jnp.float32))


Plan = tuple[tuple[str, Method], ...]  # the matrices to prune, each with its method


@functools.partial(jax.jit, static_argnames=("config", "plan"))
def block_statistics(
    layer: Params, x: jax.Array, counted: jax.Array, config: LlamaConfig, plan: Plan
) -> dict[str, Stats]:
    """The statistics that a plan needs of one block, by field of `BlockTrace`, over one batch.

    Args:
        layer: the block's parameters.
        x: [B, T, D], what the block reads.
        counted: bool [B], sequences that count.
    """
    _, trace = model.run_block(layer, x, config)
    wanted = [(statistics(name, method), isinstance(method, SparseGpt)) for name, method in plan]
    fields = sorted({field for field, _ in wanted if field})
    return {field: measure(getattr(trace, field), counted, (field, True) in wanted) for field in fields}


@functools.partial(jax.jit, static_argnames="config")
def _advance(layer: Params, x: jax.Array, config: LlamaConfig) -> jax.Array:
    return model.run_block(layer, x, config)[0]


@jax.jit
def _embed(embed: jax.Array, tokens: jax.Array) -> jax.Array:
    return constrain(constrain(embed, "vocab", None)[tokens], "batch", "sequence", None)


# --------------------------------------------------------------------------------------------------------------------
# One block
# --------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("plan", "pattern"))
def prune_block(
    layer: Params, stats: Mapping[str, Stats], plan: Plan, pattern: Pattern
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Prunes the matrices of one block.

    Args:
        layer: the block's parameters.
        stats: by field of `BlockTrace`, see `statistics`.
        plan: name and method of each matrix.
        pattern: of all of them.

    Returns:
        The new matrices and their masks (bool, True is kept) by name, in the parameters' shapes and dtypes.

    Raises:
        ConfigError: statistics that a method needs are not there, or a pattern does not divide.
    """
    weights, masks = {}, {}
    for name, method in plan:
        whole = get(layer, name)
        weight = matrix(whole, name)
        field = statistics(name, method)
        check(field is None or field in stats, f"{name} by {method.type}", f"statistics of {field!r}", sorted(stats))
        found = stats[field] if field else None
        if isinstance(method, SparseGpt):
            check(found is not None and found.gram is not None, f"{name} by sparsegpt", "a Gram matrix", None)
            hessian = 2.0 / found.sequences * found.gram  # type: ignore[union-attr, operator]
            weight, keep = sparsegpt(weight, hessian, pattern, damp=method.damp, block=method.block)
        else:
            keep = keep_largest(_scores(weight, name, method, found), pattern, compared(name, method, pattern))
            weight = jnp.where(keep, weight, jnp.zeros((), weight.dtype))  # not a product: nan times 0 is nan
        weights[name] = weight.astype(whole.dtype).reshape(whole.shape)
        masks[name] = keep.reshape(whole.shape)
    return weights, masks


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
# A whole model
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatrixReport:
    name: str  # as in `layers.0.ffn.gate`
    method: str
    groups: Axis  # over what entries were compared
    weights: int
    zeros: int
    dead: int  # channels of the statistics that are 0 over the whole calibration


@dataclass(frozen=True)
class Report:
    """What was pruned. `dataclasses.asdict` gives plain JSON values."""

    pattern: str
    sequences: int  # of calibration
    seq_len: int
    matrices: tuple[MatrixReport, ...]
    mlp_sparsity: float  # zeros among the weights of gate, up and down
    model_sparsity: float  # the same zeros and attention's, among all parameters


def prune(
    params: Params,
    config: LlamaConfig,
    tokens: ArrayLike | None = None,
    *,
    pattern: Pattern,
    mlp: Method = Dass(),
    attention: Method | None = None,
    batch_size: int = 8,
    donate: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Params, Any, Report]:
    """Prunes a model in one pass over its blocks, without training.

    Holds beside the parameters the residual stream of the calibration tokens, the statistics of one block and the
    masks. Under a mesh (`jax.set_mesh`) the sequences are split over "data" and "fsdp", and the results have the
    parameters' shardings.

    Args:
        params: stacked or unstacked; computes in their dtype, statistics and scores in float32.
        tokens: calibration sequences, int [sequences, T]; None will do for magnitude.
        pattern: of every matrix that is pruned.
        mlp: method for gate, up and down.
        attention: method for query, key, value and output; None leaves them dense. DaSS knows none.
        batch_size: sequences a forward pass.
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
    check(not isinstance(attention, Dass), "attention", "wanda, sparsegpt, magnitude or ria, as DaSS is of FFNs",
          "dass")  # fmt: skip
    plan: Plan = tuple((name, mlp) for name in MLP)
    plan += tuple((name, attention) for name in ATTENTION) if attention else ()
    layers = params["layers"]
    stacked = isinstance(layers, dict)
    for i in range(config.num_hidden_layers):
        for name, method in plan:
            shape = get(layers, name).shape[1:] if stacked else get(layers[i], name).shape
            check_divides(shape, f"layers.{i}.{name}", compared(name, method, pattern), pattern)
    needs = [f"{method.type} ({name})" for name, method in plan if statistics(name, method)]
    check(tokens is not None or not needs, "tokens", f"calibration tokens for {needs[0] if needs else ''}", None)

    stream = list(_batches(params, config, tokens, batch_size)) if needs else []
    if stacked and not donate:
        layers = replace(layers, {name: jnp.copy(get(layers, name)) for name, _ in plan})
    elif not stacked:
        layers = list(layers)
    masks = _empty_masks(layers, plan)
    rows: list[MatrixReport] = []
    for i in range(config.num_hidden_layers):
        layer = _pick(layers, i)
        stats: dict[str, Stats] = {}
        for x, counted in stream:
            one = block_statistics(layer, x, counted, config, plan)
            stats = jax.tree.map(jnp.add, stats, one) if stats else one
        dead = {field: _dead(s, f"layers.{i}.{field}") for field, s in stats.items()}
        weights, keep = prune_block(layer, stats, plan, pattern)
        for name, method in plan:
            where, axis, field = f"layers.{i}.{name}", compared(name, method, pattern), statistics(name, method)
            _zeros(get(layer, name), where, "are not finite before pruning")
            zeros = _zeros(weights[name], where, "are not finite after pruning: more damping may help")
            rows.append(MatrixReport(where, method.type, axis, weights[name].size, zeros, dead[field] if field else 0))
        layer = replace(layer, weights)
        for k, (x, counted) in enumerate(stream):  # one by one, so that it exists only once
            stream[k] = _advance(layer, x, config), counted
        layers, masks = _put(layers, i, weights), _put(masks, i, keep)
        if progress:
            progress(i + 1, config.num_hidden_layers)

    pruned = params | {"layers": layers}
    check_pattern(pruned, pattern, {name: compared(name, method, pattern) for name, method in plan})
    length = np.shape(tokens) if tokens is not None and needs else (0, 0)
    return pruned, jax.tree.map(lambda _: None, params) | {"layers": masks}, _report(pruned, rows, pattern, *length)


def _batches(params: Params, config: LlamaConfig, tokens: Any, size: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The residual stream [B, T, D] before the first block, and which rows are sequences (bool [B]), not padding."""
    tokens = np.asarray(tokens)
    check(tokens.ndim == 2 and tokens.size > 0 and tokens.dtype.kind in "iu", "tokens",
          "ids [sequences, T]", f"{tokens.dtype}{list(tokens.shape)}")  # fmt: skip
    check(size > 0, "batch_size", "a positive number", size)
    outside = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    check(not len(outside), "tokens", f"ids from 0 to {config.vocab_size - 1}", outside[:1].tolist())
    shards = batch_shards()
    size = -(-min(size, len(tokens)) // shards) * shards
    for first in range(0, len(tokens), size):
        at = np.arange(first, first + size)
        part = tokens[np.minimum(at, len(tokens) - 1)].astype(np.int32)
        yield _embed(params["embed"], part), jnp.asarray(at < len(tokens))


def _pick(layers: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], layers) if isinstance(layers, dict) else layers[i]


def _put(layers: Any, i: int, values: Mapping[str, Any]) -> Any:
    """Writes one block's matrices into a stack, in place, or a list."""
    if isinstance(layers, dict):
        return replace(layers, {name: _write(get(layers, name), x, i) for name, x in values.items()})
    return [*layers[:i], replace(layers[i], values), *layers[i + 1 :]]


def _write(stack: jax.Array, x: jax.Array, i: int) -> jax.Array:
    return jax.device_put(_write_in_place(stack, x, i), stack.sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _write_in_place(stack: jax.Array, x: jax.Array, i: Any) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, x, i, axis=0)


def _empty_masks(layers: Any, plan: Plan) -> Any:
    masks = jax.tree.map(lambda _: None, layers)
    if isinstance(layers, dict):
        stacks = {name: get(layers, name) for name, _ in plan}
        masks = replace(masks, {name: jnp.zeros(x.shape, bool, device=x.sharding) for name, x in stacks.items()})
    return masks


def _dead(stats: Stats, where: str) -> int:
    """Channels that are always 0. Raises ValueError where a statistic is not finite."""
    squares = np.asarray(stats.squares)
    bad = np.flatnonzero(~np.isfinite(squares))
    if len(bad):
        raise ValueError(f"{where}: expected finite statistics of the calibration, got {squares[bad[0]]} in channel "
                         f"{bad[0]} ({len(bad)} of {len(squares)} channels are not finite)")  # fmt: skip
    return int(np.sum(squares == 0))


def _zeros(weight: jax.Array, where: str, otherwise: str) -> int:
    """How many weights are 0. Raises ValueError where one is not finite."""
    zeros, finite = jax.device_get(_count(weight))
    if not finite:
        raise ValueError(f"{where}: weights {otherwise}")
    return int(zeros)


@jax.jit
def _count(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(weight == 0, dtype=jnp.int32), jnp.all(jnp.isfinite(weight))


def _report(params: Params, rows: list[MatrixReport], pattern: Pattern, sequences: int, seq_len: int) -> Report:
    mlp = [row for row in rows if row.name.split(".", 2)[2] in MLP]
    zeros = sum(row.zeros for row in rows)
    return Report(str(pattern), sequences, seq_len, tuple(rows),
                  mlp_sparsity=sum(row.zeros for row in mlp) / sum(row.weights for row in mlp),
                  model_sparsity=zeros / model.count(params))  # fmt: skip
