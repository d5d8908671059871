"""config.json against transformers' `LlamaConfig`, in the spellings of transformers 4 and 5, and what is refused."""

import json
from typing import Any

import pytest
import transformers

from jsparse.config import (
    Cett,
    ConfigError,
    DefaultRope,
    DynamicRope,
    FatRelu,
    Gelu,
    LinearRope,
    Llama3Rope,
    LlamaConfig,
    LongRope,
    Relu,
    ShiftedRelu,
    Silu,
    YarnRope,
)
from jsparse.hf import read_config
from jsparse.hf.config import choose_format, from_hf, to_hf

SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip
LLAMA = {"model_type": "llama", **SIZES}
FACTORS = [1.0, 1.5, 2.0, 4.0]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "head_dim": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "ids": {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 0},
    "no ids": {"bos_token_id": None, "eos_token_id": None},
    "numbers": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "initializer_range": 0.1},
    "relu": {"hidden_act": "relu"},
    "gelu": {"hidden_act": "gelu"},
    "gelu tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512,
            "attention_factor": 1.2, "beta_fast": 30.0, "beta_slow": 2.0, "mscale": 1.5, "mscale_all_dim": 0.5,
            "truncate": False,
        }
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512,
            "short_factor": FACTORS, "long_factor": FACTORS[::-1], "attention_factor": 1.1,
        }
    },
}  # fmt: skip


def plain(config: Any) -> dict[str, Any]:
    bookkeeping = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    values = json.loads(json.dumps(config.to_dict()))
    return {name: value for name, value in values.items() if name not in bookkeeping}


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_config_to_ours_and_back(variant: str) -> None:
    theirs = transformers.LlamaConfig(**SIZES, **VARIANTS[variant])
    ours = from_hf(json.loads(theirs.to_json_string()))
    back = transformers.LlamaConfig(**to_hf(ours, "llama", "float32"))
    assert plain(back) == plain(theirs)
    assert from_hf(to_hf(ours, "llama", "float32")) == ours


ATTRIBUTES = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "initializer_range",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id",
]  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("variant", ["plain", "gqa", "biases", "ids", "numbers"])
def test_every_attribute_is_transformers(variant: str, name: str) -> None:
    theirs = transformers.LlamaConfig(**SIZES, **VARIANTS[variant])
    ours = getattr(from_hf(LLAMA | VARIANTS[variant]), name)  # what is left out has transformers' default
    assert (list(ours) if isinstance(ours, tuple) else ours) == getattr(theirs, name)


V4 = {
    "theta": ({"rope_theta": 500_000.0, "rope_scaling": None}, DefaultRope(500_000.0)),
    "type": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, LinearRope(2.0)),
    "both types": ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}, LinearRope(2.0)),
    "dynamic": ({"rope_theta": 2e4, "rope_scaling": {"type": "dynamic", "factor": 3}}, DynamicRope(3.0, 2e4)),
    "llama3": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        Llama3Rope(8.0, 1.0, 4.0, 512, 5e5),
    ),
    "yarn, original outside": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 512},
        YarnRope(4.0, 512),
    ),
    "yarn, original left out": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, YarnRope(4.0, 2048)),
    "yarn, no factor": (
        {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 512}},
        YarnRope(4.0, 512),
    ),
    "longrope, no factor": (
        {
            "rope_scaling": {"type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS},
            "original_max_position_embeddings": 512,
        },
        LongRope(tuple(FACTORS), tuple(FACTORS), 512),
    ),
}


@pytest.mark.parametrize("case", V4)
def test_transformers_4_spellings(case: str) -> None:
    values, rope = V4[case]
    values = {**LLAMA, "torch_dtype": "bfloat16", "use_cache": True, "pretraining_tp": 1, **values}
    ours = from_hf(values)
    assert ours.rope == rope
    if case == "yarn, no factor":  # transformers wants it
        return
    migrated = transformers.LlamaConfig.from_dict(values)
    migrated.standardize_rope_params()  # as its RoPE does before it computes: fields outside are in place by then
    theirs = migrated.rope_parameters
    written = to_hf(ours, "llama", "float32")["rope_parameters"]
    known = {"type", "beta_fast", "beta_slow", "truncate"}  # "type" is dropped, defaults are written out
    assert {k: v for k, v in written.items() if k not in known} == {
        k: v for k, v in theirs.items() if k not in known and v is not None
    }


def test_writes_only_the_spelling_of_transformers_5() -> None:
    written = to_hf(from_hf(LLAMA), "llama", "bfloat16")
    assert not written.keys() & {"rope_theta", "rope_scaling", "torch_dtype"}
    assert written["head_dim"] == 8 and written["dtype"] == "bfloat16"
    assert written["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("values", "activation"),
    [
        ({"hidden_act": "silu"}, Silu()),
        ({"hidden_act": "gelu_new"}, Gelu(approximate=True)),
        ({"hidden_act": "relu"}, Relu()),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.01}, FatRelu(0.01)),
        ({"hidden_act": "fatrelu_0.01"}, FatRelu(0.01)),
        ({"hidden_act": "shiftrelu_0.1"}, ShiftedRelu(0.1)),
        ({"hidden_act": "shifted_relu", "hidden_act_param": 0.1}, ShiftedRelu(0.1)),
        ({"hidden_act": "cett"}, Cett()),
    ],
)
def test_activations(values: dict[str, Any], activation: Any) -> None:
    ours = from_hf({**SIZES, "model_type": "jsparse", **values})
    assert ours.activation == activation
    assert from_hf(to_hf(ours, "jsparse", "float32")) == ours


