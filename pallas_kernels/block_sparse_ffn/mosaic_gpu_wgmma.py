"""The block-sparse FFN of 5 to 16 tokens on Hopper: tensor cores fed by the copy engine, in three launches.

The weights are the tall side of the products, since `wgmma` takes 64 rows of it, and the tokens, padded to 8 or 16, the
narrow one:

            a unit                               a step of it
scores      16 blocks                            `depth` columns of their rows of the router, times those of x
hidden      16 or 32 neurons of an active block  `depth` columns of their gate and up, times those of x
output      some columns of y                    64 active neurons' rows of down, times their hidden values

All are streams through a ring in shared memory, which one warpgroup has the copy engine (TMA) fill while another
multiplies. The hidden values are packed: those of the first active block come first. No launch makes a list of active
blocks: a thread block packs the blocks' flags into words, and finds the n-th active one by counting.

Fewer than 64 rows, as gate and up of 16 neurons are, take their columns in slices, one below the other. A step fetches
some columns of each slice and multiplies all of them with those of all slices of x; the products of a slice of weights
with the same slice of x are the ones that count. The others cost no time: a product as narrow as these takes as long
as reading its tall side.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu as shared
from pallas_kernels.block_sparse_ffn.reference import Router, active_blocks
from pallas_kernels.ffn import Activation, PackedFFN, activate
from pallas_kernels.mosaic_gpu import MULTIPROCESSORS, SHARED_BYTES, store
from pallas_kernels.wgmma import DEPTH, LAYOUT

ROWS = 64  # of a product's tall side, at least
PRODUCER, CONSUMER = 0, 1  # warpgroups of a thread block
CHUNK = 4, 32  # flags that are packed into words at once, a warp a word
FLAGS = plgpu.Layout.TILED(plgpu.Tiling((CHUNK, (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
# [tokens, rows or columns of weights]: a warp has all tokens, so that sums over them need no other
SMALL = plgpu.Layout.TILED(plgpu.Tiling(((8, 16), (8, 4), (1,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


@dataclass(frozen=True)
class Tuning:
    """How the work is cut."""

    neurons: int = 16  # a unit of gate and up, 16 or 32; at most a block
    depth: int = 256  # columns of gate and up a step, fewer where four steps do not fit beside x
    columns: int = 256  # of y a thread block, 64, 128, 192 or 256
    stages: int = 8  # steps in the rings, at most what fits
    blocks: int = MULTIPROCESSORS  # thread blocks, at most


def unsupported(x: jax.Array, block_size: int) -> str | None:
    tokens, width = x.shape
    if x.dtype == jnp.float32:
        return f"expected bfloat16 or float16 for {tokens} tokens, which go to tensor cores, got float32"
    if width % DEPTH:
        return f"expected a width that {DEPTH} divides for {tokens} tokens, got {width}"
    if block_size % 16:
        return f"expected a block size that 16 divides for {tokens} tokens, got {block_size}"
    if _round_up(tokens, 8) * width > 80 * 1024:
        return f"expected at most 81920 values of x, which stay in shared memory, got {_round_up(tokens, 8)} x {width}"
    return None


def ffn(
    x: jax.Array,
    weights: PackedFFN,
    choice: Router | jax.Array | None,
    *,
    residual: jax.Array | None,
    activation: Activation,
    block_size: int,
    deterministic: bool,
    interpret: Any,
    tuning: Tuning | None,
) -> jax.Array:
    """As `reference.block_sparse_ffn`, the hidden values rounded to x's dtype."""
    tuning, tokens = tuning or Tuning(), x.shape[0]
    in_tiles = jnp.pad(x, ((0, -tokens % 8), (0, 0)))  # the copy engine's tiles have 8 rows
    if isinstance(choice, Router) and choice.weight.dtype == x.dtype and choice.weight.shape[0] % 8 == 0:
        users = _scored(in_tiles, tokens, choice, interpret, tuning)
    else:
        users = _users(active_blocks(x, choice, weights.gate.shape[0] // block_size))
    hidden = _hidden(in_tiles, weights, users, activation, block_size, interpret, tuning)
    return _output(x, hidden, weights.down, users, residual, block_size, deterministic, interpret, tuning)


# --------------------------------------------------------------------------------------------------------------------
# The blocks in use
# --------------------------------------------------------------------------------------------------------------------


def _users(mask: jax.Array) -> jax.Array:
    """bool [B, E] -> int32 [chunks, 4, 32]: the tokens that use a block, a bit each, and zeros after the last block."""
    bits = jnp.left_shift(mask.astype(jnp.int32), jnp.arange(mask.shape[0], dtype=jnp.int32)[:, None])
    users = jnp.sum(bits, axis=0, dtype=jnp.int32)
    return jnp.pad(users, (0, -users.size % math.prod(CHUNK))).reshape(-1, *CHUNK)


def _scored(x: jax.Array, tokens: int, router: Router, interpret: Any, tuning: Tuning) -> jax.Array:
    """As `_users`, of what a router of x's dtype and a multiple of 8 blocks chooses for the first tokens of x."""
    blocks, some = router.weight.shape[0], 16
    rows = _round_up(blocks, math.prod(CHUNK))

    def plan(warpgroup: jax.Array, refs: Sequence[Any]) -> Plan:
        threshold_ref, users_ref = refs

        def finish(number: jax.Array, first: jax.Array, products: Sequence[jax.Array]) -> None:
            (scores,) = products
            token, block = (plgpu.broadcasted_iota(jnp.int32, scores.shape, i, layout=SMALL) for i in (0, 1))
            chosen = (jax.lax.logistic(scores) > threshold_ref[0]) & (token < tokens) & (first + block < blocks)
            bits = jnp.where(chosen, jnp.left_shift(jnp.ones_like(token), token), 0)
            store(users_ref.at[pl.ds(first, some)], jnp.sum(bits, axis=0))

        return Plan(jnp.int32(rows // some), lambda number: (number * some, True), finish)

    users = _past_x(
        x,
        [router.weight],
        some,
        plan,
        [router.threshold],
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        programs=min(tuning.blocks, rows // some),
        interpret=interpret,
        tuning=tuning,
    )
    return users.reshape(-1, *CHUNK)


class Active:
    """The blocks that some token uses, in their order, as a warpgroup sees them."""

    def __init__(self, users_ref: Any, warpgroup: jax.Array, scratch: Sequence[Any]):
        self._users, loaded, words, counts = scratch
        self._words, counts = words.at[warpgroup], counts.at[warpgroup]

        @pl.when(warpgroup == PRODUCER)
        def _() -> None:
            plgpu.copy_gmem_to_smem(users_ref, self._users, loaded)

        plgpu.barrier_wait(loaded)
        lane = plgpu.broadcasted_iota(jnp.int32, CHUNK, 1, layout=FLAGS)
        for chunk in range(users_ref.shape[0]):
            used = plgpu.load(self._users.at[chunk], layout=FLAGS, optimized=False) != 0
            flags = jnp.where(used, jnp.left_shift(jnp.ones_like(lane), lane), 0)
            place = pl.ds(chunk * CHUNK[0], CHUNK[0])
            store(self._words.at[place], jnp.sum(flags, axis=1))
            store(counts.at[place], jnp.sum(used.astype(jnp.int32), axis=1))
        plgpu.commit_smem()
        *self._before, self.count = itertools.accumulate((counts[w] for w in range(words.shape[1])), initial=0)

    @staticmethod
    def scratch(users: jax.Array) -> list[Any]:
        """The tokens that use a block; for each warpgroup, flags of 32 blocks a word, and how many they are."""
        words = plgpu.SMEM((2, users.shape[0] * CHUNK[0]), jnp.int32)
        return [plgpu.SMEM(users.shape, jnp.int32), plgpu.Barrier(), words, words]

    @staticmethod
    def scratch_bytes(users: jax.Array) -> int:
        return 4 * users.size + 2 * 2 * 4 * users.shape[0] * CHUNK[0]

    def users(self, block: jax.Array) -> jax.Array:
        """A bit for each token that uses a block."""
        word, lane = jax.lax.div(block, CHUNK[1]), jax.lax.rem(block, CHUNK[1])
        return self._users[jax.lax.div(word, CHUNK[0]), jax.lax.rem(word, CHUNK[0]), lane]

    def find(self, n: jax.Array) -> jax.Array:
        """The n-th active block, counted from 0."""
        word, before = jnp.int32(0), jnp.int32(0)
        for w, count in enumerate(self._before):  # the last word before which there are at most n
            word, before = (jnp.where(count <= n, new, old) for new, old in ((w, word), (count, before)))
        without_lowest = lambda _, flags: jnp.bitwise_and(flags, flags - 1)
        flags = jax.lax.fori_loop(0, n - before, without_lowest, self._words[word])
        return word * CHUNK[1] + 31 - jax.lax.clz(jnp.bitwise_and(flags, -flags))


# --------------------------------------------------------------------------------------------------------------------
# Gate and up, and down
# --------------------------------------------------------------------------------------------------------------------


def _hidden(
    x: jax.Array,
    weights: PackedFFN,
    users: jax.Array,
    activation: Activation,
    block_size: int,
    interpret: Any,
    tuning: Tuning,
) -> jax.Array:
    """The active neurons' hidden values, of x's dtype: [padded tokens, F rounded up to 64].

    Zeros follow the last active neuron up to a multiple of 64; what is behind them is not written.
    """
    neurons, some = weights.gate.shape[0], math.gcd(block_size, tuning.neurons)
    units_a_block, most = block_size // some, _round_up(neurons, DEPTH)

    def plan(warpgroup: jax.Array, refs: Sequence[Any]) -> Plan:
        users_ref, out_ref, *scratch = refs
        active = Active(users_ref, warpgroup, scratch)
        used = active.count * units_a_block

        def rows(number: jax.Array) -> tuple[jax.Array, jax.Array]:
            place = jnp.minimum(number, used - 1)
            block = active.find(jax.lax.div(place, units_a_block))
            return block * block_size + jax.lax.rem(place, units_a_block) * some, number < used

        def finish(number: jax.Array, first: jax.Array, products: Sequence[jax.Array]) -> None:
            gate, up = products
            token = plgpu.broadcasted_iota(jnp.int32, gate.shape, 0, layout=SMALL)
            users = active.users(jax.lax.div(first, block_size))
            wanted = jnp.bitwise_and(jax.lax.shift_right_logical(users, token), 1) == 1
            hidden = jnp.where(wanted, activate(activation, gate) * up, 0.0)
            store(out_ref.at[:, pl.ds(number * some, some)], hidden.astype(out_ref.dtype))

        return Plan(jax.lax.div(_round_up(active.count * block_size, DEPTH), some), rows, finish)

    return _past_x(
        x,
        [weights.gate, weights.up],
        some,
        plan,
        [users],
        jax.ShapeDtypeStruct((x.shape[0], most), x.dtype),
        scratch=Active.scratch(users),
        scratch_bytes=Active.scratch_bytes(users),
        programs=min(tuning.blocks, most // some),
        interpret=interpret,
        tuning=tuning,
    )


class Plan(NamedTuple):
    """What `_past_x` does; unit i is of thread block i modulo their number."""

    units: jax.Array
    rows: Callable[[jax.Array], tuple[Any, Any]]  # of a unit: the first; whether to fetch them, or take zeros
    finish: Callable[[Any, Any, Sequence[jax.Array]], None]  # of a unit: its number, first row and products


def _past_x(
    x: jax.Array,
    matrices: Sequence[jax.Array],
    some: int,
    plan: Callable[[jax.Array, Sequence[Any]], Plan],
    operands: Sequence[jax.Array],
    out: jax.ShapeDtypeStruct,
    *,
    scratch: Sequence[Any] = (),
    scratch_bytes: int = 0,
    programs: int,
    interpret: Any,
    tuning: Tuning,
) -> jax.Array:
    """Products of rows of [N, D] matrices with every token of x [8 or 16, D], which stays in shared memory.

    Args:
        some: rows of each matrix a unit.
        plan: gets the warpgroup and refs to operands, result and scratch.
    """
    (padded, width), slices = x.shape, ROWS // (len(matrices) * some)
    room = _shared_bytes(programs) // x.dtype.itemsize - padded * (width + slices * tuning.depth)
    steps = pl.cdiv(width, slices * max(DEPTH, min(tuning.depth, room // (4 * ROWS)) // DEPTH * DEPTH))
    depth = _round_up(pl.cdiv(width, slices * steps), DEPTH)
    slice_width = steps * depth

    def kernel(program: jax.Array, warpgroup: jax.Array, refs: Sequence[Any]) -> Work:
        (x_ref, *refs), (x_slices, sums_ref, x_loaded, ring) = refs[:-4], refs[-4:]
        matrix_refs, refs = refs[: len(matrices)], refs[len(matrices) :]
        units, rows_of, finish_with = plan(warpgroup, refs)

        @pl.when(warpgroup == PRODUCER)
        def _() -> None:
            @pl.loop(0, slices)
            def _(i: jax.Array) -> None:  # behind the last column, the copy engine fills in zeros
                source = x_ref.at[:, pl.ds(i * slice_width, slice_width)]
                plgpu.copy_gmem_to_smem(source, x_slices.at[pl.ds(i * padded, padded)], x_loaded)

        @pl.when(warpgroup == CONSUMER)
        def _() -> None:
            plgpu.barrier_wait(x_loaded)

        def rows_in_ring(i: int, j: int) -> Any:
            """Where slice i of matrix j is."""
            return pl.ds((i * len(matrices) + j) * some, some)

        def unit(number: jax.Array) -> Unit:
            first, there = rows_of(number)

            def fetch(step: jax.Array, slot: jax.Array, filled: Any) -> None:
                for i in range(slices):
                    columns = pl.ds(i * slice_width + step * depth, depth)
                    for j, matrix in enumerate(matrix_refs):
                        target = ring.at[slot, rows_in_ring(i, j)]
                        plgpu.copy_gmem_to_smem(matrix.at[pl.ds(first, some), columns], target, filled)

            def sides(step: jax.Array, slot: jax.Array) -> tuple[Any, Any]:
                return ring.at[slot], x_slices.at[:, pl.ds(step * depth, depth)].T

            def finish(sums: jax.Array) -> None:
                sums_ref[...] = sums
                plgpu.commit_smem()

                def product(j: int) -> jax.Array:
                    """Of matrix j: [padded tokens, some]."""
                    parts = [sums_ref.at[rows_in_ring(i, j), pl.ds(i * padded, padded)].T for i in range(slices)]
                    return functools.reduce(jnp.add, [plgpu.load(p, layout=SMALL, optimized=False) for p in parts])

                products = [product(j) for j in range(len(matrices))]
                plgpu.commit_smem()  # the sums have been read
                finish_with(number, first, products)

            return Unit(jnp.where(there, jnp.int32(steps), 0), fetch, sides, finish)

        return Work(units, unit)

    return _launch(
        kernel,
        [x, *matrices, *operands],
        out,
        scratch=[
            *scratch,
            plgpu.SMEM((slices * padded, slice_width), x.dtype, transforms=LAYOUT),
            plgpu.SMEM((ROWS, slices * padded), jnp.float32),
            plgpu.Barrier(num_arrivals=slices),
        ],
        scratch_bytes=scratch_bytes + slices * padded * (slice_width * x.dtype.itemsize + 4 * ROWS),
        dtype=x.dtype,
        rings=[(ROWS, depth)],
        copies=slices * len(matrices),
        sums=(ROWS, slices * padded),
        programs=programs,
        stages=tuning.stages,
        interpret=interpret,
    )


def _output(
    x: jax.Array,
    hidden: jax.Array,
    down: jax.Array,
    users: jax.Array,
    residual: jax.Array | None,
    block_size: int,
    deterministic: bool,
    interpret: Any,
    tuning: Tuning,
) -> jax.Array:
    """The residual plus the hidden values times down: float32 [B, D].

    The thread blocks of the same columns share the neurons. Deterministic, each stores its sum and XLA adds them up;
    otherwise the copy engine adds them to the residual where it can.
    """
    (tokens, width), padded, neurons = x.shape, hidden.shape[0], down.shape[0]
    some = math.gcd(block_size, DEPTH)
    columns = min(tuning.columns, _round_up(width, DEPTH))
    tiles = pl.cdiv(width, columns)
    parts = max(1, min(tuning.blocks // tiles, pl.cdiv(neurons, DEPTH)))
    in_place = shared.adds_in_place(x, deterministic, interpret)

    def kernel(program: jax.Array, warpgroup: jax.Array, refs: Sequence[Any]) -> Work:
        users_ref, hidden_ref, down_ref, out_ref, *scratch, sums_ref, staged, down_ring, hidden_ring = refs
        active = Active(users_ref, warpgroup, scratch)
        tile, part = jax.lax.rem(program, tiles), jax.lax.div(program, tiles)
        steps = jax.lax.div(_round_up(active.count * block_size, DEPTH), DEPTH)

        def unit(number: jax.Array) -> Unit:
            def fetch(step: jax.Array, slot: jax.Array, filled: Any) -> None:
                first = (part + step * parts) * DEPTH
                for i in range(0, DEPTH, some):
                    place = jnp.minimum(first + i, active.count * block_size - some)  # behind the last, hidden is zero
                    block = active.find(jax.lax.div(place, block_size))
                    rows = pl.ds(block * block_size + jax.lax.rem(place, block_size), some)
                    source = down_ref.at[rows, pl.ds(tile * columns, columns)]
                    plgpu.copy_gmem_to_smem(source, down_ring.at[slot, pl.ds(i, some)], filled)
                plgpu.copy_gmem_to_smem(hidden_ref.at[:, pl.ds(first, DEPTH)], hidden_ring.at[slot], filled)

            def sides(step: jax.Array, slot: jax.Array) -> tuple[Any, Any]:
                return down_ring.at[slot].T, hidden_ring.at[slot].T

            def finish(sums: jax.Array) -> None:
                sums_ref[...] = sums
                plgpu.commit_smem()
                store(staged.at[:, 0], plgpu.load(sums_ref.T, layout=SMALL, optimized=False))
                plgpu.commit_smem()
                for token in range(tokens):
                    place = pl.ds(token, 1), pl.ds(tile * columns, columns)
                    if in_place:
                        plgpu.copy_smem_to_gmem(staged.at[token], out_ref.at[place], reduction_op="add")
                    else:
                        plgpu.copy_smem_to_gmem(staged.at[token], out_ref.at[part, *place])

            return Unit(jax.lax.div(steps - part + parts - 1, parts), fetch, sides, finish)

        return Work(jnp.int32(tiles * parts), unit)

    run = functools.partial(
        _launch,
        kernel,
        [users, hidden, down],
        scratch=[
            *Active.scratch(users),
            plgpu.SMEM((columns, padded), jnp.float32),
            plgpu.SMEM((padded, 1, columns), jnp.float32),  # so shaped that it gets no tiles
        ],
        scratch_bytes=Active.scratch_bytes(users) + 2 * padded * columns * 4,
        dtype=hidden.dtype,
        rings=[(DEPTH, columns), (padded, DEPTH)],
        copies=DEPTH // some + 1,
        sums=(columns, padded),
        programs=tiles * parts,
        stages=tuning.stages,
        interpret=interpret,
    )
    if in_place:
        out = jax.new_ref(jnp.zeros_like(x, jnp.float32) if residual is None else residual)
        run(out)
        return jax.freeze(out)
    y = jnp.sum(run(jax.ShapeDtypeStruct((parts, tokens, width), jnp.float32)), axis=0)
    return y if residual is None else residual + y


def _round_up(n: Any, to: int) -> Any:
    return (n + to - 1) // to * to


def _shared_bytes(programs: int) -> int:
    """What a thread block can have of shared memory."""
    return SHARED_BYTES // pl.cdiv(programs, MULTIPROCESSORS)


# --------------------------------------------------------------------------------------------------------------------
# A launch
# --------------------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """A sum of products of 64 rows or more with the padded tokens, or with slices of them."""

    steps: jax.Array  # int32; none is a sum of zeros
    fetch: Callable[[jax.Array, jax.Array, Any], None]  # the copies of a step, into a slot of the rings
    sides: Callable[[jax.Array, jax.Array], tuple[Any, Any]]  # what a step multiplies, from that slot
    finish: Callable[[jax.Array], None]  # takes the sum


class Work(NamedTuple):
    """What all thread blocks do: thread block i takes the units i, i + programs, ..."""

    units: jax.Array
    unit: Callable[[jax.Array], Unit]


def _launch(
    kernel: Callable[[jax.Array, jax.Array, Sequence[Any]], Work],
    operands: Sequence[jax.Array],
    out: Any,
    *,
    scratch: Sequence[Any],
    scratch_bytes: int,
    dtype: Any,
    rings: Sequence[tuple[int, int]],
    copies: int,
    sums: tuple[int, int],
    programs: int,
    stages: int,
    interpret: Any,
) -> Any:
    """Runs the work that kernel(program, warpgroup, refs) returns; the refs are to operands, result, scratch and rings.

    Args:
        out: the result's shape, or a ref in memory to add to.
        scratch: the kernel's own, of so many bytes.
        dtype, rings: of a step's parts, and their shapes.
        copies: how many fill a step.
        sums: shape of a unit's sum.
    """
    free = _shared_bytes(programs) - scratch_bytes
    stages = max(2, min(stages, free // (dtype.itemsize * sum(math.prod(ring) for ring in rings))))

    def body(*refs: Any) -> None:
        *kernel_refs, filled, freed = refs
        program, warpgroup = jax.lax.axis_index("program"), jax.lax.axis_index("warpgroup")
        work = kernel(program, warpgroup, kernel_refs)

        def each_unit(run: Callable[[Unit, jax.Array], None]) -> None:
            """run(unit, turn), where the unit's steps are number turn, turn + 1, ... of this thread block."""

            def numbered(i: jax.Array, turn: jax.Array) -> jax.Array:
                unit = work.unit(program + i * programs)
                run(unit, turn)
                return turn + unit.steps

            jax.lax.fori_loop(0, jax.lax.div(work.units - program + programs - 1, programs), numbered, jnp.int32(0))

        @pl.when(warpgroup == PRODUCER)
        def produce() -> None:
            @each_unit
            def _(unit: Unit, turn: jax.Array) -> None:
                @pl.loop(0, unit.steps)
                def _(step: jax.Array) -> None:
                    slot = jax.lax.rem(turn + step, stages)
                    plgpu.barrier_wait(freed.at[slot])
                    unit.fetch(step, slot, filled.at[slot])

            for slot in range(stages):
                plgpu.barrier_wait(freed.at[slot])

        @pl.when(warpgroup == CONSUMER)
        def consume() -> None:
            for slot in range(stages):
                plgpu.barrier_arrive(freed.at[slot])

            @each_unit
            def _(unit: Unit, turn: jax.Array) -> None:
                def sum_up(sums: Any) -> jax.Array:
                    @pl.loop(0, unit.steps)
                    def _(step: jax.Array) -> None:
                        slot = jax.lax.rem(turn + step, stages)
                        plgpu.barrier_wait(filled.at[slot])
                        plgpu.wgmma(sums, *unit.sides(step, slot))
                        plgpu.wgmma_wait(1)  # the step before is done with its slot

                        @pl.when(step > 0)
                        def _() -> None:
                            plgpu.barrier_arrive(freed.at[jax.lax.rem(turn + step - 1, stages)])

                    return sums[...]

                total = pl.run_scoped(sum_up, plgpu.ACC(sums, jnp.float32))

                @pl.when(unit.steps > 0)
                def _() -> None:
                    plgpu.barrier_arrive(freed.at[jax.lax.rem(turn + unit.steps - 1, stages)])

                unit.finish(total)

            plgpu.wait_smem_to_gmem(0)

    in_place = not isinstance(out, jax.ShapeDtypeStruct)
    run = plgpu.kernel(
        body,
        out_type=() if in_place else out,
        grid=(programs,),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[
            *scratch,
            *(plgpu.SMEM((stages, *ring), dtype, transforms=LAYOUT) for ring in rings),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=shared.interpreter(interpret),
    )
    if in_place:
        return run(*operands, out)
    return shared.result_of(run, *operands)
