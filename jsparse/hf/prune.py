"""A model folder in, a pruned model folder out, with the weights of one block in memory.

The pass over the blocks goes as far as the writer of the new folder asks for: a block is read, pruned and written, and
gone before the next one comes. The residual stream of the calibration text stays.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from jsparse import model
from jsparse.config import LlamaConfig, check
from jsparse.hf import packed as packed_form
from jsparse.hf.config import choose_format, read_config
from jsparse.hf.folder import (
    check_stored,
    check_target,
    kept_dtype,
    put,
    read_packing,
    rows_of,
    tokenizer_in,
    write_model,
)
from jsparse.hf.names import Leaf, in_order, leaves, tree
from jsparse.hf.packed import Along, Packing
from jsparse.hf.tensors import Outgoing, Stored, open_folder, pieces
from jsparse.methods.dass import Dass
from jsparse.methods.packing import check_packable
from jsparse.methods.patterns import MLP, NofM, Pattern, matrix
from jsparse.methods.pruning import (
    MatrixReport,
    Method,
    Plan,
    Remainder,
    Report,
    Stream,
    compared,
    plans,
    prune_next,
    report,
    start,
)
from pallas_kernels import PackedNM, pack


@dataclass(frozen=True)
class Folder:
    """What was pruned, and how large the new folder's tensors are beside dense ones."""

    report: Report
    bytes: int
    dense_bytes: int


