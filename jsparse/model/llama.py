"""The LLaMA model as pure functions of a parameter tree.

    params = init(jax.random.key(0), config)
    output = forward(params, tokens, config)

The tree is a plain nested dict. Its blocks are stacked, every leaf of `params["layers"]` led by an L axis, so that
training scans over them; `unstack` turns them into a list of L trees, which decoding runs without copying weights.
Every function here takes either form. Where layers differ in shape (`LlamaConfig.layers`) they are always a list.

Computation runs in the dtype of the parameters (`cast` chooses it); norms, softmax, rotary angles and logits are
float32 always.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jsparse import parallel
from jsparse.config import Cett, LayerShape, LlamaConfig, Relu, check
from jsparse.model import rope
from jsparse.model.modules import Attend, Block, Ends, LayerCache, Place, Probe, RMSNorm
from jsparse.parallel import constrain

Params = dict[str, Any]
Remat = Literal["none", "full", "dots", "attention"]

_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only each block's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matmul results
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),  # recompute all but attention
}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "start", "length"], meta_fields=["slots"])
@dataclass(frozen=True)
class Cache:
    """A static key-value cache of `slots` slots a row. Rows are left-padded: row b's text starts at slot start[b]."""

    layers: tuple[LayerCache, ...]
    start: jax.Array  # int32 [B]
    length: jax.Array  # int32 [], slots filled
    slots: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=["logits", "aux", "cache"], meta_fields=[])
@dataclass(frozen=True)
class Output:
    logits: jax.Array  # float32 [B, T, V]
    aux: Any  # what the probe returned, stacked over L (a list over layers where the layers are a list)
    cache: Cache | None


# --------------------------------------------------------------------------------------------------------------------
# The parameter tree, from the one declaration in the modules
# --------------------------------------------------------------------------------------------------------------------


def init(key: jax.Array, config: LlamaConfig, mesh: Mesh | None = None) -> Params:
    """Fresh float32 parameters, made in place on the mesh's shards where one is given."""
    out = None if mesh is None else shardings(config, mesh)
    return jax.jit(_init, static_argnames="config", out_shardings=out)(key, config=config)


def _init(key: jax.Array, config: LlamaConfig) -> Params:
    def values(module: nnx.Module) -> Params:
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    ends, blocks = jax.random.split(key)
    keys, shapes = jax.random.split(blocks, config.num_hidden_layers), config.layer_shapes
    if config.layers is None:
        layers: Any = jax.vmap(lambda k: values(Block(config, shapes[0], nnx.Rngs(k))))(keys)
    else:
        layers = [values(Block(config, shape, nnx.Rngs(k))) for shape, k in zip(shapes, keys, strict=True)]
    return values(Ends(config, nnx.Rngs(ends))) | {"layers": layers}


def abstract(config: LlamaConfig, dtype: Any = None) -> Params:
    """The tree's shapes and dtypes, at no cost for any size of model."""
    tree = jax.tree.map(lambda x: x, _cached_abstract(_declared(config)))  # the caller's own
    return tree if dtype is None else jax.eval_shape(lambda p: cast(p, config, dtype), tree)


@functools.cache
def _cached_abstract(config: LlamaConfig) -> Params:
    return jax.eval_shape(functools.partial(_init, config=config), jax.eval_shape(lambda: jax.random.key(0)))


def logical_axes(config: LlamaConfig) -> Params:
    """The tree of logical axis names, each leaf a `PartitionSpec` of names."""
    return _metadata(config, lambda meta, stacked: P("layers", *meta["axes"]) if stacked else P(*meta["axes"]))


def islands(config: LlamaConfig) -> Params:
    """True at the leaves that stay float32 whatever the computation's dtype."""
    return _metadata(config, lambda meta, stacked: meta["island"])


