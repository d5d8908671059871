"""The block-sparse FFN in one launch on an NVIDIA GPU.

A program takes some neurons of one block. It scores its block itself, and leaves at once where no token wants it:
programs beside it score the same block again, from the cache, which costs less than a kernel in front. Otherwise it
streams its rows of gate and up, applies the activation, streams its rows of down, and adds to the output with atomics,
right onto the residual stream.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import triton as shared
from pallas_kernels.block_sparse_ffn.reference import Router
from pallas_kernels.ffn import Activation, PackedFFN, activate


@dataclass(frozen=True)
class Tuning:
    """How the work is cut. Sizes are upper bounds: a shape that they do not divide takes the next smaller one."""

    path: Literal["fma", "dot"]  # arithmetic on the ordinary cores, or on tensor cores with pipelined loads
    rows: int  # neurons a program, at most a block
    chunk: int  # columns of gate and up that are loaded together
    down_chunk: int  # columns of down
    warps: int
    stages: int = 2  # loads in flight of the dot path


def default_tuning(tokens: int, dtype: Any) -> Tuning:
    """For an H100, by batch."""
    if tokens <= 4 or dtype == jnp.float32:
        return Tuning("fma", rows=8, chunk=1024, down_chunk=1024, warps=4)
    return Tuning("dot", rows=32, chunk=128, down_chunk=128, warps=4, stages=4)


def unsupported(x: jax.Array, weights: PackedFFN, block_size: int) -> str | None:
    tokens, width = x.shape
    if not 1 <= tokens <= 16:
        return f"expected 1 to 16 tokens, got {tokens}"
    if width % 16:
        return f"expected a width that 16 divides, got {width}"
    if block_size % 8:
        return f"expected a block size that 8 divides, got {block_size}"
    return None


def block_sparse_ffn(
    x: jax.Array,
    weights: PackedFFN,
    choice: Router | jax.Array,
    *,
    residual: jax.Array | None,
    activation: Activation,
    block_size: int,
    deterministic: bool = False,
    interpret: Any = False,
    tuning: Tuning | None = None,
) -> jax.Array:
    """As `reference.block_sparse_ffn`, the hidden values rounded to x's dtype on the dot path."""
    neurons = weights.gate.shape[0]
    tuning = tuning or default_tuning(x.shape[0], x.dtype)
    tuning = replace(tuning, rows=shared.power_of_two(tuning.rows, block_size))
    chosen = tuple(choice) if isinstance(choice, Router) else (choice.astype(jnp.int32),)
    kernel = functools.partial(
        {"fma": _fma_kernel, "dot": _dot_kernel}[tuning.path],
        routed=isinstance(choice, Router),
        activation=activation,
        block_size=block_size,
        tuning=tuning,
    )
    return shared.accumulate(
        kernel,
        (x, *weights, *chosen),
        residual,
        programs=neurons // tuning.rows,
        warps=tuning.warps,
        stages=tuning.stages,
        deterministic=deterministic,
        interpret=interpret,
    )


def _fma_kernel(
    x_ref: Any, gate_ref: Any, up_ref: Any, down_ref: Any, *refs: Any,
    routed: bool, activation: Activation, block_size: int, tuning: Tuning,
) -> None:  # fmt: skip
    *choice_refs, out = refs
    tokens, width = x_ref.shape
    first = pl.program_id(0) * tuning.rows
    rows, block = pl.ds(first, tuning.rows), first // block_size
    chunks = shared.columns(width, tuning.chunk)
    x = shared.load_tokens(x_ref, chunks)

    if routed:
        router_ref, threshold_ref = choice_refs
        (scores,) = shared.row_products([router_ref], pl.ds(block, 1), x, chunks, again=True)
        wanted = [jax.lax.logistic(jnp.sum(s)) > threshold_ref[0] for s in scores]
    else:
        wanted = [choice_refs[0][b, block] > 0 for b in range(tokens)]

    def run() -> None:
        gate, up = shared.row_products([gate_ref, up_ref], rows, x, chunks)
        hidden = [
            jnp.where(w, activate(activation, g, shared.erf) * u, 0.0) for w, g, u in zip(wanted, gate, up, strict=True)
        ]
        for k in shared.columns(width, tuning.down_chunk):
            tile = shared.load_weights(down_ref, rows, k)
            for b, h in enumerate(hidden):
                out.add(pl.ds(b, 1), k, shared.weighted_rows(tile, h)[None])

    out.when(functools.reduce(jnp.logical_or, wanted), run)


def _dot_kernel(
    x_ref: Any, gate_ref: Any, up_ref: Any, down_ref: Any, *refs: Any,
    routed: bool, activation: Activation, block_size: int, tuning: Tuning,
) -> None:  # fmt: skip
    *choice_refs, out = refs
    tokens, width = x_ref.shape
    first = pl.program_id(0) * tuning.rows
    rows, block = pl.ds(first, tuning.rows), first // block_size
    padded, real = pl.ds(0, 16), jnp.arange(16) < tokens  # a tensor core takes 16 tokens
    precision = "highest" if x_ref.dtype == jnp.float32 else None

    def load_x(k: Any) -> jax.Array:
        if tokens == 1:
            return jnp.broadcast_to(x_ref[0, k][None], (16, k.size))
        return plt.load(x_ref.at[padded, k], mask=jnp.broadcast_to(real[:, None], (16, k.size)), other=0.0)

    if routed:
        router_ref, threshold_ref = choice_refs

        def score(k: Any, total: jax.Array) -> jax.Array:
            r = router_ref[block, k].astype(jnp.float32)
            return total + jnp.sum(load_x(k).astype(jnp.float32) * r[None], axis=1)

        scores = _over(width, tuning.chunk, score, jnp.zeros(16, jnp.float32))
        wanted = real & (jax.lax.logistic(scores) > threshold_ref[0])
    else:
        wanted = real & (plt.load(choice_refs[0].at[padded, block], mask=real, other=0) > 0)

    def products(k: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x = load_x(k)
        gate, up = (shared.load_weights(ref, rows, k) for ref in (gate_ref, up_ref))
        return (
            sums[0] + plt.dot(x, gate, trans_b=True, precision=precision),
            sums[1] + plt.dot(x, up, trans_b=True, precision=precision),
        )

    def run() -> None:
        zeros = jnp.zeros((16, tuning.rows), jnp.float32)
        gate, up = _over(width, tuning.chunk, products, (zeros, zeros))
        hidden = jnp.where(wanted[:, None], activate(activation, gate, shared.erf) * up, 0.0).astype(x_ref.dtype)

        def add(k: Any, _: None) -> None:
            y = plt.dot(hidden, shared.load_weights(down_ref, rows, k), precision=precision)
            if tokens == 1:
                out.add(pl.ds(0, 1), k, jnp.sum(y, axis=0)[None])  # the other rows are zero
            else:
                out.add(padded, k, y, None if tokens == 16 else jnp.broadcast_to(real[:, None], y.shape))

        _over(width, tuning.down_chunk, add, None)

    out.when(jnp.sum(wanted.astype(jnp.int32)) > 0, run)


def _over(width: int, chunk: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Carries a value over the chunks of a row, in a loop whose loads Triton issues ahead: chunks of one size."""
    chunk = shared.power_of_two(chunk, width)
    return jax.lax.fori_loop(0, width // chunk, lambda i, carry: body(pl.ds(i * chunk, chunk), carry), carry)
