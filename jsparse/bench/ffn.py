"""`jsparse bench ffn`: one layer's FFN in a step of decoding, dense and sparse, beside the limit that its bytes set.

What is timed is the decoder's own sublayer, residual + FFN(norm(residual)), over several layers in turn inside one
compiled loop, so that no layer's weights are left in a cache when it comes round again. Each sparsity is met exactly:
a threshold is the quantile of the very scores that the batch will have, the largest of its rows', since rows share what
is read.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.bench.timing import CUBLAS, Bandwidth, Budget, compile_all, seconds
from jsparse.config import LlamaConfig, Relu, Router, Silu
from jsparse.inference.costs import Line, bytes_read
from jsparse.inference.decoder import Ffn, Implementation, Kind, ffn_of_step, used_share
from jsparse.methods.predictor import quantise
from pallas_kernels.add_rms_norm import add_rms_norm
from pallas_kernels.backend import Implementation as KernelImplementation
from pallas_kernels.ffn import PackedFFN
from pallas_kernels.neuron_sparse_ffn import Predictor
from pallas_kernels.neuron_sparse_ffn.reference import predicted_scores

ROUNDS = 128  # over all layers, in one timed call: what the host takes to start one is not to matter
ROTATED = 2e9  # bytes of weights that take turns: far more than any cache holds
STILL = 1e-5  # scale of the down matrices: the residual stream, and so what is active, stays what it was


@dataclass(frozen=True)
class FfnSpeed:
    """One measurement: of a layer, in microseconds, and the bytes that it had to read (weights in use and router)."""

    kind: str  # dense, or what is skipped
    implementation: str  # how: of dense, what multiplies the matrices
    batch: int
    sparsity: float  # asked for: share of blocks or neurons that no row of the batch uses
    measured: float  # and found
    us: float
    bytes: float
    limit_us: float  # bytes over the bandwidth of this run
    fraction: float  # of the limit
    speedup: float  # over the best dense time of this batch
    speedup_limit: float  # dense bytes over these


def bench_ffn(
    shape: LlamaConfig,
    speed: Bandwidth,
    *,
    kinds: Sequence[Kind] = ("blocks", "neurons", "predicted"),
    implementations: Sequence[Implementation] = ("sparse",),
    batches: Sequence[int] = (1, 2, 4, 8, 16),
    sparsities: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95),
    dtype: str = "bfloat16",
    rank: int = 1024,
    budget: Budget,
    tell: Callable[[str], None] = print,
) -> list[FfnSpeed]:
    """Measures the FFN of a model's shape.

    The dense times are XLA's own choice of kernels, cuBLAS alone (on a GPU), and what a step of decoding takes; the
    best of them is what the others are compared with.

    Args:
        speed: of the memory, measured in the same run.
        kinds: what to skip, see `jsparse.inference.decoder`.
        implementations: "sparse" for the best kernel there is, or kernels by name.
        sparsities: shares of blocks or neurons that are not used. Of "neurons" the gate is read whole all the same.
        rank: of the predictors, which are of int8.
        budget: batches that it has no time left for are left out.
        tell: called with a line of text for each measurement.
    """
    weights = _random_weights(shape, dtype)
    rows: list[FfnSpeed] = []
    for batch in batches:
        if budget.left < 0:
            tell(f"batch {batch}: left out, no time left")
            continue
        found = _bench_batch(shape, weights, batch, speed, kinds, implementations, sparsities, rank, budget, tell)
        rows += _compared(found)
    return rows


def fit_lines(rows: Sequence[FfnSpeed], speed: Bandwidth) -> dict[str, dict[int, Line]]:
    """`jsparse.inference.costs.LINES` of these measurements: of each kind by least squares over its sparsities, of the
    dense implementation (one size only) by the bandwidth."""
    lines: dict[str, dict[int, Line]] = {}
    for kind, implementation, batch in dict.fromkeys((row.kind, row.implementation, row.batch) for row in rows):
        size, us = np.array(
            [(r.bytes, r.us) for r in rows if (r.kind, r.implementation, r.batch) == (kind, implementation, batch)]
        ).T
        if kind == "dense":
            line = Line(float(us[0] - size[0] / speed.limit * 1e6), speed.limit / 1e6)
            kept = lines.get("dense", {}).get(batch)
            line = line if kept is None or line.start < kept.start else kept
        elif len(size) > 1:
            slope, start = np.polyfit(size, us, 1)
            line = Line(float(start), float(1 / slope))
        else:
            continue
        name = kind if implementation in ("sparse", "xla", "cublas", "decoder") else f"{kind} by {implementation}"
        lines.setdefault(name, {})[batch] = line
    return lines


def _bench_batch(
    shape: LlamaConfig,
    weights: list[PackedFFN],
    batch: int,
    speed: Bandwidth,
    kinds: Sequence[Kind],
    implementations: Sequence[Implementation],
    sparsities: Sequence[float],
    rank: int,
    budget: Budget,
    tell: Callable[[str], None],
) -> list[FfnSpeed]:
    """Every measurement of a batch size, not compared yet."""
    x, common = _inputs(batch, shape.hidden_size)
    plain = [_ffn(w, None, 0) for w in weights]
    dense = dataclasses.replace(shape, activation=Silu(), router=None)
    baselines: dict[str, tuple[Any, dict[str, Any]]] = {"xla": ("xla", {}), "decoder": (None, {})}
    if jax.default_backend() == "gpu":
        baselines["cublas"] = "xla", CUBLAS
    variants = [(kind, implementation) for kind in kinds for implementation in implementations]
    ffns = {kind: [_ffn(w, kind, rank) for w in weights] for kind in kinds}
    jobs = [functools.partial(_compile, plain, x, dense, "dense", *how) for how in baselines.values()]
    jobs += [
        functools.partial(_compile, ffns[kind], x, _config(shape, kind), name, None, {}) for kind, name in variants
    ]
    compiled = compile_all(jobs, budget)

    rows = []

    def measure(
        run: Any, kind: str, implementation: str, sparsity: float, measured: float, ffns: list[Ffn], size: float
    ) -> None:
        try:
            if isinstance(run, Exception):
                raise run
            us = seconds(lambda: run(ffns, x), 3) / ROUNDS / len(ffns) * 1e6
        except Exception as error:
            return tell(f"{kind} by {implementation}, batch {batch}: {_first_line(error)}")
        limit = size / speed.limit * 1e6
        rows.append(FfnSpeed(kind, implementation, batch, sparsity, measured, us, size, limit, limit / us, 0.0, 0.0))
        tell(f"{kind:10} {implementation:10} batch {batch:2}  {sparsity:4.0%} ({measured:6.2%})  {us:8.1f} us"
             f"  {size / us / 1e6:5.2f} TB/s  {limit / us:4.0%} of the limit")  # fmt: skip

    alone = seconds(lambda: _norms(plain[0], x, len(plain)), 3) / ROUNDS / len(plain) * 1e6
    tell(f"batch {batch}: every row holds a norm, which takes {alone:.1f} us without its FFN")
    for implementation, run in zip(baselines, compiled, strict=False):
        measure(run, "dense", implementation, 0.0, 0.0, plain, bytes_read(plain[0], "blocks", 1.0))
    for kind in kinds:
        for sparsity in sparsities:
            if budget.left < 0:
                tell(f"{kind}, batch {batch}, {sparsity:.0%} sparse: left out, no time left")
                continue
            set_up = [_with_sparsity(ffn, x, common, sparsity, kind) for ffn in ffns[kind]]
            share = float(np.mean([_share(ffn, x, _config(shape, kind)) for ffn in set_up]))
            for (k, implementation), run in zip(variants, compiled[len(baselines) :], strict=True):
                if k == kind:
                    measure(run, kind, implementation, sparsity, 1 - share, set_up, bytes_read(set_up[0], kind, share))
    return rows


def _compared(rows: list[FfnSpeed]) -> list[FfnSpeed]:
    """The rows of one batch beside its best dense time."""
    whole = [row for row in rows if row.kind == "dense"]
    if not whole:
        return rows
    best, size = min(row.us for row in whole), min(row.bytes for row in whole)
    return [dataclasses.replace(row, speedup=best / row.us, speedup_limit=size / row.bytes) for row in rows]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


# --------------------------------------------------------------------------------------------------------------------
# What is timed
# --------------------------------------------------------------------------------------------------------------------


def _config(shape: LlamaConfig, kind: Kind) -> LlamaConfig:
    if kind == "blocks":
        return dataclasses.replace(shape, activation=Silu(), router=Router())
    return dataclasses.replace(shape, activation=Relu(), router=None)


def _compile(
    ffns: list[Ffn],
    x: jax.Array,
    config: LlamaConfig,
    implementation: Implementation,
    rest: KernelImplementation | None,
    options: dict[str, Any],
) -> Any:
    lowered = _rounds.lower(ffns, x, config=config, implementation=implementation, rest=rest)
    return lowered.compile(compiler_options=options)


@functools.partial(jax.jit, static_argnames=("config", "implementation", "rest"))
def _rounds(
    ffns: list[Ffn],
    x: jax.Array,
    *,
    config: LlamaConfig,
    implementation: Implementation,
    rest: KernelImplementation | None,
) -> jax.Array:
    """ROUNDS times through the layers, norm and FFN as a step of decoding has them: x float32 [B, D] -> the same."""
    ones = jnp.ones(x.shape[-1], jnp.float32)

    def one(_: jax.Array, x: jax.Array) -> jax.Array:
        delta = None
        for ffn in ffns:
            x, delta = ffn_of_step(ones, ffn, x, delta, config, implementation, rest)
        return x if delta is None else x + delta

    return jax.lax.fori_loop(0, ROUNDS, one, x)


@functools.partial(jax.jit, static_argnames="layers")
def _norms(ffn: Ffn, x: jax.Array, layers: int) -> jax.Array:
    """What is left of `_rounds` without its FFNs."""

    def one(_: jax.Array, x: jax.Array) -> jax.Array:
        delta = None
        for _layer in range(layers):
            x, normed = _normed(x, ffn, delta)
            delta = normed.astype(jnp.float32)
        return x * STILL

    return jax.lax.fori_loop(0, ROUNDS, one, x)


def _normed(x: jax.Array, ffn: Ffn, delta: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    ones = jnp.ones(x.shape[-1], jnp.float32)
    return add_rms_norm(x, ones, 1e-5, ffn.weights.gate.dtype, delta=delta)


# --------------------------------------------------------------------------------------------------------------------
# Random weights of an exact sparsity
# --------------------------------------------------------------------------------------------------------------------


def _random_weights(shape: LlamaConfig, dtype: str) -> list[PackedFFN]:
    """Layers that take turns: as many as hold ROTATED bytes, if the model has so many."""
    f, d = shape.intermediate_size, shape.hidden_size
    count = int(np.ceil(ROTATED / (3 * f * d * jnp.dtype(dtype).itemsize)))
    keys = jax.random.split(jax.random.key(1), min(count, shape.num_hidden_layers))
    return [PackedFFN(*(_normal(k, (f, d), s, dtype) for k, s in zip(jax.random.split(key, 3), (1, 1, STILL),
                                                                     strict=True)))
            for key in keys]  # fmt: skip


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, shape: tuple[int, ...], scale: float, dtype: str) -> jax.Array:
    """As LLaMA's own weights are drawn, deviation 0.02, times a scale."""
    return (jax.random.normal(key, shape, jnp.float32) * (0.02 * scale)).astype(dtype)