def _metadata(config: LlamaConfig, read: Callable[[Any, bool], Any]) -> Params:
    def tree(state: Any, stacked: bool) -> Params:
        flat = nnx.to_flat_state(state)
        return nnx.traversals.unflatten_mapping({path: read(v.get_metadata(), stacked) for path, v in flat})

    layers: Any = tree(_split(Block, config, config.layer_shapes[0])[1], config.layers is None)
    if config.layers is not None:
        layers = [tree(_split(Block, config, shape)[1], False) for shape in config.layers]
    return tree(_split(Ends, config)[1], False) | {"layers": layers}


def _split(module: Any, config: LlamaConfig, *shape: LayerShape) -> tuple[Any, Any]:
    """Graph definition and abstract state of a module: the only place where modules and trees part."""
    return _cached_split(module, dataclasses.replace(_declared(config), layers=None), *shape)


def _declared(config: LlamaConfig) -> LlamaConfig:
    """A config of the same parameters that has a hash: of the activation only Cett changes what is declared, the others
    may hold a traced threshold."""
    activation = config.activation if isinstance(config.activation, Cett) else Relu()
    return dataclasses.replace(config, activation=activation)


@functools.cache
def _cached_split(module: Any, config: LlamaConfig, *shape: LayerShape) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: module(config, *shape, nnx.Rngs(0))))


def shardings(config: LlamaConfig, mesh: Mesh) -> Params:
    """The tree of `NamedSharding`s on a mesh. Raises ConfigError where a mesh axis does not divide a parameter."""
    return parallel.shardings(logical_axes(config), abstract(config), mesh)


def cast(params: Params, config: LlamaConfig, dtype: Any) -> Params:
    """Parameters in the dtype to compute in, float32 islands (norms, thresholds) excepted."""
    target = jnp.dtype(dtype)
    keep = islands(config)
    if isinstance(params["layers"], list | tuple) and config.layers is None:
        keep = keep | {"layers": [keep["layers"]] * len(params["layers"])}
    return jax.tree.map(lambda k, x: x.astype(jnp.float32 if k else target), keep, params)


def unstack(params: Params) -> Params:
    """The same tree with `layers` as a list of per-layer trees: the form that decodes fastest."""
    layers = params["layers"]
    if isinstance(layers, list | tuple):
        return params
    depth = jax.tree.leaves(layers)[0].shape[0]
    return params | {"layers": [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(depth)]}


def stack(params: Params) -> Params:
    """The inverse of `unstack`, for layers of equal widths."""
    layers = params["layers"]
    if isinstance(layers, dict):
        return params
    return params | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def count(tree: Any) -> int:
    """Number of parameters of a tree of arrays or shapes."""
    return sum(x.size for x in jax.tree.leaves(tree))


# --------------------------------------------------------------------------------------------------------------------
# The forward pass
# --------------------------------------------------------------------------------------------------------------------


def forward(
    params: Params,
    tokens: jax.Array,
    config: LlamaConfig,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    cache: Cache | None = None,
    probe: Probe | None = None,
    remat: Remat = "none",
    attend: Attend = "auto",
) -> Output:
    """Logits of every position.

    Args:
        params: the tree of `init`, stacked or unstacked.
        tokens: int32 [B, T].
        positions: int32 [B, T]; by default 0, 1, 2, ... from the start of each row, segment or cached text.
        segments: int32 [B, T]; tokens attend only within their own segment (packed documents; padding is a segment
            of its own, by convention 0).
        cache: continues the cached text: these tokens go to its next T slots, which must exist.
        probe: statistics to take of every layer's FFN, see `FFNTrace`.
        remat: what the backward pass keeps of a block: all ("none"), only its input ("full"), matmul results
            ("dots") or attention's result ("attention").
        attend: attention kernel; "auto" is cuDNN in half precision on GPUs, XLA otherwise.

    Raises:
        ConfigError: tokens of another shape, or segments, positions or more tokens than a cache takes.
    """
    x, aux, cache = trunk(params, tokens, config, positions=positions, segments=segments, cache=cache, probe=probe,
                          remat=remat, attend=attend)  # fmt: skip
    return Output(logits(x, params), aux, cache)


