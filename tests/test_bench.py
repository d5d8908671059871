"""Benchmarks on a small shape: what they set up, what they count and how they answer; the times are anybody's."""

import json
import threading

import jax
import numpy as np
import pytest

from jsparse.bench import decode, ffn, shapes
from jsparse.bench.timing import Bandwidth, Budget, bandwidth, compile_all
from jsparse.cli import run
from jsparse.config import LlamaConfig

SHAPE = LlamaConfig(128, 64, 256, 2, 4, 2, 16, 64)
SPEED = Bandwidth(copy=1e9, read=2e9)
TOLD: list[str] = []


@pytest.fixture(scope="module")
def rows():
    return ffn.bench_ffn(SHAPE, SPEED, kinds=("blocks", "neurons"), batches=(1, 3), sparsities=(0.0, 0.5, 0.75),
                         dtype="float32", budget=Budget(1e6), tell=TOLD.append)  # fmt: skip


def test_every_sparsity_is_met_exactly(rows):
    found = [(r.kind, r.batch, r.sparsity, r.measured) for r in rows if r.kind != "dense"]
    assert len(found) == 2 * 2 * 3 and len(TOLD) == len(rows) + 2 == len(found) + 2 * 2 + 2
    for kind, batch, wanted, measured in found:
        assert measured == pytest.approx(wanted, abs=1e-6), (kind, batch)


def test_bytes_limits_and_speedups(rows):
    whole, router = 3 * 256 * 64 * 4, 8 * 64 * 4
    for row in rows:
        share = 1 - row.sparsity
        expected = {"dense": whole, "blocks": share * whole + router, "neurons": whole * (1 + 2 * share) / 3}[row.kind]
        assert row.bytes == pytest.approx(expected, rel=1e-6)
        assert row.limit_us == pytest.approx(expected / 2e9 * 1e6, rel=1e-6)
        assert row.fraction == pytest.approx(row.limit_us / row.us)
        best = min(r.us for r in rows if r.batch == row.batch and r.kind == "dense")
        assert row.speedup == pytest.approx(best / row.us)
        assert row.speedup_limit == pytest.approx(whole / row.bytes)


def test_lines_go_through_their_measurements():
    row = ffn.FfnSpeed("blocks", "sparse", 2, 0.0, 0.0, 30.0, 4e6, 1.0, 1.0, 1.0, 1.0)
    slower = ffn.FfnSpeed("blocks", "sparse", 2, 0.5, 0.5, 20.0, 2e6, 1.0, 1.0, 1.0, 1.0)
    dense = ffn.FfnSpeed("dense", "xla", 2, 0.0, 0.0, 25.0, 4e6, 1.0, 1.0, 1.0, 1.0)
    worse = ffn.FfnSpeed("dense", "cublas", 2, 0.0, 0.0, 35.0, 4e6, 1.0, 1.0, 1.0, 1.0)
    lines = ffn.fit_lines([row, slower, worse, dense], Bandwidth(1e12, 0.5e12))
    assert lines["blocks"][2].start == pytest.approx(10) and lines["blocks"][2].rate == pytest.approx(2e5)
    assert lines["dense"][2].us(4e6) == pytest.approx(25)


def test_predictors_of_a_known_sparsity():
    weights = ffn._random_weights(SHAPE, "float32")[:1]
    x, common = ffn._inputs(2, SHAPE.hidden_size)
    layer = ffn._with_sparsity(ffn._ffn(weights[0], "predicted", 16), x, common, 0.75, "predicted")
    assert ffn._share(layer, x, ffn._config(SHAPE, "predicted")) == pytest.approx(0.25)


def test_nothing_is_zeros_and_layers_differ():
    weights = ffn._random_weights(SHAPE, "bfloat16")
    assert len(weights) == SHAPE.num_hidden_layers
    for matrix in jax.tree.leaves(weights):
        assert np.count_nonzero(matrix) > 0.98 * matrix.size
    assert not np.array_equal(weights[0].gate, weights[1].gate)


def test_decode_variants():
    told: list[str] = []
    variants = ("2:4", "LTE 80 %", "dense, XLA", "dense", "ProSparse 89 %, exact", "ProSparse 89 %, predicted")
    found = decode.bench_decode(SHAPE, SPEED, variants=variants, batch=2, context=8, steps=3, repeats=1, rank=64,
                                dtype="float32", budget=Budget(1e6), tell=told.append)  # fmt: skip
    by_name = {row.name: row for row in found}
    assert by_name.keys() == set(variants) and len(found) == len(told) == 6, told
    assert by_name["2:4"].bytes == pytest.approx(by_name["dense"].bytes - 2 * 3 * 256 * 64 * (4 - 2 - 1 / 8), rel=1e-6)
    dense = by_name["dense"]
    attention = 64 * (64 + 2 * 32) + 64 * 64
    cached = 2 * (8 + 3 / 2) * 2 * 32
    assert dense.bytes == pytest.approx(4 * (128 * 64 + 2 * (attention + 3 * 256 * 64 + cached)))
    assert max(dense.speedup, by_name["dense, XLA"].speedup) == dense.speedup_limit == 1 and dense.measured == 0
    for name, sparsity in (("LTE 80 %", 0.8), ("ProSparse 89 %, exact", 0.8932)):
        assert by_name[name].measured == pytest.approx(sparsity**2, abs=0.06)  # of two rows that choose on their own
        assert by_name[name].bytes < dense.bytes


def test_a_failing_variant_takes_no_other_with_it():
    def fail():
        raise ValueError("no")

    one, two, three = compile_all([fail, lambda: 2, threading.Event().wait], Budget(0.2))
    assert isinstance(one, ValueError) and two == 2 and isinstance(three, TimeoutError)
    told: list[str] = []
    assert not ffn.bench_ffn(SHAPE, SPEED, batches=(1,), budget=Budget(0), tell=told.append)
    assert told == ["batch 1: left out, no time left"]
    found = bandwidth(2**16, rounds=2)
    assert found.limit == max(found.copy, found.read) > 0


def test_commands(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", SHAPE)
    monkeypatch.chdir(tmp_path)
    shared = ["--shape", "tiny", "--dtype", "float32", "--probe-bytes", "65536", "--rank", "8"]
    assert run(["bench", "ffn", *shared, "--batch", "1", "--sparsity", "0.5", "0.75", "--kind", "blocks"]) == 0
    values = json.loads((tmp_path / "bench-ffn-tiny.json").read_text())
    assert len(values["rows"]) == 4 and values["lines"]["tiny"].keys() == {"dense", "blocks"}
    assert values["bandwidth"]["copy"] > 0 and values["device"]
    assert (
        run(["bench", "decode", *shared, "--context", "4", "--steps", "2", "--variant", "dense", "--json", "d.json"])
        == 0
    )
    [row] = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert row["name"] == "dense" and row["tokens_per_second"] > 0
