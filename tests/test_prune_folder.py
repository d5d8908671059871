"""Pruning from folder to folder, and packed matrices in folders."""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import hf, model, parallel
from jsparse.config import ConfigError, MeshConfig
from jsparse.hf import prune as hf_prune
from jsparse.methods.dass import Dass
from jsparse.methods.packing import pack_params, unpack_params
from jsparse.methods.patterns import ATTENTION, MLP, NofM, Ratio, check_claim, get, observe
from jsparse.methods.pruning import Magnitude, Wanda, prune
from pallas_kernels import PackedNM
from tests.helpers import random_params, tiny_config, tokens

CONFIG = tiny_config(vocab_size=68)
IDS = tokens(CONFIG, 5, 16)
WAYS: Any = dict(pattern=NofM(2, 4), mlp=Dass(), attention=Wanda(), batch_size=2)  # of most runs: compiled once


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("folders")
    hf.save(home / "dense", CONFIG, random_params(CONFIG))
    hf.save(home / "half", CONFIG, model.cast(random_params(CONFIG), CONFIG, jnp.bfloat16), max_shard_bytes=1e4)
    hf.prune_folder(home / "dense", home / "zeros", IDS, **WAYS, about={"command": "prune"})
    hf.prune_folder(home / "dense", home / "packed", IDS, **WAYS, packed=True)
    return home


@functools.cache
def expected():
    """What `prune` makes of the model in memory: its parameters and the report."""
    params, _, report = prune(random_params(CONFIG), CONFIG, IDS, **WAYS)
    return params, report


def assert_same(got, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path))


def test_folder_to_folder_is_what_prune_does(home):
    params, report = expected()
    config, got = hf.load(home / "zeros")
    assert config == CONFIG
    assert_same(got, params)
    told = json.loads((home / "zeros" / "prune.json").read_text())
    assert told.pop("command") == "prune" and told.pop("bytes") == told.pop("dense_bytes")
    assert told == json.loads(json.dumps(dataclasses.asdict(report)))

    mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        found = hf.prune_folder(home / "dense", home / "sharded", IDS, mesh=mesh, **WAYS)
    assert_same(hf.load(home / "sharded")[1], params)
    assert found.report == report


def test_the_report_is_there_when_the_folder_appears(home, monkeypatch):
    rename, seen = os.rename, []

    def look(source, target):
        seen.append({path.name for path in Path(source).iterdir()})
        rename(source, target)

    monkeypatch.setattr(os, "rename", look)
    hf.prune_folder(home / "dense", home / "seen", pattern=NofM(2, 4), mlp=Magnitude())
    assert len(seen) == 1 and {"config.json", "model.safetensors", "prune.json"} < seen[0]


def test_tensors_keep_their_dtype_whatever_computes(home):
    """Of bfloat16 weights computed with in float32, what is kept stays bit for bit; sharded files too."""
    hf.prune_folder(home / "half", home / "half-out", IDS, pattern=NofM(2, 4), dtype=jnp.float32, max_shard_bytes=1e4)
    _, before = hf.load(home / "half")
    _, after = hf.load(home / "half-out")
    for name in MLP:
        was, now = (np.asarray(get(x["layers"], name)) for x in (before, after))
        assert now.dtype == jnp.bfloat16
        np.testing.assert_array_equal(now[now != 0], was[now != 0])
        assert abs((now != 0).mean() - 0.5) < 0.01
    assert len(list((home / "half-out").glob("model-*.safetensors"))) > 3


def test_one_block_at_a_time(home, monkeypatch):
    """Between reading a block and writing it there is never a second one, nor is anything of the model left."""
    config = tiny_config(num_hidden_layers=8, vocab_size=16)
    hf.save(home / "deep", config, random_params(config))
    block = sum(x.nbytes for x in jax.tree.leaves(random_params(config)["layers"])) // 8
    seen, read = [], hf_prune._Blocks._layer
    before = sum(x.nbytes for x in jax.live_arrays())

    def layer(self, i):
        seen.append(sum(x.nbytes for x in jax.live_arrays()) - before)
        return read(self, i)

    monkeypatch.setattr(hf_prune._Blocks, "_layer", layer)
    hf.prune_folder(home / "deep", home / "deep-out", pattern=NofM(2, 4), mlp=Magnitude())
    assert len(seen) == 8 and max(seen) < block, (seen, block)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"pattern": NofM(2, 5)}, ConfigError, r"layers\.0\.ffn\.gate: pattern 2:5"),
        ({"pattern": Ratio(0.5), "packed": True}, ConfigError, r"packed: expected a pattern N:M .* got '0\.5'"),
        ({"tokens": IDS + 60}, ConfigError, "tokens: expected ids from 0 to 67"),
        ({"tokens": None}, ConfigError, "tokens: expected calibration tokens for dass"),
        ({"source": "broken"}, ValueError, r"layers\.1\.ffn\.up: weights are not finite before pruning"),
        ({"out": "dense"}, ConfigError, "is the model that is read"),
        ({"out": "broken"}, ConfigError, "exists already"),
    ],
)
def test_what_is_refused_leaves_nothing(home, changes, error, told):
    if not (home / "broken").exists():
        params = random_params(CONFIG)
        params["layers"]["ffn"]["up"] = params["layers"]["ffn"]["up"].at[1, 2, 7].set(jnp.nan)
        hf.save(home / "broken", CONFIG, params)
    given = {"source": "dense", "out": "left", "tokens": IDS, "pattern": NofM(2, 4)} | changes
    if given["source"] == "broken":
        given |= {"mlp": Magnitude()}
    source, out = (home / given.pop(name) for name in ("source", "out"))
    with pytest.raises(error, match=told):
        hf.prune_folder(source, out, given.pop("tokens"), **given)
    assert not [path for path in home.iterdir() if "left" in path.name]


