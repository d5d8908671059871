"""The block-sparse product and its gradients on Hopper: tensor cores fed by the copy engine.

Forward, dX and dW are sums of small dense products, and one persistent kernel makes them all. A thread block has three
warpgroups. The producer walks lists of blocks and has the copy engine fetch what each step multiplies into a ring in
shared memory. Two consumers multiply and keep their sums in registers: they share a step's b, and each has its own a.

               a consumer's sum                     its a of a step              the common b of a step
    forward    128 tokens, a column of blocks       x, the block's inputs        the block
    dX         128 tokens, a row of blocks          dy, the block's outputs      the block transposed
    dW         a block; the two are of one column   x transposed, its inputs     dy, the column's outputs

While the consumers store a result, the producer already fetches what the next one needs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_matmul.packing import BlockSparse
from pallas_kernels.mosaic_gpu import MULTIPROCESSORS, SHARED_BYTES, interpreter, result_of, too_old

CONSUMERS = 2
DEPTH = 64  # of a step: 128 bytes, a row of the layout that tensor cores read without bank conflicts
LAYOUT = plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128)


@dataclass(frozen=True)
class Tuning:
    """How the work is cut."""

    tokens: int = 128  # of a consumer's tile, forward and dX; a multiple of 64
    stages: int = 4  # steps in the ring, at most what fits
    group: int = 4  # tiles of tokens that are worked on side by side
    programs: int = MULTIPROCESSORS  # thread blocks


def unsupported(x: jax.Array, weight: BlockSparse) -> str | None:
    if reason := too_old():
        return reason
    if x.dtype == jnp.float32:
        return "expected bfloat16 or float16, got float32"
    if weight.block_size not in (64, 128):
        return f"expected blocks of 64 or 128, got {weight.block_size}"
    if x.shape[0] % 8:
        return f"expected a number of tokens that 8 divides, got {x.shape[0]}"
    return None


def matmul(x: jax.Array, weight: BlockSparse, interpret: Any = False, tuning: Tuning | None = None) -> jax.Array:
    """As `reference.matmul`."""
    return _walk(x, weight, False, interpret, tuning)


def transposed_matmul(
    dy: jax.Array, weight: BlockSparse, interpret: Any = False, tuning: Tuning | None = None
) -> jax.Array:
    """As `reference.transposed_matmul`."""
    return _walk(dy, weight, True, interpret, tuning)


class Unit(NamedTuple):
    """What a thread block does between two stores, as a kernel finds it in global memory."""

    steps: jax.Array  # int32
    sources: Callable[[jax.Array], tuple[list[Any], Any]]  # of a step: every consumer's a, and the common b
    target: Callable[[jax.Array], tuple[Any, Any]]  # of a consumer: whether it has a result, and where that belongs


def _walk(x: jax.Array, weight: BlockSparse, transposed: bool, interpret: Any, tuning: Tuning | None) -> jax.Array:
    """x times the matrix or its transpose: a unit is a tile of tokens and a column or a row of blocks."""
    tuning = tuning or Tuning()
    size, total = weight.block_size, x.shape[0]
    start = weight.row_start if transposed else weight.column_start
    lists = (weight.by_row, weight.column) if transposed else (weight.row,)
    tiles, lines = pl.cdiv(total, CONSUMERS * tuning.tokens), start.shape[0] - 1
    parts = size // DEPTH

    def unit(refs: Sequence[Any], y_ref: Any, number: jax.Array) -> Unit:
        x_ref, values_ref, start_ref, *list_refs = refs
        tile, line = plgpu.planar_snake(number, (tiles, lines), 0, tuning.group)
        first = start_ref[line]

        def tokens(consumer: Any) -> Any:
            return pl.ds((tile * CONSUMERS + consumer) * tuning.tokens, tuning.tokens)

        def sources(step: jax.Array) -> tuple[list[Any], Any]:
            place, part = first + jax.lax.div(step, parts), pl.ds(jax.lax.rem(step, parts) * DEPTH, DEPTH)
            block = list_refs[0][place] if transposed else place
            across = pl.ds(list_refs[-1][block] * size + part.start, DEPTH)
            b = values_ref.at[block, :, part] if transposed else values_ref.at[block, part]
            return [x_ref.at[tokens(consumer), across] for consumer in range(CONSUMERS)], b

        def target(consumer: jax.Array) -> tuple[Any, Any]:
            return True, y_ref.at[tokens(consumer), pl.ds(line * size, size)]

        return Unit((start_ref[line + 1] - first) * parts, sources, target)

    return _launch(
        unit,
        tiles * lines,
        [x, weight.values, start, *lists],
        jax.ShapeDtypeStruct((total, lines * size), x.dtype),
        a_shape=(tuning.tokens, DEPTH),
        b_shape=(size, DEPTH) if transposed else (DEPTH, size),
        transpose_a=False,
        transpose_b=transposed,
        tuning=tuning,
        interpret=interpret,
    )


def block_products(
    x: jax.Array, dy: jax.Array, weight: BlockSparse, interpret: Any = False, tuning: Tuning | None = None
) -> jax.Array:
    """As `reference.block_products`. A unit is up to two blocks of a column."""
    size, steps = weight.block_size, pl.cdiv(x.shape[0], DEPTH)
    first, count = _pairs(weight)

    def unit(refs: Sequence[Any], out_ref: Any, number: jax.Array) -> Unit:
        x_ref, dy_ref, row_ref, column_ref, start_ref, first_ref, count_ref = refs
        first, count = first_ref[number], count_ref[number]
        used = first < start_ref[start_ref.shape[0] - 1]  # spare places are zero, a sum of no steps

        def sources(step: jax.Array) -> tuple[list[Any], Any]:
            tokens = pl.ds(step * DEPTH, DEPTH)
            a = [x_ref.at[tokens, pl.ds(row_ref[block] * size, size)] for block in (first, first + count - 1)]
            return a, dy_ref.at[tokens, pl.ds(column_ref[first] * size, size)]

        def target(consumer: jax.Array) -> tuple[Any, Any]:
            return consumer < count, out_ref.at[first + consumer]

        return Unit(jnp.where(used, jnp.int32(steps), 0), sources, target)

    return _launch(
        unit,
        first.shape[0],
        [x, dy, weight.row, weight.column, weight.column_start, first, count],
        jax.ShapeDtypeStruct(weight.values.shape, weight.values.dtype),
        a_shape=(DEPTH, size),
        b_shape=(DEPTH, size),
        transpose_a=True,
        transpose_b=False,
        tuning=tuning or Tuning(),
        interpret=interpret,
    )


def _pairs(weight: BlockSparse) -> tuple[jax.Array, jax.Array]:
    """The blocks by twos of one column, an odd one alone: the first of each pair and how many there are, 0 to 2.

    Spare places follow as if they were a column more.
    """
    capacity = weight.row.shape[0]
    start = jnp.append(weight.column_start, jnp.int32(capacity))
    pairs = (start[1:] - start[:-1] + 1) // 2  # of each column
    begin = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(pairs, dtype=jnp.int32)])
    pair = jnp.arange((capacity + pairs.shape[0]) // 2, dtype=jnp.int32)  # as many as there can be
    column = jnp.searchsorted(begin[1:-1], pair, side="right")
    first = start[column] + 2 * (pair - begin[column])
    return first, jnp.clip(start[column + 1] - first, 0, 2)


def _launch(
    unit: Callable[[Sequence[Any], Any, jax.Array], Unit],
    units: int,
    operands: Sequence[jax.Array],
    out: jax.ShapeDtypeStruct,
    *,
    a_shape: tuple[int, int],
    b_shape: tuple[int, int],
    transpose_a: bool,
    transpose_b: bool,
    tuning: Tuning,
    interpret: Any,
) -> jax.Array:
    """Runs unit(operand refs, out ref, number) for every number below `units`.

    Args:
        a_shape, b_shape: what a step fetches; turned round where told to, they multiply to a consumer's result.
    """
    dtype, programs = operands[0].dtype, min(tuning.programs, units)
    rows, columns = a_shape[transpose_a], b_shape[not transpose_b]
    step_values, staged_values = CONSUMERS * math.prod(a_shape) + math.prod(b_shape), CONSUMERS * rows * DEPTH
    stages = min(tuning.stages, (SHARED_BYTES // dtype.itemsize - staged_values) // step_values)

    def kernel(*refs: Any) -> None:
        *operand_refs, out_ref, a, b, staged, filled, free = refs
        program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")

        def each_unit(body: Callable[[Unit, jax.Array], None]) -> None:
            """body(unit, turn), where the unit's steps are number turn, turn + 1, ... of this thread block."""

            def numbered(i: jax.Array, turn: jax.Array) -> jax.Array:
                work = unit(operand_refs, out_ref, program + i * programs)
                body(work, turn)
                return turn + work.steps

            jax.lax.fori_loop(0, jax.lax.div(units - program + programs - 1, programs), numbered, jnp.int32(0))

        @pl.when(warpgroup == CONSUMERS)
        def produce() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @each_unit
            def _(work: Unit, turn: jax.Array) -> None:
                @pl.loop(0, work.steps)
                def _(step: jax.Array) -> None:
                    slot = jax.lax.rem(turn + step, stages)
                    plgpu.barrier_wait(free.at[slot])
                    a_sources, b_source = work.sources(step)
                    for consumer, source in enumerate(a_sources):
                        plgpu.copy_gmem_to_smem(source, a.at[slot, consumer], filled.at[slot])
                    plgpu.copy_gmem_to_smem(b_source, b.at[slot], filled.at[slot])

            for slot in range(stages):
                plgpu.barrier_wait(free.at[slot])

        @pl.when(warpgroup < CONSUMERS)
        def consume() -> None:
            plgpu.set_max_registers(232, action="increase")
            for slot in range(stages):
                plgpu.barrier_arrive(free.at[slot])

            @each_unit
            def _(work: Unit, turn: jax.Array) -> None:
                def sum_up(sums: Any) -> jax.Array:
                    @pl.loop(0, work.steps)
                    def _(step: jax.Array) -> None:
                        slot = jax.lax.rem(turn + step, stages)
                        plgpu.barrier_wait(filled.at[slot])
                        own, common = a.at[slot, warpgroup], b.at[slot]
                        plgpu.wgmma(sums, own.T if transpose_a else own, common.T if transpose_b else common)
                        plgpu.wgmma_wait(1)  # the step before is done with its slot

                        @pl.when(step > 0)
                        def _() -> None:
                            plgpu.barrier_arrive(free.at[jax.lax.rem(turn + step - 1, stages)])

                    return sums[...]

                sums = pl.run_scoped(sum_up, plgpu.ACC((rows, columns), jnp.float32))

                @pl.when(work.steps > 0)
                def _() -> None:
                    plgpu.barrier_arrive(free.at[jax.lax.rem(turn + work.steps - 1, stages)])

                there, target = work.target(warpgroup)

                @pl.when(there)
                def _() -> None:
                    for panel in range(0, columns, DEPTH):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the panel before has left
                        staged[warpgroup] = sums[:, panel : panel + DEPTH].astype(dtype)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(staged.at[warpgroup], target.at[:, pl.ds(panel, DEPTH)])

            plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel,
        out_type=out,
        grid=(programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((stages, CONSUMERS, *a_shape), dtype, transforms=LAYOUT),
            plgpu.SMEM((stages, *b_shape), dtype, transforms=LAYOUT),
            plgpu.SMEM((CONSUMERS, rows, DEPTH), dtype, transforms=LAYOUT),
            plgpu.Barrier(num_arrivals=CONSUMERS + 1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpreter(interpret),
    )
    return result_of(run, *operands)
