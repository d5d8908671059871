"""The decode form of a model: weights packed once, in the layouts that one token's matrix-vector products read best.

    decoder = pack(params, config)
    generate(decoder, config, prompts, max_new_tokens=64)

A token reads every weight once and computes next to nothing, so its time is the bytes of the weights over the memory's
bandwidth, plus what each kernel takes to start. Hence this form:

- layers are a tuple of per-layer arrays, and the pass over them is unrolled: a scan would copy each layer's weights;
- query, key and value are one matrix, outputs first; gate, up and down are neuron-major, [F, D] each, so that a neuron
  that is not active is three rows that nobody reads;
- the residual stream is float32, and the FFN's kernel adds to it in place.

The dense pass over several tokens (the prompt) runs on the same arrays: there is no second copy of the weights.

What a decoder can skip depends on its model:

    blocks      a router names the blocks of neurons that a token uses (LTE, mode "hard")
    neurons     the gate's activation is zero for most neurons: the gate is computed whole, up and down only where it
                is not zero (ReLU, FATReLU, CETT, CATS; exact)
    predicted   a predictor names the neurons, and the gate is skipped too (approximate)
    packed      N:M weights (`jsparse.methods.packing`) leave out their zeros; every step reads the same

Layers may differ in that: some may have no predictor, or matrices that are not packed.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jsparse import config as configs
from jsparse.config import LayerShape, LlamaConfig, check
from jsparse.model import Cache, Params, activate, rms_norm, routing
from jsparse.model.llama import cached_place
from jsparse.model.modules import LayerCache, Place, mix_heads
from pallas_kernels.add_rms_norm import add_norm_route, add_rms_norm
from pallas_kernels.backend import Implementation as KernelImplementation
from pallas_kernels.block_sparse_ffn import block_sparse_ffn
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.ffn import Activation, PackedFFN, pack_ffn
from pallas_kernels.matvec import matvec
from pallas_kernels.neuron_sparse_ffn import Predictor, neuron_sparse_ffn
from pallas_kernels.neuron_sparse_ffn.reference import predicted_neurons
from pallas_kernels.nm_matmul import PackedNM, nm_ffn, unpack

Kind = Literal["blocks", "neurons", "predicted", "packed"]
# How an FFN of one token a row is computed: whole, by the best kernel there is, or by a named one
Implementation = Literal["dense", "sparse", "reference", "xla", "triton", "mosaic_gpu", "mosaic_tpu"]


class Attention(NamedTuple):
    qkv: jax.Array  # [(N + 2 K) H, D]
    output: jax.Array  # [D, N H]
    qkv_bias: jax.Array | None  # [(N + 2 K) H]
    output_bias: jax.Array | None  # [D]


class NMFfn(NamedTuple):
    """The matrices of an FFN in packed N:M form."""

    gate: PackedNM  # [D, F]
    up: PackedNM  # [D, F]
    down: PackedNM  # [F, D]


class Ffn(NamedTuple):
    """An FFN, and what its model may have beside the three matrices: None where it has not."""

    weights: Any  # PackedFFN: gate, up and down, [F, D] each; or NMFfn
    gate_bias: Any = None  # [F]
    up_bias: Any = None
    down_bias: Any = None  # [D]
    cutoff: Any = None  # float32 [F], CETT's thresholds
    router: Any = None  # float32 [E, D]: rounded, it would name other blocks than the model's own
    router_threshold: Any = None  # float32 []
    predictor: Any = None  # Predictor


class Layer(NamedTuple):
    attention_norm: jax.Array  # float32 [D]
    attention: Attention
    ffn_norm: jax.Array  # float32 [D]
    ffn: Ffn


class Decoder(NamedTuple):
    """A model's parameters, packed. A pytree."""

    embed: jax.Array  # [V, D]
    layers: tuple[Layer, ...]
    norm: jax.Array  # float32 [D]
    head: jax.Array  # [V, D]; the embedding itself where they are tied


