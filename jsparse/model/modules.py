"""The LLaMA block as Flax NNX modules. Each `__init__` is the one declaration of its parameters: shape, initialiser,
logical axes and whether they stay float32. Modules hold no state; `llama.py` merges them with a parameter tree.

Shapes follow the order of use, inputs first: gate [D, F], query [D, N, H], output [N, H, D].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jsparse.config import Activation, Cats, Cett, FatRelu, Gelu, LayerShape, LlamaConfig, Relu, ShiftedRelu, Silu
from jsparse.model import rope, routing
from jsparse.parallel import constrain

Attend = Literal["auto", "xla", "cudnn"]


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], init: Any, island: bool = False) -> nnx.Param:
    """Declares a parameter. `island`: stays float32 when the others are cast for computing."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes, island=island)


class RMSNorm(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.scale = param(rngs, (config.hidden_size,), ("norm",), jax.nn.initializers.ones, island=True)
        self.eps = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """float32 [B, T, D] of x [B, T, D] and scale [D]."""
    y = x.astype(jnp.float32)
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale[None, None]


# --------------------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------------------


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [B, S, K, H]. Keys are unrotated where RoPE depends on the length."""

    k: jax.Array
    v: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["cos", "sin", "mask", "slot", "key_table"], meta_fields=[])
@dataclass(frozen=True)
class Place:
    """Where the tokens of this call stand: what attention needs to know beside x. Arrays of one forward pass."""

    cos: jax.Array  # [B, T, H/2], of the queries
    sin: jax.Array
    mask: jax.Array | None = None  # bool [B, 1, T, S]; None: causal over the T tokens themselves
    slot: jax.Array | int = 0  # cache slot of the first token
    key_table: tuple[jax.Array, jax.Array] | None = None  # cos and sin [B, S, H/2] of cached keys kept unrotated


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions.

    Queries and keys may keep a part of their rotary pairs, each at its own frequency, and values a part of their
    dims; the softmax's scale stays that of the whole head.
    """

    def __init__(self, config: LlamaConfig, shape: LayerShape, rngs: nnx.Rngs):
        d, n, k, h = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.scale, self.pairs = h**-0.5, shape.rope_pairs
        h, v = shape.query_dim(config), shape.value_dim
        normal = jax.nn.initializers.normal(config.initializer_range)
        zeros = jax.nn.initializers.zeros
        self.query = param(rngs, (d, n, h), ("embed", "heads", "head_dim"), normal)
        self.key = param(rngs, (d, k, h), ("embed", "kv_heads", "head_dim"), normal)
        self.value = param(rngs, (d, k, v), ("embed", "kv_heads", "head_dim"), normal)
        self.output = param(rngs, (n, v, d), ("heads", "head_dim", "embed"), normal)
        self.bias = config.attention_bias
        if config.attention_bias:
            self.query_bias = param(rngs, (n, h), ("heads", "head_dim"), zeros)
            self.key_bias = param(rngs, (k, h), ("kv_heads", "head_dim"), zeros)
            self.value_bias = param(rngs, (k, v), ("kv_heads", "head_dim"), zeros)
            self.output_bias = param(rngs, (d,), ("norm",), zeros)

    def __call__(
        self, x: jax.Array, place: Place, cache: LayerCache | None, attend: Attend
    ) -> tuple[jax.Array, LayerCache | None]:
        """x [B, T, D] -> [B, T, D], and the cache with these tokens written to it."""
        heads, cache = self.heads(x, place, cache, attend)
        return self.project(heads), cache

    def project(self, heads: jax.Array) -> jax.Array:
        """The output projection: [B, T, N, H] -> [B, T, D]."""
        y = jnp.einsum("BTNH,NHD->BTD", heads, self.output[...])
        return y + self.output_bias[None, None] if self.bias else y

    def heads(
        self, x: jax.Array, place: Place, cache: LayerCache | None, attend: Attend
    ) -> tuple[jax.Array, LayerCache | None]:
        """What the output projection reads: x [B, T, D] -> [B, T, N, H], and the cache."""
        q = jnp.einsum("BTD,DNH->BTNH", x, self.query[...])
        k = jnp.einsum("BTD,DKH->BTKH", x, self.key[...])
        v = jnp.einsum("BTD,DKH->BTKH", x, self.value[...])
        if self.bias:
            q = q + self.query_bias[None, None]
            k = k + self.key_bias[None, None]
            v = v + self.value_bias[None, None]
        return mix_heads(q, k, v, place, cache, attend, self.scale, self.pairs)


def mix_heads(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    place: Place,
    cache: LayerCache | None,
    attend: Attend,
    scale: float,
    pairs: tuple[tuple[int, ...], ...] | None,
) -> tuple[jax.Array, LayerCache | None]:
    """Rotary attention of q [B, T, N, H] to k, v [B, T, K, H] and to what is cached -> [B, T, N, H], and the cache.

    The H of v and of the result may be another than that of q and k; `scale` is the softmax's and `pairs` as in
    `LayerShape.rope_pairs`.
    """
    q = rope.rotate(q, place.cos, place.sin, pairs)
    if place.key_table is None:
        k = rope.rotate(k, place.cos, place.sin, pairs)
    if cache is not None:
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=place.slot, axis=1)
        cache = LayerCache(write(cache.k, k), write(cache.v, v))
        k, v = cache
    if place.key_table is not None:
        k = rope.rotate(k, *place.key_table, pairs)
    q = constrain(q, "batch", "sequence", "heads", "head_dim")
    k = constrain(k, "batch", "sequence", "kv_heads", "head_dim")
    v = constrain(v, "batch", "sequence", "kv_heads", "head_dim")
    width, head = v.shape[-1], max(q.shape[-1], v.shape[-1])  # jax knows one head dim: zeros fill the smaller up
    q, k, v = (x if x.shape[-1] == head else jnp.pad(x, [(0, 0)] * 3 + [(0, head - x.shape[-1])]) for x in (q, k, v))
    implementation = _implementation(attend, q)
    with jax.numpy_dtype_promotion("standard"):  # jax's own code is not written for "strict"
        long = place.mask is None and q.shape[1] > _STRETCH
        if long and implementation == "xla" and jax.default_backend() == "cpu":
            y = _causal_by_stretches(q, k, v, scale)
        else:
            y = jax.nn.dot_product_attention(q, k, v, mask=place.mask, is_causal=place.mask is None, scale=scale,
                                             implementation=implementation)  # fmt: skip
    return checkpoint_name(y[..., :width], "attention"), cache