def trunk(
    params: Params,
    tokens: jax.Array,
    config: LlamaConfig,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    cache: Cache | None = None,
    probe: Probe | None = None,
    remat: Remat = "none",
    attend: Attend = "auto",
    unroll: int = 1,
) -> tuple[jax.Array, Any, Cache | None]:
    """`forward` up to the final norm: hidden states [B, T, D], aux, cache. The loss goes on from here in chunks."""
    check(tokens.ndim == 2, "tokens", "ids [B, T]", f"shape {tokens.shape}")
    embed = constrain(params["embed"], "vocab", None)  # gathered over fsdp, else XLA gathers the batch of activations
    x = constrain(embed[tokens], "batch", "sequence", None)
    if cache is None:
        place = _place(tokens, positions, segments, config)
    else:
        check(segments is None, "segments", "none with a cache", "both")
        place = cached_place(tokens, positions, cache, config)
    layers, shapes = params["layers"], config.layer_shapes
    scan = cache is None and isinstance(layers, dict)

    def block_of(shape: LayerShape) -> Callable[..., Any]:
        graph = _split(Block, config, shape)[0]

        def block(x: jax.Array, layer: Params, layer_cache: LayerCache | None = None) -> Any:
            return nnx.merge(graph, layer)(x, config.activation, place, layer_cache, probe, attend)

        if remat == "none":
            return block
        loop = scan and unroll < config.num_hidden_layers
        # outside of a loop XLA would merge the recomputation with the first computation
        return jax.checkpoint(block, policy=_POLICIES[remat], prevent_cse=not loop)

    if scan:
        block = block_of(shapes[0])

        def body(x: jax.Array, layer: Params) -> tuple[jax.Array, Any]:
            x, _, aux = block(x, layer)
            return x, aux

        x, aux = jax.lax.scan(body, x, layers, unroll=unroll)
    else:
        caches: list[Any] = []
        aux = []
        for i, layer in enumerate(unstack(params)["layers"]):
            x, layer_cache, a = block_of(shapes[i])(x, layer, cache.layers[i] if cache else None)
            caches.append(layer_cache)
            aux.append(a)
        if isinstance(layers, dict):
            aux = jax.tree.map(lambda *a: jnp.stack(a), *aux)
        if cache is not None:
            cache = Cache(tuple(caches), cache.start, cache.length + tokens.shape[1], cache.slots)
    norm = nnx.merge(_split(RMSNorm, config)[0], params["norm"])
    return norm(x), aux, cache


class BlockTrace(NamedTuple):
    """What the matrices of one block read: the probe of a method that goes block by block."""

    attention: jax.Array  # [B, T, D] of query, key and value
    heads: jax.Array  # [B, T, N, H] of output
    ffn: jax.Array  # [B, T, D] of gate and up
    hidden: jax.Array  # [B, T, F] of down


