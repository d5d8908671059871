"""Model folders: Hugging Face's config.json, safetensors and tokenizer files, in and out of parameter trees."""

import contextlib
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jsparse import model
from jsparse.config import ConfigError, LlamaConfig, check
from jsparse.hf.config import CODED, choose_format, read_config, to_hf
from jsparse.hf.names import HARMLESS, Leaf, in_order, leaves, tree
from jsparse.hf.packed import Packing, dense, from_config, load_stack, outgoing, to_config
from jsparse.hf.tensors import DTYPES, Outgoing, Stored, copy, open_folder, pieces, write_folder, write_json
from jsparse.methods.packing import pack_params
from jsparse.methods.patterns import NofM, replace
from pallas_kernels import PackedNM

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
CODE_FILES = ("configuration_sparsellama.py", "modeling_sparsellama.py")  # travel with folders that need them


def tokenizer_in(folder: str | Path) -> str | None:
    """The folder itself where it has a tokenizer, else None: a model may come without one."""
    path = Path(folder).expanduser()
    return str(folder) if any(any(path.glob(name)) for name in TOKENIZER_FILES) else None


# --------------------------------------------------------------------------------------------------------------------
# In
# --------------------------------------------------------------------------------------------------------------------


def load(
    path: str | Path, *, dtype: Any = None, mesh: Mesh | None = None, packed: bool = False
) -> tuple[LlamaConfig, model.Params]:
    """Reads a model folder.

    Every process reads only what its devices hold, piece by piece: beside the parameters the host needs room for one
    stacked leaf on its way to an accelerator, and for almost nothing where the host is the device.

    Args:
        path: a Hugging Face folder: config.json and safetensors, in one file or sharded.
        dtype: to convert to; float32 islands (norms, thresholds, routers) become float32. By default every tensor
            keeps the dtype it is stored in, bit for bit.
        mesh: where to put the parameters, sharded by the rules of `jsparse.parallel`; by default the first device.
        packed: N:M matrices of the MLP come as `pallas_kernels.PackedNM` leaves, whole on every device: those that the
            folder holds packed, and those whose zeros make a pattern (`jsparse.methods.packing`). By default they come
            dense, with their zeros.

    Returns:
        The config and the parameter tree of `jsparse.model`: stacked, unless the layers differ in shape.

    Raises:
        ConfigError: not a model folder, a model that jsparse does not compute, or a mesh that does not divide it.
        ValueError: a tensor is missing, unknown or misshapen, or a file is damaged.
    """
    config, where = read_config(path), Path(path).expanduser()
    stored, packing = open_folder(where), read_packing(where)
    unpacked = dense(stored, packing, where)
    if not packed or not packing or config.layers is not None:
        params = assemble(config, unpacked, where, dtype, mesh)
        return config, pack_params(params) if packed else params
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    place = functools.partial(jax.device_put, device=everywhere)
    params = assemble(config, unpacked, where, dtype, mesh, leave=packing)
    pairs = {name: load_stack(stored, "model.layers.", name, config.num_hidden_layers, axis,
                              None if dtype is None else to_dtype(dtype), place)
             for name, (_, axis) in packing.items()}  # fmt: skip
    return config, params | {"layers": replace(params["layers"], pairs)}


def read_packing(path: str | Path) -> Packing:
    """Which matrices a model folder holds packed."""
    file = Path(path) / "config.json"
    return from_config(json.loads(file.read_text(encoding="utf-8")).get("packed") or {}, f"{file}: packed")


def assemble(
    config: LlamaConfig,
    stored: dict[str, Stored],
    where: Path,
    dtype: Any,
    mesh: Mesh | None,
    leave: Iterable[str] = (),
) -> Any:
    """The parameter tree of stored tensors under Hugging Face's names; matrices named in `leave` are not read."""
    found = leaves(config)
    check_stored(config, found, stored, where)
    islands = jax.tree.leaves(model.islands(config))
    places = [None] * len(found) if mesh is None else jax.tree.leaves(model.shardings(config, mesh))
    values = {}
    for leaf, island, place in zip(found, islands, places, strict=True):
        if ".".join(map(str, leaf.path[-2:])) in leave:
            continue
        sources = [stored[name] for name in leaf.names]
        target = kept_dtype(sources) if dtype is None else np.dtype(np.float32) if island else to_dtype(dtype)
        values[leaf.path] = put(leaf, sources, target, place)
    return tree(values)


