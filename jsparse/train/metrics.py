"""What a run writes down: metrics.jsonl, TensorBoard, and the arithmetic of speed.

metrics.jsonl has one JSON object a line, each with "step". Lines of training hold what `make_step` returns and
"tokens" (seen so far), "tokens_per_second", "step_seconds", "data_wait" (share of the time spent waiting for batches)
and, where they are known, "mfu" and "memory_peak" (bytes, of this process's fullest device). Lines of evaluation hold
"eval": {source: {perplexity, loss, tokens, sparsity [L], dead [L], ...}}.
"""

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jsparse import model
from jsparse.config import LlamaConfig, TrainConfig
from jsparse.files import write_text
from jsparse.train.host import Clock

# bf16 multiply-adds count as two; dense, without the doubling that vendors quote for 2:4 sparsity.
# A device that is not here has no MFU.
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4
    "TPU v5 lite": 197e12,  # cloud.google.com/tpu/docs/v5e
    "TPU v5": 459e12,  # cloud.google.com/tpu/docs/v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # cloud.google.com/tpu/docs/v6e
    "NVIDIA A100-SXM4-40GB": 312e12,  # NVIDIA A100 data sheet
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # NVIDIA H100 data sheet, SXM
    "NVIDIA H200": 989e12,  # NVIDIA H200 data sheet, SXM
}


def flops_per_token(config: LlamaConfig, seq_len: int) -> float:
    """Floating-point operations of training on one token, forward and backward: 6 P + 6 L N H T.

    P counts the parameters that multiply: all but an input embedding that is not also the head. The second term is
    causal attention: 12 L N H T of PaLM (Chowdhery et al. 2022, appendix B), halved because a query sees half of the
    positions on average. Recomputation (remat) is not counted: this is model FLOPs, the M of MFU.
    """
    multiplied = model.count(model.abstract(config))
    if not config.tie_word_embeddings:
        multiplied -= config.vocab_size * config.hidden_size
    dims = sum(shape.query_dim(config) + shape.value_dim for shape in config.layer_shapes) / 2  # L H
    attention = dims * config.num_attention_heads * seq_len
    return 6.0 * multiplied + 6.0 * attention


def memory_peak() -> int | None:
    """Most bytes ever held on one of this process's devices, None where the backend does not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks, default=None)


class Speed:
    """Speed since it was last asked, evaluations and checkpoints apart."""

    def __init__(self, config: TrainConfig, model_config: LlamaConfig, mesh: Mesh, clock: Clock, start: int):
        self._tokens_per_step = config.data.batch_size * config.data.seq_len
        peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
        self._peak = peak and peak * mesh.size
        self._flops = flops_per_token(model_config, config.data.seq_len)
        self._clock, self._step, self._seconds, self._waited = clock, start, *self._read(clock)

    @staticmethod
    def _read(clock: Clock) -> tuple[float, float]:
        return clock.total() - clock.seconds["eval"] - clock.seconds["checkpoint"], clock.seconds["wait for data"]

    def __call__(self, step: int) -> dict[str, Any]:
        """The entries of metrics.jsonl that tell of speed and memory, once `step` is done."""
        seconds, waited = self._read(self._clock)
        passed, tokens = seconds - self._seconds, (step - self._step) * self._tokens_per_step
        values: dict[str, Any] = {
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": tokens / passed,
            "step_seconds": passed / (step - self._step),
            "data_wait": (waited - self._waited) / passed,
        }
        if self._peak:
            values["mfu"] = tokens * self._flops / passed / self._peak
        if (memory := memory_peak()) is not None:
            values["memory_peak"] = memory
        self._step, self._seconds, self._waited = step, seconds, waited
        return values


class MetricsLog:
    """metrics.jsonl and TensorBoard of a run, written by the first process alone.

    Lines beyond `start`, the step that the run goes on from, are dropped (at 0 all of them): the run is about to write
    them anew.

    Attributes:
        last: the latest value of everything ever written.
    """

    def __init__(self, run: epath.Path, start: int, tensorboard: bool):
        self._path = run / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        self._board = _tensorboard(run / "tensorboard", start) if tensorboard and self._writes else None
        lines = [x for x in read_metrics(self._path) if x["step"] <= start] if start else []
        self.last: dict[str, Any] = {name: value for line in lines for name, value in line.items()}
        if self._writes:
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds a line. Arrays become lists; TensorBoard gets the numbers, nested ones and layers under a/b."""
        values = {"step": step} | _plain(values)
        self.last |= values
        if self._writes:
            with self._path.open("a") as f:  # one write a line: a kill leaves at most the last line torn
                f.write(json.dumps(values) + "\n")
        if self._board is not None:
            for name, value in _scalars(values):
                self._board.add_scalar(name, value, step)


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, up to one that a kill left torn."""
    path = epath.Path(path)
    lines: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _tensorboard(folder: epath.Path, start: int) -> Any:
    # tensorboardX imports torch where it finds it, for tensors and graphs that no run writes: a second and 180 MB of
    # memory, with torch for CPUs. None among the modules makes the import fail as if torch were not installed.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(folder), purge_step=start + 1 if start else 0)


def _plain(x: Any) -> Any:
    """JSON values of arrays and nested values; a number that is not finite becomes null, which JSON has instead."""
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [_plain(y) for y in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _scalars(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _scalars(value, f"{name}/{key}" if name else str(key))
    elif isinstance(values, int | float) and name != "step":
        yield name, values
