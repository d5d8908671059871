"""ProSparse: ReLU in the gate, a penalty on the activations that grows in stages, and a threshold shift at the end.

Song et al., "ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large Language Models",
arXiv 2402.13516 (COLING 2025).

    x1 = relu(x W_s) * (x W_1)          FFN(x) = x1 W_2                                     Eq. 1
    L  = L_lm + sum over layers of lambda(t) ||x1||_1                                       Eq. 2
    lambda(t), t counted from 1:                                                            Algorithm 1
        0                                                             t <= T_0
        lambda_1                                                T_0 < t <= T_1
        lambda_{i-1} + eta (lambda_i - lambda_{i-1})        T_{i-1} < t <= T_i,   i = 2..S
        eta = 1/2 [sin(-pi/2 + pi (t - T_{i-1}) / (T_i - T_{i-1})) + 1]
    FATReLU_t(g) = g where g >= t, else 0                                                   Eq. 3

    paper                          here
    W_s, W_1, W_2                  layers.ffn.gate, .up [D, F], .down [F, D]
    x W_s, x1                      FFNTrace.gate, FFNTrace.hidden
    ||x1||_1 of a layer            LayerStats.l1, before it is normalised by `penalty_scale`
    lambda_1..S, T_0..S            Stages.peaks, Stages.steps
    lambda(t)                      penalty_weight
    eta                            half_cosine
    t of FATReLU                   FatRelu.threshold
    sparsity                       share of exact zeros in x1; of a model, the mean over its layers

Two things here are not the paper's. A controller may choose lambda so that a named sparsity is met (`Target`). And
thresholds may be set neuron by neuron, by CETT, the cumulative errors of tail truncation of Zhang et al., arXiv
2402.03804, as Luo et al. use it in "Sparsing Law", arXiv 2411.02335:

    dropped(tau)  = the neurons i with |x1_i| ||W_2[i]|| < tau
    CETT(x, tau)  = || sum over dropped(tau) of x1_i W_2[i] || / ||FFN(x)||
    tau_l solves    mean over tokens of CETT(x, tau_l) = error         in each layer l

    tau_l / ||W_2[i]||             layers.ffn.threshold [L, F], read by the activation `Cett`
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import model
from jsparse.config import Cett, FatRelu, Fixed, LlamaConfig, MeanL1, PaperCodeL1, Relu, Stages, Target, check
from jsparse.model import FFNTrace, Params, Probe

# --------------------------------------------------------------------------------------------------------------------
# The penalty (section 3.2, Eq. 2)
# --------------------------------------------------------------------------------------------------------------------


class LayerStats(NamedTuple):
    """float32 scalars of one layer, sums over the counted tokens; the model stacks them to [L]."""

    l1: jax.Array  # of |x1|
    active: jax.Array  # of the number of nonzeros of x1


def probe(mask: jax.Array | None = None) -> Probe:
    """Takes `LayerStats` of every layer; the gradient of l1 is x1's sign, 0 where x1 is 0.

    Args:
        mask: bool [B, T], the tokens that count; all by default.
    """

    def total(rows: jax.Array) -> jax.Array:  # [B, T] -> []
        return jnp.sum(rows if mask is None else jnp.where(mask, rows, 0.0))

    def measure(trace: FFNTrace) -> LayerStats:
        active = jnp.sum(trace.hidden != 0, axis=-1, dtype=jnp.float32)  # exact: F is far below 2^24
        return LayerStats(l1=total(_l1(trace.hidden)), active=total(active))

    return measure


@functools.partial(jax.checkpoint, prevent_cse=False)
def _l1(x1: jax.Array) -> jax.Array:
    """float32 [B, T] of x1 [B, T, F]; XLA does it in the pass that makes x1.

    |x1| is x1 times its sign: jnp.abs has the gradient 1 at 0. Under `checkpoint` the backward pass takes the sign
    from x1, which the down projection keeps anyway, instead of keeping one more array of x1's size.
    """
    return jnp.sum(x1 * jax.lax.stop_gradient(jnp.sign(x1)), axis=-1, dtype=jnp.float32)


def sparsity(stats: LayerStats, tokens: jax.Array | float, ff: int | jax.Array) -> jax.Array:
    """Share of exact zeros in x1, [L], of stacked stats over `tokens` counted tokens (section 3.1)."""
    return 1.0 - stats.active / (jnp.asarray(tokens, jnp.float32) * ff)


def penalty_scale(
    penalty: MeanL1 | PaperCodeL1, *, tokens: jax.Array | float, ff: int | jax.Array, layers: int, micro_batches: int
) -> jax.Array:
    """What the sum of |x1| over tokens and neurons is multiplied with beside lambda; float32 [] or, of widths [L], [L].

    Args:
        tokens: counted tokens of the global batch.
        ff: width F of the FFN, one or float32 [L].
        layers: number L of layers.
        micro_batches: accumulation steps times data-parallel shards. The paper's later code sums within a device's
            micro-batch, divides by the accumulation steps and averages over devices.
    """
    match penalty:
        case PaperCodeL1(scale):
            return jnp.float32(scale / micro_batches)
        case MeanL1():
            tokens = jnp.asarray(tokens, jnp.float32)
            neurons = ff if penalty.ff == "mean" else 1
            depth = layers if penalty.layers == "mean" else 1
            return penalty.scale / (tokens * neurons * depth)
    raise TypeError(f"no such penalty: {penalty!r}")


# --------------------------------------------------------------------------------------------------------------------
# Its weight: lambda(t) of Algorithm 1, a constant, or a controller's
# --------------------------------------------------------------------------------------------------------------------


class Control(NamedTuple):
    """The controller's state, float32 scalars: what it must remember from step to step."""

    log_weight: jax.Array
    sparsity: jax.Array  # running mean of the measured one; negative before the first measurement
    base: jax.Array  # the running mean at `start`, from where the target rises
    error: jax.Array  # log(active share / wanted active share) of the step before


