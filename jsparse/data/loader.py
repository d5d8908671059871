"""Batches: a pure function of (stores, config, step), placed on the mesh ahead of time by a thread.

A step's global batch is the same whatever the number of hosts and devices; each computes the rows it holds. There is
nothing to save: a run resumes by asking for its next step.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jsparse.config import ConfigError, DataConfig, check
from jsparse.data.order import Mixture, best_fit, permute
from jsparse.data.store import Store
from jsparse.parallel import batch_sharding

T = TypeVar("T")
Span = tuple[int, int]  # of a token stream: first input token, number of input tokens; each target is one token on


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Token windows, as arrays of numpy or jax; T is data.seq_len.

    Attributes:
        tokens: int32 [B, T], inputs.
        targets: int32 [B, T], the token after each.
        loss_mask: bool [B, T], which targets count.
        segments: int32 [B, T], documents numbered from 1, 0 is padding; None where attention crosses documents.
    """

    tokens: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    loss_mask: jax.Array | np.ndarray
    segments: jax.Array | np.ndarray | None


@dataclass(frozen=True)
class Windows:
    """How a store is cut: window i, of `count`, holds spans(i)."""

    count: int
    spans: Callable[[int], Sequence[Span]]


def cut(store: Store, seq_len: int) -> Windows:
    """Equal windows that run across documents.

    Neighbours share a token, so each token but the very first is a target once; the last ones, too few to fill a
    window, are left out.
    """
    return Windows((len(store.tokens) - 1) // seq_len, lambda i: [(i * seq_len, seq_len)])


def pack(store: Store, seq_len: int) -> Windows:
    """Whole documents packed into windows; longer ones are split into spans of `seq_len`.

    Each token but the first of a document is a target once, and no span reaches into another document.
    """
    if store.offsets is None:
        raise ConfigError(
            f"data.documents: expected `windows`, as {store.name} does not know its documents, got 'packed'"
        )
    targets = np.diff(store.offsets, append=len(store.tokens)) - 1  # of each document
    spans_of = -(-targets // seq_len)
    nth = np.arange(spans_of.sum()) - np.repeat(np.cumsum(spans_of) - spans_of, spans_of)  # span of its document
    starts = np.repeat(store.offsets, spans_of) + nth * seq_len
    lengths = np.minimum(np.repeat(targets, spans_of) - nth * seq_len, seq_len)
    window = best_fit(lengths, seq_len)
    by_window = np.argsort(window, kind="stable")
    spans = np.stack([starts, lengths], axis=1)[by_window]
    bounds = np.searchsorted(window[by_window], np.arange(window.max(initial=-1) + 2))
    return Windows(len(bounds) - 1, lambda i: spans[bounds[i] : bounds[i + 1]].tolist())


def collate(rows: Sequence[tuple[Store, Sequence[Span]]], seq_len: int, segments: bool) -> Batch:
    """Reads the spans of each row. Padding has token 0, target 0, segment 0 and takes no loss."""
    shape = len(rows), seq_len
    batch = Batch(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool),
                  np.zeros(shape, np.int32) if segments else None)  # fmt: skip
    for row, (store, spans) in enumerate(rows):
        at = 0
        for segment, (start, length) in enumerate(spans, 1):
            here = row, slice(at, at + length)
            batch.tokens[here] = store.tokens[start : start + length]
            batch.targets[here] = store.tokens[start + 1 : start + length + 1]
            batch.loss_mask[here] = True if store.loss is None else store.loss[start + 1 : start + length + 1]
            if batch.segments is not None:
                batch.segments[here] = segment
            at += length
    return batch


def _at_least_one(windows: Windows, store: Store, seq_len: int) -> Windows:
    if windows.count == 0:
        need = f"at least {seq_len + 1} tokens (data.seq_len + 1)"
        raise ConfigError(f"{store.name}: expected {need}, got {len(store.tokens)}")
    return windows


class Loader:
    """The training batches of a mixture of stores, in the order of config.train.

    Example n of the run, row n % B of step n // B, comes from the source that `Mixture` names; each source is walked in
    a random order of its windows, another one every epoch.
    """

    def __init__(self, stores: Sequence[Store], config: DataConfig):
        check(
            len(stores) == len(config.train) > 0, "data.train", "one source or more, and a store of each", config.train
        )
        self.stores, self.config = stores, config
        divide = pack if config.documents == "packed" else cut
        self.windows = [_at_least_one(divide(s, config.seq_len), s, config.seq_len) for s in stores]
        self._mixture = Mixture([source.weight for source in config.train])

    def locate(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of examples [n] of the run: the source and the window of each, int64 [n]."""
        source, index = self._mixture(examples)
        window = np.empty_like(index)
        for k, windows in enumerate(self.windows):
            epoch, position = np.divmod(index, windows.count)
            for e in np.unique(epoch[source == k]).tolist():
                mine = (source == k) & (epoch == e)
                window[mine] = permute(position[mine], windows.count, (self.config.seed, k, e))
        return source, window

    def batch(self, step: int, rows: range | None = None) -> Batch:
        """Rows of a step's global batch, all by default, as numpy arrays [rows, T]."""
        size = self.config.batch_size
        source, window = self.locate(step * size + np.arange(size)[slice(None) if rows is None else rows])
        spans = [
            (self.stores[k], self.windows[k].spans(i)) for k, i in zip(source.tolist(), window.tolist(), strict=True)
        ]
        return collate(spans, self.config.seq_len, segments=self.config.documents == "packed")

    def global_batch(self, step: int, mesh: Mesh) -> Batch:
        """A step's batch as global arrays under `batch_sharding`; this process reads the rows of its own devices."""
        shape, sharding = (self.config.batch_size, self.config.seq_len), batch_sharding(mesh)

        @functools.cache
        def part(rows: range) -> Batch:
            return self.batch(step, rows)

        def place(name: str) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                return getattr(part(range(shape[0])[index[0]]), name)

            return jax.make_array_from_callback(shape, sharding, shard)

        packed = self.config.documents == "packed"
        return Batch(place("tokens"), place("targets"), place("loss_mask"), place("segments") if packed else None)

    def iterate(self, start_step: int, mesh: Mesh) -> AbstractContextManager[Iterator[Batch]]:
        """The global batches of start_step, start_step + 1, ... without end, made ahead on a thread:

            with loader.iterate(step, mesh) as batches:
                for batch in batches: ...

        Raises:
            ConfigError: the mesh's data and fsdp axes do not divide the batch size.
        """
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        check(self.config.batch_size % shards == 0, "data.batch_size",
              f"a multiple of the mesh's data times fsdp ({shards})", self.config.batch_size)  # fmt: skip
        return prefetch(functools.partial(self.global_batch, mesh=mesh), start_step, self.config.prefetch)


@contextmanager
def prefetch(make: Callable[[int], T], start: int, ahead: int) -> Iterator[Iterator[T]]:
    """Yields make(start), make(start + 1), ... computed up to `ahead` calls early on one thread.

    What `make` raises is raised where its result is asked for. Leaving the context waits for the call in progress and
    drops the others.
    """
    with ThreadPoolExecutor(1, "jsparse-data") as pool:
        pending = deque(pool.submit(make, step) for step in range(start, start + ahead))

        def results() -> Iterator[T]:
            for step in itertools.count(start + ahead):
                pending.append(pool.submit(make, step))
                yield pending.popleft().result()

        try:
            yield results()
        finally:
            pool.shutdown(cancel_futures=True)
