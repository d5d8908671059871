"""A run that dies again and again ends as one left alone: the same bits, the same metrics."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from jsparse import parallel
from jsparse.train import state
from jsparse.train.checkpoint import Checkpoints
from jsparse.train.metrics import read_metrics
from tests.train_helpers import MODEL
from tests.train_lives import STEPS, config

KILLED = -signal.SIGKILL
TIMES = {"tokens_per_second", "step_seconds", "data_wait"}


def test_many_lives_end_as_one(tmp_path):
    child = subprocess.run(
        [sys.executable, "-m", "tests.train_lives", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    assert report["alone"] == 0, child.stderr
    assert report["ends"] == [
        ["before the first checkpoint", KILLED, 0],
        ["while the first checkpoint is written", KILLED, 0],
        ["as soon as it is there", KILLED, 4],
        ["in the middle of a line of metrics", KILLED, 4],
        ["in an evaluation", KILLED, 4],
        ["asked to stop", 143, 10],
        ["on a full disk", 1, 10],
        ["while an older checkpoint is deleted", KILLED, 12],
        ["while the last checkpoint is written", KILLED, 12],
        ["before the summary", KILLED, 16],
        ["never", 0, 16],
    ], child.stderr
    assert "stopped after step 10 and saved; the same command goes on from there" in child.stderr

    [told] = [line for line in child.stderr.splitlines() if line.startswith("OSError")]
    assert "checkpoint could not be written: " in told or "one before could not be written: " in told
    assert "Traceback" not in child.stderr

    found = []
    for run in ("alone", "many"):
        recipe = config(tmp_path, run)
        mesh = parallel.make_mesh(recipe.mesh)
        with Checkpoints(recipe.run) as checkpoints:
            found.append(checkpoints.restore(STEPS, state.abstract(recipe, MODEL, mesh)))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))

    alone, many = (
        [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(tmp_path / run / "metrics.jsonl")]
        for run in ("alone", "many")
    )
    assert many == alone and len(alone) == STEPS + 3
    assert {p.name for p in (tmp_path / "many" / "checkpoints").iterdir()} == {"16"}
    assert (tmp_path / "many" / "summary.json").exists()
