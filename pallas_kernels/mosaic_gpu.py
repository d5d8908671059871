"""What the Mosaic GPU kernels share: weights of chosen neurons stream through shared memory past a few tokens.

At a few tokens a matrix product is a stream of weights with some arithmetic beside it, and what counts is how many
bytes are on their way at once. So the kernels are persistent: one thread block a multiprocessor, each with a ring of
steps in shared memory that the copy engine fills while earlier steps are computed. The warpgroups of a block split the
width D. Each streams its own columns through its own ring, and they meet once a step, to add up their parts of
x . gate and x . up. The tokens, and what the block adds to the output, stay in registers throughout.

A row of D values is seen as panels [D / (128 v), 4, 32 v]: 4 warps of 32 lanes, each lane with v neighbouring values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import like
from pallas_kernels.ffn import Activation, PackedFFN, activate

MULTIPROCESSORS = 132  # of an H100 or H200 SXM
RING_BYTES = 192 * 1024  # of the 227 KiB of shared memory that a thread block can have
CHUNK = 256  # flags that are copied at once


@dataclass(frozen=True)
class Tuning:
    """How the work is cut. All are upper bounds: they shrink to fit the shape."""

    rows: int = 2  # neurons a step
    stages: int = 8  # steps in the ring
    warpgroups: int = 2  # of a thread block; they split the width
    blocks: int = MULTIPROCESSORS  # thread blocks, at most one a step


def default_tuning(tokens: int) -> Tuning:
    """For an H100: as many rows a step as the registers hold beside the tokens."""
    return Tuning(rows=2 if tokens <= 2 else 1)


@dataclass(frozen=True)
class Cut:
    """A width cut over warpgroups: `panels` a warpgroup, each of 4 warps times 32 lanes times `vector` values."""

    warpgroups: int
    panels: int
    vector: int

    @property
    def layout(self) -> Any:
        """Of an array [panels, 4, 32 v]: the registers of a thread hold its v values of every panel."""
        tiling = plgpu.Tiling(((4, 32 * self.vector), (self.vector,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def view(self, rows: jax.Array) -> jax.Array:
        """[N, D] -> [N, warpgroups * panels, 4, 32 v]."""
        return rows.reshape(rows.shape[0], self.warpgroups * self.panels, 4, 32 * self.vector)


def cut(width: int, dtype: Any, warpgroups: int) -> Cut:
    """The widest loads that suit the width, 4 to 16 bytes a thread, over as many warpgroups."""
    bytes_ = jnp.dtype(dtype).itemsize
    for groups in (g for g in (4, 2, 1) if g <= warpgroups):
        for vector in (16 // bytes_, 8 // bytes_, 4 // bytes_):
            if width % (128 * vector * groups) == 0:
                return Cut(groups, width // (128 * vector * groups), vector)
    raise ValueError(f"no cut of {width} {dtype}")


def unsupported(x: jax.Array, weights: PackedFFN) -> str | None:
    """Why the kernels cannot take these shapes, or None."""
    tokens, width = x.shape
    quantum = 512 // x.dtype.itemsize
    if not hasattr(plgpu, "InterpretGPUParams"):
        return f"expected JAX 0.11 or newer, got {jax.__version__}"
    if not 1 <= tokens <= 4:
        return f"expected 1 to 4 tokens, got {tokens}"
    if width % quantum:
        return f"expected a width that {quantum} divides, got {width}"
    if tokens * width > 16384:
        return f"expected at most 16384 values of x, which stay in registers, got {tokens} x {width}"
    return None


def largest_divisor(n: int, at_most: int) -> int:
    return max(k for k in range(1, at_most + 1) if n % k == 0)


def chosen_neurons_ffn(
    x: jax.Array,
    weights: PackedFFN,
    mask: jax.Array,
    residual: jax.Array | None,
    *,
    activation: Activation,
    interpret: Any,
    tuning: Tuning | None,
) -> jax.Array:
    """The gated FFN over the neurons that a mask chooses, in blocks: float32 [B, D].

    Args:
        mask: bool [B, E] of E blocks of neurons.
    """
    (tokens, width), neurons, blocks = x.shape, weights.gate.shape[0], mask.shape[1]
    tuning = tuning or default_tuning(tokens)
    shape = cut(width, x.dtype, tuning.warpgroups)
    rows = largest_divisor(neurons // blocks, tuning.rows)
    step_bytes = 3 * rows * width * x.dtype.itemsize
    stages = max(2, min(tuning.stages, RING_BYTES // step_bytes))
    steps, steps_a_block = neurons // rows, neurons // rows // blocks
    workers = min(tuning.blocks, steps)
    chunks = pl.cdiv(blocks, CHUNK)
    groups, panels = shape.warpgroups, shape.panels
    panel = (4, 32 * shape.vector)

    def kernel(
        flags_ref: Any, x_ref: Any, gate: Any, up: Any, down: Any, out: Any,
        ring: Any, flags: Any, partial: Any, filled: Any, flags_filled: Any, met: Any,
    ) -> None:  # fmt: skip
        first, group = jax.lax.axis_index("block"), jax.lax.axis_index("group")
        own = pl.ds(group * panels, panels)

        @pl.when(group == 0)
        def _() -> None:
            @pl.loop(0, chunks)
            def _(chunk: jax.Array) -> None:  # beyond the last block, the copy engine fills in zeros
                some = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.copy_gmem_to_smem(flags_ref.at[some], flags.at[some], flags_filled)

        xs = [plgpu.load(x_ref.at[b, own], layout=shape.layout, optimized=False) for b in range(tokens)]
        xs = [x.astype(jnp.float32) for x in xs]
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
                for i, matrix in enumerate((gate, up, down)):
                    source = matrix.at[pl.ds(step * rows, rows), own]
                    plgpu.copy_gmem_to_smem(source, ring.at[group, slot, i], filled.at[group * stages + slot])

        def compute(step: jax.Array, slot: jax.Array, parity: jax.Array, sums: Sequence[jax.Array]) -> list[jax.Array]:
            row = lambda i, r: plgpu.load(ring.at[group, slot, i, r], layout=shape.layout).astype(jnp.float32)
            for r in range(rows):
                for i in (0, 1):
                    weight = row(i, r)
                    for b, x in enumerate(xs):
                        partial[parity, i, r, b, group] = jnp.sum(jnp.sum(weight * x, axis=0), axis=1)
            plgpu.commit_smem()
            if groups > 1:
                plgpu.barrier_arrive(met)
                plgpu.barrier_wait(met)

            def total(i: int, r: int, b: int) -> jax.Array:
                return sum(partial[parity, i, r, b, g, warp] for g in range(groups) for warp in range(4))

            used, sums = users(step), list(sums)
            for r in range(rows):
                weight = row(2, r)
                for b in range(tokens):
                    hidden = activate(activation, total(0, r, b)) * total(1, r, b)
                    if tokens > 1:
                        hidden = jnp.where((used >> b) & 1 == 1, hidden, 0.0)
                    sums[b] = sums[b] + hidden * weight
            return sums

        step, ahead = first, []  # the steps in the ring, oldest first
        for slot in range(stages):
            step = next_used(step)
            fetch(step, slot)
            ahead.append(step)
            step = step + workers

        def advance(carry: Any) -> Any:
            (current, *later), step, slot, parity, sums = carry
            plgpu.barrier_wait(filled.at[group * stages + slot])
            sums = compute(current, slot, parity, sums)
            step = next_used(step)
            plgpu.commit_smem()  # the slot has been read
            fetch(step, slot)
            return (*later, step), step + workers, (slot + 1) % stages, 1 - parity, tuple(sums)

        zeros = plgpu.layout_cast(jnp.zeros((panels, *panel), jnp.float32), shape.layout)
        carry = (tuple(ahead), step, jnp.int32(0), jnp.int32(0), (zeros,) * tokens)
        totals = jax.lax.while_loop(lambda carry: carry[0][0] < steps, advance, carry)[-1]
        for b in range(tokens):
            out[first, b, own] = totals[b]

    parts = plgpu.kernel(
        kernel,
        out_type=like(x, (workers, tokens, groups * panels, *panel), jnp.float32),
        grid=(workers,),
        grid_names=("block",),
        num_threads=groups,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((groups, stages, 3, rows, panels, *panel), x.dtype),
            plgpu.SMEM((chunks * CHUNK,), jnp.int8),
            plgpu.SMEM((2, 2, rows, tokens, groups, 4), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=groups * stages),
            plgpu.Barrier(num_arrivals=chunks),
            plgpu.Barrier(num_arrivals=groups),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret is True else interpret or None,
    )(token_bits(mask), shape.view(x), *(shape.view(w) for w in weights))
    y = jnp.sum(parts, axis=0).reshape(tokens, width)
    return y if residual is None else residual + y


def token_bits(mask: jax.Array) -> jax.Array:
    """bool [B, E] -> int8 [E], bit b for token b."""
    if mask.shape[0] == 1:
        return mask[0].astype(jnp.int8)
    bits = jnp.left_shift(mask.astype(jnp.int8), jnp.arange(mask.shape[0], dtype=jnp.int8)[:, None])
    return jnp.sum(bits, axis=0, dtype=jnp.int8)
