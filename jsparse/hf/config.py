"""Hugging Face's config.json and our `LlamaConfig`.

Reading translates names and takes fields one by one; a field that is left over and not at a value that changes nothing
is an error, because a model that runs without it would be another model. Transformers 4 (`rope_theta`, `rope_scaling`,
`torch_dtype`) and 5 (`rope_parameters`, `dtype`) are read, 5 is written.
"""

import json
from pathlib import Path
from typing import Any, Literal

from jsparse import config as configs
from jsparse.config import Cats, Cett, ConfigError, FatRelu, Gelu, LlamaConfig, Relu, ShiftedRelu, Silu, check
from jsparse.hf import decilm

Format = Literal["llama", "sparsellama", "jsparse", "nemotron-nas"]

# What each kind of folder is called inside. The two in the middle bring our PyTorch file along.
ARCHITECTURES: dict[Format, str] = {
    "llama": "LlamaForCausalLM",
    "sparsellama": "SparseLlamaForCausalLM",
    "jsparse": "JsparseForCausalLM",
    "nemotron-nas": "DeciLMForCausalLM",
}
CODED = ("sparsellama", "jsparse")

# Look-alikes that compute something else (several share an architecture name with the models above).
FOREIGN = {
    "bamboo": "ReLU on gate and up (dReLU)",
    "turbosparsemixtral": "a mixture of experts with ReLU on gate and up (dReLU)",
    "llama_sparse_relu": "a ReLU that its class implies while hidden_act says otherwise",
    "llama_sparse": "thresholds on the inputs of every projection (TEAL)",
    "sparse_llama": "per-layer thresholds behind SiLU (CATS)",
    "minicpm": "scaled embeddings and residuals",
}

# Fields that say nothing about the computation, whatever their value.
BOOKKEEPING = {
    "_name_or_path", "name_or_path", "_commit_hash", "_attn_implementation_autoset", "_attn_implementation_internal",
    "attn_implementation", "transformers_version", "unsloth_version", "unsloth_fixed", "dtype", "torch_dtype",
    "use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_scores",
    "return_dict_in_generate", "keys_to_ignore_at_inference", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "tokenizer_class", "prefix", "task_specific_params", "finetuning_task", "problem_type", "id2label", "label2id",
    "num_labels", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id",
    "pretraining_tp",  # in how many slices the same product is computed
    "transformers.js_config", "gradient_checkpointing", "_flash_attn_2_enabled", "neftune_noise_alpha",
    "max_sequence_length", "model_max_length",  # transformers goes by max_position_embeddings
    # defaults of generate(), which once lived here
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens",
}  # fmt: skip

# Fields that change the computation unless they have this value; null is always one.
NEUTRAL: dict[str, Any] = {
    "is_llama_config": True,  # the first two are SmolLM's, the third Falcon3's; transformers reads none of them
    "rope_interleaved": False,
    "activation": "swiglu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "chunk_size_feed_forward": 0,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "per_layer_config": {},
    "use_sliding_window": False,
}

