"""Every setting of jsparse, as frozen dataclasses: YAML in, resolved YAML out.

A choice between alternatives is a tagged union of small dataclasses, told apart in YAML by `type`:

    activation: {type: fatrelu, threshold: 0.01}     # or just `activation: relu`

Axis letters used in the whole project: B batch, T query position, S key position, D model width, F ffn width,
N query heads, K key-value heads, H head dim, V vocabulary, E neuron blocks, L layers.
"""

import dataclasses
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar


class ConfigError(ValueError):
    """A setting is unknown, missing or out of range. The message is one line that names the field."""


def check(condition: bool, where: str, expected: str, got: object) -> None:
    """Raises ConfigError "`where`: expected ..., got ..." unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{where}: expected {expected}, got {got!r}")


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int | float):  # else none, or traced: variants of a number share one compiled step
            check(value > 0, name, "a positive number", value)


# --------------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Silu:
    type: ClassVar[str] = "silu"


@dataclass(frozen=True)
class Gelu:
    type: ClassVar[str] = "gelu"
    approximate: bool = False  # True: the tanh form, `gelu_pytorch_tanh` in Hugging Face configs


@dataclass(frozen=True)
class Relu:
    type: ClassVar[str] = "relu"


@dataclass(frozen=True)
class ShiftedRelu:
    """g - shift where that is above 0 and at least `threshold`, else 0 (ProSparse, baselines of section 4)."""

    type: ClassVar[str] = "shifted_relu"
    shift: float = 0.1
    threshold: float = 0.0


@dataclass(frozen=True)
class FatRelu:
    """g where g >= threshold, else 0, on the gate's pre-activation (ProSparse Eq. 3)."""

    type: ClassVar[str] = "fatrelu"
    threshold: float = 0.01


@dataclass(frozen=True)
class Cats:
    """silu(g) where its magnitude reaches the threshold, else 0: sparsity without training (CATS, arXiv 2404.08763)."""

    type: ClassVar[str] = "cats"
    threshold: float


@dataclass(frozen=True)
class Cett:
    """ReLU whose neuron i is dropped where |relu(g_i) u_i| < threshold_i; one threshold a neuron, held in the params.

    The thresholds are tau_l / ||W_down[i]||, tau_l solved for a relative output error (Sparsing Law, CETT).
    """

    type: ClassVar[str] = "cett"


Activation = Silu | Gelu | Relu | ShiftedRelu | FatRelu | Cats | Cett


def with_threshold(activation: Activation, threshold: Any) -> Activation:
    """The activation that drops what is below a threshold: ReLU becomes FATReLU, SiLU becomes CATS.

    The threshold may be a traced value, so that a sweep compiles once. Raises ConfigError for GELU and CETT.
    """
    match activation:
        case Relu() | FatRelu():
            return FatRelu(threshold)
        case ShiftedRelu(shift):
            return ShiftedRelu(shift, threshold)
        case Silu() | Cats():
            return Cats(threshold)
    raise ConfigError(f"activation: expected relu, fatrelu, shifted_relu or silu to threshold, got {activation.type}")


@dataclass(frozen=True)
class DefaultRope:
    type: ClassVar[str] = "default"
    theta: float = 10_000.0


@dataclass(frozen=True)
class LinearRope:
    type: ClassVar[str] = "linear"
    factor: float
    theta: float = 10_000.0


@dataclass(frozen=True)
class DynamicRope:
    """NTK scaling that depends on the longest sequence of the batch."""

    type: ClassVar[str] = "dynamic"
    factor: float
    theta: float = 10_000.0


@dataclass(frozen=True)
class Llama3Rope:
    type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    theta: float = 500_000.0


@dataclass(frozen=True)
class YarnRope:
    type: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    theta: float = 10_000.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class LongRope:
    """Per-frequency factors, one set up to the original context and one beyond it."""

    type: ClassVar[str] = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None
    theta: float = 10_000.0