def init_control(weight: Stages | Fixed | Target) -> Control:
    """The state before step 1."""
    log_weight = math.log(weight.initial) if isinstance(weight, Target) else 0.0
    return Control(*(jnp.float32(x) for x in (log_weight, -1.0, 0.0, 0.0)))


def penalty_weight(weight: Stages | Fixed | Target, step: jax.Array | int, control: Control) -> jax.Array:
    """lambda of optimizer step `step`, counted from 1; float32 []."""
    match weight:
        case Stages():
            return _staged(weight, jnp.asarray(step, jnp.float32))
        case Fixed():
            return jnp.where(step > weight.start, jnp.float32(weight.value), 0.0)
        case Target():
            return jnp.where(step > weight.start, jnp.exp(control.log_weight), 0.0)
    raise TypeError(f"no such weight: {weight!r}")


def half_cosine(progress: jax.Array) -> jax.Array:
    """eta of Algorithm 1: 0 to 1 as progress goes from 0 to 1, and held there."""
    return 0.5 * (jnp.sin(-jnp.pi / 2 + jnp.pi * jnp.clip(progress, 0.0, 1.0)) + 1.0)


def _staged(stages: Stages, t: jax.Array) -> jax.Array:
    """Algorithm 1. Stage 0 rests at 0, stage 1 at lambda_1, stage i goes from lambda_{i-1} to lambda_i."""
    low = jnp.array((0.0, stages.peaks[0], *stages.peaks[:-1]), jnp.float32)
    high = jnp.array((0.0, *stages.peaks), jnp.float32)
    begin = jnp.array((-1, *stages.steps[:-1]), jnp.float32)
    end = jnp.array(stages.steps, jnp.float32)
    stage = jnp.searchsorted(end[:-1], t)  # the i of T_{i-1} < t <= T_i; the last stage also covers t > T_S
    eta = half_cosine((t - begin[stage]) / (end[stage] - begin[stage]))
    return low[stage] + eta * (high[stage] - low[stage])


_RANGE = (1e-3, 1e6)  # of a controller's weight, over its initial weight


