"""Packed N:M products on a TPU: the packed rows are streamed from memory and expanded where the matrix unit reads.

The grid runs over blocks of rows. A row's M places are filled one after the other, where(index == place, value, 0), and
each is multiplied with the inputs that belong to it: no tile is ever larger than the values it comes from.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.backend import like
from pallas_kernels.ffn import Activation, activate
from pallas_kernels.mosaic_tpu import dot
from pallas_kernels.nm_matmul.packing import FIELDS, PackedNM

_ROWS = {"output": 128, "input": 256}  # of values, a step: bytes of indices lie in tiles of 32 rows
_EXPANDED = 64  # rows that are expanded at once, along "input"


def unsupported(x: jax.Array, *weights: PackedNM) -> str | None:
    if not 1 <= x.shape[0] <= 16:
        return f"expected 1 to 16 tokens, got {x.shape[0]}"
    if x.dtype == jnp.float16:
        return "expected float32 or bfloat16, got float16"
    return None


def nm_matmul(x: jax.Array, weight: PackedNM, interpret: Any = False) -> jax.Array:
    """As `reference.nm_matmul`."""
    tokens, (_, outputs) = x.shape[0], weight.shape
    slots, rows, columns = weight.values.shape
    bits, *_, word_columns = weight.indices.shape
    step = min(_ROWS[weight.axis], rows)
    by_output = weight.axis == "output"
    word_step = step if by_output else pl.cdiv(step, FIELDS)
    if by_output:  # one set of inputs for every place, one output a place
        x, out = x[None], (weight.m, tokens, rows)
    else:  # a set of inputs a place, one output a row
        x, out = x.reshape(tokens, columns, weight.m).transpose(2, 0, 1), (1, tokens, rows)

    y = pl.pallas_call(
        functools.partial(_output_kernel if by_output else _input_kernel, bits),
        grid=(pl.cdiv(rows, step),),
        in_specs=[
            pl.BlockSpec(x.shape, lambda i: (0, 0, 0)),
            pl.BlockSpec((slots, step, columns), lambda i: (0, i, 0)),
            pl.BlockSpec((bits, slots, word_step, word_columns), lambda i: (0, 0, i, 0)),
        ],
        out_specs=pl.BlockSpec((out[0], tokens, step), lambda i: (0, 0, i)),
        out_shape=like(x, out, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * columns * rows * weight.m, bytes_accessed=weight.nbytes, transcendentals=0
        ),
        interpret=interpret,
        name="nm_matmul",
    )(x, weight.values, weight.indices)
    return y.transpose(1, 2, 0).reshape(tokens, outputs)


def nm_ffn(
    x: jax.Array,
    gate: PackedNM,
    up: PackedNM,
    down: PackedNM,
    residual: jax.Array | None,
    activation: Activation,
    interpret: Any = False,
) -> jax.Array:
    """As `reference.nm_ffn`, the hidden values rounded to x's dtype. Three kernels."""
    hidden = activate(activation, nm_matmul(x, gate, interpret)) * nm_matmul(x, up, interpret)
    y = nm_matmul(hidden.astype(x.dtype), down, interpret)
    return y if residual is None else residual + y


def _output_kernel(bits: int, x_ref: Any, values_ref: Any, indices_ref: Any, y_ref: Any) -> None:
    """Rows of groups of outputs: a word holds eight pieces of a row."""
    slots, _, columns = values_ref.shape
    width = indices_ref.shape[-1]
    words = [_word(indices_ref, slot) for slot in range(slots)]
    y = [jnp.zeros(y_ref.shape[1:], jnp.float32)] * y_ref.shape[0]
    for field in range(FIELDS):
        size = min(width, columns - field * width)
        if size <= 0:
            break
        piece = pl.ds(field * width, size)
        x = x_ref[0, :, piece]
        kept = [values_ref[slot, :, piece].astype(jnp.float32) for slot in range(slots)]
        index = [(word[:, :size] >> (bits * field)) & ((1 << bits) - 1) for word in words]
        for place in range(1 << bits):
            y[place] += dot(x, _at_place(kept, index, place).astype(x.dtype), 1, 1)
    for place, sums in enumerate(y):
        y_ref[place] = sums


def _input_kernel(bits: int, x_ref: Any, values_ref: Any, indices_ref: Any, y_ref: Any) -> None:
    """Rows of groups of inputs: a word holds eight rows."""
    slots, rows, columns = values_ref.shape
    for first in range(0, rows, _EXPANDED):
        size = min(_EXPANDED, rows - first)
        kept = [values_ref[slot, pl.ds(first, size)].astype(jnp.float32) for slot in range(slots)]
        index = []
        for slot in range(slots):
            word = _word(indices_ref, slot, pl.ds(first // FIELDS, pl.cdiv(size, FIELDS)))
            word = jnp.broadcast_to(word[:, None], (word.shape[0], FIELDS, columns)).reshape(-1, columns)[:size]
            field = jax.lax.broadcasted_iota(jnp.int32, word.shape, 0) & (FIELDS - 1)
            index.append((word >> (bits * field)) & ((1 << bits) - 1))
        y = jnp.zeros((y_ref.shape[1], size), jnp.float32)
        for place in range(1 << bits):
            y += dot(x_ref[place], _at_place(kept, index, place).astype(x_ref.dtype), 1, 1)
        y_ref[0, :, pl.ds(first, size)] = y


def _word(indices_ref: Any, slot: int, rows: Any = slice(None)) -> jax.Array:
    """Words of a slot from their byte planes, int32; where they fill it, the mask after a shift drops its sign."""
    planes = [indices_ref[p, slot, rows].astype(jnp.int32) << (8 * p) for p in range(indices_ref.shape[0])]
    return functools.reduce(jnp.bitwise_or, planes)


def _at_place(kept: list[jax.Array], index: list[jax.Array], place: int) -> jax.Array:
    tile = jnp.zeros_like(kept[0])
    for k, i in zip(kept, index, strict=True):
        tile = jnp.where(i == place, k, tile)
    return tile
