"""The kernel on a TPU of both sparse FFN operations: a stream of the active blocks of neurons, by scalar prefetch.

The grid walks a list of block numbers; each step's index maps look up the blocks that Pallas is to fetch while the step
before computes. The list holds the active blocks first and then repeats the last of them: a repeated block is not
fetched again. What a TPU fetches is whole tiles, so a block has at least as many neurons as a tile has rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.backend import like
from pallas_kernels.ffn import Activation, activate

_VMEM = 10 * 2**20  # of the 16 MiB that the smallest of the chips gives a kernel


def tile_rows(dtype: Any) -> int:
    """Rows of a tile: 8 of 32 bits, more of narrower types."""
    return 32 // jnp.dtype(dtype).itemsize


def blocks_a_step(block: int, width: int, dtype: Any, matrices: int = 3) -> int:
    """As many as make a step long beside its fixed cost, and fit twice: one set computes while the next arrives."""
    size = 2 * matrices * block * width * jnp.dtype(dtype).itemsize
    return min(_VMEM // size, max(1, 128 // block))


def gathered_ffn(
    x: jax.Array,
    matrices: tuple[jax.Array, ...],
    scale: jax.Array,
    cutoff: jax.Array | None,
    *,
    residual: jax.Array | None,
    activation: Activation,
    interpret: Any,
) -> jax.Array:
    """residual + (scale * act(x gate') * (x up')) down over the blocks in which scale is not zero, float32 [B, D].

    Args:
        x: [B, D].
        matrices: gate, up, down, each [F, D]; or up and down, where scale holds the gate's activations already.
        scale: float32 [E, B, 1] or [E, B, F / E], a factor by block and token, or also by neuron.
        cutoff: float32 [F] or None: smaller hidden values count as zero.
    """
    (tokens, width), blocks = x.shape, scale.shape[0]
    block = matrices[0].shape[0] // blocks
    per_step = min(blocks_a_step(block, width, x.dtype, len(matrices)), blocks)
    steps = pl.cdiv(blocks, per_step)

    active = jnp.any(scale != 0, axis=(1, 2))
    count = jnp.sum(active.astype(jnp.int32))
    last = jnp.max(jnp.where(active, jnp.arange(blocks), 0))
    (order,) = jnp.nonzero(active, size=blocks, fill_value=last)
    order = jnp.concatenate([order, jnp.full(steps * per_step - blocks, last)]).astype(jnp.int32)
    each = [*matrices, scale]
    if cutoff is not None:
        each.append(cutoff.reshape(blocks, 1, block))

    def kernel(order_ref: Any, count_ref: Any, x_ref: Any, start_ref: Any, *refs: Any) -> None:
        *block_refs, out_ref = refs
        step = pl.program_id(0)

        @pl.when(step == 0)
        def _() -> None:
            out_ref[...] = start_ref[...]

        for j in range(per_step):
            mine = block_refs[j * len(each) : (j + 1) * len(each)]

            @pl.when(step * per_step + j < count_ref[0])
            def _(mine: Any = mine) -> None:
                *first, down_ref = mine[: len(matrices)]
                product, *gate = [dot(x_ref[...], ref[...], 1, 1) for ref in reversed(first)]
                hidden = product * mine[len(matrices)][...]
                for g in gate:
                    hidden = hidden * activate(activation, g)
                if cutoff is not None:
                    hidden = jnp.where(jnp.abs(hidden) >= mine[-1][...], hidden, 0.0)
                out_ref[...] += dot(hidden.astype(x.dtype), down_ref[...])

    def spec(array: jax.Array, j: int) -> pl.BlockSpec:
        if array.ndim == 2:
            return pl.BlockSpec((block, width), lambda i, order, count: (order[i * per_step + j], 0))
        return pl.BlockSpec((None, *array.shape[1:]), lambda i, order, count: (order[i * per_step + j], 0, 0))

    whole = pl.BlockSpec((tokens, width), lambda i, order, count: (0, 0))
    start = jnp.zeros(x.shape, jnp.float32) if residual is None else residual
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(steps,),
            in_specs=[whole, whole, *(spec(array, j) for j in range(per_step) for array in each)],
            out_specs=whole,
        ),
        out_shape=like(x, x.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="gathered_ffn",
    )(order, count[None], x, start, *each * per_step)


def dot(a: jax.Array, b: jax.Array, of_a: int = 1, of_b: int = 0) -> jax.Array:
    """The product over an axis of each matrix, in a kernel; float32 operands are not rounded, whatever JAX's default,
    and bfloat16 ones take no more than they have. Sums are float32."""
    precision = "highest" if a.dtype == jnp.float32 else "default"
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), precision, jnp.float32)
