"""What the Mosaic GPU kernels share, above all those of the two FFNs: rows of weights that stream past a few tokens.

At a few tokens a matrix product is a stream of weights with some arithmetic beside it, and what counts is how many
bytes are on their way at once. So these kernels are persistent: one thread block a multiprocessor, each with a ring of
steps in shared memory that the copy engine fills while earlier steps are computed. The warpgroups of a block split the
width D. Each streams its own columns through its own ring, and they meet once a step, to add up their parts of
x . gate and x . up. The tokens, and what the block adds to the output, stay in registers throughout.

A row of D values is seen as panels [D / (128 v), 4, 32 v]: 4 warps of 32 lanes, each lane with v neighbouring values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import vary_together
from pallas_kernels.ffn import Activation, PackedFFN, activate

MULTIPROCESSORS = 132  # of an H100 or H200 SXM
SHARED_BYTES = 224 * 1024  # of the 227 KiB that a thread block can have; the rest holds barriers
CHUNK = 256  # flags that are copied at once
MOST = 4  # tokens


# --------------------------------------------------------------------------------------------------------------------
# Any kernel
# --------------------------------------------------------------------------------------------------------------------


def too_old() -> str | None:
    """Why this JAX cannot run Mosaic GPU kernels, or None."""
    if jax.__version_info__ < (0, 11):  # before, it has no public interpreter
        return f"expected JAX 0.11 or newer, got {jax.__version__}"
    return None


def interpreter(interpret: Any) -> Any:
    """`plgpu.kernel`'s argument, from True, False or the interpreter's own parameters."""
    return plgpu.InterpretGPUParams() if interpret is True else interpret or None


def result_of(kernel: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """The kernel's result, varying over the mesh axes that its operands vary over, which `plgpu.kernel` forgets."""
    return vary_together((operands, kernel(*operands)))[1]


def adds_in_place(x: jax.Array, deterministic: bool, interpret: Any) -> bool:
    """Whether a kernel adds to the residual itself, in any order. The interpreter cannot, nor can a kernel take a ref
    that varies over the axes of a mesh, which `jax.shard_map` with its checks would have it do."""
    return not deterministic and not interpret and not jax.typeof(x).manual_axis_type.varying