def pack(params: Params, config: LlamaConfig, predictors: Sequence[Predictor | None] | None = None) -> Decoder:
    """Packs a model's parameters, in their dtypes. Layers may differ in their widths.

    The result shares no matrix with `params` but the embedding: drop them where memory is short.

    Args:
        params: stacked or unstacked.
        predictors: of each layer's active neurons, see `jsparse.methods.predictor`; None of a layer without. They are
            used while decoding, not for the prompt.
    """
    if isinstance(params["layers"], dict):
        layers = tuple(_pack_stacked(params["layers"], i) for i in range(config.num_hidden_layers))
    else:
        layers = tuple(map(_pack_layer, params["layers"]))
    if predictors is not None:
        check(len(predictors) == len(layers), "predictors", f"one, or None, of each of the {len(layers)} layers",
              len(predictors))  # fmt: skip
        layers = tuple(layer._replace(ffn=layer.ffn._replace(predictor=predictor))
                       for layer, predictor in zip(layers, predictors, strict=True))  # fmt: skip
    out = _outputs_first(params["head"]) if "head" in params else params["embed"]
    return Decoder(params["embed"], layers, params["norm"]["scale"], out)


@jax.jit
def _pack_stacked(layers: Params, index: Any) -> Layer:
    """One layer of a stack; the index is an argument, so that all layers compile once."""
    return _pack_layer(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), layers))


@jax.jit
def _pack_layer(layer: Params) -> Layer:
    attention, ffn = layer["attention"], layer["ffn"]
    heads = ("query", "key", "value")
    biases = [attention[f"{name}_bias"].reshape(-1) for name in heads if f"{name}_bias" in attention]
    return Layer(
        attention_norm=layer["attention_norm"]["scale"],
        attention=Attention(
            qkv=jnp.concatenate([_outputs_first(attention[name]) for name in heads]),
            output=attention["output"].reshape(-1, attention["output"].shape[-1]).T,
            qkv_bias=jnp.concatenate(biases) if biases else None,
            output_bias=attention.get("output_bias"),
        ),
        ffn_norm=layer["ffn_norm"]["scale"],
        ffn=Ffn(
            weights=_ffn_weights(ffn["gate"], ffn["up"], ffn["down"]),
            gate_bias=ffn.get("gate_bias"),
            up_bias=ffn.get("up_bias"),
            down_bias=ffn.get("down_bias"),
            cutoff=ffn.get("threshold"),
            router=ffn["router"].T if "router" in ffn else None,
            router_threshold=ffn.get("router_threshold"),
        ),
    )


def _ffn_weights(gate: Any, up: Any, down: Any) -> PackedFFN | NMFfn:
    """Packed N:M where all three are, gate and up alike; otherwise what is packed of them comes out dense."""
    if all(isinstance(w, PackedNM) for w in (gate, up, down)) and gate.axis == up.axis and gate.m == up.m:
        return NMFfn(gate, up, down)
    return pack_ffn(*(unpack(w) if isinstance(w, PackedNM) else w for w in (gate, up, down)))


def unpacked(decoder: Decoder) -> Decoder:
    """With dense weights in place of packed N:M ones: more memory, for steps that packed ones would not make faster.
    What is dense is shared with `decoder`."""
    return decoder._replace(layers=tuple(
        layer._replace(ffn=layer.ffn._replace(weights=_dense_weights(layer.ffn.weights))) for layer in decoder.layers
    ))  # fmt: skip


def _dense_weights(weights: PackedFFN | NMFfn) -> PackedFFN:
    return _unpack_ffn(weights) if isinstance(weights, NMFfn) else weights  # not within jit, which would copy it


@jax.jit
def _unpack_ffn(weights: NMFfn) -> PackedFFN:
    return pack_ffn(*map(unpack, weights))


def _outputs_first(matrix: jax.Array) -> jax.Array:
    """[D, outputs...] -> [outputs, D]."""
    return matrix.reshape(matrix.shape[0], -1).T


# --------------------------------------------------------------------------------------------------------------------
# The forward pass
# --------------------------------------------------------------------------------------------------------------------