_STRETCH = 128  # queries at once on a CPU


def _causal_by_stretches(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """Causal attention, one stretch of queries after another, each to the keys up to its end: half the products, and
    scores that stay in a processor's cache. The queries that share a key-value head are rows of one product, in order
    of time. At 2048 tokens it takes 0.4 of the time of all at once."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q, k, v = (jnp.moveaxis(x.reshape(batch, length, kv_heads, -1, width), 1, 2).reshape(batch, kv_heads, -1, width)
               for x in (q, k, v))  # fmt: skip
    done = []
    size = max(_STRETCH, -(-length // 16))  # long sequences: no more than 16 stretches to compile
    for start in range(0, length, size):
        end = min(start + size, length)
        times = jnp.repeat(jnp.arange(start, end), group)  # of the rows
        scores = jnp.einsum("BKRH,BKSH->BKRS", q[:, :, start * group : end * group], k[:, :, :end],
                            preferred_element_type=jnp.float32)  # fmt: skip
        seen = times[:, None] >= jnp.arange(end)[None]
        weights = jax.nn.softmax(jnp.where(seen, scale * scores, -jnp.inf), axis=-1).astype(v.dtype)
        done.append(jnp.einsum("BKRS,BKSH->BKRH", weights, v[:, :, :end]))
    y = jnp.concatenate(done, axis=2).reshape(batch, kv_heads, length, group, width)
    return jnp.moveaxis(y, 1, 2).reshape(batch, length, heads, width)


def _implementation(attend: Attend, q: jax.Array) -> Literal["xla", "cudnn"]:
    """cuDNN's flash attention where it exists: half precision on a GPU, more than one query."""
    if attend != "auto":
        return attend
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if jax.default_backend() == "gpu" and half and q.shape[1] > 1 else "xla"


# --------------------------------------------------------------------------------------------------------------------
# Feed-forward
# --------------------------------------------------------------------------------------------------------------------


class FFNTrace(NamedTuple):
    """What a probe sees of one layer's gated FFN: the symbols of ProSparse section 3.1 in brackets."""

    x: jax.Array  # [B, T, D] input
    gate: jax.Array  # [B, T, F] pre-activation (x W_s)
    hidden: jax.Array  # [B, T, F] act(gate) * up (x1), times the blocks' factors where there is a router
    output: jax.Array  # [B, T, D]
    params: Any  # the layer's FFN parameters
    logits: jax.Array | None = None  # float32 [B, T, E] of the router, before the logistic function
    factors: jax.Array | None = None  # float32 [B, T, E] of the blocks: scores, or 0 and 1 (`routing.gates`)


Probe = Callable[[FFNTrace], Any]  # statistics of one layer; the forward pass stacks them over L


def activate(activation: Activation, gate: jax.Array) -> jax.Array:
    """The gate's activation, elementwise, in gate's dtype. Thresholds are compared in float32, so that one such as
    0.01, which bfloat16 cannot hold, means the same in every precision."""

    def keep(score: jax.Array, value: jax.Array, threshold: Any) -> jax.Array:
        return jnp.where(score.astype(jnp.float32) >= threshold, value, jnp.zeros((), value.dtype))

    match activation:
        case Silu():
            return jax.nn.silu(gate)
        case Gelu(approximate):
            return jax.nn.gelu(gate, approximate=approximate)
        case Relu() | Cett():
            return jax.nn.relu(gate)
        case ShiftedRelu(shift, threshold):
            shifted = jax.nn.relu(gate - jnp.asarray(shift, gate.dtype))
            return keep(shifted, shifted, threshold)
        case FatRelu(threshold):
            return keep(gate, gate, threshold)
        case Cats(threshold):
            score = jax.nn.silu(gate)
            return keep(jnp.abs(score), score, threshold)
    raise TypeError(f"no such activation: {activation!r}")


class FFN(nnx.Module):
    """Gated feed-forward: y = (act(x W_gate) * (x W_up)) W_down."""

    def __init__(self, config: LlamaConfig, shape: LayerShape, rngs: nnx.Rngs):
        d, f = config.hidden_size, shape.intermediate_size
        normal = jax.nn.initializers.normal(config.initializer_range)
        zeros = jax.nn.initializers.zeros
        self.gate = param(rngs, (d, f), ("embed", "mlp"), normal)
        self.up = param(rngs, (d, f), ("embed", "mlp"), normal)
        self.down = param(rngs, (f, d), ("mlp", "embed"), normal)
        self.bias = config.mlp_bias
        if config.mlp_bias:
            self.gate_bias = param(rngs, (f,), ("mlp",), zeros)
            self.up_bias = param(rngs, (f,), ("mlp",), zeros)
            self.down_bias = param(rngs, (d,), ("norm",), zeros)
        if isinstance(config.activation, Cett):
            self.threshold = param(rngs, (f,), ("mlp",), zeros, island=True)
        self.routing = config.router
        if config.router is not None:
            if config.router.mode != "oracle":
                blocks = f // config.router.block_size
                self.router = param(rngs, (d, blocks), ("embed", "blocks"), zeros, island=True)
            half = jax.nn.initializers.constant(0.5)
            self.router_threshold = param(rngs, (), (), half, island=True)

    def __call__(self, x: jax.Array, activation: Activation, probe: Probe | None) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> [B, T, D], and what the probe makes of the intermediates.

        The activation is an argument so that a threshold may be a traced value: a sweep compiles once.
        """
        gate = jnp.einsum("BTD,DF->BTF", x, self.gate[...])
        up = jnp.einsum("BTD,DF->BTF", x, self.up[...])
        if self.bias:
            gate = gate + self.gate_bias[None, None]
            up = up + self.up_bias[None, None]
        gate = constrain(gate, "batch", "sequence", "mlp")
        hidden = self._x1(gate, up, activation)
        logits = factors = None
        if self.routing is not None:
            logits, factors = self._route(x, hidden)
            # Under `checkpoint` the backward pass makes x1 from gate and up again instead of keeping one more array.
            size = self.routing.block_size
            weigh = lambda gate, up, factors: routing.scale(self._x1(gate, up, activation), factors, size)
            hidden = jax.checkpoint(weigh, prevent_cse=False)(gate, up, factors)
        y = jnp.einsum("BTF,FD->BTD", hidden, self.down[...])
        if self.bias:
            y = y + self.down_bias[None, None]
        if probe is None:
            return y, None
        weights = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        return y, probe(FFNTrace(x, gate, hidden, y, weights, logits, factors))

    def _x1(self, gate: jax.Array, up: jax.Array, activation: Activation) -> jax.Array:
        hidden = activate(activation, gate) * up
        if isinstance(activation, Cett):
            kept = jnp.abs(hidden).astype(jnp.float32) >= self.threshold[None, None]
            hidden = jnp.where(kept, hidden, jnp.zeros((), hidden.dtype))
        return hidden

    def _route(self, x: jax.Array, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits and factors of the blocks, float32 [B, T, E] each."""
        assert self.routing is not None
        if self.routing.mode == "oracle":
            logits = routing.block_sums(hidden, self.routing.block_size)
        else:
            logits = routing.router_logits(self.routing, x, self.router[...])
        logits = constrain(logits, "batch", "sequence", "blocks")
        return logits, routing.gates(self.routing, logits, self.router_threshold[...])


class Block(nnx.Module):
    """Pre-norm attention and FFN, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, shape: LayerShape, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config, rngs)
        self.attention = Attention(config, shape, rngs)
        self.ffn_norm = RMSNorm(config, rngs)
        self.ffn = FFN(config, shape, rngs)

    def __call__(
        self,
        x: jax.Array,
        activation: Activation,
        place: Place,
        cache: LayerCache | None,
        probe: Probe | None,
        attend: Attend,
    ) -> tuple[jax.Array, LayerCache | None, Any]:
        with jax.named_scope("attention"):
            y, cache = self.attention(self.attention_norm(x), place, cache, attend)
            x = constrain(x + y, "batch", "sequence", None)
        with jax.named_scope("ffn"):
            y, aux = self.ffn(self.ffn_norm(x), activation, probe)
            x = constrain(x + y, "batch", "sequence", None)
        return x, cache, aux


class Ends(nnx.Module):
    """What stands around the blocks: token embedding, final norm, and the head where it is not tied."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        d, v = config.hidden_size, config.vocab_size
        normal = jax.nn.initializers.normal(config.initializer_range)
        self.embed = param(rngs, (v, d), ("vocab", "embed"), normal)
        self.norm = RMSNorm(config, rngs)
        if not config.tie_word_embeddings:
            self.head = param(rngs, (d, v), ("embed", "vocab"), normal)
