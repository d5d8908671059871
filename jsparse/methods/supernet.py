"""The dense model as a supernet: every subnet is the same compiled program with other masks.

    net = make_supernet(params, config, windows)
    losses = scorer(net, config)([genome, genome, ...])

A subnet is scored in the dense shapes, zeros where something is gone. That costs what the dense model costs, but masks
are values, not shapes: one compile serves all candidates of all searches. Candidates follow one another inside the
program, the windows of each are split over the devices of the mesh.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jsparse import model
from jsparse.config import LlamaConfig, check
from jsparse.methods.repair import Levels
from jsparse.methods.subnet import Genome, zero_filled
from jsparse.model import Params
from jsparse.model.chunks import by_chunks, kl, nll
from jsparse.parallel import batch_shards, constrain, round_up


class Supernet(NamedTuple):
    """The dense model as candidates are scored by it; a pytree."""

    params: Params  # stacked
    tokens: jax.Array  # int32 [W, T + 1], windows of text
    counted: jax.Array  # bool [W], windows that are not there to fill devices up
    states: jax.Array | None  # [W, T, D] of the dense model, where the fitness is the distance from it
    levels: Levels | None  # repaired weights by width


def make_supernet(
    params: Params, config: LlamaConfig, tokens: ArrayLike, *, kl: bool = False, levels: Levels | None = None
) -> Supernet:
    """Params stacked, and windows of text int [W, T + 1], which are split over the mesh in context.

    kl: scores by KL(dense || subnet), nats a token, instead of the cross-entropy with the text.
    """
    windows = np.asarray(tokens)
    check(windows.ndim == 2 and len(windows) > 0 and windows.shape[1] > 1, "tokens", "windows of text [W, T + 1]",
          f"{list(windows.shape)}")  # fmt: skip
    rows = np.arange(round_up(len(windows), batch_shards()))
    padded = constrain(jnp.asarray(windows[np.minimum(rows, len(windows) - 1)], jnp.int32), "batch", "sequence")
    states = _states(params, padded, config) if kl else None
    return Supernet(params, padded, jnp.asarray(rows < len(windows)), states, levels)


@functools.partial(jax.jit, static_argnames="config")
def _states(params: Params, tokens: jax.Array, config: LlamaConfig) -> jax.Array:
    return model.trunk(params, tokens[:, :-1], config)[0]


@functools.partial(jax.jit, static_argnames=("config", "together"))
def score(net: Supernet, genomes: Genome, config: LlamaConfig, together: int = 1) -> jax.Array:
    """Losses of candidates, float32 [C], nats a token: cross-entropy, or KL where the supernet has dense states.

    Masks are traced, so that all candidates of all searches of a model run the one compiled program.

    Args:
        genomes: with a leading axis C.
        together: candidates whose forward pass is one, where the windows alone do not fill the device; divides C.
    """

    def one(genome: Genome) -> jax.Array:
        params = net.params if net.levels is None else with_levels(net.params, net.levels, genome)
        params = zero_filled(params, genome)
        x, _, _ = model.trunk(params, net.tokens[:, :-1], config)
        losses = _losses(x, net.states, model.head(params), net.tokens[:, 1:])
        return jnp.sum(losses, where=net.counted) / (jnp.sum(net.counted, dtype=jnp.float32) * x.shape[1])

    size = together if together > 1 else None  # one by one without a batch axis of 1
    return constrain(jax.lax.map(one, genomes, batch_size=size), None)


def scorer(
    net: Supernet, config: LlamaConfig, *, batch: int = 20, together: int = 1
) -> Callable[[Sequence[Genome]], np.ndarray]:
    """Losses of any number of candidates, float32 [C], with inf for what is not finite.

    batch: candidates a call of the compiled program, a multiple of `together`.
    """
    check(batch > 0 and together > 0 and batch % together == 0, "batch", f"a multiple of together ({together})", batch)

    def measure(genomes: Sequence[Genome]) -> np.ndarray:
        found = []
        for first in range(0, len(genomes), batch):
            part = [genomes[min(first + i, len(genomes) - 1)] for i in range(batch)]
            found.append(score(net, Genome(*map(np.stack, zip(*part, strict=True))), config, together))
        losses = np.concatenate(jax.device_get(found))[: len(genomes)]
        return np.where(np.isfinite(losses), losses, np.inf)

    return measure


def with_levels(params: Params, levels: Levels, genome: Genome) -> Params:
    """Output and down of each layer as they were repaired for the widths that a genome gives it."""
    layers = params["layers"]
    at = jnp.arange(len(levels.down))
    down = levels.down[at, jnp.searchsorted(levels.ffn, jnp.sum(genome.ffn, axis=-1, dtype=jnp.int32))]
    dims = jnp.sum(genome.values[:, 0], axis=-1, dtype=jnp.int32)
    output = levels.output[at, jnp.searchsorted(levels.values, dims)]
    attention, ffn = layers["attention"] | {"output": output}, layers["ffn"] | {"down": down}
    return params | {"layers": layers | {"attention": attention, "ffn": ffn}}


def _losses(x: jax.Array, states: jax.Array | None, head: jax.Array, targets: jax.Array) -> jax.Array:
    """float32 [W], summed over tokens, of hidden states [W, T, D]."""

    def logits(x: jax.Array) -> jax.Array:
        return model.logits(x, {"head": head})

    if states is None:
        each = by_chunks(lambda x, targets: nll(logits(x), targets), x, targets)
    else:
        each = by_chunks(lambda x, states: kl(logits(states), logits(x)), x, states)
    return jnp.sum(each, axis=1)