def update_control(
    weight: Stages | Fixed | Target, step: jax.Array | int, control: Control, sparsity: jax.Array
) -> Control:
    """The state after optimizer step `step`, whose batch had this sparsity (a mean, or one a layer).

    Proportional and integral control in its velocity form, d log(weight) = gain (d error + error / settle), on the
    logarithm of the active share. In these units the paper's fit for 7B, log(active share) = const - 1.76 lambda^0.30,
    answers a change of the weight with a gain of 0.1 to 0.4 over lambda = 0.01 to 0.5, and other scales of the penalty
    only shift that range. The weight itself is all that the form remembers, so that no integral winds up while the
    rate or the range limits it.
    """
    if not isinstance(weight, Target):
        return control
    step = jnp.asarray(step, jnp.float32)
    unmeasured = control.sparsity < 0
    decay = jnp.where(unmeasured, 0.0, weight.smoothing)
    mean = decay * control.sparsity + (1.0 - decay) * jnp.mean(sparsity)
    base = jnp.where(unmeasured | (step <= weight.start), mean, control.base)

    progress = (step - weight.start) / (weight.reach - weight.start)
    wanted = base + half_cosine(progress) * (weight.sparsity - base)
    error = jnp.log(jnp.maximum(1.0 - mean, 1e-4) / jnp.maximum(1.0 - wanted, 1e-4))
    change = weight.gain * (error - control.error + error / weight.settle)

    log_weight = control.log_weight + jnp.clip(change, -weight.rate, weight.rate)
    log_weight = jnp.clip(log_weight, *(math.log(factor * weight.initial) for factor in _RANGE))
    started = step > weight.start
    return Control(
        log_weight=jnp.where(started, log_weight, control.log_weight),
        sparsity=mean,
        base=base,
        error=jnp.where(started, error, 0.0),
    )


# --------------------------------------------------------------------------------------------------------------------
# Threshold shifting (section 3.3, Eq. 3)
# --------------------------------------------------------------------------------------------------------------------

Evaluate = Callable[[float], tuple[float, Any]]  # threshold -> perplexity, sparsity [L]


@dataclass(frozen=True)
class Point:
    """One measurement of a model under a setting of its thresholds."""

    setting: float  # FATReLU's threshold, CETT's error, or the share of blocks that LTE's routers leave out
    perplexity: float
    sparsity: tuple[float, ...]  # of each layer

    @property
    def mean_sparsity(self) -> float:
        return sum(self.sparsity) / len(self.sparsity)


def shift(config: LlamaConfig, threshold: float | jax.Array) -> LlamaConfig:
    """The model with FATReLU in place of ReLU; the weights stay. The threshold may be traced. 0 is ReLU itself."""
    _check_relu(config)
    if isinstance(threshold, int | float):
        check(threshold >= 0, "threshold", "a number of at least 0", threshold)
    return replace(config, activation=FatRelu(threshold))  # type: ignore[arg-type]


def sweep(evaluate: Evaluate, thresholds: Sequence[float]) -> list[Point]:
    """Measures every threshold, in the order given."""
    for threshold in thresholds:
        check(threshold >= 0, "threshold", "a number of at least 0", threshold)
    return [_measure(evaluate, threshold) for threshold in thresholds]


def solve(
    evaluate: Evaluate,
    *,
    sparsity: float | None = None,
    perplexity: float | None = None,
    rise: float | None = None,
    first: float = 0.01,
    limit: float = 16.0,
    tolerance: float = 1e-3,
) -> Point:
    """Finds FATReLU's threshold for one goal, by bisection; some fifteen evaluations.

    Args:
        evaluate: threshold -> perplexity and sparsity of each layer.
        sparsity: the smallest threshold with at least this mean sparsity.
        perplexity: the largest threshold whose perplexity is at most this.
        rise: the largest threshold whose perplexity is at most (1 + rise) times that of threshold 0.
        first: threshold tried first after 0; doubled until the goal is bracketed.
        limit: no threshold above this is tried.
        tolerance: ends the search: sparsity above its goal, or perplexity below its budget as a share of the budget.
            Where the perplexity jumps over the budget, the search ends below the jump.

    Raises:
        ConfigError: not exactly one goal, or one out of range.
        ValueError: no threshold meets the goal; the message holds the range that can be had.
    """
    return _solve(lambda t: _measure(evaluate, t), first, limit, tolerance, sparsity, perplexity, rise)


def _measure(evaluate: Evaluate, setting: float) -> Point:
    perplexity, layers = evaluate(setting)
    return Point(float(setting), float(perplexity), tuple(float(s) for s in np.atleast_1d(layers)))


_ROUNDS = 24  # beyond this, halves are smaller than float32 tells apart


