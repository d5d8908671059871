"""Pictures of runs and results: each function returns a matplotlib Figure, which a notebook shows as it is."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jsparse.report.results import Result, Run, as_results, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Looks = Mapping[str, dict[str, Any]]  # name: how its lines are drawn

# Okabe and Ito 2008, "Color Universal Design", for two backgrounds: without black and yellow, the blue a bit lighter.
_COLORS = ("#1F83C6", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":", "-.")
# (text, faint text, lines, background); the page has the same
INK = {False: ("#1c2024", "#666d78", "#e3e5e8", "#ffffff"), True: ("#e6e8eb", "#9aa1ab", "#32373e", "#1b1e23")}


def make_looks(names: Iterable[str]) -> Looks:
    """A colour and dash for each name, told apart by the colour-blind too. Pictures that share them agree."""
    return {
        name: {"color": _COLORS[i % len(_COLORS)], "linestyle": _DASHES[i // len(_COLORS) % len(_DASHES)]}
        for i, name in enumerate(dict.fromkeys(names))
    }


def training_picture(runs: Sequence[Run], *, dark: bool = False, looks: Looks | None = None) -> "Figure":
    """Loss, and penalty and its weight where there are any, over steps. Marks: held-out loss, a shape a text."""
    runs = [run for run in runs if len(run.series("loss")[0])]
    if not runs:
        raise ValueError("training_picture: expected a run with losses in its metrics, got none")
    looks = looks or make_looks(run.name for run in runs)
    titles = {
        "loss": "Loss, nats a token",
        "penalty": "Penalty, as added to the loss",
        "penalty_weight": "Penalty weight λ",
    }
    keys = [key for key in titles if key == "loss" or any(len(run.series(key)[0]) for run in runs)]
    with _style(dark):
        fig, axes = _figure(len(keys), 0, stacked=[3.4, 1.7, 1.7][: len(keys)], sharex=True)
        for key, ax in zip(keys, axes, strict=True):
            ax.set_title(titles[key])
            ax.xaxis.set_major_formatter("{x:,.0f}")
            ax.yaxis.set_major_formatter("{x:g}")
            for run in runs:
                steps, values = run.series(key)
                if key == "loss" and len(steps) > 50:  # the batches' spread is noise
                    ax.plot(steps, values, color=looks[run.name]["color"], linewidth=0.6, alpha=0.25)
                    values = _smooth(values)
                ax.plot(steps, values, **looks[run.name])
        ax.set_xlabel("step")
        _held_out(fig, axes[0], runs, dark, looks)
        _settle(fig)
    return fig


def _held_out(fig: "Figure", ax: Any, runs: Sequence[Run], dark: bool, looks: Looks) -> None:
    """Completes the panel of the loss: held-out marks, limits, perplexities at the right, and the legend."""
    from matplotlib.lines import Line2D

    _, faint, _, paper = INK[dark]
    texts = short_names(text for run in runs for text in run.held_out())
    markers = dict(zip(texts, itertools.cycle("osD^"), strict=False))
    losses = [run.series("loss")[1] for run in runs]
    for run in runs:
        for text, found in run.held_out().items():
            steps, held_out = [step for step, _ in found], np.log([r.perplexity for _, r in found])
            ax.plot(steps, held_out, markers[text], color=looks[run.name]["color"], markeredgecolor=paper, zorder=3)
            losses.append(held_out[np.isfinite(held_out)])
    every = np.concatenate(losses)
    # The first losses after a change of activation are far up; where a run ends is always in the picture.
    low, high = every.min(), max(np.quantile(every, 0.97), *(run.series("loss")[1][-1] for run in runs))
    low, high = low - 0.06 * (high - low) - 1e-3, high + 0.06 * (high - low) + 1e-3
    ax.set_ylim(low, high)
    if every.max() > high:
        note = f"early losses up to {every.max():.1f} are above the top"
        ax.set_title(note, loc="right", color=faint, fontsize=9, weight="normal")
    ticks = _ticks(math.exp(low), math.exp(high))
    right = ax.twinx()
    right.grid(False)
    right.set_ylim(low, high)
    right.set_yticks(np.log(ticks), labels=[f"{t:,.4g}" for t in ticks])
    right.set_ylabel("perplexity")
    handles = [Line2D([], [], **looks[run.name], label=run.name) for run in runs]
    for text, name in texts.items():
        handles.append(Line2D([], [], marker=markers[text], linestyle="", color=faint, label=f"held out: {name}"))
    _legend(fig, handles)


def sparsity_picture(runs: Sequence[Run], *, dark: bool = False) -> "Figure":
    """Heat maps of sparsity over steps and layers, one a run that measured it, on one colour scale."""
    drawn = [(run.name, *series) for run in runs if len((series := run.series("sparsity"))[0])]
    if not drawn:
        raise ValueError("sparsity_picture: expected a run with sparsity in its metrics, got none")
    low = 10 * math.floor(10 * min(np.nanmin(values) for *_, values in drawn))
    high = max(low + 10, 10 * math.ceil(10 * max(np.nanmax(values) for *_, values in drawn)))
    first, last = min(steps[0] for _, steps, _ in drawn) - 0.5, max(steps[-1] for _, steps, _ in drawn) + 0.5
    with _style(dark):
        fig, axes = _figure(len(drawn), 2.7, sharey=True)
        for ax, (name, steps, values) in zip(axes, drawn, strict=True):
            edges = np.concatenate([steps[:1] - 0.5, (steps[1:] + steps[:-1]) / 2, steps[-1:] + 0.5])
            layers = np.arange(values.shape[1] + 1) - 0.5
            mesh = ax.pcolormesh(edges, layers, 100 * values.T, vmin=low, vmax=high, cmap="viridis", rasterized=True)
            ax.set_title(name)
            ax.set(xlabel="step", ylabel="layer" if ax.get_subplotspec().is_first_col() else "", xlim=(first, last))
            ax.grid(False)
            ax.yaxis.get_major_locator().set_params(integer=True)
            ax.xaxis.set_major_formatter("{x:,.0f}")
        bar = fig.colorbar(mesh, ax=axes, label="sparsity, %", aspect=30, fraction=0.05)
        bar.outline.set_visible(False)
        _settle(fig)
    return fig


def profile_picture(
    results: Iterable[Result | Mapping[str, Any]], *, dark: bool = False, looks: Looks | None = None
) -> "Figure":
    """Sparsity over layers, a line a variant, a panel a text."""
    from matplotlib.lines import Line2D

    texts = _by_text(r for r in as_results(results) if len(r.sparsity) > 1)
    if not texts:
        raise ValueError("profile_picture: expected a result with sparsity by layer, got none")
    names = list(dict.fromkeys(r.name for group in texts.values() for r in group))
    looks = looks or make_looks(names)
    with _style(dark):
        fig, axes = _figure(len(texts), 3.2, sharey=True)
        for ax, (text, group) in zip(axes, texts.items(), strict=True):
            for r in group:
                ax.plot(100 * np.array(r.sparsity), marker="o", markersize=3, **looks[r.name])
            ax.set_title("Sparsity by layer" + text)
            ax.set(xlabel="layer", ylabel="sparsity, %" if ax.get_subplotspec().is_first_col() else "")
            ax.xaxis.get_major_locator().set_params(integer=True)
        _legend(fig, [Line2D([], [], **looks[name], label=name) for name in names])
        _settle(fig)
    return fig


def tradeoff_picture(
    results: Iterable[Result | Mapping[str, Any]], *, dark: bool = False, looks: Looks | None = None
) -> "Figure":
    """Perplexity against mean sparsity: a mark a variant, a curve a threshold sweep, a panel a text."""
    texts = _by_text(r for r in as_results(results) if math.isfinite(r.perplexity) and r.sparsity)
    if not texts:
        raise ValueError("tradeoff_picture: expected a result with perplexity and sparsity, got none")
    looks = looks or make_looks(r.name for group in texts.values() for r in group)
    with _style(dark):
        fig, axes = _figure(len(texts), 4.2)
        for ax, (text, group) in zip(axes, texts.items(), strict=True):
            for r in group:
                _, perplexity, sparsity = np.array(r.points).reshape(-1, 3).T
                ax.plot(100 * sparsity, perplexity, marker=".", markersize=5, **looks[r.name])
                ax.plot(100 * r.mean_sparsity, r.perplexity, "o", color=looks[r.name]["color"], markersize=8,
                        markeredgecolor=INK[dark][3], zorder=3)  # fmt: skip
            # A sweep leaves the picture where it is of no use any more.
            low = min(r.perplexity for r in group)
            high = max([r.perplexity for r in group] + [p for r in group for _, p, _ in r.points if p < 2 * low])
            margin = (high / low) ** 0.08 * 1.01
            ax.set(xlabel="mean sparsity, %", ylabel="perplexity", yscale="log", ylim=(low / margin, high * margin))
            ax.set_title("Perplexity against sparsity" + text)
            ax.set_yticks(_ticks(low / margin, high * margin))
            ax.set_yticks([], minor=True)
            ax.yaxis.set_major_formatter("{x:,.4g}")
            ax.margins(x=0.08)
            ax.set_xlim(right=min(102, ax.get_xlim()[1]))
            ax.grid(True, axis="x")
        _settle(fig)
        for ax, group in zip(axes, texts.values(), strict=True):
            _label(ax, [(100 * r.mean_sparsity, r.perplexity, r.name) for r in group], INK[dark][1])
    return fig


def _style(dark: bool) -> Any:
    import matplotlib

    ink, faint, line, paper = INK[dark]
    settings: Any = {
        "figure.facecolor": paper, "axes.facecolor": paper, "text.color": ink, "axes.labelcolor": faint,
        "axes.titlecolor": ink, "axes.edgecolor": line, "xtick.color": line, "ytick.color": line,
        "xtick.labelcolor": faint, "ytick.labelcolor": faint, "grid.color": line, "grid.linewidth": 0.8,
        "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "axes.spines.left": False, "xtick.major.size": 4, "ytick.major.size": 0,
        "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 9,
        "font.size": 9.5, "lines.linewidth": 1.8, "lines.markersize": 6, "legend.frameon": False,
        "figure.constrained_layout.h_pad": 0.1, "figure.constrained_layout.w_pad": 0.1,
        "text.parse_math": False,
    }  # fmt: skip
    return matplotlib.rc_context(settings)


def _figure(panels: int, height: float, *, stacked: Sequence[float] = (), **options: Any) -> tuple["Figure", list[Any]]:
    """A figure of some panels and their axes, without pyplot, which would keep it in memory.

    Args:
        height: of a row, inches.
        stacked: puts the panels below each other, with these heights instead.
    """
    from matplotlib.figure import Figure

    columns = 1 if stacked else min(panels, 2)
    heights = stacked or [height] * -(-panels // columns)
    fig = Figure(figsize=(9, sum(heights) + 0.4), layout="constrained")
    grid = fig.subplots(len(heights), columns, squeeze=False, height_ratios=heights, **options)
    for ax in grid.flat[panels:]:
        ax.remove()
    return fig, list(grid.flat[:panels])


def _settle(fig: "Figure") -> None:
    """Lays the figure out, once, while the style holds: ticks made later would not have it."""
    fig.draw_without_rendering()
    fig.set_layout_engine("none")


def _legend(fig: "Figure", handles: list[Any]) -> None:
    """Above the panels, in as many columns as fit."""
    widths = [len(handle.get_label()) + 7 for handle in handles]  # characters
    columns = len(handles) if sum(widths) <= 120 else max(1, 120 // max(widths))
    fig.legend(handles=handles, loc="outside upper left", ncols=columns)


def _label(ax: Any, points: Sequence[tuple[float, float, str]], faint: str) -> None:
    """Writes each name beside its point (x, y, name), where it covers no name, point or curve, if there is room."""
    places = [(dx, dy) for dy in (0, -11, 11, -22, 22, -33, 33, -44, 44) for dx in (9, -9, 0, 30, -30) if dx or dy]
    places.sort(key=lambda place: math.hypot(*place))
    names: list[Any] = []  # boxes (left, bottom, right, top), pixels
    curves: list[Any] = []
    for line in ax.lines:
        drawn = ax.transData.transform_path(line.get_path()).interpolated(20).vertices
        curves += [(x - 6, y - 6, x + 6, y + 6) for x, y in drawn[np.isfinite(drawn).all(axis=1)]]
    for x, y, name in sorted(points, key=lambda point: point[1]):  # the lower ones have more room around
        text = ax.annotate(name, (x, y), places[0], textcoords="offset points", va="center")

        def move(place: tuple[int, int], text: Any = text) -> int:
            """Puts the text there; how bad that is."""
            text.set(position=place, ha="left" if place[0] > 0 else "right" if place[0] < 0 else "center")
            box = text.get_window_extent()
            outside = box.x0 < ax.bbox.x0 or ax.bbox.x1 < box.x1 or box.y0 < ax.bbox.y0 or ax.bbox.y1 < box.y1
            on_curves, on_names = (
                sum(a < box.x1 and box.x0 < c and b < box.y1 and box.y0 < d for a, b, c, d in boxes)
                for boxes in (curves, names)
            )
            return on_curves + 100 * on_names + 1000 * outside

        place = min(places, key=move)
        move(place)
        names.append(text.get_window_extent().extents)
        if math.hypot(*place) > 15:  # far away, a line shows whose name it is
            end = (place[0], place[1] - 7 * np.sign(place[1]))
            line = {"arrowstyle": "-", "color": faint, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
            ax.annotate("", (x, y), end, textcoords="offset points", arrowprops=line)


def _by_text(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by what a panel's title says of their text: those on different texts don't compare."""
    found = list(results)
    texts = short_names(r.data for r in found)
    groups: dict[str, list[Result]] = {}
    for r in found:
        groups.setdefault(f" on {texts[r.data]}" if r.data else "", []).append(r)
    return groups


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, for a log scale."""
    from matplotlib.ticker import MaxNLocator

    ticks = list(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high))
    if high > 3 * low:
        ticks = [m * 10.0**k for k in range(-3, 12) for m in ((1, 2, 5) if high > 30 * low else (1, 1.5, 2, 3, 5, 7))]
    return [t for t in ticks if low <= t <= high]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a fiftieth of the length, less at the ends."""
    half = max(2, len(values) // 100)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
