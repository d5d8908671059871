"""Our PyTorch file: transformers with `trust_remote_code=True` computes what we compute, for every activation."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jsparse import hf, model
from jsparse.config import Cats, Cett, FatRelu, LlamaConfig, Relu, Router, ShiftedRelu
from tests.helpers import random_params, tiny_config, tokens

torch = pytest.importorskip("torch")

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "fatrelu": ({"activation": FatRelu(0.05)}, "sparsellama"),
    "fatrelu, biases": ({"activation": FatRelu(0.05), "attention_bias": True, "mlp_bias": True}, "sparsellama"),
    "fatrelu as jsparse": ({"activation": FatRelu(0.05)}, "jsparse"),
    "relu as sparsellama": ({"activation": Relu()}, "sparsellama"),
    "shifted relu": ({"activation": ShiftedRelu(0.1), "tie_word_embeddings": True}, "jsparse"),
    "shifted relu with a threshold": ({"activation": ShiftedRelu(0.1, 0.2)}, "jsparse"),
    "cats": ({"activation": Cats(0.1)}, "jsparse"),
    "cett": ({"activation": Cett()}, "jsparse"),
    **{
        f"router, {mode}": ({"router": Router(8, mode)}, "jsparse")
        for mode in ("hard", "soft", "top", "oracle", "softmax", "off")
    },
    "router behind cett": ({"activation": Cett(), "router": Router(8, "hard")}, "jsparse"),
    "three heads of 32": ({"num_attention_heads": 3, "num_key_value_heads": 1}, "jsparse"),
}


def params_of(config: LlamaConfig) -> model.Params:
    """Random, with thresholds that drop about half of CETT's neurons."""
    params = random_params(config)
    if "threshold" in params["layers"]["ffn"]:
        params["layers"]["ffn"]["threshold"] = jax.numpy.abs(params["layers"]["ffn"]["threshold"])
    if "router_threshold" in params["layers"]["ffn"]:
        params["layers"]["ffn"]["router_threshold"] = jax.numpy.asarray([0.4, 0.55])
    return params


def theirs(folder: Path, **options: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    changes, format = CASES[case]
    config = tiny_config(**changes)
    params = params_of(config)
    hf.save(tmp_path / "model", config, params, format=format)
    loaded = theirs(tmp_path / "model", attn_implementation="eager").eval()
    assert loaded.config.model_type == format
    assert type(loaded).__name__ == json.loads((tmp_path / "model/config.json").read_text())["architectures"][0]

    ids = tokens(config, 2, 9)
    ours = model.forward(params, ids, config).logits
    with torch.no_grad():
        logits = loaded(torch.asarray(np.array(ids), dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(ours, logits, atol=1e-4)

    if config.activation != Relu():  # and the activation matters here
        other = tiny_config(**changes | {"activation": Relu()})
        params["layers"]["ffn"].pop("threshold", None)
        assert np.abs(model.forward(params, ids, other).logits - logits).max() > 1e-2


def test_round_trip_of_thresholds(tmp_path: Path) -> None:
    config = tiny_config(activation=Cett())
    params = params_of(config)
    hf.save(tmp_path / "model", config, params)
    again_config, again = hf.load(tmp_path / "model")
    assert again_config == config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, params))


def test_saved_by_transformers_and_read_back(tmp_path: Path) -> None:
    """What `save_pretrained` writes of our classes is a folder that we read."""
    config = tiny_config(activation=Cett())
    params = params_of(config)
    hf.save(tmp_path / "model", config, params)
    theirs(tmp_path / "model").save_pretrained(tmp_path / "again")
    again_config, again = hf.load(tmp_path / "again")
    assert again_config == config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, params))


def test_thresholds_stay_float32_in_half_precision(tmp_path: Path) -> None:
    config = tiny_config(activation=Cett())
    hf.save(tmp_path / "model", config, params_of(config))
    loaded = theirs(tmp_path / "model", dtype=torch.bfloat16)
    assert loaded.model.layers[1].mlp.threshold.dtype == torch.float32
    assert loaded.model.layers[1].mlp.gate_proj.weight.dtype == torch.bfloat16


def test_fatrelu_compares_in_float32(tmp_path: Path) -> None:
    """0.00995 lies just above a bfloat16 number, to which it would round: that number must go, the next one stay."""
    config = tiny_config(activation=FatRelu(0.00995))
    hf.save(tmp_path / "model", config, random_params(config))
    act = theirs(tmp_path / "model").model.layers[0].mlp.act_fn
    gate = torch.tensor([-1.0, 0.00994873046875, 0.010009765625, 1.0], dtype=torch.bfloat16)
    assert act(gate).tolist() == [0.0, 0.0, 0.010009765625, 1.0]


def test_reads_a_config_as_prosparse_published_it(tmp_path: Path) -> None:
    """transformers 4 spelling, no rope_theta, no head_dim, hidden_act_param beside hidden_act."""
    config = tiny_config(activation=FatRelu(0.05), num_key_value_heads=4, max_position_embeddings=2048)
    params = random_params(config)
    hf.save(tmp_path / "model", config, params)
    path = tmp_path / "model/config.json"
    values = json.loads(path.read_text())
    for name in ("rope_parameters", "head_dim", "dtype"):
        del values[name]
    values |= {"torch_dtype": "float32", "rope_scaling": None, "pretraining_tp": 1, "max_length": 4096,
               "use_cache": True, "transformers_version": "4.31.0.dev0"}  # fmt: skip
    path.write_text(json.dumps(values))
    assert hf.read_config(tmp_path / "model") == config
    ids = tokens(config, 1, 9)
    with torch.no_grad():
        logits = theirs(tmp_path / "model")(torch.asarray(np.array(ids), dtype=torch.int64)).logits.numpy()
    np.testing.assert_allclose(model.forward(params, ids, config).logits, logits, atol=1e-4)


def test_auto_model_and_generation(tmp_path: Path) -> None:
    import transformers

    config = tiny_config(activation=ShiftedRelu(0.1))
    hf.save(tmp_path / "model", config, random_params(config))
    body = transformers.AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert type(body).__name__ == "JsparseModel" and type(body.layers[0].mlp.act_fn).__name__ == "ShiftedRelu"
    ids = torch.arange(5)[None]
    out = theirs(tmp_path / "model").generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out.shape == (1, 9)


NO_TORCH = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from jsparse import hf
config, params = hf.load(sys.argv[1])
hf.save(sys.argv[2], config, params)
"""


def test_folders_need_no_torch(tmp_path: Path) -> None:
    config = tiny_config(activation=FatRelu(0.01))
    hf.save(tmp_path / "model", config, random_params(config))
    command = [sys.executable, "-c", NO_TORCH, str(tmp_path / "model"), str(tmp_path / "again")]
    subprocess.run(command, check=True)
    for name in ("config.json", "model.safetensors", "modeling_sparsellama.py", "configuration_sparsellama.py"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    config = tiny_config(activation=FatRelu(0.01))
    hf.save(tmp_path / "model", config, random_params(config))
    for file in (tmp_path / "model").glob("*.py"):
        file.write_text("raise SystemExit('remote code ran')")
    assert hf.load(tmp_path / "model")[0] == config
    shutil.rmtree(tmp_path / "model")
