"""Two processes joined by jax.distributed train one model."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from jsparse.train import checkpoint
from jsparse.train.loop import train
from jsparse.train.metrics import read_metrics
from tests.helpers import assert_trees_close
from tests.train_pair import config

pytestmark = pytest.mark.every_jax


def test_two_processes_match_one(tmp_path):
    config(tmp_path, "pair")  # writes the tokens
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    pair = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train_pair", str(tmp_path)],
            cwd=Path(__file__).parents[1],
            env=os.environ
            | {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(process),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [143, 143], said[0][-3000:] + said[1][-3000:]

    train(config(tmp_path, "one"))
    one, both = (read_metrics(epath.Path(tmp_path / run / "metrics.jsonl")) for run in ("one", "pair"))
    assert [line["step"] for line in both] == [line["step"] for line in one]
    for a, b in zip(both, one, strict=True):
        if "loss" in b:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            np.testing.assert_allclose(a["sparsity"], b["sparsity"], rtol=1e-5)
        else:
            assert a["eval"]["tokens.npy"]["loss"] == pytest.approx(b["eval"]["tokens.npy"]["loss"], rel=1e-5)
    params = [checkpoint.load_run(tmp_path / run)[1] for run in ("one", "pair")]
    assert_trees_close(*params, 1e-4)

    [step] = checkpoint.steps(tmp_path / "endless")[-1:]
    assert step > 3
    assert f"stopped after step {step} and saved" in said[0]
    assert "complete" not in said[1]  # the second process is silent