def _ffn(weights: PackedFFN, kind: Kind | None, rank: int) -> Ffn:
    f, d = weights.gate.shape
    ffn = Ffn(weights)
    match kind:
        case "blocks":
            router = _normal(jax.random.key(2), (f // Router().block_size, d), 1, "float32")
            return ffn._replace(router=router, router_threshold=jnp.float32(0))
        case "predicted":
            down, up = (_normal(jax.random.key(i), s, 1, "float32") for i, s in ((3, (rank, d)), (4, (f, rank))))
            return ffn._replace(predictor=quantise(Predictor(down, up, jnp.zeros(f, jnp.float32))))
    return ffn


def _inputs(batch: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Residual streams float32 [B, D] that have a direction in common and are random otherwise; the direction [D].

    Along it the gate of every row moves by the same amount: that is how the activation's sparsity is set.
    """
    noise = np.random.default_rng(batch).standard_normal((batch + 1, width))
    common = noise[0] / np.linalg.norm(noise[0])
    rest = noise[1:] - noise[1:] @ common[:, None] * common
    rows = common + rest / np.linalg.norm(rest, axis=1, keepdims=True)
    return jnp.asarray(rows * np.sqrt(width / 2), jnp.float32), jnp.asarray(common, jnp.float32)


@functools.partial(jax.jit, static_argnames="kind")
def _with_sparsity(ffn: Ffn, x: jax.Array, common: jax.Array, sparsity: Any, kind: Kind) -> Ffn:
    """The layer of which the batch x leaves out this share of the blocks or neurons."""
    rows = _normed(x, ffn)[1]

    def cut(scores: jax.Array) -> jax.Array:
        """Above this lie as many of the rows' largest scores, [..., E], as are to be in use."""
        ranked = jnp.sort(jnp.max(scores, axis=0))
        dropped = jnp.round(sparsity * ranked.size).astype(jnp.int32)
        between = (ranked[jnp.maximum(dropped - 1, 0)] + ranked[jnp.minimum(dropped, ranked.size - 1)]) / 2
        return jnp.where(dropped == 0, ranked[0] - 1, between)

    def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.dot(x, matrix.T, precision="highest", preferred_element_type=jnp.float32)

    match kind:
        case "blocks":
            return ffn._replace(router_threshold=jax.nn.sigmoid(cut(product(rows.astype(jnp.float32), ffn.router))))
        case "neurons":
            gate = ffn.weights.gate
            along = jnp.mean(rows.astype(jnp.float32) @ common)
            moved = gate.astype(jnp.float32) - (cut(product(rows, gate)) / along * common)[None]
            return ffn._replace(weights=ffn.weights._replace(gate=moved.astype(gate.dtype)))
        case "predicted":
            level = jnp.full_like(ffn.predictor.threshold, cut(predicted_scores(rows, ffn.predictor)))
            return ffn._replace(predictor=ffn.predictor._replace(threshold=level))
    raise ValueError(f"{kind}: has no threshold that sets a sparsity")


@functools.partial(jax.jit, static_argnames="config")
def _share(ffn: Ffn, x: jax.Array, config: LlamaConfig) -> jax.Array:
    rows = _normed(x, ffn)[1][:, None]
    return used_share(ffn, rows, config, jnp.ones(rows.shape[:2], bool))
