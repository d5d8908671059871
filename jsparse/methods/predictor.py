"""Predictors of active neurons: which rows of an FFN a ReLU model's token needs, guessed before any of them is read.

Liu et al., "Deja Vu", arXiv 2310.17157, as Song et al., "ProSparse", arXiv 2402.13516, appendices C and F, use them:

    p(x) = relu(x A) B          neuron f is computed where p_f > t                  one predictor a layer
    y_f  = [x1_f != 0]          the label: x1 = act(x W_gate) * (x W_up)
    loss = sum_f w_f BCE(sigmoid(p_f), y_f),   w_f = 1 where y_f = 1, else mean(y) + 0.005

    paper             here
    A [D, R]          Predictor.down [R, D]
    B [R, F]          Predictor.up [F, R]
    t                 Predictor.threshold [F], the same for all neurons of a layer
    recall            share of the active neurons that are predicted
    predicted sparsity   share of the neurons that are not predicted

The paper has one rank, t = 0 and the checkpoint of the best recall. Here each layer has what reads the fewest bytes at
the recall that was asked for: a large predictor names fewer rows, but has to be read itself. Candidates of several
ranks are trained side by side, rounded to int8, and measured on held-out text at every threshold; `choose` picks rank
and threshold layer by layer, and no predictor at all where reading the whole gate is cheaper.

And x is the FFN's normalised input where the paper's is the residual stream before the norm: without biases p is
homogeneous, so at t = 0 the two differ by the norm's scale alone, which `powerinfer` moves into A.
"""

import functools
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jsparse import model
from jsparse.config import Cats, Cett, FatRelu, LlamaConfig, Relu, check
from jsparse.files import replacing
from jsparse.model import FFNTrace, Params
from jsparse.parallel import batch_shards, round_up
from pallas_kernels.neuron_sparse_ffn import Predictor

FILE = "predictor.safetensors"  # in a model folder

Candidates = Mapping[int, Sequence[Predictor]]  # by rank, a predictor of each layer

# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def default_ranks(config: LlamaConfig) -> tuple[int, ...]:
    """From 1/32 to 1/4 of the width, multiples of 8, as kernels take them. The paper's 1024 is 1/4 at 7B."""
    return tuple(sorted({max(8, config.hidden_size // part // 8 * 8) for part in (32, 16, 8, 4)}))


def train(
    params: Params,
    config: LlamaConfig,
    windows: ArrayLike,
    *,
    ranks: Sequence[int] | None = None,
    steps: int = 1000,
    batch_size: int = 1,
    lr: float = 1e-3,
    negatives: float = 0.005,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, list[Predictor]]:
    """Trains predictors of each layer and rank on the activations that the model has on a text, as they arise.

    Nothing is recorded: each step runs the model on a batch of windows and moves the predictors of all layers.

    Args:
        params: of a model whose FFN has exact zeros, with layers of one width.
        windows: token ids, int [windows, T]; drawn anew for every step.
        ranks: R, of each candidate; `default_ranks` by default.
        batch_size: windows a step, raised to a multiple of the devices that split a batch.
        negatives: added to the mean of the labels, it is the weight of inactive neurons in the loss: the larger, the
            fewer neurons are predicted.
        progress: called after each step with the number of steps done and of all.

    Returns:
        The predictors in float32, by rank, at threshold 0. `choose` sets their thresholds.

    Raises:
        ConfigError: a model without zeros, or of layers that differ in width.
    """
    check(isinstance(config.activation, Relu | FatRelu | Cett | Cats), "activation", "one with exact zeros",
          config.activation)  # fmt: skip
    check(config.layers is None, "layers", "layers of one width", "a searched subnet")
    ranks = default_ranks(config) if ranks is None else ranks
    for rank in ranks:
        check(rank > 0 and rank % 8 == 0, "rank", "positive multiples of 8", rank)
    check(len(ranks) > 0 and steps > 0, "ranks, steps", "at least one each", (ranks, steps))
    windows, batch_size = np.asarray(windows), round_up(batch_size, batch_shards())
    params = model.stack(params)
    layers, f = config.num_hidden_layers, config.intermediate_size
    weights = {rank: _initial(jax.random.fold_in(jax.random.key(seed), rank), config, rank) for rank in ranks}
    optimizer = optax.adamw(lr, weight_decay=0.01)
    state = optimizer.init(weights)
    rng = np.random.default_rng(seed)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Any, state: Any, params: Params, tokens: jax.Array) -> tuple[Any, Any]:
        x, active = _observe(params, tokens, config)
        of_layer = functools.partial(_loss, negatives=negatives)

        def loss(weights: Any) -> jax.Array:
            losses = [jax.vmap(of_layer)(w, x, active) for w in weights.values()]
            return jnp.sum(jnp.stack(losses))

        with jax.numpy_dtype_promotion("standard"):  # optax is not written for "strict"
            updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    for i in range(steps):
        tokens = windows[rng.integers(len(windows), size=batch_size)].astype(np.int32)
        weights, state = step(weights, state, params, tokens)
        if progress:
            progress(i + 1, steps)
    zeros = jnp.zeros(f, jnp.float32)
    return {rank: [Predictor(w["down"][i], w["up"][i], zeros) for i in range(layers)] for rank, w in weights.items()}


def _initial(key: jax.Array, config: LlamaConfig, rank: int) -> dict[str, jax.Array]:
    down, up = jax.random.split(key)
    layers, d, f = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    return {
        "down": jax.random.normal(down, (layers, rank, d)) * d**-0.5,
        "up": jax.random.normal(up, (layers, f, rank)) * (2 / rank) ** 0.5,
    }


def _observe(params: Params, tokens: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """What every FFN reads, [L, tokens, D], and which of its neurons are active, bool [L, tokens, F]."""

    def probe(trace: FFNTrace) -> tuple[jax.Array, jax.Array]:
        rows = lambda x: x.reshape(-1, x.shape[-1])
        return rows(trace.x), rows(trace.hidden != 0)

    return model.trunk(params, tokens, config, probe=probe)[1]


def _logits(weights: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x.astype(jnp.float32) @ weights["down"].T) @ weights["up"].T


def _loss(weights: Any, x: jax.Array, active: jax.Array, negatives: float) -> jax.Array:
    y = active.astype(jnp.float32)
    weight = jnp.where(active, 1.0, jnp.mean(y) + negatives)
    return jnp.mean(weight * optax.sigmoid_binary_cross_entropy(_logits(weights, x), y))


# --------------------------------------------------------------------------------------------------------------------
# int8
# --------------------------------------------------------------------------------------------------------------------


def quantise(predictor: Predictor) -> Predictor:
    """The predictor in int8. It names the same neurons, but for what the rounding of its matrices changes."""
    down, up, scale = _rounded(predictor.down, predictor.up)
    return Predictor(down, up, predictor.threshold / scale)


@jax.jit
def _rounded(down: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """down [R, D] and up [F, R] in int8, and by how much their scores are to be multiplied, float32 [F].

    A row of `down` has a scale of its own, positive, which passes through the relu into a column of `up`.
    """
    down_scale = _scale(down)
    up = up.astype(jnp.float32) * down_scale[None]
    up_scale = _scale(up)
    round_to = lambda x, scale: jnp.round(x.astype(jnp.float32) / scale[:, None]).astype(jnp.int8)
    return round_to(down, down_scale), round_to(up, up_scale), up_scale


def _scale(matrix: jax.Array) -> jax.Array:
    """Of each row, what its largest magnitude is 127 times; of a row of zeros, next to nothing, as it is to count."""
    return jnp.maximum(jnp.max(jnp.abs(matrix.astype(jnp.float32)), axis=1), 1e-30) / 127


# --------------------------------------------------------------------------------------------------------------------
# The curve of recall against predicted sparsity, and what is chosen from it
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Recall and predicted sparsity of every layer at every threshold, on held-out text; arrays [L, points]."""

    threshold: np.ndarray  # [points], rising
    recall: np.ndarray
    precision: np.ndarray
    sparsity: np.ndarray  # predicted
    active: np.ndarray  # [L], the true share of active neurons


def curves(
    candidates: Candidates, params: Params, config: LlamaConfig, windows: ArrayLike, *, points: int = 61
) -> dict[int, Curve]:
    """Measures predictors, rounded to int8, on windows int [windows, T] of a text that they were not trained on.

    The thresholds are those of the predictors before rounding. Returns a curve of each rank.
    """
    params = model.stack(params)
    levels = np.linspace(-6, 6, points).astype(np.float32)
    rounded = {rank: jax.tree.map(lambda *layers: jnp.stack(layers), *(_rounded(p.down, p.up) for p in layers))
               for rank, layers in candidates.items()}  # fmt: skip

    @jax.jit
    def count(rounded: Any, params: Params, tokens: jax.Array) -> dict[int, tuple[jax.Array, ...]]:
        x, active = _observe(params, tokens, config)

        def one(layer: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            (down, up, scale), x, active = layer
            weights = {"down": down.astype(jnp.float32), "up": up.astype(jnp.float32)}
            logits = _logits(weights, x) * scale[None]

            def at(level: jax.Array) -> tuple[jax.Array, jax.Array]:
                predicted = logits > level
                return jnp.mean(predicted & active, dtype=jnp.float32), jnp.mean(predicted, dtype=jnp.float32)

            return *jax.lax.map(at, jnp.asarray(levels)), jnp.mean(active, dtype=jnp.float32)

        return {rank: jax.lax.map(one, (matrices, x, active)) for rank, matrices in rounded.items()}

    windows, size = np.asarray(windows, np.int32), batch_shards()
    whole = np.resize(windows, (round_up(len(windows), size), windows.shape[1]))  # devices split a batch evenly
    counted = [count(rounded, params, batch) for batch in whole.reshape(-1, size, windows.shape[1])]
    mean = jax.tree.map(lambda *parts: np.mean([np.asarray(part, np.float64) for part in parts], axis=0), *counted)
    found = {}
    for rank, (hit, predicted, active) in mean.items():
        some = np.maximum(active, 1e-12)[:, None]
        found[rank] = Curve(levels, hit / some, hit / np.maximum(predicted, 1e-12), 1 - predicted, active)
    return found


@dataclass(frozen=True)
class Pick:
    """What was chosen of a layer, as its curve has it. Without a predictor the gate decides, and misses nothing."""

    rank: int  # 0: no predictor
    threshold: float
    recall: float
    precision: float
    sparsity: float  # predicted; without a predictor, the true one
    share: float  # of the bytes of the layer's FFN, what a token reads: predictor or gate, and the rows in use


def choose(found: Mapping[int, Curve], config: LlamaConfig, recall: float, dtype: Any = jnp.bfloat16) -> list[Pick]:
    """Of each layer the rank that reads the fewest bytes, at the highest threshold of that recall; 0 where that is to
    have no predictor.

    Args:
        found: the candidates' curves.
        recall: the least share of a layer's active neurons that is to be predicted.
        dtype: of the model's matrices while decoding; predictors are of int8.
    """
    check(0 < recall <= 1, "recall", "a share above 0", recall)
    d, f, size = config.hidden_size, config.intermediate_size, jnp.dtype(dtype).itemsize
    active = next(iter(found.values())).active
    picks = []
    for layer in range(config.num_hidden_layers):
        used = float(active[layer])
        options = [Pick(0, 0.0, 1.0, 1.0, 1 - used, (1 + 2 * used) / 3)]
        for rank, curve in found.items():
            good = np.flatnonzero(curve.recall[layer] >= recall)
            if len(good):
                at = layer, good[-1]
                share = 1 - curve.sparsity[at] + rank * (d + f) / (3 * d * f * size)
                options.append(Pick(rank, float(curve.threshold[good[-1]]), float(curve.recall[at]),
                                    float(curve.precision[at]), float(curve.sparsity[at]), float(share)))  # fmt: skip
        picks.append(min(options, key=lambda pick: pick.share))
    return picks


def assemble(candidates: Candidates, picks: Sequence[Pick]) -> list[Predictor | None]:
    """The predictors that were chosen, in int8; None of a layer without."""

    def of(layer: int, pick: Pick) -> Predictor:
        predictor = candidates[pick.rank][layer]
        return quantise(predictor._replace(threshold=jnp.full_like(predictor.threshold, pick.threshold)))

    return [of(layer, pick) if pick.rank else None for layer, pick in enumerate(picks)]


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def save(folder: str | Path, predictors: Sequence[Predictor | None]) -> None:
    """Writes `predictor.safetensors` into a model folder: the tensors of the layers that have a predictor."""
    tensors = {f"layers.{i}.{name}": np.asarray(array)
               for i, p in enumerate(predictors) if p is not None for name, array in p._asdict().items()}  # fmt: skip
    with replacing(Path(folder) / FILE) as path:
        save_file(tensors, path, metadata={"layers": str(len(predictors))})


def load(folder: str | Path, config: LlamaConfig) -> list[Predictor | None]:
    """The predictors of a model folder; None of a layer without.

    Raises:
        ConfigError: the folder has none.
        ValueError: they do not fit the model.
    """
    path = Path(folder) / FILE
    check(path.exists(), str(folder), f"a model folder with {FILE} (jsparse predict makes it)", "none")
    layers, d, f = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    with safe_open(path, "np") as file:
        written = (file.metadata() or {}).get("layers")
    if written != str(layers):
        raise ValueError(f"{path}: expected predictors of {layers} layers, got {written}")
    tensors = load_file(path)
    found: list[Predictor | None] = [None] * layers
    for i in sorted({int(name.split(".")[1]) for name in tensors}):
        parts = [jnp.asarray(tensors.get(f"layers.{i}.{name}", np.zeros(0))) for name in Predictor._fields]
        predictor = Predictor(*parts)
        rank = len(predictor.down)
        if [x.shape for x in predictor] != [(rank, d), (f, rank), (f,)]:
            raise ValueError(f"{path}: layers.{i}: expected down [rank, {d}], up [{f}, rank] and threshold [{f}], "
                             f"got {', '.join(str(x.shape) for x in predictor)}")  # fmt: skip
        found[i] = predictor
    return found


def powerinfer(folder: str | Path, predictors: Sequence[Predictor], params: Params) -> None:
    """Writes a new folder as PowerInfer's converter reads predictors: model_N.pt of fc1.weight [R, D] and fc2.weight
    [F, R] in float16 for each layer N, and config.json with the threshold 0.

    PowerInfer feeds the residual stream before the norm, whose scale moves into fc1. Its decisions are those of these
    predictors at threshold 0; other thresholds, which it has one of for all layers, have no equal there. Their ranks
    may differ by layer.
    """
    scales = model.stack(params)["layers"]["ffn_norm"]["scale"]
    folder = Path(folder)
    folder.mkdir(parents=True)
    for i, predictor in enumerate(predictors):
        down = np.asarray(predictor.down, np.float32) * np.asarray(scales[i], np.float32)
        _save_pt(folder / f"model_{i}.pt", {"fc1.weight": down, "fc2.weight": np.asarray(predictor.up, np.float32)})
    (folder / "config.json").write_text(json.dumps({"sparse_threshold": 0.0}) + "\n")


def _save_pt(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A state dict in torch.save's format, float16: a zip of raw arrays and the pickle that describes them.

    Written by hand, as the opcodes of a dict of `torch._utils._rebuild_tensor_v2` calls, so that it takes no torch.
    """

    def number(n: int) -> bytes:
        return pickle.BININT + n.to_bytes(4, "little", signed=True)

    def text(s: str) -> bytes:
        return pickle.BINUNICODE + len(s.encode()).to_bytes(4, "little") + s.encode()

    def tuple_of(*items: bytes) -> bytes:
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    def name(module: str, attribute: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

    entries = b""
    for key, (title, x) in enumerate(tensors.items()):
        storage = tuple_of(text("storage"), name("torch", "HalfStorage"), text(str(key)), text("cpu"), number(x.size))
        hooks = name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        arguments = tuple_of(storage + pickle.BINPERSID, number(0), tuple_of(*map(number, x.shape)),
                             tuple_of(number(x.shape[1]), number(1)), pickle.NEWFALSE, hooks)  # fmt: skip
        entries += text(title) + name("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE
    described = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + entries + pickle.SETITEMS + pickle.STOP
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", described)
        archive.writestr(f"{path.stem}/byteorder", "little")
        for key, x in enumerate(tensors.values()):
            archive.writestr(f"{path.stem}/data/{key}", np.ascontiguousarray(x, np.float16).tobytes())
        archive.writestr(f"{path.stem}/version", "3\n")
