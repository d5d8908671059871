"""What a run says on the terminal: the report before step 1 and the progress line."""

import math
from datetime import timedelta
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from jsparse import model
from jsparse.config import LlamaConfig, TrainConfig
from jsparse.train.metrics import flops_per_token
from jsparse.train.state import TrainState


def make_console() -> Console:
    """Of the first process; the others are silent. On standard error: standard output is for results."""
    return Console(stderr=True, quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)


def report(
    console: Console,
    config: TrainConfig,
    model_config: LlamaConfig,
    mesh: Mesh,
    state: TrainState,
    compiled: jax.stages.Compiled,
    compile_seconds: float,
) -> None:
    """What is known before the first step runs: parameters and where they lie, memory, work of a step.

    Args:
        state: abstract, with shardings.
        compiled: the step.
    """
    table = Table(title="parameters", title_justify="left", box=None, header_style="dim", pad_edge=False)
    for column in ("name", "shape", "split over", "bytes a device"):
        table.add_column(column, justify="right" if column == "bytes a device" else "left")
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        shard = x.sharding.shard_shape(x.shape)
        split = ", ".join(str(axis) for axis in x.sharding.spec if axis) or "-"
        size = x.dtype.itemsize * math.prod(shard)
        table.add_row(jax.tree_util.keystr(path, simple=True, separator="."), "x".join(map(str, x.shape)), split,
                      _bytes(size))  # fmt: skip
    tokens = config.data.batch_size * config.data.seq_len
    flops = flops_per_token(model_config, config.data.seq_len) * tokens
    console.print(table)
    console.print(f"model      {model.count(state.params):,} parameters, {config.dtype}, masters and moments float32")
    console.print(f"mesh       {' x '.join(f'{name} {size}' for name, size in mesh.shape.items())}, "
                  f"{mesh.devices.flat[0].device_kind}")  # fmt: skip
    console.print(f"step       {tokens:,} tokens in {config.accumulate} micro-batches, {flops:.3g} FLOPs")
    use = compiled.memory_analysis()
    if use is not None:
        kept, scratch = (
            use.argument_size_in_bytes,
            use.temp_size_in_bytes + use.output_size_in_bytes - use.alias_size_in_bytes,
        )
        console.print(f"memory     {_bytes(kept)} state and batch + {_bytes(scratch)} while a step runs, a device")
    console.print(f"compiled   in {compile_seconds:.1f} s")


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


class Progress:
    """A line a report, with the time left; on a terminal a live bar below them."""

    def __init__(self, console: Console, start: int, steps: int):
        self._console, self._steps, self._bar = console, steps, None
        if console.is_terminal:
            columns = (
                MofNCompleteColumn(),
                BarColumn(None),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=steps, completed=start)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, number: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=number)

    def line(self, number: int, values: dict[str, Any]) -> None:
        """Shows the metrics of a step."""
        left = timedelta(seconds=round((self._steps - number) * values["step_seconds"]))
        self._console.print(f"step {number}/{self._steps}  {describe(values)}  left {left}")

    def evaluation(self, number: int, found: dict[str, dict[str, Any]]) -> None:
        """Shows an evaluation of the held-out sources."""
        for source, values in found.items():
            zeros = sum(values["sparsity"]) / len(values["sparsity"])
            self._console.print(f"step {number}  {source}: perplexity {values['perplexity']:.3f}, sparsity {zeros:.1%}")


def describe(values: dict[str, Any]) -> str:
    """A step's metrics in one line."""
    parts = [f"loss {values['loss']:.4f}", f"ppl {values['perplexity']:.2f}", f"grad {values['grad_norm']:.2f}"]
    if "sparsity" in values:
        parts.append(f"sparsity {float(values['sparsity'].mean()):.1%}")
    if "penalty_weight" in values:
        parts.append(f"weight {values['penalty_weight']:.3g}")
    parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in values:
        parts.append(f"mfu {values['mfu']:.1%}")
    if values["skipped"]:
        parts.append(f"skipped {values['skipped']}")
    return "  ".join(parts)
