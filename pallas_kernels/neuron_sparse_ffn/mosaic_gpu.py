"""The neuron-sparse FFN on Hopper, in one persistent kernel.

Exact: the gate's rows stream past the tokens, and the rows of up and down of every neuron that turns out active are
fetched into a second ring, to be used while the gate goes on. Predicted: XLA evaluates the predictor, and the rows of
the neurons that it names stream, as those of chosen blocks do.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu as shared
from pallas_kernels.ffn import Activation, PackedFFN, activate
from pallas_kernels.mosaic_gpu import Team
from pallas_kernels.neuron_sparse_ffn.reference import Predictor, predicted_neurons


@dataclass(frozen=True)
class Tuning:
    """How the exact kernel cuts its work. All but `slots` are upper bounds."""

    rows: int = 4  # of the gate a step
    stages: int = 4  # steps in the gate's ring
    slots: int = 4  # active neurons in the second ring
    warpgroups: int = 2  # of a thread block; they split the width
    blocks: int = shared.MULTIPROCESSORS  # thread blocks, at most one a step


def unsupported(x: jax.Array, weights: PackedFFN, predictor: Predictor | None, cutoff: jax.Array | None) -> str | None:
    return "takes no cutoff" if cutoff is not None else shared.unsupported(x)


def neuron_sparse_ffn(
    x: jax.Array,
    weights: PackedFFN,
    predictor: Predictor | None,
    cutoff: None,
    *,
    residual: jax.Array | None,
    activation: Activation,
    deterministic: bool = False,
    interpret: Any = False,
    tuning: Any = None,
) -> jax.Array:
    """As `reference.neuron_sparse_ffn`. `tuning`: this module's for the exact kernel, the shared one for predicted."""
    how: dict[str, Any] = {"activation": activation, "deterministic": deterministic, "interpret": interpret}
    if predictor is None:
        return _exact(x, weights, residual, **how, tuning=tuning or Tuning())
    mask = predicted_neurons(x, predictor)
    return shared.chosen_neurons_ffn(x, weights, mask, residual=residual, **how, tuning=tuning)


def _exact(
    x: jax.Array,
    weights: PackedFFN,
    residual: jax.Array | None,
    *,
    activation: Activation,
    deterministic: bool,
    interpret: Any,
    tuning: Tuning,
) -> jax.Array:
    (tokens, width), neurons = x.shape, weights.gate.shape[0]
    cut = shared.cut(width, x.dtype, tuning.warpgroups)
    rows = shared.largest_divisor(neurons, tuning.rows)
    steps, slots = neurons // rows, tuning.slots
    workers = min(tuning.blocks, steps)
    row_bytes = width * x.dtype.itemsize
    free = shared.SHARED_BYTES // pl.cdiv(workers, shared.MULTIPROCESSORS) - shared.staging_bytes(width)
    stages = max(2, min(tuning.stages, (free - 2 * slots * row_bytes) // (rows * row_bytes)))

    def kernel(team: Team, emit: Any, matrices: Sequence[Any], operands: Sequence[Any], scratch: Sequence[Any]) -> None:
        gate, up, down = matrices
        gates, gate_products, gates_filled, actives, hidden, up_products, actives_filled = scratch
        first, group = jax.lax.axis_index("block"), team.group

        def fetch_gate(step: jax.Array, slot: Any) -> None:
            @pl.when(step < steps)
            def _() -> None:
                source = gate.at[pl.ds(step * rows, rows), team.own]
                plgpu.copy_gmem_to_smem(source, gates.at[group, slot], gates_filled.at[group * stages + slot])

        def use_oldest(tail: jax.Array, sums: Any) -> tuple[jax.Array, Any]:
            """Adds the oldest active neuron of the second ring, and frees its slot."""
            slot, parity = tail % slots, tail % 2
            plgpu.barrier_wait(actives_filled.at[group * slots + slot])
            team.put_products(up_products.at[parity], team.load(actives.at[group, slot, 0]))
            team.meet()
            row, sums = team.load(actives.at[group, slot, 1]), list(sums)
            for b in range(tokens):
                weight = hidden[group, slot, b] * team.get_product(up_products.at[parity, b])
                sums[b] = sums[b] + weight * row
            plgpu.commit_smem()
            return tail + 1, tuple(sums)

        for slot in range(stages):
            fetch_gate(first + slot * workers, slot)

        def advance(carry: Any) -> Any:
            step, turn, (head, tail, sums) = carry
            slot, parity = turn % stages, turn % 2
            plgpu.barrier_wait(gates_filled.at[group * stages + slot])
            for r in range(rows):
                team.put_products(gate_products.at[parity, r], team.load(gates.at[group, slot, r]))
            team.meet()
            fetch_gate(step + stages * workers, slot)

            def consider(r: jax.Array, queue: Any) -> Any:
                head, tail, sums = queue
                values = [activate(activation, team.get_product(gate_products.at[parity, r, b])) for b in range(tokens)]
                active = functools.reduce(jnp.logical_or, [value != 0.0 for value in values])
                full = active & (head - tail == slots)
                tail, sums = jax.lax.cond(full, use_oldest, lambda *unchanged: unchanged, tail, sums)

                @pl.when(active)
                def _() -> None:
                    slot = head % slots
                    for b, value in enumerate(values):
                        hidden[group, slot, b] = value
                    for i, matrix in enumerate((up, down)):
                        source = matrix.at[step * rows + r, team.own]
                        filled = actives_filled.at[group * slots + slot]
                        plgpu.copy_gmem_to_smem(source, actives.at[group, slot, i], filled)

                return head + active.astype(jnp.int32), tail, sums

            return step + workers, turn + 1, jax.lax.fori_loop(0, rows, consider, (head, tail, sums))

        zero = jnp.int32(0)
        queue = (zero, zero, (team.zeros(),) * tokens)
        *_, (head, tail, sums) = jax.lax.while_loop(lambda carry: carry[0] < steps, advance, (first, zero, queue))
        emit(jax.lax.while_loop(lambda carry: carry[0] < head, lambda carry: use_oldest(*carry), (tail, sums))[1])

    return shared.launch(
        kernel,
        x,
        weights,
        [],
        residual,
        cut=cut,
        blocks=workers,
        scratch=[
            plgpu.SMEM((cut.warpgroups, stages, rows, *cut.shape), x.dtype),
            plgpu.SMEM((2, rows, tokens, cut.warpgroups, 4), jnp.float32),
            plgpu.Barrier(num_arrivals=1, num_barriers=cut.warpgroups * stages),
            plgpu.SMEM((cut.warpgroups, slots, 2, *cut.shape), x.dtype),
            plgpu.SMEM((cut.warpgroups, slots, tokens), jnp.float32),
            plgpu.SMEM((2, tokens, cut.warpgroups, 4), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=cut.warpgroups * slots),
        ],
        deterministic=deterministic,
        interpret=interpret,
    )
