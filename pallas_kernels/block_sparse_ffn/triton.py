"""The block-sparse FFN on an NVIDIA GPU: one launch, and a short one before it where there is a router.

A program takes some neurons of one block, and leaves at once where no token wants it. Otherwise it streams its rows of
gate and up, applies the activation, streams its rows of down, and adds to the output with atomics, right onto the
residual stream.
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
    ahead: bool = True  # fma: loads the first chunk of down before gate and up are summed


def default_tuning(tokens: int, width: int, dtype: Any, most: bool) -> Tuning:
    """For an H100. Few rows a program and all their loads at once leave no processor idle where little is left to do
    for one or two tokens; otherwise tensor cores, which round float32, stream better."""
    if dtype == jnp.float32 or (tokens <= 2 and not most):
        return Tuning("fma", rows=4, chunk=4096, down_chunk=4096, warps=shared.warps_for(width))
    if tokens == 1:
        return Tuning("dot", rows=32, chunk=128, down_chunk=128, warps=4, stages=3)
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
    choice: Router | jax.Array | None,
    *,
    residual: jax.Array | None,
    activation: Activation,
    block_size: int,
    most: bool = False,
    deterministic: bool = False,
    interpret: Any = False,
    tuning: Tuning | None = None,
) -> jax.Array:
    """As `reference.block_sparse_ffn`, the hidden values rounded to x's dtype on the dot path."""
    neurons = weights.gate.shape[0]
    tuning = tuning or default_tuning(x.shape[0], x.shape[1], x.dtype, most)
    tuning = replace(tuning, rows=shared.power_of_two(tuning.rows, block_size))
    if isinstance(choice, Router):
        choice = _mask(x, choice, interpret)
    body: Callable[..., None] = _dot_kernel if tuning.path == "dot" else _fma_kernel
    return shared.accumulate(
        functools.partial(body, activation=activation, block_size=block_size, tuning=tuning),
        (x, *weights, *(() if choice is None else (choice,))),
        residual,
        programs=neurons // tuning.rows,
        warps=tuning.warps,
        stages=tuning.stages,
        deterministic=deterministic,
        interpret=interpret,
    )


def _mask(x: jax.Array, router: Router, interpret: Any) -> jax.Array:
    """The active blocks, bool [B, E]: a program scores two blocks."""
    blocks = router.weight.shape[0]
    some = shared.power_of_two(2, blocks)

    def kernel(x_ref: Any, weight_ref: Any, threshold_ref: Any, mask_ref: Any) -> None:
        threshold = threshold_ref[0]
        rows, chunks = pl.ds(pl.program_id(0) * some, some), shared.columns(x_ref.shape[1], 4096)
        (scores,) = shared.row_products([weight_ref], rows, shared.load_tokens(x_ref, chunks), chunks)
        for b, score in enumerate(scores):
            mask_ref[b, rows] = jax.lax.logistic(score) > threshold

    out = like(x, (x.shape[0], blocks), jnp.bool_)
    return shared.call(kernel, out, programs=blocks // some, warps=16, interpret=interpret)(x, *router)


def _fma_kernel(
    x_ref: Any, gate_ref: Any, up_ref: Any, down_ref: Any, *refs: Any,
    activation: Activation, block_size: int, tuning: Tuning,
) -> None:  # fmt: skip
    *choice_refs, out = refs
    tokens, width = x_ref.shape
    first = pl.program_id(0) * tuning.rows
    rows, chunks = pl.ds(first, tuning.rows), shared.columns(width, tuning.chunk)
    down_chunks = shared.columns(width, tuning.down_chunk)
    wanted = [mask_ref[b, first // block_size] for mask_ref in choice_refs for b in range(tokens)]

    def run() -> None:
        tiles: list[jax.Array] = []

        def load_down() -> None:
            tiles.append(shared.load_weights(down_ref, rows, down_chunks[0]))

        x = shared.load_tokens(x_ref, chunks)
        gate, up = shared.row_products([gate_ref, up_ref], rows, x, chunks, ahead=load_down if tuning.ahead else None)
        hidden = [activate(activation, g, shared.erf) * u for g, u in zip(gate, up, strict=True)]
        if wanted:
            hidden = [jnp.where(w, h, 0.0) for w, h in zip(wanted, hidden, strict=True)]
        for k in down_chunks:
            tile = tiles.pop() if tiles else shared.load_weights(down_ref, rows, k)
            for b, h in enumerate(hidden):
                out.add(pl.ds(b, 1), k, shared.weighted_rows(tile, h)[None])

    if wanted:
        out.when(functools.reduce(jnp.logical_or, wanted), run)
    else:
        run()


def _dot_kernel(
    x_ref: Any, gate_ref: Any, up_ref: Any, down_ref: Any, *refs: Any,
    activation: Activation, block_size: int, tuning: Tuning,
) -> None:  # fmt: skip
    *choice_refs, out = refs
    tokens, width = x_ref.shape
    first = pl.program_id(0) * tuning.rows
    rows, block = pl.ds(first, tuning.rows), first // block_size
    padded = jnp.arange(16)  # a tensor core takes 16 tokens
    real = padded < tokens
    place = lambda k: (padded[:, None], (k.start + jnp.arange(k.size))[None])
    precision = "highest" if x_ref.dtype == jnp.float32 else None
    wanted = real
    for mask_ref in choice_refs:
        wanted = plt.load(mask_ref.at[padded, block], mask=real, other=False)

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

    if choice_refs:
        out.when(jnp.sum(wanted.astype(jnp.int32)) > 0, run)
    else:
        run()


def _over(width: int, chunk: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Carries a value over the chunks of a row, in a loop whose loads Triton issues ahead: chunks of one size."""
    chunk = shared.power_of_two(chunk, width)
    return jax.lax.fori_loop(0, width // chunk, lambda i, carry: body(pl.ds(i * chunk, chunk), carry), carry)
