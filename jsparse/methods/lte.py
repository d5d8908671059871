"""LTE, Learn To be Efficient: routers that leave out blocks of an FFN's neurons, learned with the model in two stages.

Zheng, Bai, Liu, Mao, Chen, Lai, Prakash, "Learn To be Efficient: Build Structured Sparsity in Large Language Models",
arXiv 2402.06126 (NeurIPS 2024).

    E_i(x)  = (act(x W_gate,i) * (x W_up,i)) W_down,i          the contribution of block i's neurons
    G(x)    = sigmoid(x W_g)                                                                     section 4.2
    soft:     FFN(x) = sum over i of G(x)_i E_i(x)                                               stage 1
    hard:     FFN(x) = sum over i of 1[G(x)_i > tau] E_i(x)                                      stage 2 and inference
    L_eff   = 1/(L N) sum over layers and blocks of |G(x)_i|^2
    L_sep   = 1/(L N) sum over layers and blocks of 1 / ((G(x)_i - tau)^2 + epsilon)
    stage 1:  L = L_task + eta L_eff + lambda L_sep, everything trains
    stage 2:  L = L_task, routers frozen

    paper                          here
    W_g                            layers.ffn.router [L, D, E], float32, without bias
    tau                            layers.ffn.router_threshold [L]
    N, i                           E = F / block_size, block i = neurons [i block_size, (i + 1) block_size)
    x                              the FFN's normalised input, what gate and up read
    G(x), or 1[G(x) > tau]         FFNTrace.factors in the modes soft and hard of `jsparse.config.Router`
    eta, lambda                    LteStage1.eta (or what the controller makes of it), .separation
    L_eff, L_sep                   LayerStats.efficiency, .separation, sums over tokens of the mean over blocks
    expert grouping                `jsparse.methods.grouping`
    sparsity                       share of blocks left out; of a model, the mean over its layers

The paper leaves the routers' start open and gives no epsilon. Both decide whether eta has any effect: an L_sep without
epsilon has no finite mean, and pushes every score away from the side of tau it starts on. With scores that start at tau
and an epsilon, the push there is zero, and the task and eta choose the side; L_sep holds it. The losses are means over
tokens, so that neither batch nor length changes them.

What LTE is compared with has the same routers, trained to another end (`predict`): MoEfication, arXiv 2110.01786, and
Deja Vu, arXiv 2310.17157, predict which blocks or neurons of a finished model have the largest activations.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import model
from jsparse.config import LlamaConfig, Router, check
from jsparse.methods import prosparse
from jsparse.methods.sparsegpt import exact_dot
from jsparse.model import FFNTrace, Params, Probe, routing
from jsparse.parallel import constrain

# --------------------------------------------------------------------------------------------------------------------
# Losses (section 4.2)
# --------------------------------------------------------------------------------------------------------------------

BAND = (0.1, 0.9)  # scores between these are undecided: stage 2 will move their blocks' outputs


class LayerStats(NamedTuple):
    """float32 scalars of one layer, sums over the counted tokens of means over the layer's blocks."""

    efficiency: jax.Array  # L_eff's term
    separation: jax.Array  # L_sep's term
    off: jax.Array  # scores below the threshold
    missing: jax.Array  # 1 - score: the share of the blocks' outputs that the scores take away
    undecided: jax.Array  # scores within BAND
    no_block: jax.Array  # tokens without any score above the threshold


def probe(mask: jax.Array | None = None, *, epsilon: Any = 1e-2) -> Probe:
    """Takes `LayerStats` of every layer, in mode "soft"; the first two carry gradients.

    Args:
        mask: bool [B, T], the tokens that count; all by default.
        epsilon: of L_sep; 0 is the formula as printed. May be traced.
    """

    def mean(x: jax.Array) -> jax.Array:  # [B, T, E] -> []
        return _total(jnp.mean(x, axis=-1, dtype=jnp.float32), mask)

    def measure(trace: FFNTrace) -> LayerStats:
        scores, tau = trace.factors, trace.params["router_threshold"]
        assert scores is not None
        return LayerStats(
            efficiency=mean(scores**2),
            separation=mean(1 / ((scores - tau) ** 2 + epsilon)),
            off=mean(scores < tau),
            missing=mean(1 - scores),
            undecided=mean((scores > BAND[0]) & (scores < BAND[1])),
            no_block=_total(jnp.all(scores <= tau, axis=-1).astype(jnp.float32), mask),
        )

    return measure


