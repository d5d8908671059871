"""A text as windows: the one protocol by which perplexities and comparisons read it.

A window shows the model `seq_len` tokens, the first of them BOS where one is given, and predicts the token after each
of its text tokens. The next window starts `stride` text tokens later. By default that is as many as a window holds, so
that windows overlap by one token, which the one predicts and the other starts from. With a smaller stride a window
after the first counts only its last `stride` predictions, each of them made with longer context.

In either case, with BOS or without, the text's first token is never predicted and every other one exactly once. The
last window is as long as what is left of the text.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from jsparse.config import DynamicRope, LlamaConfig, check
from jsparse.parallel import batch_shards, constrain, round_up


class Batch(NamedTuple):
    """Windows of one forward pass."""

    inputs: Any  # int32 [B, T]
    targets: Any  # int32 [B, T]
    counted: Any  # bool [B, T], predictions that count


class Windows:
    """The windows of a text for a model, cut when they are asked for. Raises ConfigError on what does not fit it."""

    def __init__(self, tokens: ArrayLike, config: LlamaConfig, seq_len: int, stride: int | None, bos: int | None):
        text, limit = np.asarray(tokens), positions(config)
        check(text.ndim == 1 and text.dtype.kind in "iu", "tokens", "a 1-D array of token ids",
              f"{text.dtype}{list(text.shape)}")  # fmt: skip
        check(len(text) > 1, "tokens", "at least 2 tokens", len(text))
        check_ids(text, config, "tokens")
        check_ids(np.array([] if bos is None else [bos]), config, "bos")
        check(seq_len <= limit, "seq_len", f"at most the model's {limit} positions", seq_len)
        held = seq_len - (bos is not None)  # text tokens that a window shows
        check(held > 0, "seq_len", "room for a token of the text", seq_len)
        self.text, self.seq_len, self.bos, self.held = text, seq_len, bos, held
        self.stride = held if stride is None else stride
        check(0 < self.stride <= held, "stride", f"from 1 to {held}, the text tokens of a window", stride)
        self.count = 1 + math.ceil(max(0, len(text) - 1 - held) / self.stride)

    def batches(self, size: int) -> Iterator[tuple[int, Batch]]:
        """All windows, `size` at a time, each batch with the number of windows done after it.

        All batches are of one shape: rows beyond the last window do not count. `size` is lowered to the number of
        windows, and raised to a multiple of the devices that split the batch under the mesh in context.
        """
        check(size > 0, "batch_size", "a positive number", size)
        size = round_up(min(size, self.count), batch_shards())
        for first in range(0, self.count, size):
            yield min(first + size, self.count), self._cut(np.arange(first, first + size)[:, None])

    def _cut(self, window: np.ndarray) -> Batch:
        """window [B, 1], the indices; those beyond the last window come out uncounted."""
        last = len(self.text) - 1  # has nothing to predict
        start = window * self.stride
        place = start + np.arange(self.held)[None]  # [B, T]
        seen = np.where(window == 0, 0, start - self.stride + self.held)  # predicted by the windows before
        counted = (place >= seen) & (place < last)
        inputs = self.text[np.minimum(place, last)]
        targets = self.text[np.minimum(place + 1, last)]
        if self.bos is not None:
            inputs = np.pad(inputs, ((0, 0), (1, 0)), constant_values=self.bos)
            targets = np.pad(targets, ((0, 0), (1, 0)))
            counted = np.pad(counted, ((0, 0), (1, 0)))
        return Batch(inputs.astype(np.int32), targets.astype(np.int32), counted)


def positions(config: LlamaConfig) -> int:
    """Positions that the model is made for: dynamic scaling goes beyond `max_position_embeddings`, by its factor."""
    factor = config.rope.factor if isinstance(config.rope, DynamicRope) else 1
    return int(factor * config.max_position_embeddings)


def check_ids(ids: np.ndarray, config: LlamaConfig, where: str) -> None:
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    check(not len(outside), where, f"ids from 0 to {config.vocab_size - 1}", outside[:1].tolist())


def replicated(tree: Any) -> Any:
    """The results of a computation whole on every device, so that every process of a job can read them."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


def exp(loss: float) -> float:
    """Perplexity of a loss: infinite rather than an overflow, nan of nan."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss))
