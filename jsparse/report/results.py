"""What a report is made of: the metrics of runs, the results of evaluations, and the table that compares them.

Sparsity is the share of exact zeros in x1 = act(gate) * up, 0 to 1.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jsparse.config import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Result:
    """Perplexity and sparsity of one variant on one text. What is not known is NaN or empty."""

    name: str
    perplexity: float = math.nan
    sparsity: tuple[float, ...] = ()  # [L], or just [mean]
    dead: tuple[int, ...] = ()  # [L], neurons never active on the text
    neurons: tuple[int, ...] = ()  # [L], ffn width
    points: tuple[tuple[float, float, float], ...] = ()  # (threshold, perplexity, mean sparsity) of a sweep
    data: str = ""  # the text

    @property
    def mean_sparsity(self) -> float:
        """Over all neurons: wide layers count for more."""
        weights = self.neurons if len(self.neurons) == len(self.sparsity) else None
        return float(np.average(self.sparsity, weights=weights)) if self.sparsity else math.nan


@dataclass(frozen=True)
class Run:
    """The metrics of a training run."""

    name: str
    lines: list[dict[str, Any]]  # of metrics.jsonl
    steps: int | None = None  # planned
    config: str = ""  # resolved, YAML

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [n] and values [n] or [n, L] where the training lines hold `key`."""
        found = [(line["step"], line[key]) for line in self.lines if line.get(key) is not None]
        return np.array([s for s, _ in found]), np.array([v for _, v in found], float)

    def held_out(self) -> dict[str, list[tuple[int, Result]]]:
        """(step, result) of every held-out evaluation, by its text."""
        found: dict[str, list[tuple[int, Result]]] = {}
        for line in self.lines:
            for text, values in line.get("eval", {}).items():
                found.setdefault(text, []).append((line["step"], result({"data": text, **values, "name": self.name})))
        return found

    def results(self) -> list[Result]:
        """The last held-out evaluation on each text; failing that, the end of training."""
        if held_out := self.held_out():
            return [evaluations[-1][1] for evaluations in held_out.values()]
        loss, sparsity = self.series("loss")[1], self.series("sparsity")[1]
        perplexity = math.exp(loss[-10:].mean()) if len(loss) else math.nan
        last = tuple(sparsity[-1].tolist()) if len(sparsity) else ()
        return [Result(self.name, perplexity, last, data="training batches")]


def result(values: Mapping[str, Any]) -> Result:
    """The result in JSON values: `name`, the fields of `jsparse.inference.Evaluation`, `data`, `threshold`, `points`.

    Sparsity is by layer or the mean. A sweep has `points`, a list of {threshold, perplexity, sparsity}, and stands for
    its point of the lowest threshold where it has no perplexity of its own. All but the name may be missing.
    """
    points = sorted(
        (float(p.get("threshold") or 0), _number(p["perplexity"]), float(np.mean(p["sparsity"])))
        for p in values.get("points") or ()
    )
    if points and "perplexity" not in values:
        values = {**values, "perplexity": points[0][1], "sparsity": points[0][2]}
    sparsity, threshold = values.get("sparsity"), values.get("threshold")
    return Result(
        values["name"] + (f", threshold {threshold:.3g}" if threshold else ""),
        _number(values.get("perplexity")),
        () if sparsity is None else tuple(np.atleast_1d(np.array(sparsity, float)).tolist()),
        tuple(values.get("dead") or ()),
        tuple(values.get("neurons") or ()),
        tuple(points),
        str(values.get("data") or ""),
    )


def as_results(results: Iterable[Result | Mapping[str, Any]]) -> list[Result]:
    return [r if isinstance(r, Result) else result(r) for r in results]


def _number(x: float | None) -> float:
    return math.nan if x is None else float(x)


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


def read(paths: Iterable[str | Path]) -> tuple[list[Run], list[Result]]:
    """Runs and results, in the order of the paths: run folders, evaluation and threshold files, folders of them.

    Each is named after its run folder or model, with as many parent folders as tell it from the others.

    Raises:
        ConfigError: nothing there, or nothing that a report is made of.
        ValueError: damaged metrics.
    """
    found: dict[Path, tuple[str, Any]] = {}  # file: (path of what it is about, its content)
    for path in paths:
        found |= _read_path(Path(path))
    names = short_names(about for about, _ in found.values())
    runs: list[Run] = []
    results: list[Result] = []
    for file, (about, content) in found.items():
        if file.name == "metrics.jsonl":
            runs.append(_run(names[about], file.parent, content))
            results += runs[-1].results()
        else:
            results.append(result({**content, "name": names[about]}))
    return runs, _join_sweeps(results)