class MaskStats(NamedTuple):
    """float32 scalars of one layer, sums over the counted tokens."""

    off: jax.Array  # share of blocks left out
    no_block: jax.Array  # tokens without any block


def mask_probe(mask: jax.Array | None = None) -> Probe:
    """Takes `MaskStats` of every layer, in the modes that leave blocks out."""

    def measure(trace: FFNTrace) -> MaskStats:
        assert trace.factors is not None
        off = (trace.factors == 0).astype(jnp.float32)
        return MaskStats(_total(jnp.mean(off, axis=-1), mask), _total(jnp.min(off, axis=-1), mask))

    return measure


class PredictorStats(NamedTuple):
    """float32 scalars of one layer, sums over the counted tokens of means over the layer's blocks."""

    cross_entropy: jax.Array  # of the router's scores, nats, against the blocks that have the largest activations
    off: jax.Array  # blocks that are to be left out
    hit: jax.Array  # share of the blocks to keep that have the largest scores


def predictor_probe(mask: jax.Array | None = None) -> Probe:
    """Takes `PredictorStats` of every layer, in mode "off". Gradients reach the router alone.

    The threshold parameter holds the share of blocks to leave out.
    """

    def measure(trace: FFNTrace) -> PredictorStats:
        router, dropped = trace.params["router"], trace.params["router_threshold"]
        x, x1 = jax.lax.stop_gradient((trace.x, trace.hidden))
        logits = jnp.dot(x.astype(jnp.float32), router, precision="high")
        wanted = routing.keep_largest(routing.block_sums(x1, x1.shape[-1] // router.shape[-1]), dropped)
        nats = jax.nn.softplus(jnp.where(wanted, -logits, logits))
        found = wanted & routing.keep_largest(jax.lax.stop_gradient(logits), dropped)
        kept = jnp.sum(wanted, axis=-1, dtype=jnp.float32)
        hit = jnp.sum(found, axis=-1, dtype=jnp.float32) / jnp.maximum(kept, 1)
        rows = jnp.mean(nats, axis=-1), 1 - kept / logits.shape[-1], hit
        return PredictorStats(*(_total(x, mask) for x in rows))

    return measure


def _total(rows: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Sum of rows [B, T] over the counted tokens."""
    return jnp.sum(rows if mask is None else jnp.where(mask, rows, 0.0))


# --------------------------------------------------------------------------------------------------------------------
# Routers in and out of a model
# --------------------------------------------------------------------------------------------------------------------

Init = Literal["predictor", "open", "zeros", "normal"]
OPEN = 3.0  # logit of an open router at the mean input: a score of 0.95
SPREAD = 2.0  # standard deviation of the logits that a predictor is fitted to
RIDGE = 1e-2  # of that fit, over the mean of the Gram matrix's diagonal


def add_routers(
    params: Params,
    config: LlamaConfig,
    router: Router,
    *,
    threshold: float = 0.5,
    init: Init = "zeros",
    key: jax.Array | None = None,
    tokens: Any = None,
    dropped: float = 0.5,
) -> tuple[Params, LlamaConfig]:
    """The model with routers and thresholds, float32; its neurons are expected in the order of `grouping.permute`.

    Args:
        params: without routers; stacked, or a list where layers differ in shape.
        threshold: of every layer: tau, or the share of blocks to drop (`jsparse.config.Router`).
        init: of the routers. "predictor" fits them to the blocks' activations on sample text, the largest of each token
            above a score of 0.5; "open" points every router along the layer's mean input, so that every score starts
            near 1 and the soft model is nearly the one that was given; "zeros" starts every score at 0.5, so that the
            soft model has half of each FFN's output; "normal" draws from N(0, config.initializer_range).
        key: for "normal".
        tokens: for "predictor" and "open", int32 [B, T], sample text: more tokens than D is wide.
        dropped: for "predictor", the share of blocks whose scores start below 0.5.
    """
    routed = replace(config, router=router)
    shapes, layers = model.abstract(routed)["layers"], params["layers"]
    given = None
    if router.mode != "oracle" and init == "predictor":
        given = _fit(params, jnp.asarray(tokens), dropped, config, router.block_size)
    if router.mode != "oracle" and init == "open":
        given = _mean_inputs(params, jnp.asarray(tokens), config)

    def start(shapes: Params, given: Any, key: jax.Array | None) -> Params:
        """Of one layer, or of a stack."""
        new = {"router_threshold": jnp.full(shapes["router_threshold"].shape, threshold, jnp.float32)}
        if "router" not in shapes:
            return new
        shape = shapes["router"].shape
        new["router"] = jnp.zeros(shape, jnp.float32)
        if init == "normal":
            assert key is not None
            new["router"] = config.initializer_range * jax.random.normal(key, shape)
        if init == "predictor":
            new["router"] = given
        if init == "open":
            along = OPEN * given / jnp.sum(given * given, axis=-1, keepdims=True)
            new["router"] = jnp.broadcast_to(along[..., None], shape)
        return new

    if isinstance(layers, dict):
        return params | {"layers": layers | {"ffn": layers["ffn"] | start(shapes["ffn"], given, key)}}, routed
    keys = [None] * len(layers) if key is None else jax.random.split(key, len(layers))
    rows = zip(layers, shapes, given or [None] * len(layers), keys, strict=True)
    return params | {"layers": [layer | {"ffn": layer["ffn"] | start(shape["ffn"], mean, key)}
                                for layer, shape, mean, key in rows]}, routed  # fmt: skip


@functools.partial(jax.jit, static_argnames="config")
def _mean_inputs(params: Params, tokens: jax.Array, config: LlamaConfig) -> jax.Array:
    """float32 [L, D] (a list where the layers are a list), the mean over tokens of each FFN's normalised input."""
    return model.trunk(params, tokens, config, probe=lambda trace: jnp.mean(trace.x, (0, 1), dtype=jnp.float32))[1]


@functools.partial(jax.jit, static_argnames=("config", "block_size"))
def _fit(params: Params, tokens: jax.Array, dropped: Any, config: LlamaConfig, block_size: int) -> jax.Array:
    """Routers float32 [L, D, E] (a list where the layers are a list), by ridge regression of the logarithm of what each
    block puts out, the sum over its neurons of |x1_i| ||W_down,i||, over that of the token's block at the cut."""

    def measure(trace: FFNTrace) -> jax.Array:
        x = trace.x.astype(jnp.float32).reshape(-1, trace.x.shape[-1])
        norms = jnp.linalg.norm(trace.params["down"].astype(jnp.float32), axis=-1)
        sums = routing.block_sums(trace.hidden.astype(jnp.float32) * norms[None, None], block_size)
        logs = jnp.log(jnp.maximum(sums.reshape(x.shape[0], -1), 1e-20))
        wanted = logs - jnp.quantile(logs, dropped, axis=-1, keepdims=True)
        wanted = SPREAD * wanted / jnp.maximum(jnp.std(wanted), 1e-20)
        gram, cross = exact_dot(x.T, x), exact_dot(x.T, wanted)
        ridge = RIDGE * jnp.mean(jnp.diagonal(gram)) + 1e-20
        return jnp.linalg.solve(gram + ridge * jnp.eye(len(gram)), cross)

    return model.trunk(params, tokens, config, probe=measure)[1]


def set_thresholds(params: Params, thresholds: Any) -> Params:
    """Parameters with the routers' thresholds [L]."""

    def put(layers: Any, new: Any) -> Any:  # of one layer, or of a stack
        ffn = layers["ffn"]
        new = jax.device_put(jnp.asarray(new, jnp.float32), ffn["router_threshold"].sharding)
        return layers | {"ffn": ffn | {"router_threshold": new}}

    layers = params["layers"]
    if isinstance(layers, dict):
        return params | {"layers": put(layers, thresholds)}
    return params | {"layers": [put(layer, new) for layer, new in zip(layers, thresholds, strict=True)]}


def served(config: LlamaConfig) -> LlamaConfig:
    """The config by which a trained model is used: LTE's scores become masks, a predictor's choices count."""
    if config.router is None:
        return config
    mode = config.router.mode
    return replace(config, router=replace(config.router, mode=routing.SERVED.get(mode, mode)))


# --------------------------------------------------------------------------------------------------------------------
# Thresholds for a named sparsity
# --------------------------------------------------------------------------------------------------------------------

_ROUNDS = 3  # of calibration
_LIMIT, _BINS = 20.0, 65_536  # of the histogram of logits


def calibrate(params: Params, config: LlamaConfig, batches: Iterable[jax.Array], sparsity: float) -> np.ndarray:
    """Thresholds, float32 [L], by which the hard-routed model leaves out a share of its blocks on average.

    First all layers' logits are shifted alike until the mean share is met: that keeps the layers' differences, which
    training found. Then each layer's threshold follows its own share, since a block left out below changes what the
    layers above see.

    Args:
        params: stacked; the thresholds they have are where the search starts.
        batches: int32 [B, T] each, of full windows.
        sparsity: share of blocks to leave out, of the mean over layers.

    Raises:
        ConfigError: a share not between 0 and 1, or no batches.
    """
    check(0 < sparsity < 1, "target_sparsity", "a share between 0 and 1", sparsity)
    batches = list(batches)
    check(len(batches) > 0, "batches", "calibration tokens", "none")
    assert config.router is not None
    config = replace(config, router=replace(config.router, mode="hard"))
    shares = None
    for _ in range(_ROUNDS):
        counts = np.sum([np.asarray(_histogram(params, tokens, config), np.int64) for tokens in batches], axis=0)
        below = np.cumsum(counts, axis=1) / counts.sum(axis=1, keepdims=True)  # [L, bins], share up to a bin's end
        if shares is None:
            shares = below[:, np.searchsorted(below.mean(axis=0), sparsity)]
        ends = np.array([np.searchsorted(row, share) for row, share in zip(below, shares, strict=True)]) + 1
        logits = ends / _BINS * 2 * _LIMIT - _LIMIT
        thresholds = (1 / (1 + np.exp(-logits))).astype(np.float32)
        params = set_thresholds(params, thresholds)
    return thresholds


def leave_out(params: Params, config: LlamaConfig, batches: Iterable[jax.Array], share: float) -> Params:
    """The parameters with the thresholds of `calibrate`; a share of 0 is the model that keeps every block."""
    below_all = np.full(config.num_hidden_layers, -1.0)
    return set_thresholds(params, calibrate(params, config, batches, share) if share else below_all)


_MOST = 0.99  # share that `solve_thresholds` asks calibration for
_TRIES = 8


def solve_thresholds(
    evaluate: Callable[[Params], tuple[float, Any]],
    params: Params,
    config: LlamaConfig,
    batches: Sequence[jax.Array],
    *,
    sparsity: float | None = None,
    perplexity: float | None = None,
    rise: float | None = None,
    tolerance: float = 1e-3,
) -> tuple[Params, prosparse.Point]:
    """Finds the share of blocks to leave out of the calibration text that meets one goal on the text measured.

    For a sparsity the share asked for moves by what the share measured misses: one try where both texts are the same,
    two or three where they are not. For a perplexity or a rise it is found by bisection.

    Args:
        evaluate: a model's parameters -> perplexity, and the share of blocks left out of each layer.
        params: see `calibrate`; so are the batches.
        sparsity, perplexity, rise, tolerance: as in `prosparse.solve`, with the share in place of the threshold. Where
            the text is too short to tell shares within the tolerance apart, the smallest one met above the goal counts.

    Raises:
        ConfigError, ValueError: as `prosparse.solve`.
    """

    def measure(share: float) -> tuple[float, Any]:
        return evaluate(leave_out(params, config, batches, share))

    if sparsity is None or perplexity is not None or rise is not None:
        point = prosparse.solve(measure, sparsity=sparsity, perplexity=perplexity, rise=rise, first=0.25, limit=_MOST,
                                tolerance=tolerance)  # fmt: skip
    else:
        check(0 < sparsity < 1, "sparsity", "a share between 0 and 1", sparsity)
        share, points = min(sparsity, _MOST), []
        for _ in range(_TRIES):
            [point] = prosparse.sweep(measure, [share])
            points.append(point)
            if 0 <= point.mean_sparsity - sparsity <= tolerance:
                break
            share = min(max(share + sparsity + tolerance / 2 - point.mean_sparsity, 1e-3), _MOST)
        met = [point for point in points if point.mean_sparsity >= sparsity]
        if not met:
            most = max(point.mean_sparsity for point in points)
            raise ValueError(f"sparsity: expected a goal that thresholds can reach, {most:.4f} here, got {sparsity:g}")
        point = min(met, key=lambda point: point.mean_sparsity)
    return leave_out(params, config, batches, point.setting), point


def _bins(logits: Any) -> jax.Array:
    """int32 [bins]: how many of the logits [B, T, E] fall into each bin of [-LIMIT, LIMIT]; what lies outside counts
    at the ends."""
    place = jnp.floor((logits + _LIMIT) / (2 * _LIMIT) * _BINS).astype(jnp.int32)
    return jnp.bincount(jnp.clip(place, 0, _BINS - 1).reshape(-1), length=_BINS)


@functools.partial(jax.jit, static_argnames="config")
def _histogram(params: Params, tokens: jax.Array, config: LlamaConfig) -> jax.Array:
    counts = jnp.stack([*model.trunk(params, tokens, config, probe=lambda trace: _bins(trace.logits))[1]])
    return constrain(counts, None, None)  # whole everywhere: the host reads it


# --------------------------------------------------------------------------------------------------------------------
# What it saves (Table 1)
# --------------------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of one token, by part of the model; floating-point operations (two a multiply-add) or bytes."""

    attention: float  # projections
    ffn: float
    router: float
    head: float

    @property
    def total(self) -> float:
        return sum(self)


def flops_per_token(config: LlamaConfig, sparsity: float = 0.0, *, router: bool = True, head: bool = False) -> Cost:
    """Operations of the matrices on one token, as the paper counts: without attention scores, embedding and norms.

    LLaMA-7B has 12.06 x 2^30, the paper's figure; its unit is 2^30, not 10^9.

    Args:
        sparsity: share of blocks left out.
        router: count the routers, where the config has any.
        head: count the output matrix, which the paper leaves out.
    """
    return _cost(config, sparsity, router, head, 2.0, 2.0)


def bytes_per_token(
    config: LlamaConfig, sparsity: float = 0.0, *, router: bool = True, head: bool = True, weight_bytes: int = 2
) -> Cost:
    """Bytes of weights read to decode one token at batch 1; routers are float32. Arguments as in `flops_per_token`."""
    return _cost(config, sparsity, router, head, float(weight_bytes), 4.0)


def _cost(
    config: LlamaConfig, sparsity: float, router: bool, head: bool, per_weight: float, per_router_weight: float
) -> Cost:
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    routers = 0
    if router and config.router is not None and config.router.mode != "oracle":
        routers = d * f // config.router.block_size
    return Cost(
        attention=per_weight * layers * d * heads * config.head_dim,
        ffn=per_weight * layers * 3 * d * f * (1 - sparsity),
        router=per_router_weight * layers * routers,
        head=per_weight * d * config.vocab_size * head,
    )


def union_density(
    params: Params, config: LlamaConfig, tokens: jax.Array, batches: Iterable[int] = (1, 2, 4, 8, 16)
) -> dict[int, np.ndarray]:
    """Share of blocks that a batch of B tokens uses, [L] for each B: what a kernel must read that serves them together.

    Args:
        tokens: int32 [rows, T] of real text. A batch is B neighbouring rows at one position.
        batches: sizes B, each of which must divide the rows.

    Raises:
        ConfigError: a size that does not divide the rows, or a model without routers.
    """
    check(config.router is not None, "router", "a model with routers", None)
    used = np.asarray(_used(params, tokens, config))  # [L, rows, T, E]
    found = {}
    for size in batches:
        check(size > 0 and used.shape[1] % size == 0, "batches", f"divisors of the {used.shape[1]} rows", size)
        groups = used.reshape(used.shape[0], -1, size, *used.shape[2:])
        found[size] = groups.any(axis=2).mean(axis=(1, 2, 3))
    return found


@functools.partial(jax.jit, static_argnames="config")
def _used(params: Params, tokens: jax.Array, config: LlamaConfig) -> jax.Array:
    aux = model.trunk(params, tokens, config, probe=lambda trace: trace.factors != 0)[1]
    return aux if isinstance(aux, jax.Array) else jnp.stack(aux)


def gib(cost: Cost) -> float:
    """A cost in units of 2^30, the paper's."""
    return cost.total / math.pow(2, 30)
