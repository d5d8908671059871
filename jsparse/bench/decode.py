"""`jsparse bench decode`: whole-model decoding, the loop of `jsparse generate` itself, on random weights of a shape.

Every variant has the same weights, made on the device. Random weights have no sparsity of their own, so thresholds give
it: scores and gates of random weights are normal with a known deviation, and a threshold at its quantile leaves the
wanted share above, token by token, in expectation.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.bench.timing import CUBLAS, ONE_GRAPH, Bandwidth, Budget, compile_all
from jsparse.config import FatRelu, LlamaConfig, Router, Silu
from jsparse.inference.costs import bytes_read
from jsparse.inference.decoder import (
    WINDOW,
    Attention,
    Decoder,
    Ffn,
    Implementation,
    Layer,
    NMFfn,
    empty_cache,
    sparse_kind,
    used_share,
)
from jsparse.inference.generate import Choice, State, _decode, bucket
from jsparse.methods.predictor import quantise
from jsparse.model import Cache
from pallas_kernels.ffn import PackedFFN
from pallas_kernels.neuron_sparse_ffn import Predictor
from pallas_kernels.nm_matmul import PackedNM, pack

DEVIATION = 0.02  # of every matrix, as in LLaMA's initialisation


@dataclass(frozen=True)
class Variant:
    """A model to decode with: what it leaves out, how much of it, and how its steps are compiled."""

    leaves_out: str | None = None  # blocks, neurons, predicted or packed
    sparsity: float = 0.0  # of each token
    rest: Any = None  # kernels of all but sparse FFNs: the best there are, or "xla", which tunes its own
    compiler: dict[str, Any] = dataclasses.field(default_factory=dict)


VARIANTS = {
    "dense": Variant(),
    "LTE 50 %": Variant("blocks", 0.5),
    "LTE 80 %": Variant("blocks", 0.8),
    "ProSparse 89 %, exact": Variant("neurons", 0.8932),
    "ProSparse 89 %, predicted": Variant("predicted", 0.8932),
    "2:4": Variant("packed", 0.5),
    "LTE 50 %, one graph": Variant("blocks", 0.5, compiler=ONE_GRAPH),
    "dense, XLA": Variant(rest="xla"),
    "dense, cuBLAS": Variant(rest="xla", compiler=CUBLAS),
}


@dataclass(frozen=True)
class DecodeSpeed:
    """One variant. Bytes are what a step must read: matrices in use, routers or predictors, and the cached text."""

    name: str
    batch: int
    context: int  # tokens in the cache before the first step
    measured: float  # share of blocks or neurons that a step leaves out, over all rows
    ms: float  # a step, median
    tokens_per_second: float  # of all rows
    bytes: float
    limit_ms: float  # bytes over the bandwidth of this run
    fraction: float  # of the limit
    speedup: float  # over the best dense variant
    speedup_limit: float  # dense bytes over these
    compile_seconds: float


def bench_decode(
    shape: LlamaConfig,
    speed: Bandwidth,
    *,
    variants: Sequence[str] = tuple(VARIANTS),
    implementation: Implementation = "sparse",
    batch: int = 1,
    context: int = 512,
    steps: int = 64,
    repeats: int = 3,
    dtype: str = "bfloat16",
    rank: int = 1024,
    budget: Budget,
    tell: Callable[[str], None] = print,
) -> list[DecodeSpeed]:
    """Times steps of decoding for the variants named.

    Args:
        speed: of the memory, measured in the same run.
        variants: names of `VARIANTS`. The best dense one is what the others are compared with.
        implementation: "sparse" for the best kernel there is, or a kernel by name.
        context: tokens in the cache at the first step. Its keys and values are random.
        rank: of the predictors, which are of int8.
        budget: variants that it has no time left for, compiling included, are left out.
        tell: called with a line of text for each measurement.
    """
    dense = _random_decoder(shape, dtype)
    until = context + 1 + steps

    def start() -> State:
        return jax.block_until_ready(_random_state(dense, jax.random.key(5), shape, batch, context, bucket(until)))

    def build(name: str, first: State) -> tuple[Any, Decoder, LlamaConfig, float]:
        began = time.perf_counter()
        return *_build(dense, shape, VARIANTS[name], rank, implementation, first), time.perf_counter() - began

    rows: list[DecodeSpeed] = []

    def measure(name: str, found: Any) -> None:
        try:
            if isinstance(found, Exception):
                raise found
            run, decoder, config, compile_seconds = found
            seconds = [_timed(run, decoder, start(), until) for _ in range(repeats + 1)][1:]
        except Exception as error:
            return tell(f"{name}: left out, {type(error).__name__}: {error}"[:300])
        ms = statistics.median(seconds) / steps * 1e3
        share = _share(decoder, config, batch)
        size = _step_bytes(decoder, config, share, batch * (context + steps / 2))
        limit = size / speed.limit * 1e3
        rows.append(DecodeSpeed(name, batch, context, 1 - share, ms, batch / ms * 1e3, size, limit, limit / ms, 0, 0,
                                compile_seconds))  # fmt: skip
        tell(f"{name:26} batch {batch:2}  {ms:8.3f} ms a step  {batch / ms * 1e3:8.1f} tokens/s  {limit / ms:4.0%} of "
             f"the limit  ({1 - share:.1%} left out; compiled in {compile_seconds:.0f} s)")  # fmt: skip

    # First what compiles fast, all at once; then, one by one and measured alone, what XLA tunes on the device.
    tuned = [name for name in variants if VARIANTS[name].rest == "xla"]
    for names in ([name for name in variants if name not in tuned], *[[name] for name in tuned]):
        first = start()
        for name, found in zip(names, compile_all([functools.partial(build, n, first) for n in names], budget),
                               strict=True):  # fmt: skip
            measure(name, found)
    whole = [row for row in rows if VARIANTS[row.name].leaves_out is None]
    if not whole:
        return rows
    best, size = min(row.ms for row in whole), min(row.bytes for row in whole)
    return [dataclasses.replace(row, speedup=best / row.ms, speedup_limit=size / row.bytes) for row in rows]


def _build(
    dense: Decoder, shape: LlamaConfig, variant: Variant, rank: int, implementation: Implementation, state: State
) -> tuple[Any, Decoder, LlamaConfig]:
    """The compiled token loop of a variant, for states like the one given, and its decoder and config."""
    decoder, config = _variant(dense, shape, variant, rank)
    chosen: Implementation = implementation if variant.leaves_out else "dense"
    choice = _greedy(len(state.stopped))
    lowered = _decode.lower(decoder, state, choice, 0, config=config, implementation=chosen, rest=variant.rest)
    return lowered.compile(compiler_options=variant.compiler), decoder, config


def _greedy(batch: int) -> Choice:
    return Choice(np.zeros(batch, np.uint32), np.full(8, -1, np.int32), {})


def _timed(run: Any, decoder: Decoder, state: State, until: int) -> float:
    """Seconds until `until` slots hold tokens."""
    choice, began = _greedy(len(state.stopped)), time.perf_counter()
    jax.block_until_ready(run(decoder, state, choice, until))
    return time.perf_counter() - began


def _step_bytes(decoder: Decoder, config: LlamaConfig, share: float, cached: float) -> float:
    """Bytes that a step reads, with `cached` tokens of all rows in the cache."""
    total: float = decoder.head.nbytes
    for layer in decoder.layers:
        kind = sparse_kind(layer.ffn, config)
        attention, kv = layer.attention, layer.attention.qkv.shape[0] - layer.attention.output.shape[1]
        total += attention.qkv.nbytes + attention.output.nbytes + cached * kv * attention.qkv.dtype.itemsize
        total += bytes_read(layer.ffn, kind, share) if kind else sum(w.nbytes for w in layer.ffn.weights)
    return total


# --------------------------------------------------------------------------------------------------------------------
# Random models of a known sparsity
# --------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * DEVIATION).astype(dtype)


def _random_decoder(config: LlamaConfig, dtype: str) -> Decoder:
    d, f, h = config.hidden_size, config.intermediate_size, config.head_dim
    n, k = config.num_attention_heads, config.num_key_value_heads
    ones = jnp.ones(d, jnp.float32)

    def layer(key: jax.Array) -> Layer:
        qkv, output, *ffn = jax.random.split(key, 5)
        attention = Attention(_normal(qkv, ((n + 2 * k) * h, d), dtype), _normal(output, (d, n * h), dtype), None, None)
        weights = PackedFFN(*(_normal(key, (f, d), dtype) for key in ffn))
        return Layer(ones, attention, ones, Ffn(weights))

    embed, head, *layers = jax.random.split(jax.random.key(0), 2 + config.num_hidden_layers)
    table = _normal(embed, (config.vocab_size, d), dtype)
    out = table if config.tie_word_embeddings else _normal(head, (config.vocab_size, d), dtype)
    return Decoder(table, tuple(map(layer, layers)), ones, out)


def _variant(dense: Decoder, shape: LlamaConfig, variant: Variant, rank: int) -> tuple[Decoder, LlamaConfig]:
    """The decoder whose tokens leave out the variant's share, on the dense one's weights."""
    d, f = shape.hidden_size, shape.intermediate_size
    quantile = statistics.NormalDist().inv_cdf(variant.sparsity) if variant.sparsity else 0.0
    score = DEVIATION * d**0.5  # deviation of a product of the normalised input, whose mean square is 1
    keys = jax.random.split(jax.random.key(7), shape.num_hidden_layers)

    def with_ffn(change: Callable[[jax.Array], dict[str, Any]]) -> Decoder:
        layers = [layer._replace(ffn=layer.ffn._replace(**change(key)))
                  for layer, key in zip(dense.layers, keys, strict=True)]  # fmt: skip
        return dense._replace(layers=tuple(layers))

    match variant.leaves_out:
        case "blocks":
            threshold = jax.nn.sigmoid(jnp.float32(score * quantile))
            blocks = f // Router().block_size
            decoder = with_ffn(lambda key: {"router": _normal(key, (blocks, d), "float32"),
                                            "router_threshold": threshold})  # fmt: skip
            return decoder, dataclasses.replace(shape, activation=Silu(), router=Router())
        case "neurons":
            return dense, dataclasses.replace(shape, activation=FatRelu(score * quantile))
        case "predicted":
            logit = DEVIATION * (rank / 2) ** 0.5 * score  # half of the hidden units are above 0
            threshold = jnp.full(f, logit * quantile, jnp.float32)

            def predictor(key: jax.Array) -> dict[str, Any]:
                keys = jax.random.split(key)
                down, up = _normal(keys[0], (rank, d), "float32"), _normal(keys[1], (f, rank), "float32")
                return {"predictor": quantise(Predictor(down, up, threshold))}

            return with_ffn(predictor), dataclasses.replace(shape, activation=FatRelu(score * quantile))
        case "packed":
            axes = ("output", "output", "input")
            ffns = [Ffn(NMFfn(*map(_two_of_four, layer.ffn.weights, axes))) for layer in dense.layers]
            layers = [layer._replace(ffn=ffn) for layer, ffn in zip(dense.layers, ffns, strict=True)]
            return dense._replace(layers=tuple(layers)), shape
    return dense, shape


@functools.partial(jax.jit, static_argnums=1)
def _two_of_four(matrix: jax.Array, axis: Any) -> PackedNM:
    """A neuron-major matrix [F, D] of which two of each four neurons' weights are left, as DaSS prunes: packed."""
    kept = jnp.arange(matrix.shape[0])[:, None] % 4 < 2
    left = jnp.where(kept, matrix, jnp.zeros((), matrix.dtype))
    return pack(left.T if axis == "output" else left, 2, 4, axis)


