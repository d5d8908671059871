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
first, and down on what the repaired attention lets it read.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jsparse import model
from jsparse.config import LlamaConfig, check
from jsparse.methods.importance import Importance, Moments, dense_blocks, keep_top, moments
from jsparse.methods.patterns import matrix, pick, replace
from jsparse.methods.pruning import embed
from jsparse.methods.sparsegpt import exact_dot
from jsparse.methods.subnet import Genome, check_dense, zero_filled
from jsparse.model import Params


@dataclass(frozen=True)
class ClosedForm:
    type: ClassVar[str] = "closed"
    damp: float = 0.1  # added to the unit diagonal

    def __post_init__(self) -> None:
        check(self.damp > 0, "damp", "a positive number", self.damp)


@dataclass(frozen=True)
class Admm:
    type: ClassVar[str] = "admm"
    rho: float = 1.0
    iterations: int = 30
    damp: float = 0.1
    normalise: bool = True  # False: the paper to the letter, with H as it is

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


def closed_form(weight: jax.Array, gram: jax.Array, kept: jax.Array, damp: float = 0.1) -> jax.Array:
    """W' of W [I, O], H [I, I] and bool [I], all float32. Shapes do not depend on how many inputs are kept."""
    h, scale = _unit_diagonal(gram)
    w = weight * scale[:, None]
    both = kept[:, None] & kept[None, :]
    system = jnp.where(both, h, 0.0) + jnp.diag(jnp.where(kept, damp, 1.0))
    lost = exact_dot(jnp.where(kept[:, None], h, 0.0), jnp.where(kept[:, None], 0.0, w))
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
) -> jax.Array:
    """As `closed_form`, by iteration."""
    h, scale = _unit_diagonal(gram) if normalise else (gram, jnp.ones(len(gram)))
    w = weight * scale[:, None]
    h = h + damp * jnp.mean(jnp.diag(h)) * jnp.eye(len(h))
    factor = jnp.linalg.cholesky(h + rho * jnp.eye(len(h)))
    target = exact_dot(h, w)

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


def relative_error(change: jax.Array, weight: jax.Array, gram: jax.Array) -> jax.Array:
    """||change^T X||^2 / ||W^T X||^2, float32 []."""
    return _energy(change, gram) / jnp.maximum(_energy(weight, gram), 1e-30)


def _energy(weight: jax.Array, gram: jax.Array) -> jax.Array:
    return jnp.sum(weight * exact_dot(gram, weight))


# Exact products by cuBLAS: as Triton kernels XLA compiles and times many variants of each, before the first repair.
_COMPILER = {"xla_gpu_enable_triton_gemm": False}


class Repaired(NamedTuple):
    weight: jax.Array  # in the parameter's shape and dtype, 0 where gone
    bias: jax.Array | None  # the output's, where there is one
    before: jax.Array  # float32 [], relative error of the output by masking alone
    after: jax.Array


@functools.partial(jax.jit, static_argnames=("method", "name"), compiler_options=_COMPILER)
def repair_matrix(
    weight: jax.Array, bias: jax.Array | None, stats: Moments, kept: jax.Array, method: Repair, name: str
) -> Repaired:
    """Repairs one matrix, output or down, by the statistics of what it reads; kept is bool [I]. Not under jit."""
    w = matrix(weight, name).astype(jnp.float32)
    masked = jnp.where(kept[:, None], w, 0.0)
    before = relative_error(w - masked, w, stats.gram)
    if isinstance(method, Bias):
        assert bias is not None  # `with_biases` put it there
        mean = stats.total / stats.tokens
        centred = stats.gram - jnp.outer(stats.total, mean)
        after = _energy(w - masked, centred) / jnp.maximum(_energy(w, stats.gram), 1e-30)
        bias = (bias.astype(jnp.float32) + exact_dot(mean, w - masked)).astype(bias.dtype)
        return Repaired(masked.astype(weight.dtype).reshape(weight.shape), bias, before, after)
    if isinstance(method, ClosedForm):
        new = closed_form(w, stats.gram, kept, method.damp)
    else:
        new = admm(w, stats.gram, kept, rho=method.rho, iterations=method.iterations, damp=method.damp,
                   normalise=method.normalise)  # fmt: skip
    after = relative_error(w - new, w, stats.gram)
    return Repaired(new.astype(weight.dtype).reshape(weight.shape), bias, before, after)


