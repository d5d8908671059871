"""Packed N:M products on an NVIDIA GPU: the weights are unpacked in registers.

A program takes rows of the packed matrix and streams them along the inputs, 16 bytes of values a thread and load. A
word of indices serves eight such loads, and each of the M places of a group is filled by comparing a field of it with
the place: where(index == place, value, 0), at most M - N + 1 places a slot, as a group's indices rise. Sums belong to
outputs, so axis "output" has one a place, summed over the eight fields, and axis "input" one a field, summed over the
places. Nothing is added across programs: no atomics, the same bits at every run.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.backend import like
from pallas_kernels.ffn import Activation, activate
from pallas_kernels.nm_matmul.packing import FIELDS, PackedNM
from pallas_kernels.triton import call, erf

_DOT_TOKENS = 16  # what a tensor core takes at once
_ONCE = "evict_first"  # of loads: not to be kept in the cache


@dataclass(frozen=True)
class Tuning:
    """How the work is cut: a program's tile of values, and the threads that share it."""

    path: Literal["fma", "dot"]  # arithmetic on the ordinary cores, or on tensor cores
    rows: int  # rows of words; 16 at least on the dot path
    columns: int  # values of a row side by side
    warps: int


def default_tuning(tokens: int, weight: PackedNM) -> Tuning:
    """For an H100. On the fma path a thread holds 8 columns, so that it loads 16 bytes of a 16-bit dtype at once."""
    by_output, width = weight.axis == "output", pl.next_power_of_2(weight.indices.shape[-1])
    if tokens > 2 and weight.dtype != jnp.float32:
        return Tuning("dot", 16, 32, 2) if by_output else Tuning("dot", 32, 32, 4)
    columns = min(512 if by_output else 1024, width) if tokens <= 2 else min(128, width)
    return Tuning("fma", 1, columns, max(1, columns // 256))


def unsupported(x: jax.Array, *weights: PackedNM) -> str | None:
    if not 1 <= x.shape[0] <= _DOT_TOKENS:
        return f"expected 1 to {_DOT_TOKENS} tokens, got {x.shape[0]}"
    return None


def nm_matmul(x: jax.Array, weight: PackedNM, interpret: Any = False, tuning: Tuning | None = None) -> jax.Array:
    """As `reference.nm_matmul`."""
    return _product(lambda y: y, _grouped(x, weight), [weight], None, jnp.float32, lambda o: o, interpret, tuning)


def nm_ffn(
    x: jax.Array,
    gate: PackedNM,
    up: PackedNM,
    down: PackedNM,
    residual: jax.Array | None,
    activation: Activation,
    interpret: Any = False,
    tuning: tuple[Tuning | None, Tuning | None] = (None, None),
) -> jax.Array:
    """As `reference.nm_ffn`, the hidden values rounded to x's dtype. Two launches."""
    neurons = down.shape[0]

    def place(f: jax.Array) -> jax.Array:
        """Where down looks for neuron f."""
        return f % down.m * (neurons // down.m) + f // down.m if down.axis == "input" else f

    hidden = _product(
        lambda g, u: activate(activation, g, erf) * u,
        _grouped(x, gate), [gate, up], None, x.dtype, place, interpret, tuning[0],
    )  # fmt: skip
    if down.axis == "input":
        hidden = hidden.reshape(x.shape[0], down.m, -1)
    return _product(lambda y: y, hidden, [down], residual, jnp.float32, lambda o: o, interpret, tuning[1])


def _grouped(x: jax.Array, weight: PackedNM) -> jax.Array:
    """x [B, I] as the kernel reads it: for axis "input" the places of the groups apart, [B, M, I / M]."""
    return x.reshape(x.shape[0], -1, weight.m).swapaxes(1, 2) if weight.axis == "input" else x


def _product(
    finish: Callable[..., jax.Array],
    x: jax.Array,
    weights: Sequence[PackedNM],
    residual: jax.Array | None,
    dtype: Any,
    place: Callable[[jax.Array], jax.Array],
    interpret: Any,
    tuning: Tuning | None,
) -> jax.Array:
    """residual + finish(x times each matrix), [B, O]; output o is stored at place(o)."""
    tokens, weight = x.shape[0], weights[0]
    tuning = tuning or default_tuning(tokens, weight)
    operands = [x, *(array for w in weights for array in (w.values, w.indices))]
    operands += [] if residual is None else [residual]
    kernel = functools.partial(_kernel, finish, place, weight, len(weights), tuning, interpret)
    out = like(x, (tokens, weight.shape[1]), dtype)
    programs = pl.cdiv(weight.indices.shape[2], tuning.rows)
    return call(kernel, out, programs=programs, warps=tuning.warps, interpret=interpret)(*operands)


def _kernel(
    finish: Callable[..., jax.Array],
    place: Callable[[jax.Array], jax.Array],
    weight: PackedNM,
    matrices: int,
    tuning: Tuning,
    interpret: Any,
    x_ref: Any,
    *refs: Any,
) -> None:
    """One program; `weight` says the sizes. A line is one of the outputs that a row of words has: place or field."""
    pairs = [(refs[2 * i], refs[2 * i + 1]) for i in range(matrices)]
    *residual_ref, y_ref = refs[2 * matrices :]
    tokens, outputs = y_ref.shape
    rows = pl.program_id(0) * tuning.rows + jnp.arange(tuning.rows)
    sums = _sums(weight, tuning, interpret, x_ref, pairs, rows)
    lines = len(sums[0])
    for line in range(lines):
        o = rows * lines + line
        keep = o < outputs
        for block, token in enumerate(_blocks(tokens, tuning)):
            if tuning.path == "dot":
                o, keep = o.reshape(1, -1), (token < tokens) & (o < outputs).reshape(1, -1)
            y = finish(*(of_matrix[line][block] for of_matrix in sums))
            for ref in residual_ref:
                y += plt.load(ref.at[token, o], mask=keep, other=0.0)
            plt.store(y_ref.at[token, place(o)], y.astype(y_ref.dtype), mask=keep)


def _blocks(tokens: int, tuning: Tuning) -> list[Any]:
    """The tokens as they are computed with: one by one, or all of them and more in one column."""
    return [jnp.arange(_DOT_TOKENS)[:, None]] if tuning.path == "dot" else list(range(tokens))


def _sums(
    weight: PackedNM, tuning: Tuning, interpret: Any, x_ref: Any, pairs: Sequence[tuple[Any, Any]], rows: jax.Array
) -> list[list[list[jax.Array]]]:
    """x times the lines of some rows of words: float32 by matrix, line and block of tokens, [rows] or [16, rows]."""
    by_output, dot = weight.axis == "output", tuning.path == "dot"
    _, value_rows, value_columns = weight.values.shape
    _, slots, word_rows, width = weight.indices.shape
    fields_below = 1 if by_output else FIELDS  # rows of values for a row of words
    reach = pl.cdiv(word_rows, tuning.rows) * tuning.rows
    chunks = pl.cdiv(width, tuning.columns)
    tokens = x_ref.shape[0]
    compute = weight.dtype if dot else jnp.float32

    def load_x(column: jax.Array, within: list[jax.Array], *place: int) -> list[jax.Array]:
        loaded = []
        for token in _blocks(tokens, tuning):
            present = _below(token, tokens, _DOT_TOKENS) if dot else []
            loaded.append(_load(x_ref, (token, *place, column), within + present).astype(compute))
        return loaded

    def chunk(i: Any, sums: list[list[list[jax.Array]]]) -> list[list[list[jax.Array]]]:
        row, word_column = rows[:, None], (i * tuning.columns + jnp.arange(tuning.columns))[None]
        in_rows = _below(row, word_rows, reach)
        in_width = _below(word_column, width, chunks * tuning.columns)
        words = [
            [_load_word(indices, slot, row, word_column, in_rows + in_width) for slot in range(slots)]
            for _, indices in pairs
        ]
        if not by_output:
            x = [load_x(word_column, in_width, place) for place in range(weight.m)]
        for field in range(FIELDS):
            column, value_row = word_column, row * FIELDS + field
            in_columns = in_width
            if by_output:
                column, value_row = word_column + field * width, row
                in_columns = in_width + _below(column, value_columns, FIELDS * width)
                x = [load_x(column, in_columns)] * weight.m
            within = in_columns + _below(value_row, value_rows, reach * fields_below)
            for m, (values, _) in enumerate(pairs):
                kept = [_load(values, (k, value_row, column), within, _ONCE).astype(compute) for k in range(slots)]
                _add(weight, dot, interpret, sums[m], field, kept, words[m], x)
        return sums

    zeros = jnp.zeros((_DOT_TOKENS, tuning.rows) if dot else (tuning.rows, tuning.columns), jnp.float32)
    lines, blocks = weight.m if by_output else FIELDS, 1 if dot else tokens
    sums = [[[zeros] * blocks for _ in range(lines)] for _ in pairs]
    sums = chunk(0, sums) if chunks == 1 else jax.lax.fori_loop(0, chunks, chunk, sums)
    return sums if dot else jax.tree.map(lambda total: jnp.sum(total, axis=1), sums)


def _add(
    weight: PackedNM,
    dot: bool,
    interpret: Any,
    sums: list[list[jax.Array]],
    field: int,
    kept: list[jax.Array],
    words: list[jax.Array],
    x: list[list[jax.Array]],
) -> None:
    """Adds to sums[line][block] what the groups of a tile give: kept[slot], words[slot], x[place][block]."""
    bits, spare = weight.indices.shape[0], weight.m - weight.n
    places = [range(k, k + spare + 1) for k in range(weight.n)]  # of each slot, as a group's indices rise
    tests = [{p: _test(p, of_slot, bits, field) for p in of_slot} for of_slot in places]
    if dot:
        precision = "highest" if weight.dtype == jnp.float32 else "default"
        for place in range(weight.m):
            tile = jnp.zeros_like(kept[0])
            for k in range(weight.n):
                if place in tests[k]:
                    tile = jnp.where(_holds(words[k], tests[k][place]), kept[k], tile)
            line = sums[place if weight.axis == "output" else field]
            line[0] += plt.dot(x[place][0], tile, trans_b=True, precision=precision)
        return
    for k, of_slot in enumerate(places):
        for block in range(len(x[0])):
            if weight.axis == "output":
                for place, test in tests[k].items():
                    sums[place][block] = _fma(sums[place][block], kept[k], x[0][block], interpret, words[k], test)
            else:
                factor = x[k][block]
                for place in of_slot[1:]:
                    factor = jnp.where(_holds(words[k], tests[k][place]), x[place][block], factor)
                sums[field][block] = _fma(sums[field][block], kept[k], factor, interpret)


def _test(place: int, among: range, bits: int, field: int) -> tuple[int, int]:
    """(mask, value): word & mask == value tells a place from the others of a slot, by as few bits as will do."""
    for mask in sorted(range(1, 1 << bits), key=lambda mask: (mask.bit_count(), mask)):
        if all(other & mask != place & mask for other in among if other != place):
            return mask << (bits * field), (place & mask) << (bits * field)
    return 0, 0  # the slot has one place


def _holds(word: jax.Array, test: tuple[int, int]) -> jax.Array:
    mask, value = test
    return (word & jnp.uint32(mask)) == jnp.uint32(value)


def _fma(
    total: jax.Array,
    a: jax.Array,
    b: jax.Array,
    interpret: Any,
    word: jax.Array | None = None,
    test: tuple[int, int] = (0, 0),
) -> jax.Array:
    """total + a * b, where there is a word only where its test holds.

    In PTX, as Triton neither makes one instruction of a product and a sum nor predicates it.
    """
    if interpret:
        return total + a * b if word is None else jnp.where(_holds(word, test), total + a * b, total)
    asm = "fma.rn.f32 $0, $1, $2, $0;"
    operands, constraints = [a, b], "=f,f,f"
    if word is not None:
        mask, value = test
        differs = f"xor.b32 t, $3, {value}; and.b32 t, t, {mask}; setp.eq.u32 p, t, 0;"
        asm = f"{{ .reg .pred p; .reg .b32 t; {differs} @p {asm} }}"
        operands, constraints = [a, b, word], "=f,f,f,r"
    (total,) = plt.elementwise_inline_asm(
        asm,
        args=[*jnp.broadcast_arrays(*operands), total],
        constraints=constraints + ",0",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, total.dtype)],
    )
    return total


def _below(index: jax.Array, limit: int, reach: int) -> list[jax.Array]:
    """The condition index < limit, none where the index is known to stay below `reach` <= limit."""
    return [index < limit] if reach > limit else []


def _load(ref: Any, at: tuple[Any, ...], within: list[jax.Array], policy: str | None = None) -> jax.Array:
    """What the indices say, which are arrays that broadcast, zero where a condition fails."""
    if not within:
        return plt.load(ref.at[at], eviction_policy=policy)
    shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in at))
    mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, within), shape)
    return plt.load(ref.at[at], mask=mask, other=0, eviction_policy=policy)


def _load_word(indices: Any, slot: int, row: jax.Array, column: jax.Array, within: list[jax.Array]) -> jax.Array:
    """Words of a slot from their byte planes, uint32."""
    planes = [_load(indices, (p, slot, row, column), within, _ONCE).astype(jnp.uint32) for p in range(indices.shape[0])]
    return functools.reduce(jnp.bitwise_or, [plane << (8 * p) for p, plane in enumerate(planes)])
