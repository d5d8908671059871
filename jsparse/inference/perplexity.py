"""Perplexity of a text, and the activation sparsity met on the way."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jsparse.config import LlamaConfig, with_threshold
from jsparse.inference import decoder
from jsparse.inference.decoder import Decoder
from jsparse.inference.windows import Batch, Windows, exp, replicated
from jsparse.model import FFNTrace, Params, logits, trunk
from jsparse.model.chunks import by_chunks, nll


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found, and the protocol it was found by. `dataclasses.asdict` gives plain JSON values."""

    perplexity: float  # exp(loss)
    loss: float  # nats a token
    tokens: int  # predicted, each once
    sparsity: tuple[float, ...]  # [L], share of exact zeros in x1 = act(gate) * up, over the predicting positions
    dead: tuple[int, ...]  # [L], neurons whose x1 is zero at all of these positions
    neurons: tuple[int, ...]  # [L], ffn width
    windows: int
    seq_len: int  # tokens a window shows, BOS included
    stride: int  # text tokens between the starts of windows
    bos: int | None  # put in front of every window
    block_sparsity: tuple[float, ...] = ()  # [L], share of blocks that the routers leave out; empty without routers
    no_block: tuple[float, ...] = ()  # [L], share of the predicting positions whose every block is left out


def evaluate(
    params: Params,
    config: LlamaConfig,
    tokens: ArrayLike,
    *,
    seq_len: int = 2048,
    stride: int | None = None,
    bos: int | None = None,
    batch_size: int = 8,
    threshold: float | jax.Array | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of a text by the protocol of `jsparse.inference.windows`, with each layer's activation sparsity.

    Every token but the first is predicted exactly once. Computes in the dtype of `params`, the loss in float32 and
    its sum over windows in float64. Under a mesh (`jax.set_mesh`) the batch is split over "data" and "fsdp".

    Args:
        params: stacked or unstacked.
        tokens: ids [number of tokens], on the host.
        seq_len: tokens the model sees at once, BOS included.
        stride: text tokens from one window to the next; None: as many as a window holds.
        bos: id in front of every window; None: none.
        batch_size: windows a forward pass.
        threshold: drops gate values below it (`jsparse.config.with_threshold`). A sweep compiles once.
        progress: called after each forward pass with the number of windows done and of all.

    Raises:
        ConfigError: tokens, seq_len, stride or bos do not fit the model or each other.
    """
    windows = Windows(tokens, config, seq_len, stride, bos)
    total, counted, zeros, blocks, active = 0.0, 0, np.array(0), np.array(0), None
    for done, batch in windows.batches(batch_size):
        found = jax.device_get(measure(params, batch, config, threshold))
        total += float(np.sum(found.nll, dtype=np.float64))
        counted += int(batch.counted.sum())
        zeros = zeros + np.array([np.sum(z, dtype=np.int64) for z in found.zeros])
        blocks = blocks + np.array([np.sum(b, axis=0, dtype=np.int64) for b in found.blocks])  # [L, 2]
        active = [a | b for a, b in zip(active or found.active, found.active, strict=True)]
        if progress:
            progress(done, windows.count)
    assert active is not None  # there is always a window
    neurons = tuple(len(a) for a in active)
    per_token = [] if config.router is None else (blocks / counted).tolist()  # blocks left out, and none left
    size = 0 if config.router is None else config.router.block_size
    return Evaluation(
        perplexity=exp(total / counted),
        loss=total / counted,
        tokens=counted,
        sparsity=tuple(float(z / (counted * f)) for z, f in zip(zeros, neurons, strict=True)),
        dead=tuple(int(np.sum(~a)) for a in active),
        neurons=neurons,
        windows=windows.count,
        seq_len=seq_len,
        stride=windows.stride,
        bos=bos,
        block_sparsity=tuple(off * size / f for (off, _), f in zip(per_token, neurons, strict=False)),
        no_block=tuple(none for _, none in per_token),
    )


def predicted_perplexity(
    packed: Decoder, config: LlamaConfig, tokens: ArrayLike, *, seq_len: int = 2048, bos: int | None = None
) -> float:
    """Perplexity of a text with a decoder's predictors on, by the windows of `evaluate`."""
    windows, total, counted = Windows(tokens, config, seq_len, None, bos), 0.0, 0
    for _, batch in windows.batches(1):
        total += float(_predicted_nll(packed, batch, config))
        counted += int(batch.counted.sum())
    return exp(total / counted)


@functools.partial(jax.jit, static_argnames="config")
def _predicted_nll(packed: Decoder, batch: Batch, config: LlamaConfig) -> jax.Array:
    inputs, targets, counted = batch
    cache = decoder.empty_cache(packed, inputs.shape[0], inputs.shape[1], jnp.zeros(inputs.shape[0], jnp.int32), config)
    x, _, _ = decoder.trunk(packed, inputs, config, cache, predicted=True)

    def losses(x: jax.Array, targets: jax.Array) -> jax.Array:
        scores = decoder.logits(x.reshape(-1, x.shape[-1]), packed)
        return nll(scores, targets.reshape(-1)).reshape(targets.shape)

    return jnp.sum(by_chunks(losses, x, targets), where=counted)


class Measurement(NamedTuple):
    """Of one batch, over its counted positions."""

    nll: jax.Array  # float32 [B], summed over T
    zeros: list[jax.Array]  # int32 [B] of each layer: exact zeros of x1, summed over T and F
    active: list[jax.Array]  # bool [F] of each layer: neurons that are anywhere not zero
    blocks: list[jax.Array]  # int32 [B, 2] of each layer: blocks left out, and positions without any block


@functools.partial(jax.jit, static_argnames="config")
def measure(params: Params, batch: Batch, config: LlamaConfig, threshold: Any = None) -> Measurement:
    """One forward pass with its loss and sparsity; `threshold` (a scalar) as in `evaluate`."""
    if threshold is not None:
        config = dataclasses.replace(config, activation=with_threshold(config.activation, threshold))
    inputs, targets, counted = batch

    def probe(trace: FFNTrace) -> tuple[jax.Array, ...]:
        zero = trace.hidden == 0  # [B, T, F]
        zeros = jnp.sum(zero & counted[..., None], axis=(1, 2), dtype=jnp.int32)
        found = zeros, jnp.any(~zero & counted[..., None], axis=(0, 1))
        if trace.factors is None:
            return found
        off = trace.factors == 0  # [B, T, E]
        left_out = jnp.sum(off & counted[..., None], axis=(1, 2), dtype=jnp.int32)
        without = jnp.sum(jnp.all(off, axis=-1) & counted, axis=1, dtype=jnp.int32)
        return *found, jnp.stack([left_out, without], axis=-1)

    x, aux, _ = trunk(params, inputs, config, probe=probe)
    losses = by_chunks(lambda x, targets: nll(logits(x, params), targets), x, targets)
    if isinstance(params["layers"], dict):
        aux = list(zip(*aux, strict=True))
    zeros, active, *blocks = zip(*aux, strict=True)
    return replicated(Measurement(jnp.sum(losses, axis=1, where=counted), list(zeros), list(active),
                                  list(*blocks)))  # fmt: skip
