"""The neuron-sparse FFN in one launch on an NVIDIA GPU (and a short one before it for a predictor's hidden units).

A program takes some neighbouring neurons and finds which of them are active: by streaming their rows of the gate, or by
the predictor's score. Then it gathers the active ones a few at a time, all their rows at once, sums their part of the
output in registers, and adds it to the output with atomics, right onto the residual stream.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import triton as shared
from pallas_kernels.backend import like
from pallas_kernels.ffn import Activation, PackedFFN, activate
from pallas_kernels.neuron_sparse_ffn.reference import Predictor


@dataclass(frozen=True)
class Tuning:
    """How the work is cut. Sizes are upper bounds: a shape that they do not divide takes the next smaller one."""

    rows: int  # neurons a program
    group: int  # active neurons that are gathered together
    chunk: int  # columns that are loaded together
    warps: int


def default_tuning(width: int, predicted: bool) -> Tuning:
    """For an H100."""
    warps = shared.warps_for(width)
    return Tuning(rows=64 if predicted else 16, group=4, chunk=2048, warps=min(8, warps))


def unsupported(x: jax.Array, weights: PackedFFN, predictor: Predictor | None, cutoff: jax.Array | None) -> str | None:
    tokens, width = x.shape
    neurons = weights.gate.shape[0]
    if not 1 <= tokens <= 16:
        return f"expected 1 to 16 tokens, got {tokens}"
    if width % 16:
        return f"expected a width that 16 divides, got {width}"
    if neurons % 8:
        return f"expected a number of neurons that 8 divides, got {neurons}"
    if predictor is not None and predictor.up.shape[1] % 8:
        return f"expected a predictor's rank that 8 divides, got {predictor.up.shape[1]}"
    return None


def neuron_sparse_ffn(
    x: jax.Array,
    weights: PackedFFN,
    predictor: Predictor | None,
    cutoff: jax.Array | None,
    *,
    residual: jax.Array | None,
    activation: Activation,
    deterministic: bool = False,
    interpret: Any = False,
    tuning: Tuning | None = None,
) -> jax.Array:
    """As `reference.neuron_sparse_ffn`."""
    neurons = weights.gate.shape[0]
    tuning = tuning or default_tuning(x.shape[1], predictor is not None)
    tuning = replace(tuning, rows=shared.power_of_two(tuning.rows, neurons))
    prediction = () if predictor is None else (_project(x, predictor, interpret), predictor.up, predictor.threshold)
    kernel = functools.partial(
        _kernel,
        predicted=predictor is not None,
        activation=activation,
        tuning=tuning,
    )
    return shared.accumulate(
        kernel,
        (x, *weights, *prediction, *(() if cutoff is None else (cutoff,))),
        residual,
        programs=neurons // tuning.rows,
        warps=tuning.warps,
        deterministic=deterministic,
        interpret=interpret,
    )


def _project(x: jax.Array, predictor: Predictor, interpret: Any) -> jax.Array:
    """As `reference.project`: a program computes one of the predictor's hidden units."""

    def kernel(x_ref: Any, down_ref: Any, z_ref: Any) -> None:
        chunks = shared.columns(x_ref.shape[1], 1024)
        unit = pl.ds(pl.program_id(0), 1)
        (z,) = shared.row_products([down_ref], unit, shared.load_tokens(x_ref, chunks), chunks)
        for b, value in enumerate(z):
            z_ref[b, unit] = jnp.maximum(value, 0.0).astype(z_ref.dtype)

    rank = predictor.down.shape[0]
    out = like(x, (x.shape[0], rank), x.dtype)
    return shared.call(kernel, out, programs=rank, warps=4, interpret=interpret)(x, predictor.down)


def _kernel(
    x_ref: Any, gate_ref: Any, up_ref: Any, down_ref: Any, *refs: Any,
    predicted: bool, activation: Activation, tuning: Tuning,
) -> None:  # fmt: skip
    *more, out = refs
    prediction, cutoff = (more[:3], more[3:]) if predicted else ([], more)
    tokens, width = x_ref.shape
    first = pl.program_id(0) * tuning.rows
    rows = pl.ds(first, tuning.rows)
    chunks = shared.columns(width, tuning.chunk)
    x = shared.load_tokens(x_ref, chunks)
    gate_act = functools.partial(activate, activation, erf=shared.erf)

    if predicted:
        z_ref, guess_ref, threshold_ref = prediction
        ranks = shared.columns(z_ref.shape[1], 1024)
        (scores,) = shared.row_products([guess_ref], rows, shared.load_tokens(z_ref, ranks), ranks)
        named = [s > threshold_ref[rows] for s in scores]
        values = [n.astype(jnp.float32) for n in named]  # what a token's neuron counts
    else:
        (gate,) = shared.row_products([gate_ref], rows, x, chunks)
        values = [gate_act(g) for g in gate]
    active = functools.reduce(jnp.logical_or, [v != 0 for v in values])
    count = jnp.sum(active.astype(jnp.int32))
    place = jnp.where(active, jnp.cumsum(active.astype(jnp.int32)) - 1, -1)  # among the active ones

    def gather(i: jax.Array, sums: list[list[jax.Array]]) -> list[list[jax.Array]]:
        wanted = i * tuning.group + jnp.arange(tuning.group)
        found = place[None] == wanted[:, None]  # [group, rows], one neuron in each line
        pick = lambda v: jnp.sum(jnp.where(found, v[None], jnp.zeros((), v.dtype)), axis=1)
        neuron, keep = first + pick(jnp.arange(tuning.rows)), wanted < count
        tiles: list[jax.Array] = []

        def load_down(kept: jax.Array = keep) -> None:
            tiles.extend(shared.load_weights(down_ref, neuron, k, kept) for k in chunks)

        ahead = None if cutoff else load_down
        if predicted:
            gate, up = shared.row_products([gate_ref, up_ref], neuron, x, chunks, keep, ahead=ahead)
            hidden = [pick(v) * gate_act(g) * u for v, g, u in zip(values, gate, up, strict=True)]
        else:
            (up,) = shared.row_products([up_ref], neuron, x, chunks, keep, ahead=ahead)
            hidden = [pick(v) * u for v, u in zip(values, up, strict=True)]
        if cutoff:
            least = plt.load(cutoff[0].at[neuron], mask=keep, other=0.0)
            hidden = [jnp.where(jnp.abs(h) >= least, h, 0.0) for h in hidden]
            load_down(functools.reduce(jnp.logical_or, [h != 0 for h in hidden]))
        return [
            [s + shared.weighted_rows(tile, h) for s, tile in zip(token, tiles, strict=True)]
            for token, h in zip(sums, hidden, strict=True)
        ]

    def run() -> None:
        zeros = [[jnp.zeros(k.size, jnp.float32) for k in chunks] for _ in range(tokens)]
        sums = jax.lax.fori_loop(0, pl.cdiv(count, tuning.group), gather, zeros)
        for b, token in enumerate(sums):
            for k, y in zip(chunks, token, strict=True):
                out.add(pl.ds(b, 1), k, y[None])

    out.when(count > 0, run)