def prune_folder(
    source: str | Path,
    out: str | Path,
    tokens: ArrayLike | None = None,
    *,
    pattern: Pattern,
    mlp: Method = Dass(),
    attention: Method | None = None,
    remainder: Remainder = "refuse",
    packed: bool = False,
    batch_size: int = 8,
    dtype: Any = None,
    mesh: Mesh | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    about: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Folder:
    """`jsparse.methods.pruning.prune` from folder to folder. Every tensor keeps the dtype it is stored in.

    Holds the weights of one block and the residual stream of the calibration tokens; never the model. In the new folder
    prune.json tells what was pruned; it appears whole or not at all.

    Args:
        source: a model folder.
        out: the new one, with the tokenizer of the old.
        tokens, pattern, mlp, attention, remainder, batch_size, progress: as `prune` takes them.
        packed: writes the MLP's matrices packed instead of with zeros. Such a folder is loaded by jsparse, and by
            transformers with `trust_remote_code=True`.
        dtype: of the forward passes; by default that of the embedding.
        mesh: where the passes run (`jax.set_mesh` it too); by default the first device.
        max_shard_bytes: larger models are split into files of at most this size.
        overwrite: replaces an existing model folder, once the new one is complete.
        about: goes into prune.json first.

    Raises:
        ConfigError, ValueError, OSError: as `prune`, `load` and `save` raise them; nothing is left behind.
    """
    check(jax.process_count() == 1, "prune_folder", "one process", jax.process_count())
    config, where = read_config(source), Path(source)
    todo, skipped = plans(config, pattern, mlp, attention, remainder)
    packing = _packing(todo, mlp, pattern) if packed else {}
    check_target(Path(out), overwrite, source)
    stored = packed_form.dense(open_folder(where), read_packing(source), where)
    found = leaves(config)
    check_stored(config, found, stored, where)
    blocks = _Blocks(config, found, stored, mesh, todo, pattern, progress)
    blocks.stream = start(blocks.embedding(), config, tokens, todo, batch_size, dtype)
    tensors = blocks.outgoing(packing)
    size = sum(tensor.nbytes for tensor in tensors.values())
    dense_size = sum(int(np.prod(s.shape)) * kept_dtype([s]).itemsize for s in (stored[name] for name in blocks.names))

    def told() -> Report:
        return report(config, pattern, blocks.reported, skipped, blocks.stream, tokens)

    def text() -> str:
        values = (about or {}) | dataclasses.asdict(told()) | {"bytes": size, "dense_bytes": dense_size}
        return json.dumps(values, indent=1) + "\n"

    format = choose_format(config, packed=bool(packing))
    write_model(Path(out), config, tensors, format, tokenizer_in(source), max_shard_bytes, overwrite,
                {"prune.json": text}, packed_form.to_config(packing))  # fmt: skip
    return Folder(told(), size, dense_size)


def _packing(todo: list[Plan], mlp: Method, pattern: Pattern) -> Packing:
    """The MLP's matrices that are pruned in every layer. Raises ConfigError where there are none, or no packed form."""
    whole = check_packable(pattern)
    names = [name for name in MLP if all(any(name == n for n, _ in plan) for plan in todo)]
    check(bool(names), "packed", f"a matrix of the MLP that {pattern} divides in every layer", "none")
    return {name: (whole, compared(name, mlp, whole)) for name in names}  # type: ignore[misc]


def _copy(stored: Stored, dtype: np.dtype) -> Iterator[np.ndarray]:
    """A tensor as it is, in pieces of consecutive rows."""
    whole = tuple(slice(0, n) for n in stored.shape)
    if not whole:
        yield stored.read(whole).astype(dtype, copy=False).reshape(1)
        return
    row_bytes = int(np.prod(stored.shape[1:])) * stored.dtype.itemsize
    for cut in pieces(whole[0], row_bytes):
        yield stored.read((cut, *whole[1:])).astype(dtype, copy=False)


class _Blocks:
    """The pass over the blocks of a folder, as far as it has gone, and what is pruned but not yet written."""

    def __init__(
        self,
        config: LlamaConfig,
        found: list[Leaf],
        stored: dict[str, Stored],
        mesh: Mesh | None,
        todo: list[Plan],
        pattern: Pattern,
        progress: Callable[[int, int], None] | None,
    ):
        self.config, self.found, self.stored = config, found, stored
        self.todo, self.pattern, self.progress = todo, pattern, progress
        self.places: list[Any] = [None] * len(found)
        if mesh is not None:
            self.places = jax.tree.leaves(model.shardings(config, mesh))
        self.stream: Stream | None = None
        self.reported: list[MatrixReport] = []
        self.done = 0
        self.waiting: dict[tuple[int, str], jax.Array] = {}
        self.pairs: dict[tuple[int, str], PackedNM] = {}  # one array of each is written

    @property
    def names(self) -> list[str]:
        """Every weight of the model, by Hugging Face's name."""
        return [name for leaf in self.found for name in leaf.names]

    def outgoing(self, packing: Packing) -> dict[str, Outgoing]:
        """The tensors of the new folder: what is pruned comes from the pass, when it is asked for."""
        tensors: dict[str, Outgoing] = {}
        for leaf in self.found:
            name = ".".join(map(str, leaf.path[-2:]))
            for i, weight in enumerate(leaf.names):
                source = self.stored[weight]
                shape, dtype = leaf.layout.shape(leaf.shape), kept_dtype([source])
                layer = i if leaf.stacked else int(leaf.path[1]) if leaf.path[0] == "layers" else None
                if layer is None or all(name != pruned for pruned, _ in self.todo[layer]):
                    tensors[weight] = Outgoing(shape, dtype, functools.partial(_copy, source, dtype))
                elif name in packing:
                    pair = functools.partial(self.packed, layer, name, *packing[name])
                    tensors |= packed_form.outgoing(weight, shape, dtype, packing[name], pair)
                else:
                    tensors[weight] = Outgoing(shape, dtype, functools.partial(self.rows, layer, name, leaf, dtype))
        return in_order(tensors)

    def embedding(self) -> jax.Array:
        at = [leaf.path for leaf in self.found].index(("embed",))
        return self._read(self.found[at], self.places[at])

    def take(self, i: int, name: str) -> jax.Array:
        """A pruned matrix of block i; the pass goes on to there. It can be taken once."""
        while self.done <= i:
            self._next()
        return self.waiting.pop((i, name))

    def rows(self, i: int, name: str, leaf: Leaf, dtype: np.dtype) -> Iterator[np.ndarray]:
        return rows_of(self.take(i, name), None, leaf, dtype)

    def packed(self, i: int, name: str, pattern: NofM, axis: Along) -> PackedNM:
        """A pruned matrix in its packed form, which can be taken twice: for its values and for its indices."""
        if (i, name) in self.pairs:
            return self.pairs.pop((i, name))
        self.pairs[i, name] = pack(matrix(self.take(i, name), name), pattern.n, pattern.m, axis)
        return self.pairs[i, name]

    def _next(self) -> None:
        i = self.done
        pruned, self.stream = prune_next(self._layer(i), i, self.stream, self.config, self.todo[i], self.pattern)
        self.reported += pruned.rows
        self.waiting |= {(i, name): x for name, x in pruned.weights.items()}
        self.done += 1
        if self.progress:
            self.progress(self.done, self.config.num_hidden_layers)

    def _layer(self, i: int) -> model.Params:
        """The parameters of one block."""
        values = {}
        for leaf, place in zip(self.found, self.places, strict=True):
            if leaf.stacked:
                one = Leaf(("layers", 0, *leaf.path[1:]), (leaf.names[i],), leaf.layout, leaf.shape)
                inner = None if place is None else NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
                values[one.path] = self._read(one, inner)
            elif leaf.path[:2] == ("layers", i):
                values["layers", 0, *leaf.path[2:]] = self._read(leaf, place)
        return tree(values)["layers"][0]

    def _read(self, leaf: Leaf, place: Any) -> jax.Array:
        sources = [self.stored[name] for name in leaf.names]
        return put(leaf, sources, kept_dtype(sources), place)