_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {"type": "silu"},
    "swish": {"type": "silu"},
    "gelu": {"type": "gelu"},
    "gelu_pytorch_tanh": {"type": "gelu", "approximate": True},
    "gelu_new": {"type": "gelu", "approximate": True},
    "relu": {"type": "relu"},
    "cett": {"type": "cett"},
}
_PARAMETERS = {  # what hidden_act_param holds: a number, or a list of these
    "fatrelu": ("threshold",),
    "cats": ("threshold",),
    "shifted_relu": ("shift", "threshold"),
    "shiftrelu": ("shift",),  # the ProSparse authors' name of it
}

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_DEFAULTS: dict[str, Any] = {  # transformers' own, which differ from ours
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def read_config(path: str | Path) -> LlamaConfig:
    """The config of a model folder.

    Raises:
        ConfigError: no model folder, or one whose model is not (exactly) what jsparse computes.
    """
    file = Path(path).expanduser() / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        where = "it has no config.json" if file.parent.exists() else (
            "there is none of that name (`hf download NAME --local-dir FOLDER` makes one of a model on the Hub)"
        )  # fmt: skip
        raise ConfigError(f"{path}: not a model folder: {where}") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from None
    try:
        check(isinstance(values, dict), "config", "a mapping", values)
        return from_hf(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def from_hf(values: dict[str, Any]) -> LlamaConfig:
    """A `LlamaConfig` of the values of a config.json.

    Raises:
        ConfigError: names the first field that is missing, wrong or not supported.
    """
    rest = decilm.read_blocks(values) if values.get("model_type") == "nemotron-nas" else dict(values)
    shapes = rest.pop("layers", None) if rest.get("model_type") == "jsparse" else None
    if rest.get("model_type") == "jsparse":
        rest.pop("packed", None)  # how tensors are stored, see jsparse.hf.packed
    _check_kind(rest)
    for name in _SIZES:
        check(rest.get(name) is not None, name, "a size", None)
    found = {name: rest.pop(name) for name in _SIZES}
    found |= {name: rest.pop(name, default) for name, default in _DEFAULTS.items()}
    heads, width = found["num_attention_heads"], found["hidden_size"]
    found["num_key_value_heads"] = _pop(rest, "num_key_value_heads", heads)
    head_dim = _pop(rest, "head_dim", None)
    if head_dim is None:
        whole = isinstance(heads, int) and isinstance(width, int) and heads > 0 and width % heads == 0
        check(whole, "hidden_size", f"a multiple of num_attention_heads ({heads}), or an explicit head_dim", width)
        head_dim = width // heads
    found["head_dim"] = head_dim
    found["activation"] = _read_activation(_pop(rest, "hidden_act", "silu"), _pop(rest, "hidden_act_param", None))
    found["rope"] = _read_rope(rest, found["max_position_embeddings"])
    found["router"] = rest.pop("router", None)
    found["layers"] = shapes
    config = configs.from_dict(LlamaConfig, found)
    _check_rest(rest)
    return config


def _pop(values: dict[str, Any], name: str, default: Any) -> Any:
    """Takes a field, null meaning its default."""
    value = values.pop(name, None)
    return default if value is None else value


def _check_kind(rest: dict[str, Any]) -> None:
    """Goes by `model_type`; `architectures` and `auto_map` may only agree with it."""
    kind = rest.pop("model_type", None)
    if kind in FOREIGN:
        raise ConfigError(f"model_type {kind!r} is not supported: it computes {FOREIGN[kind]}")
    check(kind in ARCHITECTURES, "model_type", f"one of {', '.join(ARCHITECTURES)}", kind)
    for name in _pop(rest, "architectures", []):
        check(name == ARCHITECTURES[kind], "architectures", f"{ARCHITECTURES[kind]} for model_type {kind!r}", name)
    code = rest.pop("auto_map", None)
    if code and kind == "llama":
        raise ConfigError(f"auto_map: the folder brings code of its own, which is never run: {code}; "
                          "if it computes what LlamaForCausalLM computes, delete auto_map")  # fmt: skip


def _check_rest(rest: dict[str, Any]) -> None:
    for name, value in rest.items():
        if name in BOOKKEEPING or value is None or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name == "layer_types" and isinstance(value, list) and set(value) <= {"full_attention"}:
            continue
        if name == "quantization_config":
            raise ConfigError("quantization_config: quantised weights are not supported; export the model unquantised")
        mend = f"only {NEUTRAL[name]!r} is supported" if name in NEUTRAL else (
            "unknown field; if the model does not depend on it, delete it")  # fmt: skip
        raise ConfigError(f"{name} = {value!r}: {mend}")


# --------------------------------------------------------------------------------------------------------------------
# Activation
# --------------------------------------------------------------------------------------------------------------------


def _read_activation(name: Any, param: Any) -> dict[str, Any]:
    stem, _, inline = str(name).rpartition("_")
    if stem in ("fatrelu", "shiftrelu"):  # "fatrelu_0.01", how the ProSparse authors write it among themselves
        check(param is None, "hidden_act_param", f"nothing beside hidden_act {name!r}", param)
        name, param = stem, inline
    if name in _PARAMETERS:
        names, numbers = _PARAMETERS[name], param if isinstance(param, list) else [param]
        good = param is not None and 0 < len(numbers) <= len(names)
        check(good, "hidden_act_param", f"the {' and '.join(names)} of hidden_act {name!r}", param)
        kind = "shifted_relu" if name == "shiftrelu" else name
        return {"type": kind} | dict(zip(names, numbers, strict=False))
    known = ", ".join([*_ACTIVATIONS, *_PARAMETERS])
    check(name in _ACTIVATIONS, "hidden_act", f"one of {known}", name)
    if param is not None:
        raise ConfigError(f"hidden_act_param = {param!r}: hidden_act {name!r} takes none; delete it or use 'fatrelu'")
    return _ACTIVATIONS[name]


def _write_activation(config: LlamaConfig) -> dict[str, Any]:
    match config.activation:
        case Gelu(approximate):
            return {"hidden_act": "gelu_pytorch_tanh" if approximate else "gelu"}
        case ShiftedRelu(shift, threshold):
            return {"hidden_act": "shifted_relu", "hidden_act_param": [shift, threshold] if threshold else shift}
        case FatRelu(param) | Cats(param):
            return {"hidden_act": config.activation.type, "hidden_act_param": param}
        case activation:
            return {"hidden_act": activation.type}


# --------------------------------------------------------------------------------------------------------------------
# RoPE
# --------------------------------------------------------------------------------------------------------------------


def _read_rope(rest: dict[str, Any], longest: Any) -> dict[str, Any]:
    """Our RoPE fields, from either spelling. The order in which spellings win is transformers'."""
    theta = _pop(rest, "rope_theta", 10_000.0)
    new = _pop(rest, "rope_parameters", {})
    old = _pop(rest, "rope_scaling", {})
    found = dict(old or new)
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    found = {name: value for name, value in found.items() if value is not None}
    found = {"theta": found.pop("rope_theta", theta)} | found
    if found.get("partial_rotary_factor") == 1.0:
        del found["partial_rotary_factor"]
    if kind in ("llama3", "yarn", "longrope"):
        inside = found.get("original_max_position_embeddings", longest)
        found["original_max_position_embeddings"] = _pop(rest, "original_max_position_embeddings", inside)
    if kind == "yarn" and "factor" not in found:
        found["factor"] = longest / found["original_max_position_embeddings"]
    if kind == "dynamic" and found.get("original_max_position_embeddings") == longest:
        del found["original_max_position_embeddings"]  # it stretches from max_position_embeddings
    return {"type": kind} | found


def _write_rope(config: LlamaConfig) -> dict[str, Any]:
    values = configs.to_dict(config.rope)
    names = {"type": "rope_type", "theta": "rope_theta"}
    return {names.get(name, name): value for name, value in values.items() if value is not None}


# --------------------------------------------------------------------------------------------------------------------
# Out
# --------------------------------------------------------------------------------------------------------------------


def choose_format(config: LlamaConfig, wanted: str = "auto", packed: bool = False) -> Format:
    """The plainest folder that holds a model, or the wanted one if it can; `packed`: with packed matrices.

    Raises:
        ConfigError: the wanted format cannot express the model; the message names those that can.
    """
    able: list[Format] = ["jsparse"]
    if not isinstance(config.activation, ShiftedRelu | Cats | Cett):
        able.insert(0, "sparsellama")
        if not isinstance(config.activation, FatRelu):
            able.insert(0, "llama")
    even = config.hidden_size % config.num_attention_heads == 0
    if not even or config.router or config.layers or packed:  # transformers' LlamaConfig refuses the first
        able = ["jsparse"]
    if "llama" in able or (config.layers and not packed):
        plain = isinstance(config.activation, Silu | Gelu | Relu)
        able += ["nemotron-nas"] if plain and decilm.holds(config) else []
    if wanted == "auto":
        return able[0]
    for name in able:
        if name == wanted:
            return name
    check(wanted in ARCHITECTURES, "format", f"auto or one of {', '.join(ARCHITECTURES)}", wanted)
    reason = f"hidden_act {config.activation}"
    if not even:
        reason = f"hidden_size {config.hidden_size} with {config.num_attention_heads} heads"
    if config.router is not None:
        reason = "routers"
    if config.layers is not None:
        reason = "layers of different shapes"
    if packed:
        reason = "packed matrices"
    if wanted == "nemotron-nas":
        reason = "FFN widths that are no multiples of 256, or heads of other widths than the whole model's"
    raise ConfigError(f"format {wanted!r} cannot hold {reason}; formats that can: {', '.join(able)}")


def to_hf(config: LlamaConfig, format: Format, dtype: str) -> dict[str, Any]:
    """The values of config.json, in transformers 5's spelling. `dtype` is that of the weights."""
    plain = configs.to_dict(config)
    fields = [*_SIZES, "num_key_value_heads", "head_dim", *_DEFAULTS]
    name = ARCHITECTURES[format]
    code = {
        "AutoConfig": f"configuration_sparsellama.{name.removesuffix('ForCausalLM')}Config",
        "AutoModel": f"modeling_sparsellama.{name.removesuffix('ForCausalLM')}Model",
        "AutoModelForCausalLM": f"modeling_sparsellama.{name}",
    }
    rope = _write_rope(config)
    shared = {
        "architectures": [name],
        "model_type": format,
        **({"auto_map": code} if format in CODED else {}),
        **{field: plain[field] for field in fields},
        **_write_activation(config),
        "dtype": dtype,
    }
    if format == "nemotron-nas":  # its readers go by the older spelling
        theta = rope.pop("rope_theta")
        scaling = None if rope["rope_type"] == "default" else rope
        return shared | {"rope_theta": theta, "rope_scaling": scaling} | decilm.write_blocks(config)
    return {
        **shared,
        "rope_parameters": rope,
        **({"router": plain["router"]} if config.router else {}),
        **({"layers": plain["layers"]} if config.layers else {}),
    }
