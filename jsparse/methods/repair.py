"""Weights that make up for what a subnet has lost: the reformation of "Search for Efficient Large Language Models".

    minimise ||W'^T X - W^T X||_F^2   subject to   W' = 0 at the inputs that are gone                (section 3.4)

for the two matrices whose inputs go, output and down. W [I, O] is inputs first, X [I, tokens] what it reads, H = X X^T.
H and W are scaled so that H has a unit diagonal, and `damp` is added to it: without the scaling the penalty below would
be of no size that fits every layer. K are the inputs kept, R those gone.

    ClosedForm    W'_K = W_K + (H_KK + damp)^-1 H_KR W_R
    Admm          W' <- (H + damp + rho)^-1 ((H + damp) W + rho (Z - U))                                    Theorem 3.1
                  Z <- W' + U at K, 0 at R         (the paper prints the other part, which would keep what is gone)
                  U <- U + W' - Z;      after `iterations` the result is Z
    Bias          b' = b + W_R^T mean(X_R), weights as they are (FLAP, An et al., arXiv 2312.11983)

The inputs gone are the same for every output, so the problem is least squares, which `ClosedForm` solves and `Admm`
approaches. Its objective is that of plain masking at W'_K = W_K, so that it never makes the error larger.

Blocks are repaired one after another on what the repaired blocks before them put out; within a block output comes
first, and down on what the repaired attention lets it read. With the target "dense" a matrix also makes up for what
went wrong before it, queries and keys that its block has lost included, which no matrix of their own repairs:

    minimise ||W'^T X - (W^T X + R)||_F^2,    R = residual stream after it of the dense model - and as W would have it

which adds (H_KK + damp)^-1 X_K R^T to W'_K.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jsparse import model
from jsparse.config import LlamaConfig, check
from jsparse.methods.importance import COMPILER, Importance, Moments, dense_blocks, keep_top, moments
from jsparse.methods.patterns import matrix, pick, replace
from jsparse.methods.pruning import embed
from jsparse.methods.sparsegpt import exact_dot
from jsparse.methods.subnet import Genome, check_dense, zero_filled
from jsparse.model import Params

Target = Literal["own", "dense"]


@dataclass(frozen=True)
class ClosedForm:
    type: ClassVar[str] = "closed"
    damp: float = 0.1  # added to the unit diagonal
    target: Target = "own"  # own: what W puts out of the same inputs; dense: the dense model's residual stream

    def __post_init__(self) -> None:
        check(self.damp > 0, "damp", "a positive number", self.damp)


@dataclass(frozen=True)
class Admm:
    type: ClassVar[str] = "admm"
    rho: float = 1.0
    iterations: int = 30
    damp: float = 0.1
    normalise: bool = True  # False: the paper to the letter, with H as it is
    target: Target = "own"

    def __post_init__(self) -> None:
        check(self.rho > 0, "rho", "a positive number", self.rho)
        check(self.iterations > 0, "iterations", "a positive number", self.iterations)
        check(self.damp >= 0, "damp", "a number of at least 0", self.damp)


@dataclass(frozen=True)
class Bias:
    type: ClassVar[str] = "bias"


Repair = ClosedForm | Admm | Bias

# --------------------------------------------------------------------------------------------------------------------
# One matrix
# --------------------------------------------------------------------------------------------------------------------


class Short(NamedTuple):
    """R, by how much what W puts out of X is short of what is wanted, summed over tokens; float32."""

    cross: jax.Array  # [I, O], X R^T
    energy: jax.Array  # [], ||R||^2


def closed_form(
    weight: jax.Array, gram: jax.Array, kept: jax.Array, damp: float = 0.1, cross: jax.Array | None = None
) -> jax.Array:
    """W' of W [I, O], H [I, I] and bool [I], all float32. Shapes do not depend on how many inputs are kept.

    cross: X R^T [I, O]; none where R is 0.
    """
    h, scale = _unit_diagonal(gram)
    w = weight * scale[:, None]
    both = kept[:, None] & kept[None, :]
    system = jnp.where(both, h, 0.0) + jnp.diag(jnp.where(kept, damp, 1.0))
    lost = exact_dot(jnp.where(kept[:, None], h, 0.0), jnp.where(kept[:, None], 0.0, w))
    if cross is not None:
        lost = lost + jnp.where(kept[:, None], cross / scale[:, None], 0.0)
    gained = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(system), True), lost) / scale[:, None]
    return jnp.where(kept[:, None], weight + gained, 0.0)  # where nothing is lost, the weights as they were


def admm(
    weight: jax.Array,
    gram: jax.Array,
    kept: jax.Array,
    *,
    rho: float = 1.0,
    iterations: int = 30,
    damp: float = 0.1,
    normalise: bool = True,
    cross: jax.Array | None = None,
) -> jax.Array:
    """As `closed_form`, by iteration."""
    h, scale = _unit_diagonal(gram) if normalise else (gram, jnp.ones(len(gram)))
    w = weight * scale[:, None]
    h = h + damp * jnp.mean(jnp.diag(h)) * jnp.eye(len(h))
    factor = jnp.linalg.cholesky(h + rho * jnp.eye(len(h)))
    target = exact_dot(h, w)
    if cross is not None:
        target = target + cross / scale[:, None]

    def step(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z, u = state
        new = jax.scipy.linalg.cho_solve((factor, True), target + rho * (z - u))
        z = jnp.where(kept[:, None], new + u, 0.0)
        return z, u + new - z

    z, _ = jax.lax.fori_loop(0, iterations, step, (w, jnp.zeros_like(w)))
    return jnp.where(kept[:, None], z / scale[:, None], 0.0)


def _unit_diagonal(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """H of unit diagonal, and the root of the diagonal; channels that are always 0 keep a zero row."""
    scale = jnp.sqrt(jnp.diag(gram))
    scale = jnp.where(scale > 0, scale, 1.0)
    return gram / (scale[:, None] * scale[None, :]), scale


def relative_error(change: jax.Array, weight: jax.Array, gram: jax.Array, short: Short | None = None) -> jax.Array:
    """||change^T X + R||^2 / ||W^T X + R||^2, float32 [], of what is wanted less what is put out."""
    return _energy(change, gram, short) / jnp.maximum(_energy(weight, gram, short), 1e-30)


def _energy(weight: jax.Array, gram: jax.Array, short: Short | None = None) -> jax.Array:
    put_out = jnp.sum(weight * exact_dot(gram, weight))
    return put_out if short is None else put_out + 2 * jnp.sum(weight * short.cross) + short.energy


class Repaired(NamedTuple):
    weight: jax.Array  # in the parameter's shape and dtype, 0 where gone
    bias: jax.Array | None  # the output's, where there is one
    before: jax.Array  # float32 [], relative error of the output by masking alone
    after: jax.Array


@functools.partial(jax.jit, static_argnames=("method", "name"), compiler_options=COMPILER)
def repair_matrix(
    weight: jax.Array,
    bias: jax.Array | None,
    stats: Moments,
    kept: jax.Array,
    method: Repair,
    name: str,
    short: Short | None = None,
) -> Repaired:
    """Repairs one matrix, output or down, by the statistics of what it reads; kept is bool [I]. Not under jit."""
    w = matrix(weight, name).astype(jnp.float32)
    masked = jnp.where(kept[:, None], w, 0.0)
    before = relative_error(w - masked, w, stats.gram, short)
    if isinstance(method, Bias):
        assert bias is not None  # `with_biases` put it there
        mean = stats.total / stats.tokens
        centred = stats.gram - jnp.outer(stats.total, mean)
        after = _energy(w - masked, centred) / jnp.maximum(_energy(w, stats.gram), 1e-30)
        bias = (bias.astype(jnp.float32) + exact_dot(mean, w - masked)).astype(bias.dtype)
        return Repaired(masked.astype(weight.dtype).reshape(weight.shape), bias, before, after)
    cross = None if short is None else short.cross
    if isinstance(method, ClosedForm):
        new = closed_form(w, stats.gram, kept, method.damp, cross)
    else:
        new = admm(w, stats.gram, kept, rho=method.rho, iterations=method.iterations, damp=method.damp,
                   normalise=method.normalise, cross=cross)  # fmt: skip
    after = relative_error(w - new, w, stats.gram, short)
    return Repaired(new.astype(weight.dtype).reshape(weight.shape), bias, before, after)


# --------------------------------------------------------------------------------------------------------------------
# A whole model
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RepairReport:
    """Of one matrix: squared error of its output on the calibration, relative to the output that is wanted."""

    name: str  # as in `layers.0.ffn.down`
    before: float  # by masking alone
    after: float


def repair(
    params: Params,
    config: LlamaConfig,
    tokens: ArrayLike,
    genome: Genome,
    method: Repair = ClosedForm(),
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Params, LlamaConfig, tuple[RepairReport, ...]]:
    """Repairs a subnet of a dense model.

    Holds beside the parameters the residual stream of the calibration tokens, twice where the target is dense, and the
    statistics of one matrix.

    Args:
        params: of the dense model, stacked; computes in their dtype, statistics and solutions in float32.
        tokens: calibration sequences, int [sequences, T].
        genome: what the subnet keeps.
        batch_size: sequences a forward pass.
        progress: called after each layer with the number of layers done and of all.

    Returns:
        The zero-filled subnet in the dense model's shapes, its dense config (with biases, where `Bias` needs them) and
        the errors before and after.

    Raises:
        ConfigError: tokens that do not fit the model, or a model that is a subnet already.
        ValueError: a repaired matrix is not finite.
    """
    check_dense(config)
    if isinstance(method, Bias):
        params, config = with_biases(params, config)
    masked = zero_filled(params, genome)
    groups = config.num_attention_heads // config.num_key_value_heads
    stream = embed(params["embed"], config, tokens, batch_size)
    aims = [x for x, _ in stream] if not isinstance(method, Bias) and method.target == "dense" else []
    layers, rows = [], []
    for i in range(config.num_hidden_layers):
        dense, layer = pick(params["layers"], i), pick(masked["layers"], i)
        kept = {"attention.output": np.repeat(genome.values[i], groups, axis=0).reshape(-1), "ffn.down": genome.ffn[i]}
        for name, inputs in kept.items():
            for k, x in enumerate(aims):  # one by one, so that the stream exists only once
                aims[k] = _advance(dense, x, config, name)
            if genome.layers[i]:
                where = f"layers.{i}.{name}"
                found = _repair_one(dense, layer, stream, aims, config, inputs, method, name)
                before, after, finite = jax.device_get((found.before, found.after, jnp.all(jnp.isfinite(found.weight))))
                if not finite:
                    raise ValueError(f"{where}: weights are not finite after the repair: more damping may help")
                rows.append(RepairReport(where, float(before), float(after)))
                bias = {} if found.bias is None else {f"{name}_bias": found.bias}
                layer = replace(layer, {name: found.weight} | bias)
                for k, (x, counted) in enumerate(stream):
                    stream[k] = _advance(layer, x, config, name), counted
        layers.append(layer)
        if progress:
            progress(i + 1, config.num_hidden_layers)
    return model.stack(masked | {"layers": layers}), config, tuple(rows)


def _repair_one(
    dense: Params, layer: Params, stream: Any, aims: Any, config: LlamaConfig, kept: Any, method: Repair, name: str
) -> Repaired:
    """Output or down of one block, given dense and masked, by the residual stream before its half of the block, and
    the dense one after it where there are aims."""
    part, leaf = name.split(".")
    whole = dense["ffn"]
    if part == "attention":  # pruned queries and keys, but all values
        values = {name: dense["attention"].get(name) for name in ("value", "value_bias", "output")}
        whole = layer["attention"] | {name: x for name, x in values.items() if x is not None}
    reading, stats = layer | {part: whole}, None
    for (x, counted), aim in zip(stream, aims or [None] * len(stream), strict=True):
        one = _read(reading, x, aim, counted, config, name)
        stats = one if stats is None else jax.tree.map(jnp.add, stats, one)
    assert stats is not None  # there is always a batch
    bias = dense[part].get(f"{leaf}_bias")
    return repair_matrix(dense[part][leaf], bias, stats[0], jnp.asarray(kept), method, name, stats[1])


@functools.partial(jax.jit, static_argnames=("config", "name"), compiler_options=COMPILER)
def _read(
    reading: Params, x: jax.Array, aim: jax.Array | None, counted: jax.Array, config: LlamaConfig, name: str
) -> tuple[Moments, Short | None]:
    """Statistics of what output or down reads in one batch, and of how short of the aim the residual stream is."""
    y, read = _half(reading, x, config, name)
    stats = moments(read, counted)
    if aim is None:
        return stats, None
    short = jnp.where(counted[:, None, None], aim.astype(jnp.float32) - y.astype(jnp.float32), 0.0)
    short = short.reshape(-1, short.shape[-1])
    cross = exact_dot(read.reshape(len(short), -1).astype(jnp.float32).T, short)
    return stats, Short(cross, jnp.sum(short**2))


@functools.partial(jax.jit, static_argnames=("config", "name"))
def _advance(layer: Params, x: jax.Array, config: LlamaConfig, name: str) -> jax.Array:
    """The residual stream [B, T, D] after the half of a block that ends in output or down."""
    return _half(layer, x, config, name)[0]


def _half(layer: Params, x: jax.Array, config: LlamaConfig, name: str) -> tuple[jax.Array, jax.Array]:
    """The residual stream after one half of a block, and what its output or down reads."""
    y, _, read = (model.run_attention if name == "attention.output" else model.run_ffn)(layer, x, config)
    return y, read


def with_biases(params: Params, config: LlamaConfig) -> tuple[Params, LlamaConfig]:
    """The same model with biases everywhere, 0 where it had none."""
    config = dataclasses.replace(config, attention_bias=True, mlp_bias=True)
    layers = params["layers"]
    dtype = layers["ffn"]["down"].dtype
    filled = {part: {leaf: layers[part].get(leaf, jnp.zeros(x.shape, dtype)) for leaf, x in leaves.items()}
              for part, leaves in model.abstract(config)["layers"].items()}  # fmt: skip
    return params | {"layers": filled}, config


# --------------------------------------------------------------------------------------------------------------------
# Levels: every width repaired beforehand, for a search that sees repaired weights
# --------------------------------------------------------------------------------------------------------------------


class Levels(NamedTuple):
    """Output and down of each layer, repaired for each width that a search may give it; a pytree."""

    output: jax.Array  # [L, widths, N, H, D]
    down: jax.Array  # [L, widths, F, D]
    values: jax.Array  # int32 [widths], value dims of a head that each level of output keeps, rising
    ffn: jax.Array  # int32 [widths], neurons that each level of down keeps, rising


def repair_levels(
    params: Params,
    config: LlamaConfig,
    tokens: ArrayLike,
    scores: Importance,
    values: Sequence[int],
    ffn: Sequence[int],
    *,
    damp: float = 0.1,
    batch_size: int = 8,
) -> Levels:
    """Repairs every layer for every width, each time for the inputs of the highest scores, on the dense model's inputs.

    Args:
        params: of the dense model, stacked.
        tokens: calibration sequences, int [sequences, T].
        scores: by which a layer of a width keeps its neurons and value dims.
        values: widths of a head's values, rising.
        ffn: widths of the FFN, rising.
        damp: of `ClosedForm`.

    Returns:
        Levels in the parameters' dtype: as many times the size of output and down as there are widths.
    """
    groups = config.num_attention_heads // config.num_key_value_heads
    output, down = [], []
    for i, layer, stats in dense_blocks(params, config, tokens, batch_size):
        heads = np.repeat(np.stack([keep_top(scores.values[i], k) for k in values]), groups, axis=1)
        neurons = np.stack([keep_top(scores.ffn[i], k) for k in ffn])
        output.append(_levels(layer["attention"]["output"], stats.heads.gram, heads.reshape(len(heads), -1), damp))
        down.append(_levels(layer["ffn"]["down"], stats.hidden.gram, neurons, damp))
    return Levels(jnp.stack(output), jnp.stack(down), jnp.asarray(values, jnp.int32), jnp.asarray(ffn, jnp.int32))


@functools.partial(jax.jit, compiler_options=COMPILER)
def _levels(weight: jax.Array, gram: jax.Array, kept: jax.Array, damp: float) -> jax.Array:
    """[widths, ...] of a weight [..., D], for inputs kept bool [widths, I]; one after another, to hold one system."""
    w = weight.reshape(-1, weight.shape[-1]).astype(jnp.float32)
    repaired = jax.lax.map(lambda k: closed_form(w, gram, k, damp).astype(weight.dtype), kept)
    return repaired.reshape(-1, *weight.shape)