# --------------------------------------------------------------------------------------------------------------------
# A whole model
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RepairReport:
    """Of one matrix: squared error of its output on the calibration, relative to the output."""

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

    Holds beside the parameters the residual stream of the calibration tokens and the statistics of one matrix.

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
    stream = embed(params["embed"], config, tokens, batch_size)
    layers, rows = [], []
    for i in range(config.num_hidden_layers):
        layer = pick(masked["layers"], i)
        if genome.layers[i]:
            layer, found = _repair_block(pick(params["layers"], i), layer, stream, config, genome, i, method)
            rows += found
            for k, (x, counted) in enumerate(stream):  # one by one, so that it exists only once
                stream[k] = _advance(layer, x, config), counted
        layers.append(layer)
        if progress:
            progress(i + 1, config.num_hidden_layers)
    return model.stack(masked | {"layers": layers}), config, tuple(rows)


def _repair_block(
    dense: Params, layer: Params, stream: Any, config: LlamaConfig, genome: Genome, i: int, method: Repair
) -> tuple[Params, list[RepairReport]]:
    """One block, given dense and masked."""
    groups = config.num_attention_heads // config.num_key_value_heads
    kept = {"attention.output": np.repeat(genome.values[i], groups, axis=0).reshape(-1), "ffn.down": genome.ffn[i]}
    # What output and down read is wanted whole, inputs that are gone included.
    reading = replace(layer, {"attention.value": dense["attention"]["value"]}) | {"ffn": dense["ffn"]}
    rows = []
    for name, inputs in kept.items():
        stats: Any = None
        for x, counted in stream:
            one = _read(reading, x, counted, config, name)
            stats = one if stats is None else jax.tree.map(jnp.add, stats, one)
        part, leaf = name.split(".")
        bias = dense[part].get(f"{leaf}_bias")
        found = repair_matrix(dense[part][leaf], bias, stats, jnp.asarray(inputs), method, name)
        before, after, finite = jax.device_get((found.before, found.after, jnp.all(jnp.isfinite(found.weight))))
        if not finite:
            raise ValueError(f"layers.{i}.{name}: weights are not finite after the repair: more damping may help")
        values = {name: found.weight} | ({} if bias is None else {f"{name}_bias": found.bias})
        layer = replace(layer, values)
        if name == "attention.output":
            reading = replace(reading, values)
        rows.append(RepairReport(f"layers.{i}.{name}", float(before), float(after)))
    return layer, rows


@functools.partial(jax.jit, static_argnames=("config", "name"))
def _read(layer: Params, x: jax.Array, counted: jax.Array, config: LlamaConfig, name: str) -> Moments:
    """Statistics of what output or down reads in one batch."""
    trace = model.run_block(layer, x, config)[1]
    return moments(trace.heads if name == "attention.output" else trace.hidden, counted)


@functools.partial(jax.jit, static_argnames="config")
def _advance(layer: Params, x: jax.Array, config: LlamaConfig) -> jax.Array:
    """The residual stream [B, T, D] after a block."""
    return model.run_block(layer, x, config)[0]


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


@functools.partial(jax.jit, compiler_options=_COMPILER)
def _levels(weight: jax.Array, gram: jax.Array, kept: jax.Array, damp: float) -> jax.Array:
    """[widths, ...] of a weight [..., D], for inputs kept bool [widths, I]; one after another, to hold one system."""
    w = weight.reshape(-1, weight.shape[-1]).astype(jnp.float32)
    repaired = jax.lax.map(lambda k: closed_form(w, gram, k, damp).astype(weight.dtype), kept)
    return repaired.reshape(-1, *weight.shape)
