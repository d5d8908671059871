"""The tile-sparse product and its gradients on Hopper: all are sums of small dense products (`wgmma.py`).

                a consumer's sum                        the common side of a step     its own side of a step
    outputs     a tile, one of two blocks that it uses  64 inputs of the tile's x     64 inputs of the weight's block
    inputs      a tile, one of two slices of outputs    x, 64 inputs of an active     64 inputs of the weight's slice
                                                        block
    dW          a block, one of two slices of the       64 tokens of a tile that      64 tokens of the slice
                other axis                              uses it, in the block

The product with the transposed weight is the same, with what a step fetches of the weight turned round.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import MULTIPROCESSORS, too_old
from pallas_kernels.tile_sparse_matmul.api import Sparse
from pallas_kernels.tile_sparse_matmul.masks import sorted_by_use
from pallas_kernels.wgmma import CONSUMERS, DEPTH, Side, Unit, launch

_SIZES = (64, 128)


@dataclass(frozen=True)
class Tuning:
    """How the work is cut."""

    width: int = 128  # of a consumer's slice of the axis that is not sparse, a multiple of 64
    stages: int = 4  # steps in the ring, at most what fits
    group: int = 16  # tiles of tokens, of dW blocks, that are worked on side by side
    programs: int = MULTIPROCESSORS  # thread blocks


def unsupported(x: jax.Array, weight: jax.Array, mask: jax.Array, sparse: Sparse, tile: int) -> str | None:
    axis = int(sparse == "outputs")
    block = weight.shape[axis] // mask.shape[1]
    if reason := too_old():
        return reason
    if x.dtype == jnp.float32:
        return "expected bfloat16 or float16, got float32"
    if tile not in _SIZES or block not in _SIZES:
        return f"expected tiles and blocks of 64 or 128, got {tile} and {block}"
    if weight.shape[1 - axis] % DEPTH:
        return f"expected a weight that {DEPTH} divides, got {weight.shape}"
    if x.shape[0] % 8:
        return f"expected a number of tokens that 8 divides, got {x.shape[0]}"
    return None


def matmul(
    x: jax.Array, weight: jax.Array, mask: jax.Array, sparse: Sparse, tile: int, transposed: bool,
    interpret: Any = False, tuning: Tuning | None = None,
) -> jax.Array:  # fmt: skip
    """As `reference.matmul`."""
    tuning = tuning or Tuning()
    inputs, outputs = weight.shape[::-1] if transposed else weight.shape
    tiles, blocks = mask.shape
    order, count = sorted_by_use(mask)
    if sparse == "outputs":
        width, columns = outputs // blocks, blocks // CONSUMERS + 1  # an odd one of either kind is alone
    else:
        width, columns = tuning.width, pl.cdiv(outputs, CONSUMERS * tuning.width)

    def unit(refs: Sequence[Any], y_ref: Any, number: jax.Array) -> Unit:
        x_ref, weight_ref, order_ref, count_ref = refs
        row, column = plgpu.planar_snake(number, (tiles, columns), 0, tuning.group)
        tokens, used = pl.ds(row * tile, tile), count_ref[row]

        if sparse == "outputs":  # pairs of blocks: first those in use, then the others, which are zero
            pairs = jax.lax.div(used + 1, 2)
            active = column < pairs
            first = jnp.where(active, 2 * column, used + 2 * (column - pairs))
            here = jnp.clip(jnp.where(active, used, blocks) - first, 0, CONSUMERS)
            steps = jnp.where(active, jnp.int32(inputs // DEPTH), 0)
        else:
            here = jnp.minimum(pl.cdiv(outputs, width) - CONSUMERS * column, CONSUMERS)
            steps = used * (inputs // blocks // DEPTH)

        def columns_of(consumer: Any) -> Any:
            """Of y; a consumer without a result repeats what the other has."""
            place = jnp.clip(here - 1, 0, consumer)
            if sparse == "outputs":
                return pl.ds(order_ref[row, jnp.minimum(first + place, blocks - 1)] * width, width)
            return pl.ds((CONSUMERS * column + place) * width, width)

        def sources(step: jax.Array) -> tuple[list[Any], list[Any]]:
            if sparse == "outputs":
                along = pl.ds(step * DEPTH, DEPTH)
            else:
                parts = inputs // blocks // DEPTH
                block = order_ref[row, jax.lax.div(step, parts)]
                along = pl.ds((block * parts + jax.lax.rem(step, parts)) * DEPTH, DEPTH)
            own = [columns_of(consumer) for consumer in range(CONSUMERS)]
            b = [weight_ref.at[(of, along) if transposed else (along, of)] for of in own]
            return [x_ref.at[tokens, along]], b

        def target(consumer: jax.Array) -> tuple[Any, Any]:
            return consumer < here, y_ref.at[tokens, columns_of(consumer)]

        return Unit(steps, sources, target)

    return launch(
        unit,
        tiles * columns,
        [x, weight, order, count],
        jax.ShapeDtypeStruct((x.shape[0], outputs), x.dtype),
        a=Side((tile, DEPTH), common=True),
        b=Side((width, DEPTH) if transposed else (DEPTH, width), turned=transposed),
        stages=tuning.stages,
        programs=tuning.programs,
        interpret=interpret,
    )


def weight_gradient(
    x: jax.Array, dy: jax.Array, mask: jax.Array, sparse: Sparse, tile: int,
    interpret: Any = False, tuning: Tuning | None = None,
) -> jax.Array:  # fmt: skip
    """As `reference.weight_gradient`."""
    tuning = tuning or Tuning()
    inputs, outputs, blocks = x.shape[1], dy.shape[1], mask.shape[1]
    order, count = sorted_by_use(mask.T)
    by_outputs = sparse == "outputs"
    size, total = (outputs // blocks, inputs) if by_outputs else (inputs // blocks, outputs)
    width, parts = tuning.width, tile // DEPTH
    slices = pl.cdiv(total, width)
    columns = pl.cdiv(slices, CONSUMERS)

    def unit(refs: Sequence[Any], out_ref: Any, number: jax.Array) -> Unit:
        x_ref, dy_ref, order_ref, count_ref = refs
        block, column = plgpu.planar_snake(number, (blocks, columns), 0, tuning.group)
        chosen = pl.ds(block * size, size)

        def slice_of(consumer: Any) -> Any:
            """A consumer without a result repeats what the other has."""
            return pl.ds(jnp.minimum(CONSUMERS * column + consumer, slices - 1) * width, width)

        def sources(step: jax.Array) -> tuple[list[Any], list[Any]]:
            used_by = order_ref[block, jax.lax.div(step, parts)]
            tokens = pl.ds((used_by * parts + jax.lax.rem(step, parts)) * DEPTH, DEPTH)
            own = [slice_of(consumer) for consumer in range(CONSUMERS)]
            if by_outputs:
                return [x_ref.at[tokens, of] for of in own], [dy_ref.at[tokens, chosen]]
            return [x_ref.at[tokens, chosen]], [dy_ref.at[tokens, of] for of in own]

        def target(consumer: jax.Array) -> tuple[Any, Any]:
            of = slice_of(consumer)
            return CONSUMERS * column + consumer < slices, out_ref.at[(of, chosen) if by_outputs else (chosen, of)]

        return Unit(count_ref[block] * parts, sources, target)

    return launch(
        unit,
        blocks * columns,
        [x, dy, order, count],
        jax.ShapeDtypeStruct((inputs, outputs), x.dtype),
        a=Side((DEPTH, width if by_outputs else size), turned=True, common=not by_outputs),
        b=Side((DEPTH, size if by_outputs else width), common=by_outputs),
        stages=tuning.stages,
        programs=tuning.programs,
        interpret=interpret,
    )
