"""The report of `jsparse report`: a folder with one HTML page, its pictures and its numbers."""

import base64
import dataclasses
import functools
import html
import io
import json
import math
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jsparse.config import ConfigError
from jsparse.report import pictures
from jsparse.report.results import Result, Run, cells, one_text, percent, perplexity, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report(paths: Sequence[Path], out: Path, *, overwrite: bool = False) -> Path:
    """Draws runs and evaluations into the folder `out`: index.html, which needs no other file, the PNG and report.json.

    Args:
        paths: run folders (unfinished ones too), results of `jsparse eval` and `jsparse threshold`, folders of them.
        overwrite: replaces an earlier report, and nothing else.

    Returns:
        The page's path.

    Raises:
        ConfigError: nothing to draw, or `out` exists.
        ValueError: damaged metrics.
    """
    out = Path(out)
    _check(out, overwrite)
    runs, results = read(paths)
    scratch = out.resolve().with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        new = scratch / "new"
        new.mkdir(parents=True)
        figures = []
        for name, caption, draw in _pictures(runs, results):
            light, dark = _png(draw(dark=False)), _png(draw(dark=True))
            (new / name).write_bytes(light)
            figures.append(_FIGURE.format(light=_data(light), dark=_data(dark), caption=html.escape(caption)))
        (new / "index.html").write_text(_page(runs, results, figures), encoding="utf-8")
        numbers = {"command": "report", "results": [_plain(r) for r in results]}
        (new / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
        if out.exists():
            out.rename(scratch / "old")
        new.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out / "index.html"


def _check(out: Path, overwrite: bool) -> None:
    """Whether `out` may be written: it is not there, or empty, or a report that may go."""
    there = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if there and not overwrite:
        raise ConfigError(f"{out}: exists; give another folder, or --overwrite to replace an earlier report")
    ours = {"index.html", "report.json"}
    if there and not ours <= there <= ours | {"tradeoff.png", "training.png", "profile.png", "sparsity.png"}:
        raise ConfigError(f"{out}: expected an earlier report to replace, got something else")


def _plain(r: Result) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    points = [{"threshold": t, "perplexity": p if math.isfinite(p) else None, "sparsity": s} for t, p, s in r.points]
    perplexity = r.perplexity if math.isfinite(r.perplexity) else None
    return dataclasses.asdict(r) | {"perplexity": perplexity, "points": points}


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


# --------------------------------------------------------------------------------------------------------------------
# Pictures and what is seen on them
# --------------------------------------------------------------------------------------------------------------------


def _looks(runs: list[Run], results: list[Result]) -> pictures.Looks:
    return pictures.make_looks([run.name for run in runs] + [r.name for r in results])


def _pictures(runs: list[Run], results: list[Result]) -> list[tuple[str, str, Callable[..., "Figure"]]]:
    """(file, caption, drawing function) of the pictures that there is something to draw for."""
    looks = _looks(runs, results)
    found: list[tuple[str, str, Callable[..., Figure]]] = []
    placed = [r for r in results if math.isfinite(r.perplexity) and r.sparsity]
    if compared := [r for r in placed if r.points or sum(other.data == r.data for other in placed) > 1]:
        draw = functools.partial(pictures.tradeoff_picture, compared, looks=looks)
        found.append(("tradeoff.png", _tradeoff_caption(compared), draw))
    if trained := [run for run in runs if len(run.series("loss")[0])]:
        draw = functools.partial(pictures.training_picture, trained, looks=looks)
        found.append(("training.png", _training_caption(trained), draw))
    if layered := [r for r in results if len(r.sparsity) > 1]:
        draw = functools.partial(pictures.profile_picture, layered, looks=looks)
        found.append(("profile.png", _profile_caption(layered), draw))
    if watched := [run for run in runs if len(run.series("sparsity")[0])]:
        draw = functools.partial(pictures.sparsity_picture, watched)
        found.append(("sparsity.png", _sparsity_caption(watched), draw))
    return found


def _tradeoff_caption(results: list[Result]) -> str:
    r = max(results, key=lambda r: r.mean_sparsity)
    best = min((b for b in results if b.data == r.data), key=lambda b: b.perplexity)
    caption = f"{r.name} is the sparsest: {percent(r.mean_sparsity)} at perplexity {perplexity(r.perplexity)}"
    if best is not r:
        caption += f", {r.perplexity / best.perplexity:.2f} times that of {best.name} at {percent(best.mean_sparsity)}"
    return caption + ("; curves are threshold sweeps." if any(r.points for r in results) else ".")


def _training_caption(runs: list[Run]) -> str:
    first = runs[0].results()[0]
    ends = sorted((r.perplexity, r.name) for run in runs for r in run.results() if r.data == first.data)
    caption = f"Perplexity {one_text([first])} ends at {perplexity(ends[0][0])} ({ends[0][1]})"
    if len(ends) > 1:
        caption += f" to {perplexity(ends[-1][0])} ({ends[-1][1]})"
    weights = [(weight[-1], run.name) for run in runs if len(weight := run.series("penalty_weight")[1])]
    return caption + ("; the penalty's weight ends at {:.3g} ({}).".format(*max(weights)) if weights else ".")


def _profile_caption(results: list[Result]) -> str:
    r = max(results, key=lambda r: r.mean_sparsity)
    low, high = int(np.argmin(r.sparsity)), int(np.argmax(r.sparsity))
    return (f"The layers of {r.name} lie between {percent(r.sparsity[low])} (layer {low}) and "
            f"{percent(r.sparsity[high])} (layer {high}).")  # fmt: skip


def _sparsity_caption(runs: list[Run]) -> str:
    name, steps, values = max(((run.name, *run.series("sparsity")) for run in runs), key=lambda x: x[2][-1].mean())
    return (f"On the tokens trained on, the mean sparsity of {name} goes from {percent(values[0].mean())} at step "
            f"{steps[0]:,} to {percent(values[-1].mean())} at step {steps[-1]:,}.")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# HTML
# --------------------------------------------------------------------------------------------------------------------


def _page(runs: list[Run], results: list[Result], figures: list[str]) -> str:
    names = ", ".join(dict.fromkeys(r.name for r in results))
    settings = [_SETTINGS.format(head=html.escape(f"{run.name}: {_progress(run)}"), config=html.escape(run.config))
                for run in runs]  # fmt: skip
    colors = "--ink: {}; --faint: {}; --line: {}; --paper: {}"
    light, dark = colors.format(*pictures.INK[False]), colors.format(*pictures.INK[True])
    body = "\n".join([_table(runs, results), *figures, *settings])
    return _PAGE.format(title=html.escape(names), light=light, dark=dark, body=body)


def _progress(run: Run) -> str:
    """How far a run is and how fast, the median over its lines."""
    step = max(line["step"] for line in run.lines)
    parts = [f"step {step:,}" + (f" of {run.steps:,}" if run.steps else "")]
    for key, form in {"tokens_per_second": "{:,.0f} tokens/s", "mfu": "{:.1%} MFU"}.items():
        if len(values := run.series(key)[1]):
            parts.append(form.format(np.median(values)))
    skipped = run.series("skipped")[1]
    return ", ".join(parts) + (f", {skipped[-1]:.0f} steps skipped" if skipped.any() else "")


def _table(runs: list[Run], results: list[Result]) -> str:
    """Each row begins with a dot of its colour in the pictures."""
    looks = _looks(runs, results)
    header, rows = cells(results)
    dots = [f'<i style="background:{looks[r.name]["color"]}"></i>' for r in results]
    rows = [[dot + html.escape(row[0]), *map(html.escape, row[1:])] for dot, row in zip(dots, rows, strict=True)]
    lines = [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows]
    head = "</th><th>".join(header)
    return _TABLE.format(text=html.escape(one_text(results)), head=head, lines="\n".join(lines))


_TABLE = """<div class="wide"><table><thead><tr><th>{head}</th></tr></thead><tbody>
{lines}
</tbody></table></div>
<p>Perplexity {text} and its change against the first variant on the same text; sparsity, the share of exact zeros in
the feed-forward activations act(gate) · up, on average and from the least to the most sparse layer; neurons that were
never active.</p>"""

_FIGURE = """<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">
<img src="{light}" alt="{caption}"></picture><figcaption>{caption}</figcaption></figure>"""

_SETTINGS = """<details><summary>{head}</summary><pre>{config}</pre></details>"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>jsparse: {title}</title>
<style>
:root {{ color-scheme: light dark; {light}; --ground: #f6f7f8 }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark}; --ground: #131519 }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; padding: 3rem 1.25rem 5rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }}
h1 {{ margin: 0 0 1.5rem; font-size: 1.7rem; line-height: 1.25; letter-spacing: -.015em }}
p, figcaption {{ color: var(--faint); font-size: .925rem; margin: .75rem 0 }}
.wide, figure, details {{ background: var(--paper); border: 1px solid var(--line); border-radius: 10px }}
.wide {{ overflow-x: auto }}
table {{ width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .925rem }}
th, td {{ padding: .6rem 1rem; text-align: right; white-space: nowrap }}
th {{ color: var(--faint); font-weight: 500; border-bottom: 1px solid var(--line) }}
tr + tr td {{ border-top: 1px solid var(--line) }}
th:first-child, td:first-child {{ text-align: left; font-weight: 600 }}
i {{ display: inline-block; width: .65rem; height: .65rem; border-radius: 50%; margin-right: .6rem }}
figure {{ margin: 1.5rem 0; padding: 1rem 1rem .5rem }}
img {{ display: block; width: 100%; height: auto }}
figcaption {{ padding: 0 .5rem }}
details {{ margin: 1rem 0; padding: .7rem 1rem }}
summary {{ cursor: pointer; font-weight: 500 }}
pre {{ overflow-x: auto; font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }}
</style></head>
<body>
<h1>{title}</h1>
{body}
</body></html>
"""