def _read_path(path: Path) -> dict[Path, tuple[str, Any]]:
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    found: dict[Path, tuple[str, Any]] = {}
    for file in _files(path):
        if file.name == "metrics.jsonl":
            found[file] = str(file.parent), _read_metrics(file)
        elif file.suffix == ".json" and not (file.parent / "metrics.jsonl").exists():  # there it is the run's summary
            values = _read_evaluation(file)
            if values is not None:
                found[file] = str(values.get("name") or values.get("model") or file.with_suffix("")), values
    if not found:
        expected = "a run folder, or a result of `jsparse eval` or `jsparse threshold`"
        raise ConfigError(f"{path}: expected {expected}, got nothing with metrics or with perplexity and sparsity")
    return found


def _files(path: Path) -> list[Path]:
    path = path.resolve()
    found = [path] if path.is_file() else []
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = sorted(set(subfolders) - {"checkpoints", "tensorboard", "profile"})
        found += [Path(folder, file) for file in sorted(files)]
    return found


def _read_metrics(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines()
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except ValueError:
            if number < len(lines):  # the last one may be in the making
                raise ValueError(f"{file}: line {number} is not JSON") from None
    if not any("loss" in v or "eval" in v for v in values):
        raise ValueError(f"{file}: expected metrics, got none yet")
    return values


def _read_evaluation(file: Path) -> dict[str, Any] | None:
    """The values of an evaluation or a sweep; None of anything else."""
    try:
        values = json.loads(file.read_text())
    except ValueError:
        return None
    values = {"points": values} if isinstance(values, list) else values
    if not isinstance(values, dict):
        return None
    parts = [values] if "perplexity" in values else values.get("points") or [values]
    return values if all(isinstance(p, dict) and {"perplexity", "sparsity"} <= p.keys() for p in parts) else None


def _run(name: str, folder: Path, lines: list[dict[str, Any]]) -> Run:
    file = folder / "config.yaml"
    config = file.read_text() if file.exists() else ""
    steps = re.search(r"^steps: (\d+)", config, re.MULTILINE)
    return Run(name, lines, int(steps[1]) if steps else None, config)


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """The fewest last parts of each path that no other path ends with."""
    parts = {path: Path(path).parts for path in paths}

    def name(path: tuple[str, ...]) -> str:
        others = set(parts.values()) - {path}
        ends = (path[-n:] for n in range(1, len(path)))
        alone = (end for end in ends if not any(other[-len(end) :] == end for other in others))
        return str(Path(*next(alone, path))) if path else ""

    return {path: name(parts[path]) for path in parts}


def _join_sweeps(results: list[Result]) -> list[Result]:
    """Gives a sweep's points to the evaluation of the same model on the same text, where there is one."""
    sweeps = {(r.name, r.data): r.points for r in results if r.points}
    evaluated = {(r.name, r.data) for r in results if not r.points}
    return [
        dataclasses.replace(r, points=r.points or sweeps.get((r.name, r.data), ()))
        for r in results
        if not (r.points and (r.name, r.data) in evaluated)
    ]


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------


def summary_table(results: Iterable[Result | Mapping[str, Any]]) -> "Table":
    """One row a variant, for the terminal. Changes of perplexity are against the first variant on the same text.

    Args:
        results: `Result`s, or mappings as `result` takes them.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    found = as_results(results)
    header, rows = cells(found)
    title = escape(one_text(found)) or None
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in header:
        number = name not in ("variant", "text")
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def cells(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; with a column for the text where there are several."""
    first: dict[str, Result] = {}
    texts = short_names(r.data for r in results)
    rows = []
    for r in results:
        change = layers = dead = "-"
        base = first.setdefault(r.data, r) if math.isfinite(r.perplexity) else r
        if base is not r:
            change = f"{r.perplexity / base.perplexity - 1:+,.1%}"
        if len(r.sparsity) > 1:
            layers = f"{100 * min(r.sparsity):.1f} to {max(r.sparsity):.1%}"
        if r.dead:
            dead = f"{sum(r.dead):,}"
        rows.append([r.name, texts[r.data], perplexity(r.perplexity), change, percent(r.mean_sparsity), layers, dead])
    header = ["variant", "text", "perplexity", "change", "sparsity", "by layer", "dead\nneurons"]
    if len(texts) < 2:
        header, *rows = ([row[0], *row[2:]] for row in (header, *rows))
    return header, rows


def one_text(results: Sequence[Result]) -> str:
    """What to say of the text where there is only one."""
    texts = short_names(r.data for r in results)
    return f"on {text}" if len(texts) == 1 and (text := next(iter(texts.values()))) else ""


def percent(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.1%}"


def perplexity(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:,.2f}" if x < 1000 else f"{x:,.0f}"