def run_attention(
    layer: Params, x: jax.Array, config: LlamaConfig, attend: Attend = "auto"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first half of a block: x [B, T, D] to the residual stream [B, T, D] between attention and FFN, and the
    `attention` and `heads` of `BlockTrace`."""
    block = nnx.merge(_split(Block, config, config.layer_shapes[0])[0], layer)
    read = block.attention_norm(x)
    heads, _ = block.attention.heads(read, _place(x[..., 0], None, None, config), None, attend)
    return constrain(x + block.attention.project(heads), "batch", "sequence", None), read, heads


def run_ffn(layer: Params, x: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The second half of a block: x [B, T, D] between attention and FFN to the residual stream [B, T, D] after the
    block, and the `ffn` and `hidden` of `BlockTrace`."""
    block = nnx.merge(_split(Block, config, config.layer_shapes[0])[0], layer)
    y, (read, hidden) = block.ffn(block.ffn_norm(x), config.activation, lambda trace: (trace.x, trace.hidden))
    return constrain(x + y, "batch", "sequence", None), read, hidden


def run_block(
    layer: Params, x: jax.Array, config: LlamaConfig, attend: Attend = "auto"
) -> tuple[jax.Array, BlockTrace]:
    """One block of the forward pass, for use under `jax.jit`: what is not used of the trace is not computed.

    Args:
        layer: one element of `unstack(params)["layers"]`.
        config: the model's, or where its layers differ `config.of_layer(i)`.
        x: [B, T, D], the residual stream: token embeddings, or what the block before returned.

    Returns:
        The residual stream [B, T, D] after the block, and what its matrices read.
    """
    x, *attention = run_attention(layer, x, config, attend)
    x, *ffn = run_ffn(layer, x, config)
    return x, BlockTrace(*attention, *ffn)


def head(params: Params) -> jax.Array:
    """The output matrix [D, V]: the head's, or the embedding's transpose where they are tied."""
    return params["head"] if "head" in params else params["embed"].T


def logits(x: jax.Array, params: Params) -> jax.Array:
    """float32 [..., V] of hidden states [..., D]."""
    y = jnp.einsum("...D,DV->...V", x, head(params), preferred_element_type=jnp.float32)
    return constrain(y, "batch", *["sequence"] * (x.ndim - 2), "vocab")


def init_cache(params: Params, batch: int, slots: int, start: jax.Array | None = None) -> Cache:
    """An empty cache for `batch` rows of at most `slots` tokens, in the parameters' dtype and layer widths."""

    def zeros(weight: Any) -> jax.Array:  # [D, K, H]
        shape = (batch, slots, *weight.shape[-2:])
        return constrain(jnp.zeros(shape, weight.dtype), "batch", "sequence", "kv_heads", "head_dim")

    layers = params["layers"]
    if isinstance(layers, dict):
        attention = [layers["attention"]] * jax.tree.leaves(layers)[0].shape[0]
    else:
        attention = [layer["attention"] for layer in layers]
    caches = tuple(LayerCache(zeros(a["key"]), zeros(a["value"])) for a in attention)
    start = jnp.zeros(batch, jnp.int32) if start is None else start
    return Cache(caches, start, jnp.zeros((), jnp.int32), slots)


def _place(tokens: jax.Array, positions: jax.Array | None, segments: jax.Array | None, config: LlamaConfig) -> Place:
    steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    mask = None
    if segments is not None:
        causal = steps[:, :, None] >= steps[:, None, :]
        mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
    if positions is None:
        positions = jnp.broadcast_to(steps, tokens.shape)
        if segments is not None:
            first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
            positions = positions - jax.lax.cummax(jnp.where(first, positions, 0), axis=1)
    return Place(*rope.table(positions, jnp.max(positions) + 1, config), mask)


def cached_place(tokens: jax.Array, positions: jax.Array | None, cache: Cache, config: LlamaConfig) -> Place:
    """Where tokens [B, T] stand that go to a cache's next slots."""
    by_length = rope.needs_length(config.rope)
    check(tokens.shape[1] <= cache.slots, "cache", f"slots for {tokens.shape[1]} tokens", cache.slots)
    check(positions is None or not by_length, "positions", "none with a cache whose keys are rotated late", config.rope)
    queries = cache.length + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]  # slots
    slots = jnp.arange(cache.slots, dtype=jnp.int32)[None]
    start = cache.start[:, None]
    if positions is None:
        positions = jnp.maximum(queries - start, 0)
    visible = (slots[:, None, :] <= queries[:, :, None]) & (slots >= start)[:, None, :]
    itself = slots[:, None, :] == queries[:, :, None]  # padding sees itself, so that no row is empty
    length = jnp.max(positions) + 1
    keys = rope.table(jnp.maximum(slots - start, 0), length, config) if by_length else None
    return Place(*rope.table(positions, length, config), (visible | itself)[:, None], cache.length, keys)