def test_published_prosparse_config() -> None:
    """Every key of SparseLLM/prosparse-llama-2-13b's config.json."""
    values = {
        "_name_or_path": "SparseLLM/prosparse-llama-2-13b",
        "architectures": ["SparseLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sparsellama.SparseLlamaConfig",
            "AutoModel": "modeling_sparsellama.SparseLlamaForCausalLM",
            "AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM",
        },
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "fatrelu", "hidden_act_param": 0.01,
        "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 13824, "max_position_embeddings": 4096,
        "model_type": "sparsellama", "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 40,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.31.0", "use_cache": True, "vocab_size": 32000,
        "max_length": 4096,
    }  # fmt: skip
    assert from_hf(values) == LlamaConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=40, head_dim=128, max_position_embeddings=4096, rms_norm_eps=1e-5,
        activation=FatRelu(0.01), bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


REFUSED = {
    "unknown field": ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0: unknown field"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout = 0.1: only 0.0"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "partial rotation, 5": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "unknown setting rope.partial_rotary_factor",
    ),
    "window": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "per layer": ({"per_layer_config": {"0": {"intermediate_size": 3}}}, "per_layer_config"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config: quantised weights are not supported"),
    "activation": ({"hidden_act": "mish"}, "hidden_act: expected one of silu"),
    "no threshold": ({"hidden_act": "fatrelu"}, "hidden_act_param: expected the threshold"),
    "two thresholds": ({"hidden_act": "fatrelu_0.1", "hidden_act_param": 0.1}, "hidden_act_param: expected nothing"),
    "idle threshold": ({"hidden_act": "relu", "hidden_act_param": 0.01}, "hidden_act_param = 0.01: hidden_act 'relu'"),
    "odd threshold": ({"hidden_act": "fatrelu_x"}, "activation.threshold: expected a number, got 'x'"),
    "rope type": ({"rope_scaling": {"type": "su", "factor": 2}}, "rope.type: expected one of default"),
    "rope key": ({"rope_scaling": {"type": "linear", "facto": 2}}, "unknown setting rope.facto"),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, "missing setting rope.factor"),
    "longrope": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": FACTORS}},
        "rope.short_factor: expected 4 factors",
    ),
    "type": ({"vocab_size": "many"}, "vocab_size: expected a whole number, got 'many'"),
    "missing": ({"hidden_size": None}, "hidden_size: expected a size, got None"),
    "heads": ({"num_attention_heads": 3}, r"hidden_size: expected a multiple of num_attention_heads \(3\)"),
    "no type": ({"model_type": None}, "model_type: expected one of llama, .*, nemotron-nas, got None"),
    "other type": ({"model_type": "qwen2"}, "model_type: expected one of llama, .*, nemotron-nas, got 'qwen2'"),
    "bamboo": ({"model_type": "bamboo", "hidden_act": "relu"}, "bamboo.*dReLU"),
    "implied relu": (
        {"model_type": "llama_sparse_relu", "architectures": ["SparseLlamaForCausalLM"], "hidden_act": "silu"},
        "llama_sparse_relu.*its class implies",
    ),
    "architecture": ({"architectures": ["SparseLlamaForCausalLM"]}, "architectures: expected LlamaForCausalLM"),
    "code": ({"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map: the folder brings code of its own"),
}


def test_fields_of_published_models_that_change_nothing() -> None:
    smollm2 = {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "pretraining_tp": 1,
               "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}  # fmt: skip
    assert from_hf(LLAMA | smollm2 | {"activation": "swiglu", "max_sequence_length": 2048}) == from_hf(LLAMA)
    with pytest.raises(ConfigError, match="rope_interleaved = True: only False is supported"):
        from_hf(LLAMA | {"rope_interleaved": True})


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as error:
        from_hf(LLAMA | values)
    assert "\n" not in str(error.value)


def test_read_config_errors_name_the_file(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: not a model folder: there is none of that name \(`hf down"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json: not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config.json: config: expected a mapping"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"mlp_bias": 3}))
    with pytest.raises(ConfigError, match=r"config.json: mlp_bias: expected true or false, got 3"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("activation", "heads", "format"),
    [
        (Silu(), 4, "llama"),
        (Gelu(), 4, "llama"),
        (Relu(), 4, "llama"),
        (FatRelu(0.01), 4, "sparsellama"),
        (ShiftedRelu(0.1), 4, "jsparse"),
        (Cett(), 4, "jsparse"),
        (Silu(), 3, "jsparse"),  # transformers' LlamaConfig refuses 3 heads of 32 dimensions
    ],
)
def test_plainest_format(activation: Any, heads: int, format: str) -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=heads, num_key_value_heads=1, activation=activation)
    assert choose_format(config) == format
    assert choose_format(config, "jsparse") == "jsparse"
    if format != "llama":
        with pytest.raises(ConfigError, match=f"format 'llama' cannot hold .*formats that can: {format}"):
            choose_format(config, "llama")
    with pytest.raises(ConfigError, match=r"format: expected auto or one of llama, .*, nemotron-nas, got 'onnx'"):
        choose_format(config, "onnx")