def kept_dtype(sources: list[Stored]) -> np.dtype:
    """The dtype that tensors of one leaf are kept in: their own, and float32 where they differ or are float64."""
    kinds = {s.dtype for s in sources}
    return kinds.pop() if len(kinds) == 1 and DTYPES["F64"] not in kinds else np.dtype(np.float32)


def check_stored(config: LlamaConfig, found: list[Leaf], stored: dict[str, Stored], where: Path) -> None:
    """Raises ValueError for the first tensor that is unknown, misshapen or missing."""
    expected = {name: leaf.layout.shape(leaf.shape) for leaf in found for name in leaf.names}
    tied = config.tie_word_embeddings
    for name, s in stored.items():
        if tied and name == "lm_head.weight":
            if not _equal(s, stored.get("model.embed_tokens.weight", s)):
                raise ValueError(f"{s.file}: lm_head.weight differs from model.embed_tokens.weight, but "
                                 "tie_word_embeddings is true in config.json")  # fmt: skip
        elif name in expected:
            if s.shape != expected[name]:
                raise ValueError(f"{s.file}: tensor {name}: expected shape {expected[name]}, got {s.shape}")
        elif not HARMLESS.fullmatch(name):
            raise ValueError(f"{s.file}: unknown tensor {name} of shape {s.shape}: the model of config.json has none")
    missing = [name for name in expected if name not in stored]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{where}: missing tensor {missing[0]} of shape {expected[missing[0]]}{more}")


def _equal(a: Stored, b: Stored) -> bool:
    if a.shape != b.shape:
        return False
    width = slice(0, a.shape[1])
    cuts = pieces(slice(0, a.shape[0]), a.shape[1] * a.dtype.itemsize)
    return all(np.array_equal(a.read((rows, width)), b.read((rows, width))) for rows in cuts)


def put(leaf: Leaf, sources: list[Stored], dtype: np.dtype, place: Sharding | None) -> jax.Array:
    """One leaf, read into its devices' shards."""
    shape = (len(sources), *leaf.shape) if leaf.stacked else leaf.shape
    if place is None:
        return jax.device_put(_read(leaf, sources, dtype, tuple(slice(0, n) for n in shape)))
    shards: dict[Any, np.ndarray] = {}  # replicas are read once

    def shard(index: Any) -> np.ndarray:
        cuts = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
        key = tuple((cut.start, cut.stop) for cut in cuts)
        if key not in shards:
            shards[key] = _read(leaf, sources, dtype, cuts)
        return shards[key]

    return jax.make_array_from_callback(shape, place, shard)


def _read(leaf: Leaf, sources: list[Stored], dtype: np.dtype, cuts: tuple[slice, ...]) -> np.ndarray:
    """A part of a leaf, in our layout. Threads, because the work is copying, which numpy does without the lock."""
    out = _aligned([cut.stop - cut.start for cut in cuts], dtype)
    layers, inner = (cuts[0], cuts[1:]) if leaf.stacked else (slice(0, 1), cuts)
    rows, *columns = leaf.layout.index(inner, leaf.shape)

    def fill(job: tuple[int, slice]) -> None:
        layer, part = job
        target = leaf.layout.view(out[layer - layers.start, ...] if leaf.stacked else out)
        values = sources[layer].read((part, *columns)).astype(dtype, copy=False)
        copy(target[part.start - rows.start : part.stop - rows.start], values)

    width = int(np.prod([c.stop - c.start for c in columns])) * sources[0].dtype.itemsize
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, itertools.product(range(layers.start, layers.stop), pieces(rows, width))))
    return out


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address that jax on a CPU adopts as its own instead of copying it."""
    size = int(np.prod(shape)) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def to_dtype(dtype: Any) -> np.dtype:
    """A dtype that models are kept in. Raises ConfigError for any other."""
    found = jax.numpy.dtype(dtype)
    check(found in DTYPES.values() and found.itemsize < 8, "dtype", "float32, bfloat16 or float16", found.name)
    return found


# --------------------------------------------------------------------------------------------------------------------
# Out
# --------------------------------------------------------------------------------------------------------------------


def save(
    path: str | Path,
    config: LlamaConfig,
    params: model.Params,
    *,
    tokenizer: str | Path | None = None,
    dtype: Any = None,
    format: str = "auto",
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Writes a model folder that transformers loads. It appears whole or not at all.

    Streams: beside the parameters the host needs room for a few pieces of tensors. In a job of several processes all
    call it, and the first one writes.

    Args:
        path: the new folder.
        config: of the model.
        params: its parameters, stacked or unstacked, sharded or not, of any dtypes that safetensors knows; PackedNM
            leaves are written packed.
        tokenizer: a folder whose tokenizer files and generation_config.json are copied byte for byte.
        dtype: of every tensor written but thresholds and routers, which stay float32. By default each keeps its own.
        format: "llama" (any runtime loads it), "sparsellama" (FATReLU, as ProSparse's authors publish it), "jsparse"
            (everything; the last two bring a PyTorch file, so transformers wants `trust_remote_code=True`), "auto", the
            first of these that holds the model, or "nemotron-nas" (DeciLM: layers whose FFNs alone differ).
        max_shard_bytes: larger models are split into files of at most this size.
        overwrite: replaces an existing model folder, once the new one is complete.
        extra: text files to lie in the folder too, by name.

    Raises:
        ConfigError: the folder exists, the format cannot hold the model, or `tokenizer` has no tokenizer.
        ValueError: parameters that do not fit the config.
        OSError: cannot write; nothing is left behind.
    """
    path, packing = Path(path).expanduser(), _packing(params)
    chosen = choose_format(config, format, packed=bool(packing))
    check_target(path, overwrite)  # in every process, so that none waits for one that has given up
    tensors = _outgoing(config, params, dtype, packing)
    if jax.process_index() == 0:
        write_model(path, config, tensors, chosen, tokenizer, max_shard_bytes, overwrite, extra or {},
                    to_config(packing))  # fmt: skip
    else:
        for tensor in tensors.values():  # gathering takes every process
            for _ in tensor.rows():
                pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jsparse.save {path}")