Rope = DefaultRope | LinearRope | DynamicRope | Llama3Rope | YarnRope | LongRope


@dataclass(frozen=True)
class Router:
    """Sends every token through some blocks of an FFN's neurons only (LTE, arXiv 2402.06126).

    A block is `block_size` consecutive neurons. Each layer has a router (a score of each block, linear in the FFN's
    input) and a threshold, both parameters; mode "oracle" has the threshold alone. The threshold is a score, the
    logistic function of the router's, in the modes soft and hard; in the others, but off, the share of blocks to drop.
    """

    block_size: int = 32  # neurons
    # hard: blocks whose score is above the threshold, unscaled (LTE, inference and stage 2);
    # soft: all blocks, times their scores (LTE, stage 1);
    # top: the blocks of the largest scores, unscaled (MoEfication's predictor; of single neurons, Deja Vu's);
    # oracle: the blocks of the largest activations, known in hindsight (of single neurons: keep the largest);
    # softmax: the blocks of the largest scores, times a softmax over these and their number (top-k routing);
    # noisy_softmax: the same with noise on the scores, for training;
    # off: all blocks, as if there were no router; for training a predictor
    mode: Literal["hard", "soft", "top", "oracle", "softmax", "noisy_softmax", "off"] = "hard"

    def __post_init__(self) -> None:
        _check_positive(self, "block_size")


