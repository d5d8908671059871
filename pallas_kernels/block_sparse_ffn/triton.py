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
from pallas_kernels.backend import like
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
    router: Literal["fused", "apart"] = "apart"  # in every program of the fma path, or in a short launch before
    ahead: bool = True  # fma: loads the first chunk of down before gate and up are summed
    programs: int = 0  # fma, router apart: so many programs share the active rows evenly; 0: one program for any rows


def default_tuning(tokens: int, width: int, dtype: Any) -> Tuning:
    """For an H100, by batch: at one or two tokens few rows a program and all their loads at once, later tensor cores,
    which round float32."""
    if tokens <= 2 or dtype == jnp.float32:
        warps = shared.warps_for(width)
        return Tuning("fma", rows=4, chunk=4096, down_chunk=4096, warps=warps, programs=264 if tokens == 1 else 0)
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
    tuning = tuning or default_tuning(x.shape[0], x.shape[1], x.dtype)
    tuning = replace(tuning, rows=shared.power_of_two(tuning.rows, block_size))
    if deterministic or tuning.path == "dot" or tuning.router == "fused":
        tuning = replace(tuning, programs=0)
    fused = isinstance(choice, Router) and tuning.path == "fma" and tuning.router == "fused"
    chosen = tuple(choice) if fused else (_mask(x, choice, interpret),)
    body: Callable[..., None] = _dot_kernel if tuning.path == "dot" else _fma_kernel
    return shared.accumulate(
        functools.partial(body, activation=activation, block_size=block_size, tuning=tuning),
        (x, *weights, *chosen),
        residual,
        programs=min(tuning.programs or neurons, neurons // tuning.rows),
        warps=tuning.warps,
        stages=tuning.stages,
        deterministic=deterministic,
        interpret=interpret,
    )


def _mask(x: jax.Array, choice: Router | jax.Array, interpret: Any) -> jax.Array:
    """The active blocks, int32 [B, E]: a program scores two blocks."""
    if not isinstance(choice, Router):
        return choice.astype(jnp.int32)
    blocks = choice.weight.shape[0]
    some = shared.power_of_two(2, blocks)

    def kernel(x_ref: Any, weight_ref: Any, threshold_ref: Any, mask_ref: Any) -> None:
        threshold = threshold_ref[0]
        rows, chunks = pl.ds(pl.program_id(0) * some, some), shared.columns(x_ref.shape[1], 4096)
        (scores,) = shared.row_products([weight_ref], rows, shared.load_tokens(x_ref, chunks), chunks)
        for b, score in enumerate(scores):
            mask_ref[b, rows] = (jax.lax.logistic(score) > threshold).astype(jnp.int32)

    out = like(x, (x.shape[0], blocks), jnp.int32)
    return shared.call(kernel, out, programs=blocks // some, warps=16, interpret=interpret)(x, *choice)


def _fma_kernel(
    x_ref: Any, gate_ref: Any, up_ref: Any, down_ref: Any, *refs: Any,
    activation: Activation, block_size: int, tuning: Tuning,
) -> None:  # fmt: skip
    *choice_refs, out = refs
    tokens, width = x_ref.shape
    program = pl.program_id(0)
    parts = block_size // tuning.rows  # of a block
    chunks = shared.columns(width, tuning.chunk)
    down_chunks = shared.columns(width, tuning.down_chunk)

    def run(first: jax.Array, wanted: list[jax.Array], x: list[list[jax.Array]]) -> None:
        rows, tiles = pl.ds(first, tuning.rows), []

        def load_down() -> None:
            tiles.append(shared.load_weights(down_ref, rows, down_chunks[0]))

        ahead = load_down if tuning.ahead else None
        gate, up = shared.row_products([gate_ref, up_ref], rows, x, chunks, ahead=ahead)
        hidden = [activate(activation, g, shared.erf) * u for g, u in zip(gate, up, strict=True)]
        hidden = [jnp.where(w, h, 0.0) for w, h in zip(wanted, hidden, strict=True)]
        for k in down_chunks:
            tile = tiles.pop() if tiles else shared.load_weights(down_ref, rows, k)
            for b, h in enumerate(hidden):
                out.add(pl.ds(b, 1), k, shared.weighted_rows(tile, h)[None])

    if tuning.programs:
        (mask_ref,) = choice_refs
        blocks = mask_ref.shape[1]
        block = jnp.arange(pl.next_power_of_2(blocks))
        places = [(jnp.full_like(block, b), block) for b in range(tokens)]
        masks = [plt.load(mask_ref.at[place], mask=block < blocks, other=0) for place in places]
        union = functools.reduce(jnp.maximum, masks)
        place = jnp.where(union > 0, jnp.cumsum(union) - 1, -1)  # among the active blocks
        x = shared.load_tokens(x_ref, chunks)

        def share(i: jax.Array, _: None) -> None:
            part = program + i * tuning.programs
            found = place == part // parts
            pick = lambda v: jnp.sum(jnp.where(found, v, 0))
            run(pick(block) * block_size + part % parts * tuning.rows, [pick(m) > 0 for m in masks], x)

        jax.lax.fori_loop(0, pl.cdiv(jnp.sum(union) * parts - program, tuning.programs), share, None)
    elif len(choice_refs) == 2:
        router_ref, threshold_ref = choice_refs
        threshold, x = threshold_ref[0], shared.load_tokens(x_ref, chunks)
        (scores,) = shared.row_products([router_ref], pl.ds(program // parts, 1), x, chunks, again=True)
        wanted = [jax.lax.logistic(jnp.sum(s)) > threshold for s in scores]
        any_wants = functools.reduce(jnp.logical_or, wanted)
        out.when(any_wants, lambda: run(program * tuning.rows, wanted, x))
    else:
        (mask_ref,) = choice_refs
        wanted = [mask_ref[b, program // parts] > 0 for b in range(tokens)]
        any_wants = functools.reduce(jnp.logical_or, wanted)
        out.when(any_wants, lambda: run(program * tuning.rows, wanted, shared.load_tokens(x_ref, chunks)))


def _dot_kernel(
    x_ref: Any, gate_ref: Any, up_ref: Any, down_ref: Any, mask_ref: Any, out: shared.Output,
    *, activation: Activation, block_size: int, tuning: Tuning,
) -> None:  # fmt: skip
    tokens, width = x_ref.shape
    first = pl.program_id(0) * tuning.rows
    rows, block = pl.ds(first, tuning.rows), first // block_size
    padded = jnp.arange(16)  # a tensor core takes 16 tokens
    real = padded < tokens
    place = lambda k: (padded[:, None], (k.start + jnp.arange(k.size))[None])
    precision = "highest" if x_ref.dtype == jnp.float32 else None
    wanted = plt.load(mask_ref.at[padded, block], mask=real, other=0) > 0

    def load_x(k: Any) -> jax.Array:
        if tokens == 1:
            return jnp.broadcast_to(x_ref[0, k][None], (16, k.size))
        return plt.load(x_ref.at[place(k)], mask=jnp.broadcast_to(real[:, None], (16, k.size)), other=0.0)

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
                out.add(*place(k), y, None if tokens == 16 else jnp.broadcast_to(real[:, None], y.shape))

        _over(width, tuning.down_chunk, add, None)

    out.when(jnp.sum(wanted.astype(jnp.int32)) > 0, run)


def _over(width: int, chunk: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Carries a value over the chunks of a row, in a loop whose loads Triton issues ahead: chunks of one size."""
    chunk = shared.power_of_two(chunk, width)
    return jax.lax.fori_loop(0, width // chunk, lambda i, carry: body(pl.ds(i * chunk, chunk), carry), carry)