# --------------------------------------------------------------------------------------------------------------------
# Packed
# --------------------------------------------------------------------------------------------------------------------


def test_packed_folder_is_the_model_that_prune_makes(home):
    params, _ = expected()
    config, got = hf.load(home / "packed")
    assert config == CONFIG
    assert_same(got, params)
    about = json.loads((home / "packed" / "config.json").read_text())
    assert about["packed"] == {"gate_proj": "2:4 output", "up_proj": "2:4 output", "down_proj": "2:4 input"}
    told = json.loads((home / "packed" / "prune.json").read_text())
    files = sum(f.stat().st_size for f in (home / "packed").glob("*.safetensors"))
    assert told["bytes"] < told["dense_bytes"] and abs(files - told["bytes"]) < 8000

    mlp = sum(get(params["layers"], name).nbytes for name in MLP)
    assert told["dense_bytes"] - told["bytes"] == mlp - mlp * (2 * 32 + 2 * 2) // (4 * 32)


def test_packed_leaves(home):
    config, params = hf.load(home / "packed", packed=True)
    _, dense = hf.load(home / "packed")
    for name in MLP:
        leaf = get(params["layers"], name)
        assert isinstance(leaf, PackedNM) and leaf.values.shape[0] == 2
        assert (leaf.n, leaf.m, leaf.axis) == (2, 4, "input" if name == "ffn.down" else "output")
    assert_same(unpack_params(params), dense)
    assert_same(pack_params(dense), params)
    assert pack_params(params) is params and unpack_params(dense) is dense
    assert_same(model.unstack(pack_params(dense)), pack_params(model.unstack(dense)))
    _, half = hf.load(home / "packed", packed=True, dtype=jnp.bfloat16, mesh=parallel.make_mesh())
    assert (
        half["layers"]["ffn"]["gate"].dtype == jnp.bfloat16 and half["layers"]["ffn"]["gate"].indices.dtype == jnp.uint8
    )
    hf.save(home / "again", config, params)
    assert_same(hf.load(home / "again", packed=True)[1], params)
    assert_same(hf.load(home / "zeros", packed=True)[1], params)  # zeros that make a pattern are packed as they come
    assert jax.tree.structure(hf.load(home / "dense", packed=True)[1]) == jax.tree.structure(random_params(CONFIG))


def test_packed_folder_prunes_and_reads_in_pieces(home, monkeypatch):
    """Slices that cut groups and words: a mesh's shards, and pieces of few rows."""
    expected = hf.load(home / "packed")[1]
    monkeypatch.setattr("jsparse.hf.tensors.PIECE", 500)
    assert_same(hf.load(home / "packed")[1], expected)
    mesh = parallel.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    assert_same(hf.load(home / "packed", mesh=mesh)[1], expected)
    hf.prune_folder(home / "packed", home / "wanda", IDS, pattern=NofM(2, 4), mlp=Wanda(), packed=True)
    check_claim(hf.load(home / "wanda")[1], NofM(2, 4))
    assert hf.load(home / "wanda", packed=True)[1]["layers"]["ffn"]["gate"].axis == "input"


def test_damaged_packed_folders(home, tmp_path):
    config = json.loads((home / "packed" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((home / "packed" / "model.safetensors").read_bytes())

    def told(changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError) as error:
            hf.load(tmp_path)
        return str(error.value)

    assert "unknown tensor model.layers.0.mlp" in told({"packed": None})
    assert re.search(r"gate_proj: values .* are no matrix packed 1:4 along the outputs", told({"packed": {
        "gate_proj": "1:4 output", "up_proj": "2:4 output", "down_proj": "2:4 input"}}))  # fmt: skip
    assert "packed.gate_proj: expected a pattern and an axis" in told({"packed": {"gate_proj": "2:4"}})
    assert "packed: expected matrices among" in told({"packed": {"q_proj": "2:4 input"}})


@pytest.mark.parametrize("form", ["zeros", "packed"])
def test_pytorch_sees_the_same_logits(home, form):
    torch = pytest.importorskip("torch")
    import transformers

    folder = home / form
    config, params = hf.load(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=form == "packed", attn_implementation="eager"
    )
    assert type(reference).__name__ == ("LlamaForCausalLM" if form == "zeros" else "JsparseForCausalLM")
    with torch.no_grad():
        expected = reference(torch.tensor(np.asarray(IDS), dtype=torch.long)).logits.numpy()
    got = jax.jit(model.forward, static_argnames="config")(params, IDS, config=config).logits
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert {row.pattern for row in observe(params)} >= {"2:4 input", "2:4 output"}
    check_claim(params, NofM(2, 4), MLP + ATTENTION)