def _solve(
    measure: Callable[[float], Point],
    first: float,
    limit: float,
    tolerance: float,
    sparsity: float | None,
    perplexity: float | None,
    rise: float | None,
) -> Point:
    """Brackets the goal by doubling the setting from `first`, then bisects."""
    goals = {"sparsity": sparsity, "perplexity": perplexity, "rise": rise}
    given = {name: goal for name, goal in goals.items() if goal is not None}
    check(len(given) == 1, "goal", "one of sparsity, perplexity and rise", given or "none")
    [(name, goal)] = given.items()
    if name == "sparsity":
        check(0 < goal < 1, name, "a share between 0 and 1", goal)
    else:
        check(goal > 0, name, "a positive number", goal)

    start = measure(0.0)
    if name == "rise":
        name, goal = "perplexity", (1 + goal) * start.perplexity

    def value(point: Point) -> float:  # grows with the setting; a perplexity that is not finite is above any budget
        return point.mean_sparsity if name == "sparsity" else point.perplexity

    def unreachable(high: Point) -> ValueError:
        reach = f"{value(start):.4f} (setting 0) to {value(high):.4f} (setting {high.setting:g})"
        return ValueError(f"{name}: expected a goal that thresholds can reach, {reach}, got {goal:g}")

    if not value(start) <= goal:
        raise unreachable(measure(limit))
    low, high = start, measure(first)
    while value(high) < goal:
        if high.setting >= limit:
            raise unreachable(high)
        low, high = high, measure(min(2 * high.setting, limit))
    for _ in range(_ROUNDS):
        if name == "sparsity" and value(high) - goal <= tolerance:
            break
        if name == "perplexity" and goal - value(low) <= tolerance * goal:
            break
        narrow = high.setting - low.setting <= tolerance * high.setting
        if narrow and high.mean_sparsity - low.mean_sparsity <= tolerance / 10:
            break  # the perplexity jumps here, and no setting between has more to give
        middle = measure((low.setting + high.setting) / 2)
        low, high = (middle, high) if value(middle) < goal else (low, middle)
    return high if name == "sparsity" else low


def _check_relu(config: LlamaConfig) -> None:
    check(isinstance(config.activation, Relu | FatRelu | Cett), "activation", "a ReLU model to set thresholds of",
          config.activation)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Thresholds neuron by neuron (CETT)
# --------------------------------------------------------------------------------------------------------------------


_RATIOS = 2.0 ** (np.arange(-45, 10) / 3)  # candidate taus, over a layer's typical ||FFN(x)||


class CettCurve(NamedTuple):
    """Each layer's mean CETT as a function of tau: what any number of thresholds can be read from."""

    tau: np.ndarray  # [L, points], rising
    error: np.ndarray  # [L, points]

    def tau_at(self, error: float) -> np.ndarray:
        """[L], between the measured points by a straight line. A layer that puts out nothing gets the largest."""
        return np.array([np.interp(error, [0, *e], [0, *t]) for t, e in zip(*self, strict=True)])


def cett_curve(params: Params, config: LlamaConfig, batches: Iterable[jax.Array]) -> CettCurve:
    """Measures CETT on calibration tokens, each layer at the inputs that the model without thresholds gives it.

    So defined, as the paper's code does it, an error belongs to its layer alone: no layer's threshold depends on
    another's, and one pass over the data measures all layers at all taus. What the errors do together is for the
    perplexity to say (`solve_cett`).

    Args:
        params: a ReLU model's.
        batches: int32 [B, T] each, of full windows: every token counts. A few thousand tokens will do.
    """
    _check_relu(config)
    batches = list(batches)
    check(len(batches) > 0, "batches", "calibration tokens", "none")
    # A negative threshold drops nothing, so the forward pass is the dense one; and it tells the probe, which sees a
    # layer but not its number, what tau that layer's candidates are multiples of.
    dense, config = apply_cett(params, config, -np.ones(config.num_hidden_layers))
    scale = np.exp(_log_output_norms(dense, batches[0], config))  # [L]
    dense, config = apply_cett(params, config, -scale)
    total = sum(np.asarray(_cett_sums(dense, tokens, config)) for tokens in batches)
    error = total / sum(tokens.size for tokens in batches)
    error = np.maximum.accumulate(error, axis=1)  # dropped neurons that cancel can lower it, and `tau_at` inverts it
    return CettCurve(scale[:, None] * _RATIOS, error)


