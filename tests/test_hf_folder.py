"""Model folders: bit-exact to PyTorch and back, onto meshes and off them, whole or not at all."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from jsparse import hf, model
from jsparse.config import Cett, ConfigError, FatRelu, Relu, Silu
from jsparse.parallel import MESH_AXES
from tests.helpers import from_torch, random_params, tiny_config, tokens, torch_model

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16, "num_key_value_heads": 1, "activation": Relu()},
}
DIVISIBLE = {"vocab_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}


def assert_identical(got: Any, expected: Any) -> None:
    """The same tree to the bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def digest(folder: Path) -> dict[str, str]:
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def make_mesh(shape: tuple[int, int, int]) -> Any:
    return jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * 3)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of a tiny model."""
    hf.save(tmp_path / "model", tiny_config(), random_params(tiny_config()))
    return tmp_path / "model"


# --------------------------------------------------------------------------------------------------------------------
# Against PyTorch
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_pytorch_to_ours_and_back(variant: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    config = tiny_config(**VARIANTS[variant])
    reference = torch_model(config)
    reference.save_pretrained(tmp_path / "theirs")
    loaded, params = hf.load(tmp_path / "theirs")
    assert loaded == config
    assert_identical(params, from_torch(reference.state_dict(), config))

    hf.save(tmp_path / "ours", loaded, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert type(again) is transformers.LlamaForCausalLM
    expected = reference.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, x in again.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, expected[name]), name
    ids = tokens(config, 2, 7)
    logits = again(torch.asarray(np.array(ids), dtype=torch.int64)).logits.detach().numpy()
    np.testing.assert_allclose(model.forward(params, ids, config).logits, logits, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_to_the_bit(dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    reference = torch_model(tiny_config()).to(getattr(torch, dtype))
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    config, params = hf.load(tmp_path / "theirs")
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}

    hf.save(tmp_path / "ours", config, params, max_shard_bytes=10_000)
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and all((tmp_path / "ours" / f).stat().st_size < 13_000 for f in files)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == getattr(torch, dtype)
    for name, x in again.state_dict().items():
        assert torch.equal(x, reference.state_dict()[name]), name
    sizes = [x.nbytes for x in reference.state_dict().values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_identical(hf.load(tmp_path / "ours")[1], params)


# --------------------------------------------------------------------------------------------------------------------
# Round trips
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["stacked", "unstacked", "numpy"])
def test_every_form_of_params_saves_the_same(form: str, saved: Path, tmp_path: Path) -> None:
    params = random_params(tiny_config())
    if form == "unstacked":
        params = model.unstack(params)
    elif form == "numpy":
        params = jax.tree.map(np.asarray, params)
    hf.save(tmp_path / "again", tiny_config(), params)
    assert digest(tmp_path / "again") == digest(saved)


def test_file_is_what_the_safetensors_library_reads(saved: Path) -> None:
    params = random_params(tiny_config())
    tensors = load_file(saved / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embed"])
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"].T)
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.down_proj.weight"], params["layers"]["ffn"]["down"][1].T)
    header = (saved / "model.safetensors").read_bytes()
    assert int.from_bytes(header[:8], "little") % 8 == 0
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}


def test_pieces_join_seamlessly(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hf.load(saved)[1]
    monkeypatch.setattr("jsparse.hf.tensors.PIECE", 3000)  # bytes: every matrix takes several
    assert_identical(hf.load(saved)[1], whole)
    hf.save(tmp_path / "again", tiny_config(), whole)
    assert digest(tmp_path / "again") == digest(saved)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 1, 8), (2, 2, 2)])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_onto_a_mesh_and_off_it(shape: tuple[int, int, int], dtype: str | None, tmp_path: Path) -> None:
    config = tiny_config(**DIVISIBLE, attention_bias=True)
    hf.save(tmp_path / "model", config, random_params(config))
    mesh = make_mesh(shape)
    alone = hf.load(tmp_path / "model", dtype=dtype)[1]
    spread = hf.load(tmp_path / "model", dtype=dtype, mesh=mesh)[1]
    assert_identical(spread, alone)
    assert jax.tree.map(lambda x: x.sharding, spread) == model.shardings(config, mesh)
    shard = spread["layers"]["ffn"]["gate"].addressable_shards[0].data.shape
    assert shard == (2, 32 // shape[1], 48 // shape[2])
    if dtype is None:
        hf.save(tmp_path / "again", config, spread)
        assert digest(tmp_path / "again") == digest(tmp_path / "model")


def test_mesh_that_does_not_divide(saved: Path) -> None:
    with pytest.raises(ConfigError, match="mesh: embed has 67 vocab"):
        hf.load(saved, mesh=make_mesh((1, 1, 8)))


def test_dtypes_on_request(saved: Path, tmp_path: Path) -> None:
    params = hf.load(saved, dtype="bfloat16")[1]
    assert_identical(params, model.cast(random_params(tiny_config()), tiny_config(), jnp.bfloat16))
    assert params["norm"]["scale"].dtype == jnp.float32  # an island
    hf.save(tmp_path / "half", tiny_config(), params, dtype=jnp.float16)
    assert {x.dtype.name for x in load_file(tmp_path / "half/model.safetensors").values()} == {"float16"}
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "float16"
    with pytest.raises(ConfigError, match="dtype: expected float32, bfloat16 or float16, got 'int8'"):
        hf.load(saved, dtype="int8")


def test_layers_of_different_dtypes_stack_as_float32(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    save_file(tensors, saved / "model.safetensors")
    params = hf.load(saved)[1]
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    np.testing.assert_array_equal(params["layers"]["ffn"]["up"][0], tensors[name].T.astype(np.float32))


def test_thresholds_stay_float32(tmp_path: Path) -> None:
    config = tiny_config(activation=Cett())
    params = random_params(config)
    hf.save(tmp_path / "model", config, params, dtype="bfloat16")
    again, loaded = hf.load(tmp_path / "model")
    assert again == config
    np.testing.assert_array_equal(loaded["layers"]["ffn"]["threshold"], params["layers"]["ffn"]["threshold"])
    assert loaded["layers"]["ffn"]["gate"].dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [None, (1, 1, 1)])
def test_loaded_memory_becomes_the_array(shape: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing is copied between reading and the parameter."""
    from jsparse.hf import folder

    addresses = []
    allocate = folder._aligned

    def recording(*args: Any) -> np.ndarray:
        addresses.append((room := allocate(*args)).ctypes.data)
        return room

    monkeypatch.setattr(folder, "_aligned", recording)
    mesh = shape and jax.make_mesh(shape, MESH_AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])
    params = hf.load(saved, mesh=mesh)[1]
    arrays = [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(params)]
    assert sorted(arrays) == sorted(addresses)


