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

The paper keeps t = 0 and the checkpoint of the best recall. Here t is chosen from the whole curve of recall against
predicted sparsity on held-out text, layer by layer, so that every layer has the recall that was asked for. And x is the
FFN's normalised input where the paper's is the residual stream before the norm: without biases p is homogeneous, so at
t = 0 the two differ by the norm's scale alone, which `powerinfer` moves into A.
"""

import functools
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike
from safetensors.numpy import load_file, save_file

from jsparse import model
from jsparse.config import Cats, Cett, FatRelu, LlamaConfig, Relu, check
from jsparse.model import FFNTrace, Params
from jsparse.parallel import batch_shards
from pallas_kernels.neuron_sparse_ffn import Predictor

FILE = "predictor.safetensors"  # in a model folder

# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def train(
    params: Params,
    config: LlamaConfig,
    windows: ArrayLike,
    *,
    rank: int = 1024,
    steps: int = 1000,
    batch_size: int = 1,
    lr: float = 1e-3,
    negatives: float = 0.005,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Predictor]:
    """Trains a predictor for each layer on the activations that the model has on a text, as they arise.

    Nothing is recorded: each step runs the model on a batch of windows and moves the predictors of all layers.

    Args:
        params: of a model whose FFN has exact zeros, with layers of one width.
        windows: token ids, int [windows, T]; drawn anew for every step.
        rank: R.
        batch_size: windows a step, raised to a multiple of the devices that split a batch.
        negatives: added to the mean of the labels, it is the weight of inactive neurons in the loss: the larger, the
            fewer neurons are predicted.
        progress: called after each step with the number of steps done and of all.

    Returns:
        The predictors in float32, at threshold 0. `choose` sets their thresholds.

    Raises:
        ConfigError: a model without zeros, or of layers that differ in width.
    """
    check(isinstance(config.activation, Relu | FatRelu | Cett | Cats), "activation", "one with exact zeros",
          config.activation)  # fmt: skip
    check(config.layers is None, "layers", "layers of one width", "a searched subnet")
    check(rank > 0 and steps > 0, "rank, steps", "positive numbers", (rank, steps))
    windows, batch_size = np.asarray(windows), _round_up(batch_size, batch_shards())
    params = model.stack(params)
    down, up = jax.random.split(jax.random.key(seed))
    layers, d, f = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    weights = {
        "down": jax.random.normal(down, (layers, rank, d)) * d**-0.5,
        "up": jax.random.normal(up, (layers, f, rank)) * (2 / rank) ** 0.5,
    }
    optimizer = optax.adamw(lr, weight_decay=0.01)
    state = optimizer.init(weights)
    rng = np.random.default_rng(seed)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Any, state: Any, params: Params, tokens: jax.Array) -> tuple[Any, Any]:
        x, active = _observe(params, tokens, config)

        def loss(weights: Any) -> jax.Array:
            return jnp.sum(jax.vmap(functools.partial(_loss, negatives=negatives))(weights, x, active))

        with jax.numpy_dtype_promotion("standard"):  # optax is not written for "strict"
            updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    for i in range(steps):
        tokens = windows[rng.integers(len(windows), size=batch_size)].astype(np.int32)
        weights, state = step(weights, state, params, tokens)
        if progress:
            progress(i + 1, steps)
    return [Predictor(weights["down"][i], weights["up"][i], jnp.zeros(f, jnp.float32)) for i in range(layers)]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


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
# The curve of recall against predicted sparsity, and the thresholds chosen from it
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Recall and predicted sparsity of every layer at every threshold, on held-out text; arrays [L, points]."""

    threshold: np.ndarray  # [points], rising
    recall: np.ndarray
    precision: np.ndarray
    sparsity: np.ndarray  # predicted
    active: np.ndarray  # [L], the true share of active neurons