def write_model(
    path: Path,
    config: LlamaConfig,
    tensors: dict[str, Outgoing],
    format: Any,
    tokenizer: str | Path | None,
    max_shard_bytes: float,
    overwrite: bool,
    extra: Mapping[str, str | Callable[[], str]],
    fields: dict[str, Any] | None = None,
) -> None:
    """A whole model folder from tensors under Hugging Face's names.

    `extra` holds text files by name; what is callable is called once the tensors are written. `fields` are more fields
    of config.json.
    """
    tokenizer = None if tokenizer is None else Path(tokenizer).expanduser()
    files = [] if tokenizer is None else [f for name in TOKENIZER_FILES for f in sorted(tokenizer.glob(name))]
    if tokenizer is not None and not files:
        raise ConfigError(f"{tokenizer}: no tokenizer files")
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes
    with whole_folder(path, overwrite) as folder:
        values = to_hf(config, format, dtype=max(sizes, key=lambda name: sizes[name])) | (fields or {})
        write_json(folder / "config.json", values)
        ids = {name: values[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if any(x is not None for x in ids.values()):
            write_json(folder / "generation_config.json", {name: x for name, x in ids.items() if x is not None})
        if tokenizer is not None:
            files += tokenizer.glob("generation_config.json")
            for file in files:
                copied = folder / file.relative_to(tokenizer)
                copied.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copied)
        if format in CODED:
            for name in CODE_FILES:
                shutil.copyfile(Path(__file__).with_name(name), folder / name)
        write_folder(folder, tensors, max_shard_bytes)
        for name, text in extra.items():
            (folder / name).write_text(text if isinstance(text, str) else text(), encoding="utf-8")


def check_target(path: Path, overwrite: bool, source: str | Path | None = None) -> None:
    """Raises ConfigError where `path` exists and may not be replaced: without leave, because it is no model, or because
    it is the source that is read."""
    if path.exists():
        if source is not None and path.samefile(source):
            raise ConfigError(f"{path}: is the model that is read; choose another name for the one to write")
        if not overwrite:
            raise ConfigError(f"{path}: exists already; choose another name, or overwrite it (--overwrite)")
        if not (path / "config.json").exists() and (path.is_file() or any(path.iterdir())):
            raise ConfigError(f"{path}: exists and is not a model folder; it will not be overwritten")


@contextlib.contextmanager
def whole_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its place when the block ends well and vanishes when it does not.

    Raises:
        ConfigError: `path` exists and may not be replaced.
        OSError: the disk is full or the like.
    """
    check_target(path, overwrite)
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    previous = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            os.rename(path, previous)
        os.rename(temporary, path)
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        if previous.exists():  # the new folder could not take the name
            os.rename(previous, path)
        raise OSError(f"{path}: cannot write: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _outgoing(config: LlamaConfig, params: model.Params, dtype: Any, packing: Packing) -> dict[str, Outgoing]:
    """Every tensor to write, in the order of the model."""
    _check_params(config, params)
    tensors: dict[str, Outgoing] = {}
    for leaf in leaves(config):
        for i, name in enumerate(leaf.names):
            value, layer = _pick(params, leaf, i)
            target = np.dtype(value.dtype) if dtype is None else to_dtype(dtype)
            if leaf.path[-1] in ("threshold", "router", "router_threshold"):
                target = np.dtype(np.float32)
            check(target in DTYPES.values(), f"dtype of {name}", f"one of {', '.join(DTYPES)}", target.name)
            shape = leaf.layout.shape(leaf.shape)
            if isinstance(value, PackedNM):
                one = functools.partial(_packed_layer, value, layer)
                tensors |= outgoing(name, shape, target, packing[".".join(map(str, leaf.path[-2:]))], one)
            else:
                rows = functools.partial(rows_of, value, layer, leaf, target)
                tensors[name] = Outgoing(shape, target, rows)
    return in_order(tensors)


def _packing(params: model.Params) -> Packing:
    """The patterns of the PackedNM leaves; those of one name are of one pattern in all layers."""
    found: Packing = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_packed):
        if isinstance(x, PackedNM):
            name = ".".join(key.key for key in path[-2:])
            kind = NofM(x.n, x.m), x.axis
            check(found.setdefault(name, kind) == kind, name, f"{found[name]} in every layer", kind)
    return found


def _is_packed(x: Any) -> bool:
    return isinstance(x, PackedNM)


def _packed_layer(value: PackedNM, layer: int | None) -> PackedNM:
    return value if layer is None else jax.tree.map(lambda x: x[layer], value)


def _check_params(config: LlamaConfig, params: model.Params) -> None:
    def shapes(params: Any) -> dict[str, tuple[int, ...]]:
        found = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_packed)
        return {jax.tree_util.keystr(path, simple=True, separator="."): _shape(x) for path, x in found}

    abstract = model.abstract(config)
    if isinstance(params.get("layers"), list | tuple):
        abstract = jax.eval_shape(model.unstack, abstract)
    expected, got = shapes(abstract), shapes(params)
    for name, shape in expected.items():
        if name not in got:
            raise ValueError(f"params: missing {name} of shape {shape}")
        if got[name] != shape:
            raise ValueError(f"params: {name}: expected shape {shape}, got {got[name]}")
    for name in sorted(got.keys() - expected.keys()):
        raise ValueError(f"params: unknown {name} of shape {got[name]}: the model of the config has none")


def _shape(x: Any) -> tuple[int, ...]:
    """That of a leaf as it would be dense."""
    return (*x.values.shape[:-3], *x.shape) if isinstance(x, PackedNM) else x.shape


def _pick(params: model.Params, leaf: Leaf, i: int) -> tuple[Any, int | None]:
    """The array that holds a leaf's i-th tensor, and the index to take of it (None: the array itself)."""
    value: Any = params
    for key in leaf.path:
        value = value[key]
        if leaf.stacked and isinstance(value, list | tuple):
            value = value[i]
    return value, i if leaf.stacked and len(_shape(value)) > len(leaf.shape) else None


def rows_of(value: Any, layer: int | None, leaf: Leaf, dtype: np.dtype) -> Iterator[np.ndarray]:
    """A tensor in Hugging Face's layout, in pieces of consecutive rows, on the host."""
    if not leaf.shape:
        yield np.asarray(value if layer is None else value[layer]).astype(dtype).reshape(1)
        return
    axis = leaf.layout.ours.index(leaf.layout.theirs[0][0])
    size = leaf.shape[axis]
    for cut in pieces(slice(0, size), int(np.prod(leaf.shape)) // size * value.dtype.itemsize):
        ours = np.ascontiguousarray(_gather(value, layer, axis, cut).astype(dtype, copy=False))
        view = leaf.layout.view(ours)
        piece = np.empty(view.shape, dtype)
        copy(piece, view)
        yield piece


def _gather(value: Any, layer: int | None, axis: int, cut: slice) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return (value if layer is None else value[layer])[(slice(None),) * axis + (cut,)]
    x = _slice(value, layer, axis, cut.start, cut.stop)
    if not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


@functools.partial(jax.jit, static_argnames=("axis", "start", "stop"))
def _slice(x: jax.Array, layer: Any, axis: int, start: int, stop: int) -> jax.Array:
    if layer is not None:
        x = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
    return jax.lax.slice_in_dim(x, start, stop, axis=axis)