def _share(decoder: Decoder, config: LlamaConfig, batch: int) -> float:
    """The share of the FFNs that steps use, measured on random inputs of every layer."""
    measure = jax.jit(functools.partial(used_share, config=config))
    shares = []
    for i, layer in enumerate(decoder.layers):
        x = jax.random.normal(jax.random.key(i), (batch, WINDOW, config.hidden_size)).astype(decoder.embed.dtype)
        shares.append(float(measure(layer.ffn, x, real=jnp.ones((batch, WINDOW), bool))))
    return float(np.mean(shares))


def _random_state(decoder: Decoder, key: jax.Array, config: LlamaConfig, batch: int, context: int, slots: int) -> State:
    """What generation has after a prompt of `context` tokens: a cache of random keys and values."""
    cache = empty_cache(decoder, batch, slots, jnp.zeros(batch, jnp.int32), config)
    leaves, structure = jax.tree.flatten(cache.layers)
    keys = jax.random.split(key, len(leaves) + 1)
    filled = [_normal(k, x.shape, x.dtype.name) for k, x in zip(keys, leaves, strict=False)]
    tokens = jax.random.randint(keys[-1], (batch, slots), 0, config.vocab_size)
    layers = jax.tree.unflatten(structure, filled)
    return State(Cache(layers, cache.start, jnp.int32(context), slots), tokens, jnp.zeros(batch, bool))
