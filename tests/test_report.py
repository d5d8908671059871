"""The report against runs and evaluations made up here: what it reads, computes, draws and writes."""

import base64
import dataclasses
import io
import json
import math
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console

from jsparse import report
from jsparse.config import ConfigError
from jsparse.inference import Evaluation
from jsparse.report import Result, Run, pictures
from jsparse.report.results import cells, short_names
from jsparse.train.metrics import MetricsLog

WIKI, SOTU = "data/wiki.txt", "data/sotu.txt"
DEAD = (3, 0, 1)


def evaluation(perplexity, sparsity, dead=DEAD):
    loss = math.log(perplexity) if perplexity else None
    return Evaluation(perplexity, loss, 1000, tuple(sparsity), tuple(dead), (48, 48, 48), 4, 256, 256, 1)


def write_run(folder, *, penalty=True, held_out=(WIKI,), steps=60, done=60, end=3.0):
    """A run as the training loop writes it: a step a line, held-out evaluations every 20."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"run: {folder.name}\nsteps: {steps}\noptimizer:\n  steps: 7\n")
    with MetricsLog(epath.Path(folder), 0, tensorboard=False) as log:
        for step in range(done + 1):
            sparsity = 0.5 + 0.4 * step / steps + np.array([0.0, 0.05, -0.1])
            loss = end + 6.0 * math.exp(-step / 2)
            if step:
                line = {"loss": np.float32(loss), "tokens_per_second": 1000.0 + step % 2, "skipped": 0}
                if penalty:
                    line |= {"sparsity": sparsity, "penalty": 0.02 * step, "penalty_weight": 0.001 * step}
                log.write(step, line)
            if step % 20 == 0 and held_out:
                found = {text: evaluation(math.exp(loss) + i, sparsity) for i, text in enumerate(held_out)}
                log.write(step, {"eval": {text: dataclasses.asdict(e) for text, e in found.items()}})
    return folder


def write_json(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def sweep(*points):
    return [dict(zip(("threshold", "perplexity", "sparsity"), point, strict=True)) for point in points]


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


def test_run_folder(tmp_path):
    write_run(tmp_path / "prosparse", held_out=(WIKI, SOTU))
    write_json(tmp_path / "prosparse" / "summary.json", {"perplexity": 1.0, "sparsity": 1.0})  # not an evaluation
    [run], results = report.read([tmp_path])
    assert (run.name, run.steps) == ("prosparse", 60)
    steps, loss = run.series("loss")
    np.testing.assert_array_equal(steps, np.arange(1, 61))
    np.testing.assert_allclose(loss, 3 + 6 * np.exp(-steps / 2), rtol=1e-6)
    assert run.series("sparsity")[1].shape == (60, 3)
    assert run.series("mfu")[1].size == 0
    assert [step for step, _ in run.held_out()[SOTU]] == [0, 20, 40, 60]
    assert [(r.name, r.data, round(r.perplexity, 3)) for r in results] == [
        ("prosparse", WIKI, 20.086), ("prosparse", SOTU, 21.086)]  # fmt: skip
    assert results[0].dead == DEAD
    assert results[0].mean_sparsity == pytest.approx(0.9 - 0.05 / 3)


def test_run_without_evaluation_gives_the_end_of_training(tmp_path):
    _, [r] = report.read([write_run(tmp_path / "dense", held_out=(), penalty=False)])
    assert (r.perplexity, r.sparsity, r.data) == (pytest.approx(math.exp(3)), (), "training batches")


def test_a_torn_last_line_is_left_out(tmp_path):
    file = write_run(tmp_path / "run", done=5) / "metrics.jsonl"
    text = file.read_text()
    whole = text.splitlines()
    for cut in range(1, 400, 7):
        file.write_text(text[:-cut])
        left = [json.loads(line) for line in text[:-cut].splitlines() if line in whole]
        assert report.read([file])[0][0].lines == left
        assert len(left) >= len(whole) - 3


def test_values_that_were_not_finite_are_gaps():
    run = Run("x", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}])
    np.testing.assert_array_equal(run.series("loss"), [[1, 3], [2, 1]])


def test_evaluations_and_sweeps(tmp_path):
    own = {"command": "eval", "model": "models/relu", "data": WIKI} | dataclasses.asdict(
        evaluation(20.0, [0.5, 0.7, 0.6])
    )
    points = sweep((0.1, 22.0, [0.8, 0.6]), (0.0, 20.0, 0.6), (0.2, None, 0.9))
    write_json(tmp_path / "a" / "eval.json", own)
    write_json(tmp_path / "a" / "threshold.json", {"model": "models/relu", "data": WIKI, "points": points})
    write_json(tmp_path / "a" / "tokenizer.json", {"model": {"type": "BPE"}})
    write_json(tmp_path / "a" / "report.json", {"results": [own]})
    bare = write_json(tmp_path / "bare.json", points)
    solved = write_json(tmp_path / "solved.json", own | {"model": "models/silu", "threshold": 0.0125})
    runs, (relu, alone, shifted) = report.read([tmp_path / "a", bare, solved])
    assert not runs
    assert (relu.name, relu.perplexity, relu.sparsity) == ("relu", 20.0, (0.5, 0.7, 0.6))
    assert relu.points[:2] == ((0.0, 20.0, 0.6), (0.1, 22.0, pytest.approx(0.7)))
    assert math.isnan(relu.points[2][1])
    assert (alone.name, alone.perplexity, alone.sparsity, alone.points[0]) == ("bare", 20.0, (0.6,), (0.0, 20.0, 0.6))
    assert shifted.name == "silu, threshold 0.0125"


def test_names_are_as_short_as_they_can_be():
    paths = ["/x/a/relu", "/x/b/relu", "/x/b/dense", "relu", "/y/b/relu", ""]
    assert list(short_names(paths).values()) == ["a/relu", "x/b/relu", "dense", "relu", "y/b/relu", ""]


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join), min_size=1))
def test_names_tell_paths_apart(paths):
    names = short_names(paths)
    assert len(set(names.values())) == len(set(paths))
    assert all(path == name or path.endswith("/" + name) for path, name in names.items())


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").write_text('{"step": 1, "lo')
    damaged = write_run(tmp_path / "damaged") / "metrics.jsonl"
    lines = damaged.read_text().splitlines()
    damaged.write_text("\n".join([*lines[:4], lines[4][:-9], *lines[5:]]))
    cases = {
        "missing": (ConfigError, "no such file or folder"),
        "empty": (ConfigError, "expected a run folder"),
        "empty/notes.txt": (ConfigError, "expected a run folder"),
        "young": (ValueError, "none yet"),
        "damaged": (ValueError, "line 5 is not JSON"),
    }
    for name, (kind, message) in cases.items():
        with pytest.raises(kind, match=message) as error:
            report.report([tmp_path / name], tmp_path / "out")
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------


def test_table():
    dense = {"name": "dense", "perplexity": 20.0, "sparsity": 0.0, "data": WIKI}
    sparse = {"name": "sparse", "perplexity": 25.0, "sparsity": [0.2, 0.8], "neurons": [30, 10], "dead": [1, 1200]}
    other = Result("dense", 2000.0, data=SOTU)
    header, rows = cells([report.result(dense), report.result(sparse | {"data": WIKI}), other, Result("no", data=SOTU)])
    assert header == ["variant", "text", "perplexity", "change", "sparsity", "by layer", "dead\nneurons"]
    assert rows == [
        ["dense", "wiki.txt", "20.00", "-", "0.0%", "-", "-"],
        ["sparse", "wiki.txt", "25.00", "+25.0%", "35.0%", "20.0 to 80.0%", "1,201"],
        ["dense", "sotu.txt", "2,000", "-", "-", "-", "-"],
        ["no", "sotu.txt", "-", "-", "-", "-", "-"],
    ]


def test_table_on_a_terminal():
    console = Console(width=80, file=io.StringIO())
    console.print(
        report.summary_table([Result("[bold]a[/]", 18.5, (0.25, 0.5), data=WIKI), {"name": "b", "data": WIKI}])
    )
    text = console.file.getvalue()
    assert "on wiki.txt" in text  # one text: above the table, no column
    assert text.count("wiki.txt") == 1
    assert "[bold]a[/]" in text and "25.0 to 50.0%" in text


# --------------------------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------------------------


def lines_of(ax, color):
    return [line for line in ax.lines if line.get_color() == color]


def test_training_picture(tmp_path):
    runs, _ = report.read([write_run(tmp_path / "dense", penalty=False), write_run(tmp_path / "sparse")])
    looks = report.make_looks(["dense", "sparse"])
    loss, penalty, weight, right = report.training_picture(runs).axes
    assert [ax.get_title("left") for ax in (loss, penalty, weight)] == [
        "Loss, nats a token", "Penalty, as added to the loss", "Penalty weight λ"]  # fmt: skip
    [line] = penalty.lines[1:]
    np.testing.assert_allclose(line.get_xydata(), [[step, 0.02 * step] for step in range(1, 61)])
    assert line.get_color() == looks["sparse"]["color"] != looks["dense"]["color"]
    raw, mean, marks = lines_of(loss, looks["sparse"]["color"])
    assert len(raw.get_xdata()) == len(mean.get_xdata()) == 60 and raw.get_alpha() < 1
    np.testing.assert_allclose(marks.get_xydata()[1:], [[20, 3 + 6 * math.exp(-10)], [40, 3], [60, 3]], rtol=1e-6)
    assert loss.get_ylim() == right.get_ylim()
    assert [float(label.get_text()) for label in right.get_yticklabels()] == pytest.approx(np.exp(right.get_yticks()))
    assert loss.get_ylim()[1] < 7 and "9.0" in loss.get_title("right")  # the first losses do not flatten the rest
    assert len(report.training_picture(runs[:1]).axes) == 2
    high = Run("high", [{"step": 1, "loss": 20.0}])
    assert report.training_picture([*runs, high]).axes[0].get_ylim()[1] > 20


def test_smoothing_keeps_the_mean_of_a_line_and_the_ends():
    line = np.linspace(5.0, 1.0, 300)
    np.testing.assert_allclose(pictures._smooth(line)[10:-10], line[10:-10])
    assert np.std(pictures._smooth(np.random.default_rng(0).normal(size=300))) < 0.6
    assert pictures._smooth(np.array([1.0, 2.0])).tolist() == [1.5, 1.5]


def test_sparsity_picture(tmp_path):
    runs, _ = report.read(
        [write_run(tmp_path / "a"), write_run(tmp_path / "b", done=1), write_run(tmp_path / "c", penalty=False)]
    )
    fig = report.sparsity_picture(runs)
    a, b, bar = fig.axes  # c measured none
    assert (a.get_title("left"), b.get_title("left")) == ("a", "b")
    np.testing.assert_allclose(a.collections[0].get_array(), 100 * runs[0].series("sparsity")[1].T)
    assert a.get_xlim() == b.get_xlim() == (0.5, 60.5)
    assert a.collections[0].get_clim() == b.collections[0].get_clim() == (40, 100)
    assert bar.get_ylabel() == "sparsity, %"


def test_profile_picture_has_a_panel_for_each_text():
    results = [
        Result("a", 9.0, (0.1, 0.3), data=WIKI),
        Result("a", 9.0, (0.2, 0.4), data=SOTU),
        Result("b", 9.0, (0.5,)),
    ]
    wiki, sotu = report.profile_picture(results).axes
    assert (wiki.get_title("left"), sotu.get_title("left")) == (
        "Sparsity by layer on wiki.txt",
        "Sparsity by layer on sotu.txt",
    )
    np.testing.assert_allclose(sotu.lines[0].get_xydata(), [[0, 20], [1, 40]])
    report.profile_picture([Result(r"$\x$", sparsity=(0.1, 0.3))]).savefig(io.BytesIO())  # no formula


def test_tradeoff_picture():
    dense = Result(
        "dense", 18.0, (0.0,), points=((0.0, 18.0, 0.0), (0.1, 24.0, 0.2), (0.3, 1e6, 0.5), (0.4, math.nan, 0.6))
    )
    close = [Result(f"variant {i}", 20 + 0.02 * i, (0.8 + 0.001 * i,)) for i in range(5)]
    fig = report.tradeoff_picture([dense, *close, Result("no perplexity", sparsity=(0.5,))])
    [ax] = fig.axes
    np.testing.assert_allclose(ax.lines[0].get_xydata()[:2], [[0, 18], [20, 24]])
    assert 24 < ax.get_ylim()[1] < 30 and ax.get_xlim()[1] <= 102
    texts = [text for text in ax.texts if text.get_text()]  # the others are lines to far names
    assert [text.get_text() for text in texts] == ["dense", *(r.name for r in close)]
    boxes = [text.get_window_extent() for text in texts]
    marks = ax.transData.transform([line.get_xydata()[0] for line in ax.lines if line.get_marker() == "o"])
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    assert all(ax.bbox.contains(*corner) for box in boxes for corner in box.corners())


@pytest.mark.parametrize(
    "draw", [report.training_picture, report.sparsity_picture, report.profile_picture, report.tradeoff_picture]
)
def test_nothing_to_draw(draw):
    with pytest.raises(ValueError, match=f"{draw.__name__}: expected"):
        draw([])


def test_pictures_leave_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    runs, results = report.read([write_run(tmp_path / "a")])
    everything = [report.training_picture, report.sparsity_picture, report.profile_picture, report.tradeoff_picture]
    ink, faint, _, paper = pictures.INK[True]
    for draw, shown in zip(everything, [runs, runs, results, results], strict=True):
        fig = draw(shown, dark=True)
        assert fig.get_facecolor() == matplotlib.colors.to_rgba(paper)
        fig.savefig(io.BytesIO())
        ticks = [label for ax in fig.axes for label in [*ax.get_xticklabels(), *ax.get_yticklabels()]]
        assert {label.get_color() for label in ticks} == {faint}
        assert all(ax.title.get_color() == ink for ax in fig.axes)
        panels = [ax for ax in fig.axes if not (ax.get_ylabel() == "perplexity" and draw == report.training_picture)]
        boxes = [ax.get_tightbbox() for ax in panels] + [legend.get_window_extent() for legend in fig.legends]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(fig.bbox.contains(*corner) for box in boxes for corner in box.corners())
    assert dict(matplotlib.rcParams) == before


def test_many_names_look_different():
    looks = report.make_looks(str(i) for i in range(24))
    assert len({tuple(look.values()) for look in looks.values()}) == 24


# --------------------------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Images, tags in their order, and text by the tag it stands in."""

    def __init__(self, text):
        super().__init__()
        self.images, self.tags, self.links, self.text, self.open = [], [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset"):
                self.images.append(value)
            elif name in ("href", "action", "data"):
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def test_page_stands_alone(tmp_path):
    dense, sparse = (
        write_run(tmp_path / "dense", penalty=False),
        write_run(tmp_path / "<i>$s_1$", steps=80, end=3.2, held_out=(WIKI, "<b>")),
    )
    write_json(tmp_path / "eval.json", {"model": "m/shift", "data": WIKI, "perplexity": 30.0, "sparsity": [0.9, 0.97]})
    path = report.report([dense, sparse, tmp_path / "eval.json"], tmp_path / "out" / "page")
    assert path == tmp_path / "out" / "page" / "index.html"
    files = ["tradeoff.png", "training.png", "profile.png", "sparsity.png"]
    assert {f.name for f in path.parent.iterdir()} == {"index.html", "report.json", *files}
    assert [f.name for f in path.parent.parent.iterdir()] == ["page"]

    page = Page(path.read_text())
    assert not page.open and not page.links and not any(x in path.read_text() for x in ("url(", "://", "@import"))
    assert page.tags.index("table") < page.tags.index("figure") < page.tags.index("details")
    assert len(page.images) == 8  # each for both schemes
    for image, name in zip(page.images, [name for name in files for _ in range(2)], strict=True):
        kind, _, data = image.partition(",")
        assert kind == "data:image/png;base64"
        pixels = imread(io.BytesIO(base64.b64decode(data)))
        assert pixels.shape == imread(path.parent / name).shape and pixels.shape[1] == 1440
    dark, light = (imread(io.BytesIO(base64.b64decode(image.partition(",")[2])))[0, 0, :3] for image in page.images[:2])
    assert dark.max() < 0.2 and light.min() > 0.9

    row = ["shift", "wiki.txt", "30.00", "+49.4%", "93.5%", "90.0 to 97.0%", "-"]
    assert page.text["td"][-7:] == row and page.text["td"][-14:-12] == ["<i>$s_1$", "<b>"]
    captions = page.text["figcaption"]
    assert captions[0] == "shift is the sparsest: 93.5% at perplexity 30.00, 1.49 times that of dense at 88.3%."
    assert captions[1].startswith("Perplexity on wiki.txt ends at 20.09 (dense) to 24.53 (<i>$s_1$)")
    assert captions[1].endswith("; the penalty's weight ends at 0.06 (<i>$s_1$).")
    assert captions[2] == "The layers of shift lie between 90.0% (layer 0) and 97.0% (layer 1)."
    assert "from 48.8% at step 1 to 78.3% at step 60" in captions[3]
    assert page.text["summary"] == ["dense: step 60 of 60, 1,000 tokens/s", "<i>$s_1$: step 60 of 80, 1,000 tokens/s"]
    assert "steps: 80\n" in page.text["pre"][1]
    numbers = json.loads((path.parent / "report.json").read_text())["results"]
    assert [r["name"] for r in numbers] == ["dense", "<i>$s_1$", "<i>$s_1$", "shift"]
    assert numbers[3]["perplexity"] == 30.0


def test_page_of_a_diverged_model(tmp_path):
    """Evaluations write infinity and null; the report's JSON is strict all the same."""
    values = {"perplexity": math.inf, "sparsity": [0.5, 0.6], "points": sweep((0, 9.0, 0.5), (1, None, 0.9))}
    path = report.report([write_json(tmp_path / "x.json", values)], tmp_path / "out")
    assert {f.name for f in path.parent.iterdir()} == {"index.html", "report.json", "profile.png"}
    [r] = json.loads((path.parent / "report.json").read_text(), parse_constant=pytest.fail)["results"]
    assert r["perplexity"] is None and r["points"][1]["perplexity"] is None


def test_existing_output(tmp_path):
    one = write_json(tmp_path / "one.json", {"perplexity": 3.0, "sparsity": 0.5})
    other = write_json(tmp_path / "other.json", {"perplexity": 4.0, "sparsity": [0.5, 0.6]})
    out = report.report([other], tmp_path / "out").parent
    with pytest.raises(ConfigError, match=r"exists.*--overwrite"):
        report.report([one], out)
    assert (out / "profile.png").exists()
    report.report([one], out, overwrite=True)
    assert {f.name for f in out.iterdir()} == {"index.html", "report.json"}  # a point alone is no picture
    (tmp_path / "empty").mkdir()
    report.report([one], tmp_path / "empty")
    (out / "notes.txt").write_text("mine")
    for precious in (write_run(tmp_path / "run"), other, out):
        with pytest.raises(ConfigError, match="expected an earlier report"):
            report.report([one], precious, overwrite=True)
    assert (tmp_path / "run" / "metrics.jsonl").exists() and (out / "notes.txt").exists()


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    one = write_json(
        tmp_path / "one.json",
        {"points": sweep((0, 3, [0.5, 0.6]), (1, 4, 0.8)), "perplexity": 3, "sparsity": [0.5, 0.6]},
    )
    out = report.report([one], tmp_path / "out").parent
    kept = {f.name: f.read_bytes() for f in out.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "profile_picture", full)
    for target in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            report.report([one], target, overwrite=True)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == kept
    assert sorted(f.name for f in tmp_path.iterdir()) == ["one.json", "out"]