def store(ref: Any, values: jax.Array) -> None:
    """Stores an array in the layout that it has, whether or not banks conflict.

    From JAX 0.12 on a plain store demands that they do not, and the search for layouts that would allow it has no end.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values


# --------------------------------------------------------------------------------------------------------------------
# A thread block that streams weights past a few tokens
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A width cut over warpgroups: `panels` a warpgroup, each of 4 warps times 32 lanes times `vector` values."""

    warpgroups: int
    panels: int
    vector: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a warpgroup's part of a row."""
        return self.panels, 4, 32 * self.vector

    @property
    def layout(self) -> Any:
        """Of an array of that shape in registers: a thread holds its `vector` values of every panel."""
        tiling = plgpu.Tiling(((4, 32 * self.vector), (self.vector,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def view(self, rows: jax.Array) -> jax.Array:
        """[N, D] -> [N, warpgroups * panels, 4, 32 v]."""
        return rows.reshape(rows.shape[0], self.warpgroups * self.panels, *self.shape[1:])


def cut(width: int, dtype: Any, warpgroups: int) -> Cut:
    """The widest loads that suit the width, 4 to 16 bytes a thread, over at most so many warpgroups."""
    bytes_ = jnp.dtype(dtype).itemsize
    for groups in (g for g in (4, 2, 1) if g <= warpgroups):
        for vector in (16 // bytes_, 8 // bytes_, 4 // bytes_):
            if width % (128 * vector * groups) == 0:
                return Cut(groups, width // (128 * vector * groups), vector)
    raise ValueError(f"no cut of {width} {dtype}")


class Team:
    """The warpgroups of a thread block, seen from one of them.

    Args:
        x_ref: [B, ...], the tokens, which it takes into registers.
        met: a barrier on which every warpgroup arrives once.
    """

    def __init__(self, cut: Cut, x_ref: Any, met: Any):
        self.cut = cut
        self.group = jax.lax.axis_index("group")
        self.own = pl.ds(self.group * cut.panels, cut.panels)  # its panels of a row
        self._met = met
        tokens = range(x_ref.shape[0])
        xs = [plgpu.load(x_ref.at[b, self.own], layout=cut.layout, optimized=False) for b in tokens]
        self._xs = [x.astype(jnp.float32) for x in xs]

    def load(self, ref: Any) -> jax.Array:
        """Its part of a row in shared memory, float32."""
        return plgpu.load(ref, layout=self.cut.layout).astype(jnp.float32)

    def zeros(self) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(self.cut.shape, jnp.float32), self.cut.layout)

    def put_products(self, ref: Any, row: jax.Array) -> None:
        """Its part of row . x for every token, warp by warp: ref [B, warpgroups, 4]."""
        for b, x in enumerate(self._xs):
            store(ref.at[b, self.group], jnp.sum(jnp.sum(row * x, axis=0), axis=1))

    def get_product(self, ref: Any) -> jax.Array:
        """A token's product, after all have put their parts and met: ref [warpgroups, 4]."""
        return sum(ref[g, warp] for g in range(self.cut.warpgroups) for warp in range(4))

    def meet(self) -> None:
        """Waits for the other warpgroups; what all have written before, all read after."""
        plgpu.commit_smem()
        if self.cut.warpgroups > 1:
            plgpu.barrier_arrive(self._met)
            plgpu.barrier_wait(self._met)


def launch(
    kernel: Callable[..., None],
    x: jax.Array,
    weights: Sequence[jax.Array],
    operands: Sequence[jax.Array],
    residual: jax.Array | None,
    *,
    cut: Cut,
    blocks: int,
    scratch: Sequence[Any],
    deterministic: bool,
    interpret: Any,
) -> jax.Array:
    """Runs kernel(team, emit, weight refs, operand refs, scratch refs) in every thread block.

    emit(sums), once in each, adds [panels, 4, 32 v] float32 a token to the block's part of y.

    Args:
        weights: [F, D] each; the kernel sees them in panels.
        deterministic: every block stores its part, and XLA adds them up. Otherwise the copy engine adds each to the
            residual where it can (`adds_in_place`).
    Returns:
        The residual plus all parts: float32 [B, D].
    """
    tokens, width = x.shape
    in_place = adds_in_place(x, deterministic, interpret)
    parts_shape = (cut.warpgroups * cut.panels, *cut.shape[1:])

    def body(x_ref: Any, *refs: Any) -> None:
        weight_refs, refs = refs[: len(weights)], refs[len(weights) :]
        operand_refs, refs = refs[: len(operands)], refs[len(operands) :]
        out_ref, staged, met, *scratch_refs = refs
        team = Team(cut, x_ref, met)

        def emit(sums: Sequence[jax.Array]) -> None:
            for b, y in enumerate(sums):
                if in_place:
                    store(staged.at[team.group], y)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(staged.at[team.group], out_ref.at[b, team.own], reduction_op="add")
                    plgpu.wait_smem_to_gmem(0)
                else:
                    store(out_ref.at[jax.lax.axis_index("block"), b, team.own], y)

        kernel(team, emit, weight_refs, operand_refs, scratch_refs)

    run = plgpu.kernel(
        body,
        out_type=() if in_place else jax.ShapeDtypeStruct((blocks, tokens, *parts_shape), jnp.float32),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=cut.warpgroups,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((cut.warpgroups, *cut.shape), jnp.float32),
            plgpu.Barrier(num_arrivals=cut.warpgroups),
            *scratch,
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpreter(interpret),
    )
    inputs = cut.view(x), *(cut.view(w) for w in weights), *operands
    if in_place:
        y = jnp.zeros_like(x, jnp.float32) if residual is None else residual
        ref = jax.new_ref(cut.view(y))
        run(*inputs, ref)
        return jax.freeze(ref).reshape(tokens, width)
    y = jnp.sum(result_of(run, *inputs), axis=0).reshape(tokens, width)
    return y if residual is None else residual + y


def staging_bytes(width: int) -> int:
    """Shared memory that `launch` itself takes."""
    return 4 * width


def unsupported(x: jax.Array) -> str | None:
    """Why the kernels cannot take these tokens, or None."""
    tokens, width = x.shape
    quantum = 512 // x.dtype.itemsize
    if reason := too_old():
        return reason
    if not 1 <= tokens <= MOST:
        return f"expected 1 to {MOST} tokens, got {tokens}"
    if width % quantum:
        return f"expected a width that {quantum} divides, got {width}"
    if tokens * width > 16384:
        return f"expected at most 16384 values of x, which stay in registers, got {tokens} x {width}"
    return None


def largest_divisor(n: int, at_most: int) -> int:
    return max(k for k in range(1, at_most + 1) if n % k == 0)


# --------------------------------------------------------------------------------------------------------------------
# The FFN over chosen blocks of neurons
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """How the work is cut. All are upper bounds: they shrink to fit the shape."""

    rows: int = 2  # neurons a step
    stages: int = 8  # steps in the ring
    warpgroups: int = 2  # of a thread block; they split the width
    blocks: int = MULTIPROCESSORS  # thread blocks, at most one a step


def default_tuning(tokens: int, width: int) -> Tuning:
    """For an H100: for one token what was fastest there at a width of 4096, two thread blocks of one warpgroup a
    multiprocessor; otherwise as many rows a step as the registers hold beside the tokens."""
    if tokens == 1 and width <= 5120:
        return Tuning(rows=1, stages=4, warpgroups=1, blocks=2 * MULTIPROCESSORS)
    return Tuning(rows=2 if tokens <= 2 else 1)


def chosen_neurons_ffn(
    x: jax.Array,
    weights: PackedFFN,
    mask: jax.Array,
    *,
    residual: jax.Array | None,
    activation: Activation,
    deterministic: bool,
    interpret: Any,
    tuning: Tuning | None,
) -> jax.Array:
    """The gated FFN over the neurons that a mask chooses, in blocks: float32 [B, D].

    A step is some neurons' rows of all three matrices. Thread block i takes the steps i, i + blocks, ... that any token
    uses: active blocks of neurons are spread over all.

    Args:
        mask: bool [B, E] of E blocks of neurons.
    """
    (tokens, width), neurons, blocks = x.shape, weights.gate.shape[0], mask.shape[1]
    tuning = tuning or default_tuning(tokens, width)
    shape = cut(width, x.dtype, tuning.warpgroups)
    rows = largest_divisor(neurons // blocks, tuning.rows)
    steps, steps_a_block = neurons // rows, neurons // rows // blocks
    workers = min(tuning.blocks, steps)
    chunks = pl.cdiv(blocks, CHUNK)
    free = SHARED_BYTES // pl.cdiv(workers, MULTIPROCESSORS) - staging_bytes(width) - chunks * CHUNK
    stages = max(2, min(tuning.stages, free // (3 * rows * width * x.dtype.itemsize)))

    def kernel(team: Team, emit: Any, matrices: Sequence[Any], operands: Sequence[Any], scratch: Sequence[Any]) -> None:
        (flags_ref,), (ring, flags, products, filled, flags_filled) = operands, scratch
        first, group = jax.lax.axis_index("block"), team.group

        @pl.when(group == 0)
        def _() -> None:
            @pl.loop(0, chunks)
            def _(chunk: jax.Array) -> None:  # beyond the last flag, the copy engine fills in zeros
                some = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.copy_gmem_to_smem(flags_ref.at[some], flags.at[some], flags_filled)

        plgpu.barrier_wait(flags_filled)

        def users(step: jax.Array) -> jax.Array:
            """The tokens that use the step's neurons, a bit each."""
            return flags[step // steps_a_block].astype(jnp.int32)

        def next_used(step: jax.Array) -> jax.Array:
            unused = lambda step: (step < steps) & (users(jnp.minimum(step, steps - 1)) == 0)
            return jax.lax.while_loop(unused, lambda step: step + workers, step)

        def fetch(step: jax.Array, slot: Any) -> None:
            @pl.when(step < steps)
            def _() -> None:
                for i, matrix in enumerate(matrices):
                    source = matrix.at[pl.ds(step * rows, rows), team.own]
                    plgpu.copy_gmem_to_smem(source, ring.at[group, slot, i], filled.at[group * stages + slot])

        step, ahead = first, []  # the steps in the ring, oldest first
        for slot in range(stages):
            step = next_used(step)
            fetch(step, slot)
            ahead.append(step)
            step = step + workers

        def advance(carry: Any) -> Any:
            (current, *later), step, slot, parity, sums = carry
            plgpu.barrier_wait(filled.at[group * stages + slot])
            for r in range(rows):
                for i in (0, 1):
                    team.put_products(products.at[parity, i, r], team.load(ring.at[group, slot, i, r]))
            team.meet()
            used, sums = users(current), list(sums)
            for r in range(rows):
                down = team.load(ring.at[group, slot, 2, r])
                for b in range(tokens):
                    gate, up = (team.get_product(products.at[parity, i, r, b]) for i in (0, 1))
                    hidden = activate(activation, gate) * up
                    if tokens > 1:
                        hidden = jnp.where((used >> b) & 1 == 1, hidden, 0.0)
                    sums[b] = sums[b] + hidden * down
            step = next_used(step)
            plgpu.commit_smem()  # the slot has been read
            fetch(step, slot)
            return (*later, step), step + workers, (slot + 1) % stages, 1 - parity, tuple(sums)

        carry = (tuple(ahead), step, jnp.int32(0), jnp.int32(0), (team.zeros(),) * tokens)
        emit(jax.lax.while_loop(lambda carry: carry[0][0] < steps, advance, carry)[-1])

    return launch(
        kernel,
        x,
        weights,
        [token_bits(mask)],
        residual,
        cut=shape,
        blocks=workers,
        scratch=[
            plgpu.SMEM((shape.warpgroups, stages, 3, rows, *shape.shape), x.dtype),
            plgpu.SMEM((chunks * CHUNK,), jnp.int8),
            plgpu.SMEM((2, 2, rows, tokens, shape.warpgroups, 4), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=shape.warpgroups * stages),
            plgpu.Barrier(num_arrivals=chunks),
        ],
        deterministic=deterministic,
        interpret=interpret,
    )


def token_bits(mask: jax.Array) -> jax.Array:
    """bool [B, E] -> int8 [E], bit b for token b."""
    if mask.shape[0] == 1:
        return mask[0].astype(jnp.int8)
    bits = jnp.left_shift(mask.astype(jnp.int8), jnp.arange(mask.shape[0], dtype=jnp.int8)[:, None])
    return jnp.sum(bits, axis=0, dtype=jnp.int8)