def curve(
    predictors: list[Predictor], params: Params, config: LlamaConfig, windows: ArrayLike, *, points: int = 61
) -> Curve:
    """Measures predictors on windows int [windows, T] of a text that they were not trained on."""
    params = model.stack(params)
    levels = np.linspace(-6, 6, points).astype(np.float32)
    weights = {name: jnp.stack([getattr(p, name).astype(jnp.float32) for p in predictors]) for name in ("down", "up")}

    @jax.jit
    def count(weights: Any, params: Params, tokens: jax.Array) -> tuple[jax.Array, ...]:
        x, active = _observe(params, tokens, config)

        def one(weights: Any, x: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            logits = _logits(weights, x)

            def at(level: jax.Array) -> tuple[jax.Array, jax.Array]:
                predicted = logits > level
                return jnp.mean(predicted & active, dtype=jnp.float32), jnp.mean(predicted, dtype=jnp.float32)

            return *jax.lax.map(at, jnp.asarray(levels)), jnp.mean(active, dtype=jnp.float32)

        return jax.lax.map(lambda layer: one(*layer), (weights, x, active))

    windows, size = np.asarray(windows, np.int32), batch_shards()
    whole = np.resize(windows, (_round_up(len(windows), size), windows.shape[1]))  # devices split a batch evenly
    counted = [count(weights, params, batch) for batch in whole.reshape(-1, size, windows.shape[1])]
    hit, predicted, active = (np.mean([np.asarray(c[i], np.float64) for c in counted], axis=0) for i in range(3))
    some = np.maximum(active, 1e-12)[:, None]
    return Curve(levels, hit / some, hit / np.maximum(predicted, 1e-12), 1 - predicted, active)


def choose(predictors: list[Predictor], found: Curve, recall: float) -> tuple[list[Predictor], np.ndarray]:
    """The predictors with each layer's threshold the highest at which its recall is at least `recall`, and the index
    of that point on each layer's curve, int [L]. A layer that never reaches it takes the lowest."""
    check(0 < recall <= 1, "recall", "a share above 0", recall)
    good = found.recall >= recall
    index = np.where(good.any(axis=1), good.shape[1] - 1 - np.argmax(good[:, ::-1], axis=1), 0)
    chosen = [p._replace(threshold=jnp.full_like(p.threshold, found.threshold[i]))
              for p, i in zip(predictors, index, strict=True)]  # fmt: skip
    return chosen, index


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def save(folder: str | Path, predictors: list[Predictor]) -> None:
    """Writes `predictor.safetensors` into a model folder."""
    tensors = {f"layers.{i}.{name}": np.asarray(array)
               for i, p in enumerate(predictors) for name, array in p._asdict().items()}  # fmt: skip
    path = Path(folder) / FILE
    scratch = path.with_name(f".{FILE}.tmp")
    save_file(tensors, scratch)
    scratch.replace(path)


def load(folder: str | Path, config: LlamaConfig, dtype: Any = jnp.float32) -> list[Predictor]:
    """The predictors of a model folder, matrices in `dtype`.

    Raises:
        ConfigError: the folder has none.
        ValueError: they do not fit the model.
    """
    path = Path(folder) / FILE
    check(path.exists(), str(folder), f"a model folder with {FILE} (jsparse predict makes it)", "none")
    tensors, found = load_file(path), []
    for i in range(config.num_hidden_layers):
        names = [f"layers.{i}.{name}" for name in Predictor._fields]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"{path}: missing tensor {missing[0]}")
        down, up, threshold = (tensors[name] for name in names)
        if down.shape != (up.shape[1], config.hidden_size) or up.shape[0] != threshold.size:
            raise ValueError(f"{path}: layers.{i}: {down.shape} and {up.shape} do not fit width {config.hidden_size}")
        found.append(Predictor(jnp.asarray(down, dtype), jnp.asarray(up, dtype), jnp.asarray(threshold)))
    return found


def powerinfer(folder: str | Path, predictors: list[Predictor], params: Params) -> None:
    """Writes a new folder as PowerInfer's converter reads predictors: model_N.pt of fc1.weight [R, D] and fc2.weight
    [F, R] in float16 for each layer N, and config.json with the threshold 0.

    PowerInfer feeds the residual stream before the norm, whose scale moves into fc1. Its decisions are those of these
    predictors at threshold 0; other thresholds, which it has one of for all layers, have no equal there.
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
