"""What the kernels on Pallas's Triton backend share: the call itself, and products of few tokens with rows of weights.

At a few tokens a matrix product is a stream of weights with some arithmetic beside it, and what counts is how many
bytes are on their way at once. So a program takes a handful of rows, its threads lie side by side along a row, 16 bytes
each, and its loads are issued before the first of them is needed. Triton wants every array's size to be a power of
two, so rows are cut into chunks of one.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import triton_atomics
from pallas_kernels.backend import like, vary_together

VECTOR = 8  # 16-bit values in the 16 bytes that a thread loads at once


class Output:
    """Where the programs of a kernel add their parts of y [B, D]: all into one array with atomics, or, deterministic,
    each into its own row of [programs, B, D]."""

    def __init__(self, ref: Any, deterministic: bool, interpret: Any):
        self._ref = ref
        self._program = pl.program_id(0)
        self._deterministic = deterministic
        self._interpret = interpret

    def add(self, tokens: Any, k: Any, y: jax.Array, mask: jax.Array | None = None) -> None:
        """Adds y at [tokens, k], slices or arrays; where the output is deterministic, every place takes one part."""
        if self._deterministic:
            plt.store(self._ref.at[self._program, tokens, k], y, mask=mask)
        elif self._interpret:  # one program after another, and no atomics with masks
            place = self._ref.at[tokens, k]
            plt.store(place, y + plt.load(place, mask=mask), mask=mask)
        else:
            triton_atomics.add(self._ref, (tokens, k), y, mask)

    def when(self, condition: jax.Array, run: Callable[[], None]) -> None:
        """Runs what adds to every place, or leaves zeros."""
        pl.when(condition)(run)
        if self._deterministic:

            @pl.when(jnp.logical_not(condition))
            def _() -> None:
                _, tokens, width = self._ref.shape
                for b in range(tokens):
                    for k in columns(width, 1024):
                        self._ref[self._program, b, k] = jnp.zeros(k.size, jnp.float32)


def call(
    kernel: Callable[..., None],
    out: Any,
    *,
    programs: int | tuple[int, ...],
    warps: int,
    stages: int = 1,
    interpret: Any,
    aliases: dict[int, int] | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """`pl.pallas_call` on the Triton backend, every array whole in global memory; `out` is one shape or a list.

    JAX warns at lowering that it will drop this backend. Nobody who calls our operations can act on that, so the
    warning is turned off here, for this message alone.
    """
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

    def run(*operands: jax.Array) -> Any:
        return pl.pallas_call(
            kernel,
            grid=programs if isinstance(programs, tuple) else (programs,),
            in_specs=[pl.no_block_spec] * len(operands),
            out_specs=jax.tree.map(lambda _: pl.no_block_spec, out),
            out_shape=out,
            input_output_aliases=aliases or {},
            compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name=name,
        )(*operands)

    return run


def accumulate(
    kernel: Callable[..., None],
    operands: tuple[jax.Array, ...],
    residual: jax.Array | None,
    *,
    programs: int,
    deterministic: bool,
    interpret: Any,
    **launch: Any,
) -> jax.Array:
    """residual + the sum of what `programs` programs of `kernel` add, float32 of the first operand's shape.

    The kernel gets the operands and an `Output`.
    """
    x = operands[0]

    def body(*refs: Any) -> None:
        kernel(*refs[: len(operands)], Output(refs[-1], deterministic, interpret))

    launch |= {"programs": programs, "interpret": interpret}
    if deterministic:
        y = jnp.sum(call(body, like(x, (programs, *x.shape), jnp.float32), **launch)(*operands), axis=0)
        return y if residual is None else residual + y
    start = vary_together((x, jnp.zeros(x.shape, jnp.float32)))[1] if residual is None else residual
    return call(body, like(x, x.shape, jnp.float32), aliases={len(operands): 0}, **launch)(*operands, start)


def power_of_two(wanted: int, of: int) -> int:
    """The largest power of two that is at most `wanted` and divides `of`."""
    size = of & -of
    while size > wanted:
        size //= 2
    return size


def warps_for(width: int) -> int:
    """As many warps, up to 16, as it takes to load a row of 16-bit values at once."""
    warps = max(1, min(16, width // (32 * VECTOR)))
    return 1 << (warps.bit_length() - 1)


def columns(width: int, chunk: int) -> list[Any]:
    """A row cut into chunks, each a power of two: as many of `chunk` as fit, then smaller ones."""
    chunks, start = [], 0
    while start < width:
        while chunk > width - start:
            chunk //= 2
        chunks.append(pl.ds(start, chunk))
        start += chunk
    return chunks


def load_tokens(x_ref: Any, chunks: Sequence[Any]) -> list[list[jax.Array]]:
    """x [B, D] in registers, [token][chunk]."""
    return [[x_ref[b, k] for k in chunks] for b in range(x_ref.shape[0])]


def load_weights(w_ref: Any, rows: Any, k: Any, keep: jax.Array | None = None) -> jax.Array:
    """A tile [rows, chunk], not to stay in the cache. Rows outside `keep` are not read."""
    if keep is None:
        return plt.load(w_ref.at[rows, k], eviction_policy="evict_first")
    index = rows[:, None], k.start + jnp.arange(k.size)[None]
    return plt.load(w_ref.at[index], mask=keep[:, None], other=0.0, eviction_policy="evict_first")


def row_products(
    w_refs: Sequence[Any],
    rows: Any,
    x: list[list[jax.Array]],
    chunks: Sequence[Any],
    keep: jax.Array | None = None,
    ahead: Callable[[], Any] | None = None,
) -> list[list[jax.Array]]:
    """Products of rows of several matrices with every token: [matrix][token], each float32 [rows].

    Each thread sums what it loaded; the threads meet once, at the end. `ahead` is called before they do: to issue
    loads of what comes next.
    """

    def per_thread(tile: jax.Array, x: jax.Array) -> jax.Array:
        product = tile.astype(jnp.float32) * x.astype(jnp.float32)[None]
        n, size = product.shape
        return jnp.sum(product.reshape(n, max(size // VECTOR, 1), -1), axis=2)

    partial: list[list[list[Any]]] = []  # by size of chunk, matrix and token
    for _, same_size in itertools.groupby(enumerate(chunks), key=lambda chunk: chunk[1].size):
        sums: list[list[Any]] = [[0.0] * len(x) for _ in w_refs]
        for c, k in same_size:
            for m, tile in enumerate([load_weights(w_ref, rows, k, keep) for w_ref in w_refs]):
                sums[m] = [s + per_thread(tile, token[c]) for s, token in zip(sums[m], x, strict=True)]
        partial.append(sums)
    if ahead is not None:
        ahead()
    total = lambda m, b: functools.reduce(jnp.add, [jnp.sum(sums[m][b], axis=1) for sums in partial])
    return [[total(m, b) for b in range(len(x))] for m in range(len(w_refs))]


def weighted_rows(tile: jax.Array, h: jax.Array) -> jax.Array:
    """The sum over the rows of h[row] tile[row]: tile [rows, chunk], h float32 [rows] -> float32 [chunk]."""
    return jnp.sum(tile.astype(jnp.float32) * h[:, None], axis=0)


def erf(x: jax.Array) -> jax.Array:
    """The error function to 1.5e-7 (Abramowitz and Stegun 7.1.26), which this backend does not have."""
    t = 1.0 / (1.0 + 0.3275911 * jnp.abs(x))
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    y = 1.0 - poly * jnp.exp(-x * x)
    return jnp.where(x < 0, -y, y)


def dot(a: jax.Array, b: jax.Array, **kwargs: Any) -> jax.Array:
    """The product of two tiles on tensor cores; float32 operands are not rounded, whatever JAX's default."""
    return plt.dot(a, b, precision="highest" if a.dtype == jnp.float32 else "default", **kwargs)


def grouped(program: jax.Array, tiles: int, lines: int, group: int) -> tuple[jax.Array, jax.Array]:
    """Tile and line of a program: groups of tiles one after the other, in each the tiles of a line side by side."""
    first = jax.lax.div(program, jnp.int32(group * lines)) * group
    height = jnp.minimum(tiles - first, group)
    place = program - first * lines
    return first + jax.lax.rem(place, height), jax.lax.div(place, height)