def apply_cett(params: Params, config: LlamaConfig, tau: Any) -> tuple[Params, LlamaConfig]:
    """The model that drops neuron i of layer l where |x1_i| ||W_2[i]|| < tau[l]; tau [L]."""
    _check_relu(config)
    tau = jnp.asarray(tau, jnp.float32)

    def put(layers: Any, tau: jax.Array) -> Any:  # of one layer, or of a stack
        norms = jnp.linalg.norm(layers["ffn"]["down"].astype(jnp.float32), axis=-1)  # [..., F]
        return layers | {"ffn": layers["ffn"] | {"threshold": tau[..., None] / jnp.maximum(norms, 1e-20)}}

    if config.layers is None:
        layers: Any = put(model.stack(params)["layers"], tau)
    else:
        layers = [put(layer, t) for layer, t in zip(params["layers"], tau, strict=True)]
    return params | {"layers": layers}, replace(config, activation=Cett())


def cett_thresholds(
    params: Params, config: LlamaConfig, batches: Iterable[jax.Array], *, error: float
) -> tuple[Params, LlamaConfig]:
    """The model with the thresholds at which every layer's mean CETT on the calibration tokens is `error`.

    See `cett_curve` for the arguments. Raises ConfigError where error is not between 0 and 1 or the model not a ReLU
    model.
    """
    check(0 < error < 1, "error", "a share between 0 and 1", error)
    return apply_cett(params, config, cett_curve(params, config, batches).tau_at(error))


def solve_cett(
    evaluate: Callable[[Params, LlamaConfig], tuple[float, Any]],
    params: Params,
    config: LlamaConfig,
    curve: CettCurve,
    *,
    sparsity: float | None = None,
    perplexity: float | None = None,
    rise: float | None = None,
    tolerance: float = 1e-3,
) -> tuple[Params, LlamaConfig, Point]:
    """Finds the CETT error, one for all layers, that meets one goal: rise=0.01 is Sparsing Law's CETT-PPL-1%.

    The calibration is in the curve; only `evaluate`, of a model's parameters and config to its perplexity and sparsity
    by layer, runs at every step of the bisection. Goals and errors are those of `solve`, with the error in place of
    the threshold.
    """

    def measure(error: float) -> Point:
        return _measure(lambda error: evaluate(*apply_cett(params, config, curve.tau_at(error))), error)

    point = _solve(measure, 0.01, 0.99, tolerance, sparsity, perplexity, rise)
    return *apply_cett(params, config, curve.tau_at(point.setting)), point


@functools.partial(jax.jit, static_argnames="config")
def _log_output_norms(params: Params, tokens: jax.Array, config: LlamaConfig) -> jax.Array:
    """Mean over tokens of log ||FFN(x)||, [L]; of the logarithm, so that a few huge outputs do not set the scale."""

    def measure(trace: FFNTrace) -> jax.Array:
        return jnp.mean(jnp.log(jnp.maximum(_norm(trace.output), 1e-20)))

    return jnp.stack([*model.trunk(params, tokens, config, probe=measure)[1]])


@functools.partial(jax.jit, static_argnames="config")
def _cett_sums(params: Params, tokens: jax.Array, config: LlamaConfig) -> jax.Array:
    """Sum over tokens of CETT at every candidate tau, [L, points]."""

    def measure(trace: FFNTrace) -> jax.Array:
        limit = -trace.params["threshold"][None, None]
        size = jnp.maximum(_norm(trace.output), 1e-20)

        def total(ratio: jax.Array) -> jax.Array:
            below = jnp.abs(trace.hidden).astype(jnp.float32) < ratio * limit
            dropped = jnp.where(below, trace.hidden, jnp.zeros((), trace.hidden.dtype))
            return jnp.sum(_norm(jnp.einsum("BTF,FD->BTD", dropped, trace.params["down"])) / size)

        return jax.lax.map(total, jnp.asarray(_RATIOS, jnp.float32))

    return jnp.stack([*model.trunk(params, tokens, config, probe=measure)[1]])


def _norm(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
