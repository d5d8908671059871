"""Sums of small dense products on Hopper, of which any may be left out: tensor cores fed by the copy engine.

One persistent kernel makes them all. A thread block has three warpgroups. The producer walks what the work consists of
and has the copy engine fetch what each step multiplies into a ring in shared memory. Two consumers multiply and keep
their sums in registers: of the two sides of a step's product they share one, and each has its own other. While the
consumers store a result, the producer already fetches what the next one needs.

The steps of a result may lie anywhere: an operation says, as a `Unit`, how many there are, where each is found and
where the result belongs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import SHARED_BYTES, interpreter, result_of

CONSUMERS = 2
DEPTH = 64  # of a step: 128 bytes, a row of the layout that tensor cores read without bank conflicts
LAYOUT = plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128)


class Side(NamedTuple):
    """One side of the products: what a step fetches of it for a consumer."""

    shape: tuple[int, int]
    turned: bool = False  # transposed before it multiplies
    common: bool = False  # fetched once, for both consumers


class Unit(NamedTuple):
    """What a thread block does between two stores, as a kernel finds it in global memory."""

    steps: jax.Array  # int32; none is a result of zeros
    sources: Callable[[jax.Array], tuple[Sequence[Any], Sequence[Any]]]  # of a step: a, b; each consumer's or a common
    target: Callable[[jax.Array], tuple[Any, Any]]  # of a consumer: whether it has a result, and where that belongs


def launch(
    unit: Callable[[Sequence[Any], Any, jax.Array], Unit],
    units: int,
    operands: Sequence[jax.Array],
    out: jax.ShapeDtypeStruct,
    *,
    a: Side,
    b: Side,
    stages: int,
    programs: int,
    interpret: Any,
) -> jax.Array:
    """Runs unit(operand refs, out ref, number) for every number below `units`.

    Args:
        operands: what the units refer to; the first of the dtype that is multiplied.
        a, b: a [M, K] and b [K, N] of a step, K = DEPTH, once turned where told to.
        stages: steps in the ring, at most what fits.
        programs: thread blocks, at most one a unit.
    """
    dtype, programs = operands[0].dtype, min(programs, units)
    rows, columns = a.shape[a.turned], b.shape[not b.turned]
    a_ring, b_ring = ((1 if side.common else CONSUMERS, *side.shape) for side in (a, b))
    step_values, staged_values = math.prod(a_ring) + math.prod(b_ring), CONSUMERS * rows * DEPTH
    stages = min(stages, (SHARED_BYTES // dtype.itemsize - staged_values) // step_values)

    def kernel(*refs: Any) -> None:
        *operand_refs, out_ref, a_ref, b_ref, staged, filled, free = refs
        program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")

        def each_unit(body: Callable[[Unit, jax.Array], None]) -> None:
            """body(unit, turn), where the unit's steps are number turn, turn + 1, ... of this thread block."""

            def numbered(i: jax.Array, turn: jax.Array) -> jax.Array:
                work = unit(operand_refs, out_ref, program + i * programs)
                body(work, turn)
                return turn + work.steps

            jax.lax.fori_loop(0, jax.lax.div(units - program + programs - 1, programs), numbered, jnp.int32(0))

        def operand(side: Side, ring: Any, slot: jax.Array) -> Any:
            """Of this consumer, as it multiplies."""
            fetched = ring.at[slot, 0 if side.common else warpgroup]
            return fetched.T if side.turned else fetched

        @pl.when(warpgroup == CONSUMERS)
        def produce() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @each_unit
            def _(work: Unit, turn: jax.Array) -> None:
                @pl.loop(0, work.steps)
                def _(step: jax.Array) -> None:
                    slot = jax.lax.rem(turn + step, stages)
                    plgpu.barrier_wait(free.at[slot])
                    for ring, sources in zip((a_ref, b_ref), work.sources(step), strict=True):
                        for i, source in enumerate(sources):
                            plgpu.copy_gmem_to_smem(source, ring.at[slot, i], filled.at[slot])

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
                        plgpu.wgmma(sums, operand(a, a_ref, slot), operand(b, b_ref, slot))
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
            plgpu.SMEM((stages, *a_ring), dtype, transforms=LAYOUT),
            plgpu.SMEM((stages, *b_ring), dtype, transforms=LAYOUT),
            plgpu.SMEM((CONSUMERS, rows, DEPTH), dtype, transforms=LAYOUT),
            plgpu.Barrier(num_arrivals=a_ring[0] + b_ring[0], num_barriers=stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpreter(interpret),
    )
    return result_of(run, *operands)
