"""The tables and the picture of docs/results.md, from the results that `tools/study.py` wrote.

python tools/study_tables.py docs/results/smollm2_135m.json --picture docs/results/smollm2_135m.png
"""

import argparse
import itertools
import json
import math
from pathlib import Path

LEVELS = (0.75, 0.80, 0.85, 0.90)
CURVES = {"FATReLU": "threshold", "CETT": "cett_error"}  # how a curve's points say what they are


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("--picture")
    args = parser.parse_args()
    results = {r["name"]: r["points"] for r in json.loads(Path(args.results).read_text())}
    for text in next(iter(results.values())):
        print(f"\n**{Path(text).stem}**\n")
        print("| model | perplexity | sparsity | " + " | ".join(f"at {x:.0%}" for x in LEVELS) + " |")
        print("|---|---|---|" + "---|" * len(LEVELS))
        for name, points in results.items():
            base = points[text][0]
            for criterion in CURVES:
                curve = curve_of(points[text], criterion)
                if len(curve) > 1:
                    first = criterion == "FATReLU"
                    own = f"{base['perplexity']:.2f} | {mean(base):.1%}" if first else " | "
                    cells = " | ".join(show(at(curve, level)) for level in LEVELS)
                    print(f"| {name} + {label(name, criterion)} | {own} | {cells} |")
    if args.picture:
        draw(results, Path(args.picture))


def label(name: str, criterion: str) -> str:
    return "CATS" if name.startswith("dense") else criterion


def mean(point: dict) -> float:
    return sum(point["sparsity"]) / len(point["sparsity"])


def curve_of(points: list[dict], criterion: str) -> list[tuple[float, float]]:
    """(sparsity, perplexity) of the model itself and of its points of one criterion, by rising sparsity."""
    return sorted((mean(p), p["perplexity"]) for i, p in enumerate(points) if i == 0 or CURVES[criterion] in p)


def at(curve: list[tuple[float, float]], level: float) -> float | None:
    """Perplexity at a sparsity, between two measured points by a straight line of its logarithm; a model that is
    sparser than the level by itself has its own. None where no measured point is so sparse."""
    if level <= curve[0][0]:
        return curve[0][1]
    for (s0, p0), (s1, p1) in itertools.pairwise(curve):
        if s0 <= level <= s1:
            share = (level - s0) / (s1 - s0)
            return math.exp(math.log(p0) + share * (math.log(p1) - math.log(p0)))
    return None


def show(perplexity: float | None) -> str:
    return "-" if perplexity is None else f"{perplexity:.2f}" if perplexity < 1000 else ">1000"


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    texts = list(next(iter(results.values())))
    shown = [name for name in results if "seed" not in name]
    size = (6 * len(texts), 4.5 * len(CURVES))
    figure, axes = pyplot.subplots(len(CURVES), len(texts), figsize=size, layout="constrained", squeeze=False)
    for row, criterion in zip(axes, CURVES, strict=True):
        for panel, text in zip(row, texts, strict=True):
            lowest = min(p["perplexity"] for name in shown for p in results[name][text])
            for i, name in enumerate(shown):
                curve = curve_of(results[name][text], criterion)
                if len(curve) > 1:
                    x, y = zip(*curve, strict=True)
                    named = f"{name}, {label(name, criterion)}"
                    panel.plot([100 * v for v in x], y, color=f"C{i}", marker=".", label=named, lw=1.2)
            ticks = [t for t in (12, 14, 16, 18, 20, 22, 25, 30, 35, 40) if lowest < t < 2.6 * lowest]
            panel.set(title=f"{Path(text).stem}, thresholds by {criterion}", yscale="log",
                      xlabel="zeros in x1, % (mean over layers)", ylabel="perplexity", xlim=(0, 100),
                      ylim=(0.97 * lowest, 2.6 * lowest))  # fmt: skip
            panel.set_yticks(ticks, [str(t) for t in ticks])
            panel.minorticks_off()
            panel.grid(alpha=0.25)
            panel.legend(fontsize=7, frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