def trunk(
    decoder: Decoder, tokens: jax.Array, config: LlamaConfig, cache: Cache, predicted: bool = False
) -> tuple[jax.Array, Cache, jax.Array | None]:
    """Hidden states of a prompt, tokens int32 [B, T], which go to the cache's next T slots; dense.

    What `jsparse.model.trunk` computes of the unpacked parameters, with the residual stream in float32.

    Args:
        predicted: lets the predictors decide, as steps of decoding do; to see what that costs.

    Returns:
        [B, T, D] in the parameters' dtype after the final norm; the cache after these tokens; and, where steps of
        decoding can leave something out, the share of each layer that the last tokens used, float32 [L].
    """
    x = decoder.embed[tokens].astype(jnp.float32)
    place = cached_place(tokens, None, cache, config)
    real = cache.length + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] >= cache.start[:, None]  # not padding
    caches, shares = [], []
    for layer, shape, layer_cache in zip(decoder.layers, config.layer_shapes, cache.layers, strict=True):
        x, layer_cache, share = _layer_of_trunk(layer, x, layer_cache, place, real, config, shape, predicted)
        caches.append(layer_cache)
        shares.append(share)
    x = rms_norm(x, decoder.norm, config.rms_norm_eps).astype(decoder.embed.dtype)
    filled = Cache(tuple(caches), cache.start, cache.length + tokens.shape[1], cache.slots)
    return x, filled, jnp.stack(shares) if can_skip(decoder, config) else None


# A function of its own under jit, so that layers of one shape are traced and lowered once; XLA puts it in place.
@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _layer_of_trunk(
    layer: Layer,
    x: jax.Array,
    layer_cache: LayerCache,
    place: Place,
    real: jax.Array,
    config: LlamaConfig,
    shape: LayerShape,
    predicted: bool,
) -> tuple[jax.Array, LayerCache, jax.Array]:
    """The residual stream after a layer, its cache, and the share that the last tokens used of it."""
    dtype = layer.attention.qkv.dtype
    with jax.named_scope("attention"):
        normed = rms_norm(x, layer.attention_norm, config.rms_norm_eps).astype(dtype)
        y, layer_cache = _attention(layer.attention, normed, config, shape, place, layer_cache)
        x = x + y
    with jax.named_scope("ffn"):
        normed = rms_norm(x, layer.ffn_norm, config.rms_norm_eps).astype(dtype)
        share = used_share(layer.ffn, normed[:, -WINDOW:], config, real[:, -WINDOW:])
        return x + dense_ffn(layer.ffn, normed, config, predicted), layer_cache, share


def step(
    decoder: Decoder,
    tokens: jax.Array,
    config: LlamaConfig,
    cache: Cache,
    implementation: Implementation = "dense",
    rest: KernelImplementation | None = None,
) -> tuple[jax.Array, Cache]:
    """Hidden states of one new token a row, int32 [B], which go to the cache's next slot.

    What `trunk` computes of tokens [B, 1], by kernels that do more each.

    Args:
        implementation: how FFNs are computed of which a token can leave something out; the others are dense. Of a
            router's blocks even "dense" leaves out those that nobody names, where the kernel for all of them can.
        rest: the kernels of all else, by name; None: the best there are. On a CPU, Pallas's are interpreted.

    Returns:
        [B, D] in the parameters' dtype after the final norm, and the cache.
    """
    x = decoder.embed[tokens].astype(jnp.float32)
    delta = None  # what is still to be added to the residual stream
    place = cached_place(tokens[:, None], None, cache, config)
    caches = []
    for layer, shape, layer_cache in zip(decoder.layers, config.layer_shapes, cache.layers, strict=True):
        x, delta, layer_cache = _layer_of_step(layer, x, delta, layer_cache, place, cache.start, cache.length, config,
                                               shape, implementation, rest)  # fmt: skip
        caches.append(layer_cache)
    _, x = _add_norm(x, decoder.norm, delta, decoder.embed.dtype, config, rest)
    return x, Cache(tuple(caches), cache.start, cache.length + 1, cache.slots)


@functools.partial(jax.jit, static_argnums=(7, 8, 9, 10))
def _layer_of_step(
    layer: Layer,
    x: jax.Array,
    delta: jax.Array | None,
    layer_cache: LayerCache,
    place: Place,
    start: jax.Array,
    length: jax.Array,
    config: LlamaConfig,
    shape: LayerShape,
    implementation: Implementation,
    rest: KernelImplementation | None,
) -> tuple[jax.Array, jax.Array | None, LayerCache]:
    """The residual stream after a layer, what is still to be added to it, and the layer's cache."""
    dtype = layer.attention.qkv.dtype
    with jax.named_scope("attention"):
        x, normed = _add_norm(x, layer.attention_norm, delta, dtype, config, rest)
        delta, layer_cache = _attend_once(layer.attention, normed, config, shape, place, layer_cache, start, length,
                                          rest)  # fmt: skip
    with jax.named_scope("ffn"):
        x, delta = ffn_of_step(layer.ffn_norm, layer.ffn, x, delta, config, implementation, rest)
        return x, delta, layer_cache


