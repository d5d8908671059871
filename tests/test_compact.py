"""Layers of different widths: the model, its folder, PyTorch, training, pruning and thresholds on top."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsparse import config as configs
from jsparse import hf, model, parallel
from jsparse.config import (
    CheckpointConfig,
    ConfigError,
    DynamicRope,
    Fixed,
    LayerShape,
    LlamaConfig,
    LogConfig,
    LteStage1,
    MeshConfig,
    ModelSource,
    ProSparse,
    Relu,
    Router,
    Silu,
)
from jsparse.hf import decilm
from jsparse.inference import evaluate, generate
from jsparse.methods import prosparse
from jsparse.methods.patterns import NofM
from jsparse.methods.pruning import prune
from jsparse.train.checkpoint import load_run
from jsparse.train.loop import train
from jsparse.train.metrics import flops_per_token
from tests.helpers import assert_trees_close, random_params, tiny_config, tokens
from tests.train_helpers import recipe

SHAPES = (LayerShape(16, 8, ((0, 1, 3), (1, 2, 3))), LayerShape(48, 6))  # queries narrower than values, and wider
CONFIG = tiny_config(
    vocab_size=68, num_hidden_layers=2, layers=SHAPES, attention_bias=True, mlp_bias=True, activation=Relu()
)
IDS = tokens(CONFIG, 2, 12)


def zero_filled(params: model.Params, config: LlamaConfig) -> tuple[model.Params, LlamaConfig]:
    """A dense model whose layers hold a compact model's entries, the others 0. Neurons and dims stand in front."""
    dense = dataclasses.replace(config, layers=None)
    zeros = [jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), model.abstract(dense)["layers"]) for _ in SHAPES]
    for big, small, shape in zip(zeros, params["layers"], SHAPES, strict=True):
        pairs = shape.rope_pairs or (tuple(range(4)),) * 2
        for part, leaf in [(p, name) for p in small for name in small[p]]:
            x = np.asarray(small[part][leaf])
            if leaf.startswith(("query", "key")):
                for head in range(x.shape[-2]):
                    kept = np.array(pairs[head // (x.shape[-2] // 2)])
                    big[part][leaf][..., head, np.concatenate([kept, kept + 4])] = x[..., head, :]
            else:
                big[part][leaf][tuple(slice(n) for n in x.shape)] = x
    return model.stack(params | {"layers": jax.tree.map(jnp.asarray, zeros)}), dense


def logits(params: model.Params, config: LlamaConfig, ids: jax.Array = IDS) -> np.ndarray:
    return np.asarray(jax.jit(lambda p: model.forward(p, ids, config).logits)(params))


@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_the_same_as_the_zero_filled_model(rope: str) -> None:
    """Logits, and the text decoded with caches of different widths: with keys cached rotated, and unrotated."""
    config = CONFIG if rope == "default" else dataclasses.replace(CONFIG, rope=DynamicRope(2.0))
    params = random_params(config)
    filled, dense = zero_filled(params, config)
    np.testing.assert_allclose(logits(params, config), logits(filled, dense), atol=1e-4)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    text = generate(params, config, prompts, max_new_tokens=6, stop_ids=())
    assert text.tokens == generate(filled, dense, prompts, max_new_tokens=6, stop_ids=()).tokens
    got, expected = (evaluate(p, c, np.arange(60) % 67, seq_len=16) for p, c in ((params, config), (filled, dense)))
    assert got.neurons == (16, 48) and abs(got.loss - expected.loss) < 1e-5


def test_the_tree() -> None:
    """Init, shardings, axes, islands and casting agree with one another and with the shapes."""
    params = model.init(jax.random.key(0), CONFIG)
    abstract = model.abstract(CONFIG)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)
    first = params["layers"][0]
    assert first["attention"]["query"].shape == (32, 4, 6) and first["attention"]["output"].shape == (4, 8, 32)
    assert first["attention"]["value_bias"].shape == (2, 8) and first["ffn"]["down"].shape == (16, 32)
    assert model.logical_axes(CONFIG)["layers"][1]["ffn"]["gate"] == jax.sharding.PartitionSpec("embed", "mlp")
    half = model.cast(params, CONFIG, jnp.bfloat16)["layers"][1]
    assert half["ffn"]["up"].dtype == jnp.bfloat16 and half["ffn_norm"]["scale"].dtype == jnp.float32
    assert model.unstack(params) is params
    mesh = parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = model.init(jax.random.key(0), CONFIG, mesh)
    assert_trees_close(sharded, params, 1e-6)
    ids = tokens(CONFIG, 4, 12)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(sharded, CONFIG, ids), logits(params, CONFIG, ids), atol=1e-5)