@dataclass(frozen=True)
class LayerShape:
    """Widths of one layer of a searched subnet (`jsparse.methods.search`)."""

    intermediate_size: int  # F
    value_dim: int  # head dim of values and of what the output projection reads
    # of each key-value head: the RoPE pairs that its keys and its group's queries keep, as indices below head_dim / 2,
    # equally many for each; None: all
    rope_pairs: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "intermediate_size", "value_dim")
        heads = self.rope_pairs or ()
        for pairs in heads:
            good = 0 < len(pairs) == len(heads[0]) and list(pairs) == sorted(set(pairs)) and pairs[0] >= 0
            check(good, "rope_pairs", "rising indices, equally many for each key-value head", self.rope_pairs)

    def query_dim(self, config: "LlamaConfig") -> int:
        """Head dim of queries and keys, in a model of this config."""
        return config.head_dim if self.rope_pairs is None else 2 * len(self.rope_pairs[0])


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA-family model. Field names are Hugging Face's, where Hugging Face has one."""

    vocab_size: int = 32_000
    hidden_size: int = 4096  # D
    intermediate_size: int = 11_008  # F
    num_hidden_layers: int = 32  # L
    num_attention_heads: int = 32  # N
    num_key_value_heads: int = 32  # K: N is MHA, 1 is MQA, between is GQA
    head_dim: int = 128  # H
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope: Rope = DefaultRope()
    activation: Activation = Silu()
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # biases on the query, key, value and output projections
    mlp_bias: bool = False  # biases on the gate, up and down projections
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    router: Router | None = None
    # of a searched subnet, whose layers differ in width; the softmax's scale and RoPE stay those of head_dim
    layers: tuple[LayerShape, ...] | None = None

    def __post_init__(self) -> None:
        _check_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        _check_positive(self, "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
        n, k = self.num_attention_heads, self.num_key_value_heads
        check(n % k == 0, "num_key_value_heads", f"a divisor of num_attention_heads ({n})", k)
        check(self.head_dim % 2 == 0, "head_dim", "an even number (RoPE rotates pairs)", self.head_dim)
        if isinstance(self.rope, LongRope):
            pairs = self.head_dim // 2
            for name in ("short_factor", "long_factor"):
                given = len(getattr(self.rope, name))
                check(given == pairs, f"rope.{name}", f"{pairs} factors (head_dim / 2)", given)
        if self.router is not None:
            size = self.router.block_size
            for width in [self.intermediate_size, *(shape.intermediate_size for shape in self.layers or ())]:
                check(width % size == 0, "router.block_size", f"a divisor of intermediate_size ({width})", size)
        if self.layers is not None:
            check(len(self.layers) == self.num_hidden_layers, "layers", f"{self.num_hidden_layers} shapes",
                  len(self.layers))  # fmt: skip
            for i, shape in enumerate(self.layers):
                check(shape.value_dim <= self.head_dim, f"layers[{i}].value_dim", f"at most {self.head_dim}",
                      shape.value_dim)  # fmt: skip
                if shape.rope_pairs is not None:
                    last = max(pairs[-1] for pairs in shape.rope_pairs)
                    good = len(shape.rope_pairs) == k and last < self.head_dim // 2
                    check(good, f"layers[{i}].rope_pairs", f"indices below {self.head_dim // 2} for {k} heads",
                          f"{len(shape.rope_pairs)} heads, indices up to {last}")  # fmt: skip

    @property
    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """Of each layer, whether they differ or not."""
        uniform = LayerShape(self.intermediate_size, self.head_dim)
        return self.layers or (uniform,) * self.num_hidden_layers

    def of_layer(self, i: int) -> "LlamaConfig":
        """What `jsparse.model.run_block` is to know of layer i: itself where all layers are of one shape."""
        if self.layers is None:
            return self
        return dataclasses.replace(self, num_hidden_layers=1, layers=self.layers[i : i + 1])

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSource:
    """Where the starting weights come from: a model folder, another run, or fresh ones of a given shape."""

    path: str | None = None  # a Hugging Face folder
    run: str | None = None  # a run folder, complete, such as LTE's stage 1 for stage 2
    step: int | None = None  # of that run, another checkpoint than the last; the run may then be under way
    config: LlamaConfig | None = None  # train from scratch
    activation: Activation | None = None  # replaces the model's own (ProSparse section 3.2: step 1)

    def __post_init__(self) -> None:
        given = [name for name in ("path", "run", "config") if getattr(self, name) is not None]
        check(len(given) == 1, "model.path", "one of it, `model.run` and `model.config`", given)
        check(self.step is None or self.run is not None, "step", "none without `model.run`", self.step)


@dataclass(frozen=True)
class Source:
    """One text source of a mixture."""

    # .txt and .jsonl (also .gz, .xz, .bz2), .parquet, a folder of them, a token store folder, a .npy file of token ids,
    # or a `datasets` data set, as `name` or `name:config`; a .txt file is one document
    path: str
    weight: float = 1.0  # share of the windows drawn from this source, relative to the others
    split: str = "train"  # of a `datasets` name
    text: str = "text"  # column that holds the text
    prompt: str | None = None  # column that precedes `text` and takes no loss (supervised fine-tuning)
    end_token: str | None = None  # put after each document; by default the tokenizer's own

    def __post_init__(self) -> None:
        check(self.weight > 0, "weight", "a positive number", self.weight)


@dataclass(frozen=True)
class DataConfig:
    train: tuple[Source, ...] = ()  # a mixture
    eval: tuple[Source, ...] = ()  # held out: perplexity and sparsity during the run
    seq_len: int = 2048  # tokens of a sequence
    batch_size: int = 64  # sequences a step, over all devices and accumulation steps
    # windows: documents joined by the end token, cut into equal windows, attention runs across documents;
    # packed: whole documents packed into windows, no attention across documents, positions restart
    documents: Literal["windows", "packed"] = "windows"
    tokenizer: str | None = None  # a folder; by default the model's
    cache: str = "~/.cache/jsparse"  # token stores, keyed by content and tokenizer
    seed: int = 0  # of the windows' order
    prefetch: int = 2  # batches made ahead on a thread

    def __post_init__(self) -> None:
        check(self.seq_len > 0, "data.seq_len", "a positive number", self.seq_len)
        check(self.batch_size > 0, "data.batch_size", "a positive number", self.batch_size)
        check(self.seed >= 0, "data.seed", "a number of at least 0", self.seed)
        check(self.prefetch >= 0, "data.prefetch", "a number of at least 0", self.prefetch)


@dataclass(frozen=True)
class ConstantLr:
    """The peak, after the warm-up."""

    type: ClassVar[str] = "constant"
    warmup_steps: int = 0  # of linear rise from 0


@dataclass(frozen=True)
class CosineLr:
    """From the peak along a half-cosine to the last step."""

    type: ClassVar[str] = "cosine"
    warmup_steps: int = 0  # of linear rise from 0
    final: float = 0.1  # share of the peak at the last step


@dataclass(frozen=True)
class WsdLr:
    """Warm-up, stable, decay: linear down to `final` over the last `decay_steps`."""

    type: ClassVar[str] = "wsd"
    warmup_steps: int = 0  # of linear rise from 0
    decay_steps: int = 0  # the last ones of the run
    final: float = 0.0  # share of the peak at the last step


LrSchedule = ConstantLr | CosineLr | WsdLr


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with float32 moments. Norm scales, biases and thresholds are never decayed."""

    lr: float = 3e-5  # at the peak
    schedule: LrSchedule = CosineLr()
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # and of the second
    eps: float = 1e-8  # beside the root of the second moment
    weight_decay: float = 0.1  # decoupled, times the learning rate
    clip: float = 1.0  # largest global norm of the gradient
    max_skipped: int = 10  # steps in a row with a non-finite loss or gradient before the run ends

    def __post_init__(self) -> None:
        _check_positive(self, "eps", "clip", "max_skipped")
        check(self.lr >= 0, "lr", "a number of at least 0", self.lr)
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", getattr(self, name))


@dataclass(frozen=True)
class Stages:
    """ProSparse Algorithm 1: 0 up to steps[0], then flat at peaks[0] up to steps[1], then half-cosine ramps between
    peaks that end at the following steps. Equal neighbours make a plateau. len(steps) == len(peaks) + 1."""

    type: ClassVar[str] = "stages"
    peaks: tuple[float, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        check(len(self.steps) == len(self.peaks) + 1 and len(self.peaks) > 0, "method.weight.steps",
              f"one more than the {len(self.peaks)} peaks", self.steps)  # fmt: skip
        check(list(self.steps) == sorted(set(self.steps)), "method.weight.steps", "increasing steps", self.steps)
        check(min(self.peaks) >= 0, "method.weight.peaks", "weights of at least 0", self.peaks)


@dataclass(frozen=True)
class Fixed:
    """The baseline: a constant weight after `start` steps."""

    type: ClassVar[str] = "fixed"
    value: float
    start: int = 0  # last step without a penalty


@dataclass(frozen=True)
class Target:
    """Holds a sparsity instead of a weight: a controller multiplies the weight until the target is met.

    The target itself rises along a half-cosine from the sparsity found at `start` to `sparsity` at `reach`; leave the
    controller a few times `settle` steps after `reach`. The controller is proportional and integral, on
    log(active share / wanted active share) in and log(weight) out, so that it knows no scale of the penalty.
    """

    type: ClassVar[str] = "target"
    sparsity: float  # share of zeros in x1, 0 to 1
    start: int = 0  # last step without a penalty
    reach: int = 1000  # step at which the sparsity is wanted whole
    initial: float = 5e-3  # the weight at `start`; rather too small than too large
    gain: float = 20.0  # relative change of the weight for a relative change of the active share
    settle: float = 100.0  # steps in which the integral part does as much as the proportional part
    rate: float = 0.1  # largest change of log(weight) in a step
    smoothing: float = 0.9  # decay of the running mean of the measured sparsity

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, int | float):  # else traced: several targets share one compiled step
            check(0 < self.sparsity < 1, "method.weight.sparsity", "a share between 0 and 1", self.sparsity)
        check(self.reach > self.start, "method.weight.reach", f"a step after start ({self.start})", self.reach)
        for name in ("initial", "gain", "settle", "rate"):
            check(getattr(self, name) > 0, f"method.weight.{name}", "a positive number", getattr(self, name))
        check(0 <= self.smoothing < 1, "method.weight.smoothing", "at least 0 and below 1", self.smoothing)


@dataclass(frozen=True)
class MeanL1:
    """The recommended normaliser: the paper leaves it open (docs/prosparse.md says why this one)."""

    type: ClassVar[str] = "mean"
    ff: Literal["mean", "sum"] = "mean"  # over a layer's neurons
    layers: Literal["mean", "sum"] = "sum"  # over layers
    mask: Literal["all", "loss"] = "all"  # which tokens count: all real ones, or those that take loss
    scale: float = 1.0  # factor on all of it


@dataclass(frozen=True)
class PaperCodeL1:
    """Sum over every element of a device's micro-batch and over layers, times `scale`, as the first author's later
    public trainer computes it. Depends on the micro-batch size."""

    type: ClassVar[str] = "paper_code"
    scale: float = 1e-8


@dataclass(frozen=True)
class ProSparse:
    """ProSparse's penalty, weight * L1(x1), added to the loss (arXiv 2402.13516, section 3.2)."""

    type: ClassVar[str] = "prosparse"
    weight: Stages | Fixed | Target
    penalty: MeanL1 | PaperCodeL1 = MeanL1()


@dataclass(frozen=True)
class Dense:
    """No penalty: plain continued training, and the ReLU baselines (by `model.activation`)."""

    type: ClassVar[str] = "dense"


@dataclass(frozen=True)
class LteStage1:
    """Routers and model learn together: scores multiply blocks, two losses make them small and decided (LTE)."""

    type: ClassVar[str] = "lte_stage1"
    target_sparsity: float | None = None  # share of blocks to leave out: eta and the thresholds are then found for it
    eta: float = 2.0  # weight of the mean square of the scores; with a target, where the controller starts
    reach: float = 0.6  # share of the run's steps after which the controller wants the target met
    separation: float = 0.2  # lambda, weight of 1 / ((score - tau)^2 + epsilon)
    separation_ramp: float = 0.8  # share of the run's steps over which lambda rises from 0
    epsilon: float = 0.1  # 0 is the formula as printed, which diverges
    tau: float = 0.5  # the threshold
    tokens: Literal["all", "loss"] = "all"  # which tokens the two losses average: all real ones, or those with loss
    block_size: int = 32  # neurons
    grouping: Literal["kmeans", "coactivation", "random"] = "kmeans"  # of neurons into blocks, before the first step
    # of the routers: predictor, fitted to which blocks act most, so that the target share of scores starts below 0.5;
    # open, all scores near 1; zeros, all 0.5; normal, random
    init: Literal["predictor", "open", "zeros", "normal"] = "predictor"
    router_lr: float = 1e-2  # the routers' own peak; the schedule's shape is the optimizer's
    router_weight_decay: float = 0.0  # of the routers, likewise

    def __post_init__(self) -> None:
        if isinstance(self.target_sparsity, int | float):  # else none, or traced
            check(0 < self.target_sparsity < 1, "target_sparsity", "a share between 0 and 1", self.target_sparsity)
            check(self.eta > 0, "eta", "a positive number for the controller to start from", self.eta)
        for name in ("eta", "separation", "separation_ramp", "epsilon"):
            value = getattr(self, name)
            if isinstance(value, int | float):  # else traced
                check(value >= 0, name, "a number of at least 0", value)
        check(0 < self.tau < 1, "tau", "a score between 0 and 1", self.tau)
        check(0 < self.reach <= 1, "reach", "a share of the steps", self.reach)
        _check_positive(self, "block_size", "router_lr")


@dataclass(frozen=True)
class LteStage2:
    """The model learns behind the routers' hard masks, the routers rest (LTE). `model.run` names stage 1's run."""

    type: ClassVar[str] = "lte_stage2"
    target_sparsity: float | None = None  # share of blocks to leave out: the thresholds are set for it at the end

    def __post_init__(self) -> None:
        if self.target_sparsity is not None:
            check(0 < self.target_sparsity < 1, "target_sparsity", "a share between 0 and 1", self.target_sparsity)


@dataclass(frozen=True)
class NoisyTopK:
    """Routers and model learn together by noisy top-k softmax routing, a baseline of LTE; without a balancing loss."""

    type: ClassVar[str] = "noisy_top_k"
    sparsity: float  # share of blocks to leave out, in every layer
    block_size: int = 32  # neurons
    grouping: Literal["kmeans", "coactivation", "random"] = "kmeans"  # of neurons into blocks, before the first step
    router_lr: float = 1e-2  # the routers' own peak; the schedule's shape is the optimizer's
    router_weight_decay: float = 0.0  # of the routers, likewise

    def __post_init__(self) -> None:
        check(0 < self.sparsity < 1, "sparsity", "a share between 0 and 1", self.sparsity)
        _check_positive(self, "block_size", "router_lr")


@dataclass(frozen=True)
class Predictor:
    """The model rests, linear predictors learn which of its blocks have the largest activations, baselines of LTE.

    MoEfication with blocks, Deja Vu with block_size 1. `model` should name a model that has been trained on the data.
    """

    type: ClassVar[str] = "predictor"
    sparsity: float  # share of blocks to leave out, in every layer
    select: Literal["router", "oracle"] = "router"  # oracle: by the activations themselves, nothing is learned
    block_size: int = 32  # neurons
    grouping: Literal["kmeans", "coactivation", "random"] = "kmeans"  # of neurons into blocks, before the first step
    router_lr: float = 1e-2  # the routers' own peak; the schedule's shape is the optimizer's
    router_weight_decay: float = 0.0  # of the routers, likewise

    def __post_init__(self) -> None:
        check(0 < self.sparsity < 1, "sparsity", "a share between 0 and 1", self.sparsity)
        _check_positive(self, "block_size", "router_lr")


Method = Dense | ProSparse | LteStage1 | LteStage2 | NoisyTopK | Predictor


@dataclass(frozen=True)
class Distill:
    """Adds weight * KL(teacher || student) at a temperature to the loss."""

    teacher: str  # a model folder with the same vocabulary
    weight: float = 1.0  # beside the loss of the text
    temperature: float = 1.0  # divides the logits of both

    def __post_init__(self) -> None:
        _check_positive(self, "weight", "temperature")


@dataclass(frozen=True)
class Hold:
    """What is 0 in the blocks' matrices stays 0: recovery training of a pruned model."""

    pattern: str | None = None  # N:M, or a share such as 0.5, that the starting model must have
    scope: Literal["mlp", "all"] = "mlp"  # whose matrices must have it: the MLP's, or attention's too

    def __post_init__(self) -> None:
        check(self.pattern is not None or self.scope == "mlp", "scope", "a pattern beside it", self.scope)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what is left."""

    data: int = -1  # splits the batch
    fsdp: int = 1  # splits the batch and the parameters
    tensor: int = 1  # splits heads, neurons and vocabulary
    max_replicated: float = 0.02  # share of the parameter bytes that may miss the fsdp and tensor axes


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500  # steps
    keep: int = 2  # newest checkpoints kept
    keep_every: int | None = None  # and every so many steps, for good

    def __post_init__(self) -> None:
        _check_positive(self, "every", "keep", "keep_every")


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 500  # steps between evaluations of `data.eval`; the start and the end are evaluated too
    eval_tokens: int = 131_072  # of each source
    tensorboard: bool = True  # write the numbers for TensorBoard too, where tensorboardX is installed
    profile: tuple[int, int] | None = None  # first step and number of steps to trace

    def __post_init__(self) -> None:
        _check_positive(self, "every", "eval_every", "eval_tokens")


@dataclass(frozen=True)
class TrainConfig:
    """A recipe: everything `jsparse train` needs."""

    run: str  # run folder: checkpoints, metrics, resolved config
    model: ModelSource
    data: DataConfig
    steps: int = 1000  # of the optimizer
    method: Method = Dense()
    optimizer: OptimizerConfig = OptimizerConfig()
    distill: Distill | None = None
    hold: Hold | None = None  # keeps the zeros of a pruned model
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    accumulate: int = 1  # micro-batches a step
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; masters and moments are float32
    # what the backward pass computes again: nothing, all of a block, all but matrix products, or all but attention
    remat: Literal["none", "full", "dots", "attention"] = "none"
    unroll: int = 1  # layers a step of the scan runs; all of them is fastest on a GPU and compiles longest
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # kernel; auto: cuDNN in half precision on GPUs, else XLA
    loss_chunk: int = 4096  # tokens whose logits exist at once on a device
    compile_cache: str | None = "~/.cache/jsparse/xla"  # folder of compiled programs; null: none
    seed: int = 0  # of fresh weights, routers and groupings; `data.seed` is the data's

    def __post_init__(self) -> None:
        _check_positive(self, "steps", "accumulate", "unroll", "loss_chunk")
        check(self.data.batch_size % self.accumulate == 0, "accumulate",
              f"a divisor of data.batch_size ({self.data.batch_size})", self.accumulate)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# YAML in and out
# --------------------------------------------------------------------------------------------------------------------

T = TypeVar("T")


def from_dict(cls: type[T], values: object, where: str = "") -> T:
    """Builds a config from plain YAML values. Errors name the field, what was expected and what came."""
    return _build(cls, values, where)


def to_dict(config: Any) -> Any:
    """The plain YAML values of a config; `from_dict` reads them back to an equal config."""
    if dataclasses.is_dataclass(config):
        tag = {"type": config.type} if hasattr(config, "type") else {}
        return tag | {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [to_dict(x) for x in config] if isinstance(config, tuple) else config


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a recipe and applies dotted overrides such as `optimizer.lr=1e-4`, left to right.

    An override that changes a `type` starts that alternative afresh, without the settings of the one before:
    `method.weight.type=fixed method.weight.value=0.1`.
    """
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a readable recipe: {error}") from None
    values = _yaml(text, str(path)) or {}
    check(isinstance(values, dict), str(path), "a mapping of settings", values)
    for override in overrides:
        key, equals, text = override.partition("=")
        check(bool(key and equals), override, "an override of the form field.sub=value", override)
        *parents, last = key.split(".")
        target = values
        for parent in parents:
            inner = target.get(parent) or {}
            inner = {"type": inner} if isinstance(inner, str) else inner
            check(isinstance(inner, dict), override, f"a mapping of settings at {parent}", inner)
            target[parent] = target = dict(inner)
        value = _yaml(text, override)
        if last == "type" and value != target.get("type"):
            target.clear()
        target[last] = value
    return from_dict(TrainConfig, values)


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _build(kind: Any, value: object, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin in (types.UnionType, typing.Union):
        return _build_union(args, value, where)
    if origin is tuple:
        check(isinstance(value, list | tuple), where, "a list", value)
        items = list(typing.cast(list, value))
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        check(len(kinds) == len(items), where, f"{len(kinds)} values", value)
        return tuple(_build(k, x, f"{where}[{i}]") for i, (k, x) in enumerate(zip(kinds, items, strict=True)))
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: expected one of {', '.join(args)}, got {value!r}{_nearest(value, args)}")
        return value
    if kind is float:
        value = _number(value)
    good = isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)) and value == value
    check(good, where, {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind], value)
    return value


