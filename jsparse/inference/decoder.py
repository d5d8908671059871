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
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jsparse.config import LayerShape, LlamaConfig
from jsparse.model import Cache, Params, activate, rms_norm
from jsparse.model.llama import cached_place
from jsparse.model.modules import LayerCache, Place, mix_heads


class Attention(NamedTuple):
    qkv: jax.Array  # [(N + 2 K) H, D]
    output: jax.Array  # [D, N H]
    qkv_bias: jax.Array | None  # [(N + 2 K) H]
    output_bias: jax.Array | None  # [D]


class Ffn(NamedTuple):
    gate: jax.Array  # [F, D]
    up: jax.Array  # [F, D]
    down: jax.Array  # [F, D]
    gate_bias: jax.Array | None  # [F]
    up_bias: jax.Array | None
    down_bias: jax.Array | None  # [D]
    threshold: jax.Array | None  # float32 [F], CETT's


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


def pack(params: Params, config: LlamaConfig) -> Decoder:
    """Packs a model's parameters, in their dtype. Layers may differ in their widths.

    The result shares no matrix with `params` but the embedding: drop them where memory is short.
    """
    if isinstance(params["layers"], dict):
        count = config.num_hidden_layers
        layers = tuple(_pack_stacked(params["layers"], i) for i in range(count))
    else:
        layers = tuple(map(_pack_layer, params["layers"]))
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
            gate=ffn["gate"].T,
            up=ffn["up"].T,
            down=ffn["down"],
            gate_bias=ffn.get("gate_bias"),
            up_bias=ffn.get("up_bias"),
            down_bias=ffn.get("down_bias"),
            threshold=ffn.get("threshold"),
        ),
    )


def _outputs_first(matrix: jax.Array) -> jax.Array:
    """[D, outputs...] -> [outputs, D]."""
    return matrix.reshape(matrix.shape[0], -1).T


# --------------------------------------------------------------------------------------------------------------------
# The forward pass
# --------------------------------------------------------------------------------------------------------------------


def trunk(decoder: Decoder, tokens: jax.Array, config: LlamaConfig, cache: Cache) -> tuple[jax.Array, Cache]:
    """Hidden states of tokens int32 [B, T], which go to the cache's next T slots, and the cache after them.

    What `jsparse.model.trunk` computes of the unpacked parameters, with the residual stream in float32.

    Returns:
        [B, T, D] in the parameters' dtype, after the final norm, and the cache.
    """
    dtype = decoder.embed.dtype
    x = decoder.embed[tokens].astype(jnp.float32)
    place = cached_place(tokens, None, cache, config)
    caches = []
    for layer, shape, layer_cache in zip(decoder.layers, config.layer_shapes, cache.layers, strict=True):
        with jax.named_scope("attention"):
            normed = rms_norm(x, layer.attention_norm, config.rms_norm_eps).astype(dtype)
            y, layer_cache = _attention(layer.attention, normed, config, shape, place, layer_cache)
            x = x + y
        with jax.named_scope("ffn"):
            normed = rms_norm(x, layer.ffn_norm, config.rms_norm_eps).astype(dtype)
            x = x + _dense_ffn(layer.ffn, normed, config)
        caches.append(layer_cache)
    x = rms_norm(x, decoder.norm, config.rms_norm_eps).astype(dtype)
    return x, Cache(tuple(caches), cache.start, cache.length + tokens.shape[1], cache.slots)


def logits(x: jax.Array, decoder: Decoder) -> jax.Array:
    """float32 [..., V] of hidden states [..., D]."""
    return _product(x, decoder.head)


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


def _dense_ffn(ffn: Ffn, x: jax.Array, config: LlamaConfig) -> jax.Array:
    """x [B, T, D] -> float32 [B, T, D]: every neuron computed, the ones that are not active as zeros."""
    gate = _add(_product(x, ffn.gate), ffn.gate_bias).astype(x.dtype)
    up = _add(_product(x, ffn.up), ffn.up_bias).astype(x.dtype)
    hidden = activate(config.activation, gate) * up
    if ffn.threshold is not None:
        kept = jnp.abs(hidden).astype(jnp.float32) >= ffn.threshold[None, None]
        hidden = jnp.where(kept, hidden, jnp.zeros((), hidden.dtype))
    y = jnp.einsum("BTF,FD->BTD", hidden, ffn.down, preferred_element_type=jnp.float32)
    return _add(y, ffn.down_bias)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """float32 [..., O] of x [..., I] and a matrix [O, I]."""
    return jnp.einsum("...I,OI->...O", x, matrix, preferred_element_type=jnp.float32)


def _add(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias.astype(x.dtype)[None, None]