def test_config_round_trip_and_errors() -> None:
    assert configs.from_dict(LlamaConfig, configs.to_dict(CONFIG)) == CONFIG
    assert CONFIG.of_layer(1).layer_shapes == SHAPES[1:2] and tiny_config().of_layer(1) == tiny_config()
    for changes, message in (
        ({"num_hidden_layers": 3}, "layers: expected 3 shapes, got 2"),
        ({"layers": (LayerShape(8, 8, ((0, 4),) * 2),) * 2}, r"layers\[0\].rope_pairs: expected indices below 4 for 2"),
        ({"num_key_value_heads": 1}, "indices below 4 for 1 heads"),
        ({"layers": (LayerShape(8, 9),) * 2}, r"layers\[0\].value_dim: expected at most 8, got 9"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ConfigError, match="rope_pairs: expected rising indices"):
        LayerShape(8, 8, ((0, 1), (1, 0)))
    with pytest.raises(ConfigError, match="intermediate_size: expected a positive number"):
        LayerShape(0, 8)


def test_folder(tmp_path: Path) -> None:
    """Written, read back bit by bit, and onto a mesh."""
    params = random_params(CONFIG)
    hf.save(tmp_path / "model", CONFIG, params)
    config, again = hf.load(tmp_path / "model")
    assert config == CONFIG
    assert_trees_close(again, params, 0)
    _, sharded = hf.load(tmp_path / "model", mesh=parallel.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert_trees_close(sharded, params, 0)
    with pytest.raises(ConfigError, match="format 'llama' cannot hold layers of different shapes"):
        hf.save(tmp_path / "other", CONFIG, params, format="llama")
    with pytest.raises(ValueError, match=r"params: layers\.0\.ffn\.up: expected shape \(32, 16\), got \(32, 15\)"):
        narrow = params["layers"][0] | {"ffn": params["layers"][0]["ffn"] | {"up": jnp.zeros((32, 15))}}
        hf.save(tmp_path / "other", CONFIG, params | {"layers": [narrow, params["layers"][1]]})


@pytest.mark.parametrize("activation", [Silu(), configs.Cett()])
def test_torch(activation: Any, tmp_path: Path) -> None:
    """transformers computes the same logits from the folder, and decodes the same text with its cache."""
    torch = pytest.importorskip("torch")
    import transformers

    config = dataclasses.replace(CONFIG, activation=activation, attention_bias=False, mlp_bias=False)
    params = random_params(config)
    hf.save(tmp_path / "model", config, params)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path / "model", trust_remote_code=True).eval()
    ids = torch.asarray(np.array(IDS), dtype=torch.int64)
    with torch.no_grad():
        np.testing.assert_allclose(logits(params, config), theirs(ids).logits.numpy(), atol=1e-4)
        text = theirs.generate(ids[:1], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours = generate(params, config, IDS[:1], max_new_tokens=5, stop_ids=())
    assert ours.tokens[0] == text[0, 12:].tolist()
    with pytest.raises(ValueError, match="attn_implementation: expected 'eager' or 'sdpa'"):
        load(tmp_path / "model", trust_remote_code=True, attn_implementation="flex_attention")


def test_pruning_and_thresholds_on_top() -> None:
    params = random_params(CONFIG)
    pruned, masks, report = prune(params, CONFIG, IDS, pattern=NofM(2, 4), batch_size=2)
    assert [row.weights for row in report.matrices[:4]] == [32 * 16] * 3 + [32 * 48]
    assert all(float(x.mean()) == 0.5 for x in (masks["layers"][1]["ffn"]["up"], pruned["layers"][1]["ffn"]["up"] == 0))
    thresholds, config = prosparse.cett_thresholds(params, CONFIG, [IDS], error=0.2)
    assert [layer["ffn"]["threshold"].shape[0] for layer in thresholds["layers"]] == [16, 48]
    shares = evaluate(thresholds, config, np.asarray(IDS).reshape(-1), seq_len=12).sparsity
    dense = evaluate(params, CONFIG, np.asarray(IDS).reshape(-1), seq_len=12).sparsity
    assert all(a > b for a, b in zip(shares, dense, strict=True))


def test_routers_on_top() -> None:
    """A router a layer, over the layer's own blocks; all blocks in use compute what no router does."""
    config = dataclasses.replace(CONFIG, router=Router(block_size=8))
    params = random_params(config)
    assert [layer["ffn"]["router"].shape for layer in params["layers"]] == [(32, 2), (32, 6)]
    for layer in params["layers"]:
        layer["ffn"]["router_threshold"] = jnp.zeros(())
    plain = [jax.tree.map(lambda x: x, layer) for layer in params["layers"]]
    for layer in plain:
        del layer["ffn"]["router"], layer["ffn"]["router_threshold"]
    np.testing.assert_allclose(logits(params, config), logits(params | {"layers": plain}, CONFIG), atol=1e-5)
    with pytest.raises(ConfigError, match=r"router\.block_size: expected a divisor of .* \(16\), got 32"):
        dataclasses.replace(config, intermediate_size=64, router=Router(block_size=32))


def test_training_on_top(tmp_path: Path) -> None:
    """A compact folder trains on with ProSparse, on a mesh, and its checkpoint and export are compact again."""
    config = dataclasses.replace(CONFIG, attention_bias=False, mlp_bias=False)
    params = random_params(config)
    hf.save(tmp_path / "model", config, params)
    run = recipe(
        tmp_path / "run",
        model=ModelSource(path=str(tmp_path / "model")),
        method=ProSparse(Fixed(0.5)),
        steps=2,
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(every=1, tensorboard=False, eval_every=2, eval_tokens=100),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2, max_replicated=0.5),
        remat="full",
    )
    train(run)
    again, trained, info = load_run(run.run)
    assert again == config and info["step"] == 2
    moved = np.abs(trained["layers"][0]["ffn"]["gate"] - params["layers"][0]["ffn"]["gate"])
    assert moved.shape == (32, 16) and 0 < moved.max() < 0.1
    lines = [json.loads(line) for line in (Path(run.run) / "metrics.jsonl").read_text().splitlines()]
    assert len(lines[0]["sparsity"]) == 2 and lines[0]["penalty"] > 0


def test_lte_on_top(tmp_path: Path) -> None:
    """Stage 1 on a compact folder: blocks of each layer's own width, fitted routers, thresholds for the target."""
    config = dataclasses.replace(CONFIG, attention_bias=False, mlp_bias=False)
    params = random_params(config)
    hf.save(tmp_path / "model", config, params)
    run = recipe(
        tmp_path / "run",
        model=ModelSource(path=str(tmp_path / "model")),
        method=LteStage1(target_sparsity=0.5, block_size=4),
        steps=1,
        checkpoint=CheckpointConfig(every=1),
    )
    train(run)
    routed, trained, _ = load_run(run.run)
    assert routed == dataclasses.replace(config, router=Router(block_size=4))
    assert [layer["ffn"]["router"].shape for layer in trained["layers"]] == [(32, 4), (32, 12)]
    for new, old in zip(trained["layers"], params["layers"], strict=True):  # in another order, and a step further
        new, old = (np.sort(np.asarray(layer["ffn"]["down"][:, 0])) for layer in (new, old))
        np.testing.assert_allclose(new, old, atol=0.02)
    ids = np.load(tmp_path / "run" / "tokens.npy")[:200]
    assert abs(np.mean(evaluate(trained, routed, ids, seq_len=16).block_sparsity) - 0.5) < 0.1


def test_training_flops() -> None:
    dense = dataclasses.replace(CONFIG, layers=None)
    same = dataclasses.replace(CONFIG, layers=(LayerShape(48, 8),) * 2)
    assert flops_per_token(same, 64) == flops_per_token(dense, 64)
    widths = (6 + 8) + (8 + 6)  # of queries and values
    matrices = model.count(model.abstract(CONFIG)) - 68 * 32
    assert flops_per_token(CONFIG, 64) == 6 * matrices + 6 * 64 * 4 * widths / 2


# --------------------------------------------------------------------------------------------------------------------
# DeciLM's form
# --------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 64), st.sampled_from([64, 512, 576, 2048, 2560, 3072, 4096, 5120, 6144, 8192]))
def test_deci_widths_round_trip(width: int, hidden: int) -> None:
    assert decilm.width(decilm.multiplier(256 * width, hidden), hidden) == 256 * width
    with pytest.raises(ConfigError, match="width: expected a multiple of 256"):
        decilm.multiplier(256 * width + 128, hidden)


def test_deci_folder(tmp_path: Path) -> None:
    """Written and read back; block_configs and null sizes as its readers expect them; what it cannot hold."""
    config = tiny_config(rope=configs.Llama3Rope(8.0, 1.0, 4.0, 32), layers=(LayerShape(256, 8), LayerShape(512, 8)))
    config = dataclasses.replace(config, intermediate_size=512)
    params = random_params(config)
    hf.save(tmp_path / "deci", config, params, format="nemotron-nas")
    values = json.loads((tmp_path / "deci" / "config.json").read_text())
    assert values["architectures"] == ["DeciLMForCausalLM"] and values["model_type"] == "nemotron-nas"
    assert values["intermediate_size"] is values["num_key_value_heads"] is None and "auto_map" not in values
    assert [block["ffn"]["ffn_mult"] for block in values["block_configs"]] == [12.0, 24.0]
    assert values["block_configs"][0]["attention"] == {
        "n_heads_in_group": 2,
        "no_op": False,
        "replace_with_linear": False,
    }
    assert values["rope_theta"] == 500_000 and values["rope_scaling"]["rope_type"] == "llama3"
    again, tree = hf.load(tmp_path / "deci")
    assert again == config
    assert_trees_close(tree, params, 0)

    values["block_configs"][1]["ffn"]["no_op"] = True
    (tmp_path / "deci" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"block_configs\[1\]\.ffn: expected one that is there in full"):
        hf.load(tmp_path / "deci")
    with pytest.raises(ConfigError, match="format 'nemotron-nas' cannot hold FFN widths that are no multiples of 256"):
        hf.save(tmp_path / "other", CONFIG, random_params(CONFIG), format="nemotron-nas")