def _number(value: object) -> object:
    """YAML 1.1 reads `1e-4` as text; people write it all the time."""
    if isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _build_dataclass(cls: Any, value: object, where: str) -> Any:
    dot = f"{where}." if where else ""
    if isinstance(value, str) and hasattr(cls, "type"):
        value = {"type": value}
    check(isinstance(value, dict), where or cls.__name__, "a mapping of settings", value)
    values = {k: v for k, v in typing.cast(dict, value).items() if not (k == "type" and hasattr(cls, "type"))}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown setting {dot}{key}{_nearest(key, fields)}; known here: {', '.join(fields)}")
    for name, f in fields.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise ConfigError(f"missing setting {dot}{name}")
    kinds = _hints(cls)
    built = {name: _build(kinds[name], v, dot + name) for name, v in values.items()}
    try:
        return cls(**built)
    except ConfigError as error:  # a dataclass's own check knows its field, not where it stands
        text = str(error)
        raise ConfigError(text if text.startswith(dot) else dot + text) from None


def _build_union(kinds: Sequence[Any], value: object, where: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    kinds = [k for k in kinds if k is not types.NoneType]
    tagged = {k.type: k for k in kinds if hasattr(k, "type")}
    if tagged:
        tag = value.get("type") if isinstance(value, dict) else value
        if not isinstance(tag, str) or tag not in tagged:
            raise ConfigError(f"{where}.type: expected one of {', '.join(tagged)}, got {tag!r}{_nearest(tag, tagged)}")
        return _build_dataclass(tagged[tag], value, where)
    sequence = isinstance(value, list | tuple)
    fitting = [k for k in kinds if (typing.get_origin(k) is tuple) == sequence]
    return _build((fitting or kinds)[0], value, where)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _nearest(word: object, known: Any) -> str:
    match = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f" (did you mean {match[0]!r}?)" if match else ""


def dump(config: Any) -> str:
    """The config as YAML, every field resolved."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def describe(cls: Any, prefix: str = "") -> str:
    """Every setting below a config class, one a line: dotted name, kind or choices, default and what it means."""
    lines = []
    for f in dataclasses.fields(cls):
        kind, name = _hints(cls)[f.name], prefix + f.name
        nested = [k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)]
        tagged = [k for k in nested if hasattr(k, "type")]
        value = None if f.default is dataclasses.MISSING else to_dict(f.default)
        plain = f.default is not dataclasses.MISSING and (tagged or not isinstance(value, dict))
        default = f" = {_short(value)}" if plain else ""
        comment = _comments(cls).get(f.name) or (_meaning(nested[0]) if nested and not tagged else "")
        shown = "" if nested else f" ({_kind_name(kind)})"
        lines.append(f"{name}{shown}{default}{'  # ' if comment else ''}{comment}".rstrip())
        for k in nested:
            if k in tagged:
                meaning = _meaning(k)
                lines.append(f"  {name}.type={typing.cast(Any, k).type}{'  # ' if meaning else ''}{meaning}")
            indent = "    " if k in tagged else "  "
            lines += [indent + line for line in describe(k, f"{name}.").splitlines()]
    return "\n".join(lines)


def _meaning(cls: Any) -> str:
    """The first paragraph of a class's docstring; of one that `dataclass` made up, nothing."""
    text = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    return "" if text.startswith(f"{cls.__name__}(") else text


def _kind_name(kind: Any) -> str:
    """A kind in words: the choices of a Literal, the names of everything else."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(str, args))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " | ".join(map(_kind_name, args))
    if typing.get_origin(kind) is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"list of {count}{_kind_name(args[0])}"
    return {"str": "text", "NoneType": "null"}.get(kind.__name__, kind.__name__)


def _short(value: Any) -> str:
    return value["type"] if isinstance(value, dict) and "type" in value else "null" if value is None else str(value)


@functools.cache
def _comments(cls: Any) -> dict[str, str]:
    """What the comments beside the fields and in the lines above them say."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(cls).splitlines():
        field = re.match(r"    (\w+): [^#]*(?:# *(.*))?$", line)
        if field:
            found[field[1]] = " ".join([*above, *filter(None, [field[2]])])
        above = [*above, line.strip(" #")] if line.startswith("    #") else []
    return found