def test_params_survive_donation(saved: Path) -> None:
    """Loaded arrays may live in numpy's memory; a donated update must neither fail nor write through."""
    params = hf.load(saved)[1]
    kept = np.array(params["embed"])
    alias = params["embed"]
    stepped = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)
    np.testing.assert_array_equal(stepped["embed"], kept + 1)
    assert alias.is_deleted()


# --------------------------------------------------------------------------------------------------------------------
# What comes along
# --------------------------------------------------------------------------------------------------------------------


def test_tokenizer_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    files = {
        "tokenizer.json": b"\x00{}\r\n",
        "tokenizer_config.json": b"{ }",
        "generation_config.json": b'{"top_k": 3}',
        "additional_chat_templates/tool.jinja": b"{{ x }}",
        "pytorch_model.bin": b"pickle",
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    hf.save(tmp_path / "model", tiny_config(), random_params(tiny_config()), tokenizer=source)
    for name, content in files.items():
        if name != "pytorch_model.bin":
            assert (tmp_path / "model" / name).read_bytes() == content
    assert not (tmp_path / "model/pytorch_model.bin").exists()
    with pytest.raises(ConfigError, match="empty: no tokenizer files"):
        hf.save(tmp_path / "m2", tiny_config(), random_params(tiny_config()), tokenizer=tmp_path / "empty")


def test_generation_config_is_made_from_the_ids(saved: Path, tmp_path: Path) -> None:
    import transformers

    made = transformers.GenerationConfig.from_pretrained(saved)
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (1, 2, None)
    config = tiny_config(bos_token_id=None, eos_token_id=None)
    hf.save(tmp_path / "none", config, random_params(config))
    assert not (tmp_path / "none/generation_config.json").exists()


def test_harmless_tensors(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    before = hf.load(saved)[1]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, saved / "model.safetensors")
    assert_identical(hf.load(saved)[1], before)


# --------------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------------


def raises(error: type[Exception], message: str, folder: Path) -> None:
    with pytest.raises(error, match=message) as caught:
        hf.load(folder)
    assert "\n" not in str(caught.value)


def edit(folder: Path, **tensors: Any) -> None:
    """Replaces tensors of a folder ("__" for "."); None deletes."""
    found = load_file(folder / "model.safetensors")
    for name, x in tensors.items():
        found.pop(name.replace("__", "."), None)
        if x is not None:
            found[name.replace("__", ".")] = x
    save_file(found, folder / "model.safetensors")


def test_missing_unknown_and_misshapen_tensors(saved: Path) -> None:
    up = load_file(saved / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    edit(saved, model__layers__1__mlp__up_proj__weight=None)
    raises(ValueError, r"model: missing tensor model.layers.1.mlp.up_proj.weight of shape \(48, 32\)$", saved)
    edit(saved, model__layers__1__mlp__up_proj__weight=up.T.copy())
    raises(ValueError, r"model.safetensors: tensor model.layers.1.mlp.up_proj.weight: expected shape \(48, 32\), "
                       r"got \(32, 48\)", saved)  # fmt: skip
    edit(saved, model__layers__1__mlp__up_proj__weight=up, model__layers__1__mlp__fc__weight=up)
    raises(ValueError, r"model.safetensors: unknown tensor model.layers.1.mlp.fc.weight of shape \(48, 32\)", saved)
    edit(saved, model__layers__1__mlp__fc__weight=None, lm_head__weight=None, model__norm__weight=None)
    raises(ValueError, r"missing tensor .* \(and 1 more\)", saved)


def test_quantised_tensor(saved: Path) -> None:
    edit(saved, model__norm__weight=np.ones(32, np.int8))
    raises(ValueError, r"model.safetensors: tensor model.norm.weight: expected one of F64, .* got I8", saved)


def test_head_of_a_tied_model(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    params = random_params(config)
    hf.save(tmp_path / "model", config, params)
    assert "lm_head.weight" not in load_file(tmp_path / "model/model.safetensors")
    edit(tmp_path / "model", lm_head__weight=np.array(params["embed"]))
    assert_identical(hf.load(tmp_path / "model")[1], params)
    edit(tmp_path / "model", lm_head__weight=np.array(params["embed"]) + 1)
    raises(ValueError, "lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings",
           tmp_path / "model")  # fmt: skip


@pytest.mark.parametrize("length", [0, 4, 100, 5_000, -1])
def test_truncated_file(length: int, saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    raises(ValueError, r"model.safetensors: truncated or damaged safetensors file", saved)


def test_no_tensors_and_only_a_pickle(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    raises(ValueError, r"no model.safetensors and no .*; found pytorch_model.bin \(pickles are never loaded", saved)


def test_bad_index(saved: Path, tmp_path: Path) -> None:
    hf.save(tmp_path / "sharded", tiny_config(), random_params(tiny_config()), max_shard_bytes=20_000)
    folder = tmp_path / "sharded"
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())

    def write(**changes: str) -> None:
        index.write_text(json.dumps({"weight_map": good["weight_map"] | changes}))

    write(**{"model.norm.weight": "../model/model.safetensors"})
    raises(ValueError, "shard '../model/model.safetensors' lies outside the folder", folder)
    write(**{"model.norm.weight": good["weight_map"]["model.embed_tokens.weight"]})
    raises(ValueError, "index.json: tensor model.norm.weight is not in model-00001", folder)
    write(**{"model.norm.weight": "gone.safetensors"})
    raises(ValueError, "gone.safetensors: missing, though the index names it", folder)
    index.write_text("{}")
    raises(ValueError, "index.json: damaged", folder)


def test_params_that_do_not_fit(tmp_path: Path) -> None:
    config = tiny_config()
    params = random_params(config)

    def refuse(params: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            hf.save(tmp_path / "model", config, params)
        assert not list(tmp_path.iterdir())

    refuse({k: v for k, v in params.items() if k != "head"}, r"params: missing head of shape \(32, 67\)")
    refuse(params | {"embed": jnp.ones((3, 4))}, r"params: embed: expected shape \(67, 32\), got \(3, 4\)")
    refuse(params | {"router": jnp.ones(3)}, r"params: unknown router of shape \(3,\)")
    layers = model.unstack(params)["layers"]
    refuse(params | {"layers": layers[:1]}, r"params: missing layers.1.attention.key")
    refuse(params | {"embed": jnp.ones((67, 32), jnp.int32)}, r"dtype of model.embed_tokens.weight: expected one of")


# --------------------------------------------------------------------------------------------------------------------
# Whole or not at all
# --------------------------------------------------------------------------------------------------------------------


def test_existing_folders(saved: Path, tmp_path: Path) -> None:
    config = tiny_config(activation=FatRelu(0.5))
    params = random_params(config, seed=1)
    before = digest(saved)
    with pytest.raises(ConfigError, match="model: exists already"):
        hf.save(saved, config, params)
    assert digest(saved) == before
    hf.save(saved, config, params, overwrite=True)
    assert hf.load(saved)[0] == config and [f.name for f in tmp_path.iterdir()] == ["model"]

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("dear")
    with pytest.raises(ConfigError, match="notes: exists and is not a model folder"):
        hf.save(tmp_path / "notes", config, params, overwrite=True)
    assert (tmp_path / "notes/diary.txt").read_text() == "dear"


def test_full_disk(saved: Path, tmp_path: Path) -> None:
    """A write that the system refuses midway: the old folder stays, no new one, nothing else."""
    before = digest(saved)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        for name in ("model", "new"):
            with pytest.raises(OSError, match=f"{name}: cannot write: File too large; nothing was left behind"):
                hf.save(tmp_path / name, tiny_config(), random_params(tiny_config(), seed=1), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert digest(saved) == before and [f.name for f in tmp_path.iterdir()] == ["model"]


def test_new_folder_that_cannot_take_the_name(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = digest(saved), os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            raise PermissionError(1, "no")
        rename(source, target)

    monkeypatch.setattr("jsparse.hf.folder.os.rename", refuse)
    with pytest.raises(OSError, match="model: cannot write: no; nothing was left behind"):
        hf.save(saved, tiny_config(), random_params(tiny_config(), seed=1), overwrite=True)
    assert digest(saved) == before and [f.name for f in tmp_path.iterdir()] == ["model"]


def test_interrupted(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jsparse.hf.folder.write_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hf.save(tmp_path / "new", tiny_config(), random_params(tiny_config()))
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


# --------------------------------------------------------------------------------------------------------------------
# In processes of their own
# --------------------------------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import sys, jax
process, port, folder, out = int(sys.argv[1]), *sys.argv[2:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, process)
from jsparse import hf
from jsparse.config import MeshConfig
from jsparse.parallel import make_mesh
config, params = hf.load(folder, mesh=make_mesh(MeshConfig(data=1, fsdp=4)))
assert not params["layers"]["ffn"]["gate"].is_fully_addressable
hf.save(out, config, params)
"""


def test_two_processes_save_one_model(tmp_path: Path) -> None:
    import socket

    config = tiny_config(**DIVISIBLE)
    hf.save(tmp_path / "model", config, random_params(config))
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(i), str(port), str(tmp_path / "model"), str(tmp_path / "out")]
        )
        for i in range(2)
    ]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]
    assert digest(tmp_path / "out") == digest(tmp_path / "model")


def test_memory(tmp_path: Path) -> None:
    """A second copy of these 263 MB would fail; tools/measure_memory.py shows a billion parameters."""
    tool = Path(__file__).parents[1] / "tools/measure_memory.py"
    sys.path.insert(0, str(tool.parent))
    try:
        import measure_memory
    finally:
        sys.path.remove(str(tool.parent))
    measure_memory.make(tmp_path / "model", layers=6, hidden=1024, vocab=32_000)
    size = sum(f.stat().st_size for f in (tmp_path / "model").glob("*.safetensors"))
    for case, limit in (("load", 200e6), ("save", 400e6)):
        command = [sys.executable, str(tool), "--case", case, "--folder", str(tmp_path)]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        assert abs(result["params"] - size) < 0.01 * size
        assert result["over"] < limit, case


def test_silu_is_not_written_as_something_else(saved: Path) -> None:
    assert hf.read_config(saved).activation == Silu()
    assert not list(saved.glob("*.py"))