def ffn_of_step(
    norm: jax.Array,
    ffn: Ffn,
    x: jax.Array,
    delta: jax.Array | None,
    config: LlamaConfig,
    implementation: Implementation,
    rest: KernelImplementation | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Adds delta to the residual stream, normalises it, and adds the FFN of that: x and delta float32 [B, D], norm
    float32 [D].

    Returns:
        The residual stream, and what is still to be added to it.
    """
    dtype = ffn.weights.gate.dtype
    kind, whole = sparse_kind(ffn, config), implementation == "dense"
    streams = rest != "xla" and x.shape[0] <= FEW
    if kind == "blocks" and (streams or not whole):
        # many rows are better normalised once than by every program that scores blocks
        route = rest if streams else "xla"
        x, normed, mask = add_norm_route(x, norm, config.rms_norm_eps, dtype, ffn.router, ffn.router_threshold,
                                         delta=delta, implementation=route, interpret=_interpreted())  # fmt: skip
        chosen: Implementation = (rest or "sparse") if whole else implementation
        return sparse_ffn(ffn, normed, x, config, chosen, mask, most=whole), None
    x, normed = _add_norm(x, norm, delta, dtype, config, rest)
    if kind is not None and not whole:
        return sparse_ffn(ffn, normed, x, config, implementation), None
    if streams and _plain(ffn, config):
        return whole_ffn(ffn, normed, x, config, rest), None
    return x, dense_ffn(ffn, normed, config)


def _add_norm(
    x: jax.Array, scale: jax.Array, delta: jax.Array | None, dtype: Any, config: LlamaConfig, rest: Any
) -> tuple[jax.Array, jax.Array]:
    return add_rms_norm(x, scale, config.rms_norm_eps, dtype, delta=delta, implementation=rest,
                        interpret=_interpreted())  # fmt: skip


def _interpreted() -> bool:
    return jax.default_backend() == "cpu"


def logits(x: jax.Array, decoder: Decoder, rest: KernelImplementation | None = "xla") -> jax.Array:
    """float32 [B, V] of hidden states [B, D]."""
    return matvec(x, decoder.head, implementation=rest, interpret=_interpreted())


def empty_cache(decoder: Decoder, batch: int, slots: int, start: jax.Array, config: LlamaConfig) -> Cache:
    """An empty cache for `batch` rows of at most `slots` tokens, row b's text from slot start[b] on."""

    def zeros(head_dim: int) -> jax.Array:
        return jnp.zeros((batch, slots, config.num_key_value_heads, head_dim), decoder.embed.dtype)

    caches = (LayerCache(zeros(shape.query_dim(config)), zeros(shape.value_dim)) for shape in config.layer_shapes)
    return Cache(tuple(caches), start, jnp.zeros((), jnp.int32), slots)


def _attention(
    attention: Attention, x: jax.Array, config: LlamaConfig, shape: LayerShape, place: Place, cache: LayerCache
) -> tuple[jax.Array, LayerCache]:
    """x [B, T, D] -> float32 [B, T, D], and the cache with these tokens written to it."""
    b, t, h = *x.shape[:2], shape.query_dim(config)
    n, k = config.num_attention_heads, config.num_key_value_heads
    qkv = _add(_product(x, attention.qkv), attention.qkv_bias).astype(x.dtype)
    q, key, value = jnp.split(qkv, (n * h, (n + k) * h), axis=2)
    q, key, value = q.reshape(b, t, n, h), key.reshape(b, t, k, h), value.reshape(b, t, k, shape.value_dim)
    y, filled = mix_heads(q, key, value, place, cache, "auto", config.head_dim**-0.5, shape.rope_pairs)
    assert filled is not None
    return _add(_product(y.reshape(b, t, -1), attention.output), attention.output_bias), filled


def _attend_once(
    attention: Attention, x: jax.Array, config: LlamaConfig, shape: LayerShape, place: Place, layer_cache: LayerCache,
    start: jax.Array, length: jax.Array, rest: KernelImplementation | None,
) -> tuple[jax.Array, LayerCache]:  # fmt: skip
    """`_attention` of one token a row: x [B, D] -> float32 [B, D], and the layer's cache."""
    plain = shape.rope_pairs is None and shape.value_dim == config.head_dim and place.key_table is None
    if not plain:
        y, layer_cache = _attention(attention, x[:, None], config, shape, place, layer_cache)
        return y[:, 0], layer_cache
    product = functools.partial(matvec, implementation=rest, interpret=_interpreted())
    at_once = x.dtype if attention.qkv_bias is None else jnp.float32  # rounded only after the bias
    qkv = _add(product(x, attention.qkv, dtype=at_once), attention.qkv_bias).astype(x.dtype)
    y, *filled = decode_attention(qkv, *layer_cache, place.cos[:, 0], place.sin[:, 0], start, length,
                                  implementation=rest, interpret=_interpreted())  # fmt: skip
    return _add(product(y, attention.output), attention.output_bias), LayerCache(*filled)


# --------------------------------------------------------------------------------------------------------------------
# The FFN: whole, or what is used of it
# --------------------------------------------------------------------------------------------------------------------


def can_skip(decoder: Decoder, config: LlamaConfig) -> bool:
    """Whether a token can leave out something of some layer."""
    return any(sparse_kind(layer.ffn, config) is not None for layer in decoder.layers)


def sparse_kind(ffn: Ffn, config: LlamaConfig) -> Kind | None:
    """What of an FFN a token can leave out; None: nothing, or nothing that a kernel knows of."""
    activation = _kernel_activation(config.activation)
    if activation is None or ffn.gate_bias is not None:
        return None
    if isinstance(ffn.weights, NMFfn):
        return "packed" if config.router is None and ffn.cutoff is None and ffn.predictor is None else None
    if config.router is not None:
        return "blocks" if config.router.mode == "hard" and ffn.cutoff is None else None
    if ffn.predictor is not None:
        return "predicted"
    return "neurons" if activation.kind in ("relu", "fatrelu", "cats") else None


def sparse_ffn(
    ffn: Ffn,
    x: jax.Array,
    residual: jax.Array,
    config: LlamaConfig,
    implementation: Implementation,
    mask: jax.Array | None = None,
    most: bool = False,
) -> jax.Array:
    """residual + FFN(x) by a kernel that reads what is used: x [B, D], residual and result float32 [B, D].

    Args:
        mask: bool [B, E], the blocks that the router chose, where there is one.
        most: whether most of them are likely to be in use.
    """
    shared: dict[str, Any] = {
        "activation": _kernel_activation(config.activation),
        "residual": residual,
        "implementation": None if implementation == "sparse" else implementation,
        "interpret": _interpreted(),
    }
    if isinstance(ffn.weights, NMFfn):
        return nm_ffn(x, *ffn.weights, **shared)
    if config.router is not None:
        assert mask is not None
        return block_sparse_ffn(x, ffn.weights, mask=mask, block_size=config.router.block_size, most=most, **shared)
    return neuron_sparse_ffn(x, ffn.weights, ffn.predictor, cutoff=ffn.cutoff, **shared)


FEW = 4  # rows up to which a kernel that streams weights past them beats XLA's matrix products


def _plain(ffn: Ffn, config: LlamaConfig) -> bool:
    """Whether `whole_ffn` knows this FFN."""
    bare = config.router is None and ffn.gate_bias is None and ffn.cutoff is None
    return bare and isinstance(ffn.weights, PackedFFN) and _kernel_activation(config.activation) is not None


def whole_ffn(
    ffn: Ffn, x: jax.Array, residual: jax.Array, config: LlamaConfig, rest: KernelImplementation | None
) -> jax.Array:
    """residual + FFN(x) with every neuron computed, by the block-sparse kernel with every block in use."""
    neurons = ffn.weights.gate.shape[0]
    block = next(size for size in (32, 16, 8, neurons) if neurons % size == 0)
    activation = _kernel_activation(config.activation)
    assert activation is not None
    return block_sparse_ffn(x, ffn.weights, block_size=block, activation=activation, residual=residual,
                            implementation=rest, interpret=_interpreted())  # fmt: skip


def dense_ffn(ffn: Ffn, x: jax.Array, config: LlamaConfig, predicted: bool = False) -> jax.Array:
    """FFN(x) with every neuron computed, those of no use in vain: x [..., D] -> float32 [..., D]."""
    ffn = ffn._replace(weights=_dense_weights(ffn.weights))
    hidden = _gate(ffn, x, config) * _add(_product(x, ffn.weights.up), ffn.up_bias).astype(x.dtype)
    if ffn.cutoff is not None:
        kept = jnp.abs(hidden).astype(jnp.float32) >= _along(ffn.cutoff, hidden)
        hidden = jnp.where(kept, hidden, jnp.zeros((), hidden.dtype))
    if config.router is not None:
        hidden = routing.scale(hidden, _factors(ffn, x, hidden, config), config.router.block_size)
    if predicted and ffn.predictor is not None:
        hidden = jnp.where(_predicted(ffn, x), hidden, jnp.zeros((), hidden.dtype))
    y = jnp.einsum("...F,FD->...D", hidden, ffn.weights.down, preferred_element_type=jnp.float32)
    return _add(y, ffn.down_bias)


WINDOW = 16  # tokens of a prompt whose choices tell what decoding will use


def used_share(ffn: Ffn, x: jax.Array, config: LlamaConfig, real: jax.Array) -> jax.Array:
    """The share of blocks or neurons that some row of the batch uses, a mean over T; float32 [].

    Rows of a batch share what is read, so this is what T steps of decoding would have had to read.

    Args:
        x: [B, T, D].
        real: bool [B, T], tokens that count.
    """
    match sparse_kind(ffn, config):
        case None | "packed":
            return jnp.float32(1)
        case "blocks":
            used = _factors(ffn, x, None, config) > 0
        case "neurons":
            used = _gate(ffn, x, config) != 0
        case "predicted":
            used = _predicted(ffn, x)
    used = jnp.any(used & real[..., None], axis=0)
    steps = jnp.sum(jnp.any(real, axis=0), dtype=jnp.float32)
    return jnp.sum(used, dtype=jnp.float32) / (steps * used.shape[-1])


def _predicted(ffn: Ffn, x: jax.Array) -> jax.Array:
    """The neurons that the layer's predictor names: x [..., D] -> bool [..., F]."""
    return predicted_neurons(x.reshape(-1, x.shape[-1]), ffn.predictor).reshape(*x.shape[:-1], -1)


def _gate(ffn: Ffn, x: jax.Array, config: LlamaConfig) -> jax.Array:
    """act(x W_gate): [..., F] in x's dtype."""
    return activate(config.activation, _add(_product(x, ffn.weights.gate), ffn.gate_bias).astype(x.dtype))


def _factors(ffn: Ffn, x: jax.Array, hidden: Any, config: LlamaConfig) -> jax.Array:
    """The factor of every block of neurons, float32 [..., E]."""
    router = config.router
    assert router is not None
    if router.mode == "oracle":
        scores = routing.block_sums(hidden, router.block_size)
    else:
        scores = routing.router_logits(router, x, ffn.router.T)
    return routing.gates(router, scores, ffn.router_threshold)


def _kernel_activation(activation: configs.Activation) -> Activation | None:
    """The kernels' name of an activation; None where they have none."""
    match activation:
        case configs.Silu():
            return Activation("silu")
        case configs.Gelu(approximate):
            return Activation("gelu_tanh" if approximate else "gelu")
        case configs.Relu() | configs.Cett():
            return Activation("relu")
        case configs.FatRelu(threshold):
            return Activation("fatrelu", threshold)
        case configs.Cats(threshold):
            return Activation("cats", threshold)
    return None


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """float32 [..., O] of x [..., I] and a matrix [O, I]."""
    return jnp.einsum("...I,OI->...O", x, matrix, preferred_element_type=jnp.float32)


def _add(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + _along(bias.astype(x.dtype), x)


def _along(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector as an array that broadcasts along the last axis of x."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
