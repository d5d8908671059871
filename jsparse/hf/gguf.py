"""GGUF files in: LLaMA weights of any quantisation that the `gguf` package can undo."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jsparse import config as configs
from jsparse.config import ConfigError, LlamaConfig, check
from jsparse.hf import gguf_tokenizer
from jsparse.hf.config import choose_format
from jsparse.hf.folder import assemble, check_stored, to_dtype, write_model
from jsparse.hf.names import in_order, leaves
from jsparse.hf.tensors import Outgoing, Stored, pieces
from jsparse.model import rope

_HARMLESS = {"vocab_size", "rope.scaling.finetuned"}  # of llama.*: the embedding has the size


def load_gguf(path: str | Path, dtype: Any = "float32", *, mesh: Mesh | None = None) -> tuple[LlamaConfig, Any]:
    """Reads a GGUF file of the llama architecture: its config, and its weights dequantised.

    Args:
        path: the .gguf file, of any of F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K.
        dtype: of the parameters; norms stay float32.
        mesh: as in `load`.

    Raises:
        ConfigError: another architecture, or a setting that jsparse does not compute.
        ValueError: a damaged file; a tensor missing, unknown or misshapen.
    """
    config, stored, _ = _open(Path(path))
    return config, assemble(config, stored, Path(path), dtype, mesh)


def import_gguf(
    source: str | Path,
    path: str | Path,
    dtype: Any = "float32",
    *,
    tokenizer: str | Path | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Turns a GGUF file into a model folder, one piece of a tensor at a time.

    Args:
        source: the .gguf file.
        path: the new folder.
        dtype: of the weights written.
        tokenizer: a folder to copy the tokenizer from; by default it is made from what the file holds.
        max_shard_bytes: as in `save`.
        overwrite: as in `save`.

    Raises:
        ConfigError: as `load_gguf` and `save`, and a tokenizer that is not supported.
        ValueError: as `load_gguf`.
        OSError: cannot write; nothing is left behind.
    """
    config, stored, fields = _open(Path(source))
    check_stored(config, leaves(config), stored, Path(source))
    target = to_dtype(dtype)

    def rows(tensor: Stored) -> Any:
        width = tuple(slice(0, n) for n in tensor.shape[1:])
        for cut in pieces(slice(0, tensor.shape[0]), int(np.prod(tensor.shape[1:])) * 4):
            yield tensor.read((cut, *width)).astype(target, copy=False)

    outgoing = in_order({name: Outgoing(t.shape, target, partial(rows, t)) for name, t in stored.items()})
    extra = {} if tokenizer is not None else gguf_tokenizer.files(fields, str(source))
    write_model(Path(path), config, outgoing, choose_format(config), tokenizer, max_shard_bytes, overwrite, extra)


def _open(path: Path) -> tuple[LlamaConfig, dict[str, Stored], dict[str, Any]]:
    """The config, the tensors under Hugging Face's names, and all key-values of a file."""
    from gguf import GGUFReader

    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    with open(path, "rb") as f:
        if f.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: truncated or damaged GGUF file") from error
    tensors = {t.name: t for t in reader.tensors}
    try:
        config = _config(fields, tensors)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config, _tensors(path, config, tensors), fields


# --------------------------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------------------------


def _config(fields: dict[str, Any], tensors: dict[str, Any]) -> LlamaConfig:
    architecture = fields.get("general.architecture")
    check(architecture == "llama", "general.architecture", "llama", architecture)
    rest = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}

    def take(name: str, default: Any = None) -> Any:
        value = rest.pop(name, default)
        check(isinstance(value, int | float), f"llama.{name}", "one number for all layers", value)
        return value

    check("token_embd.weight" in tensors, "token_embd.weight", "a tensor", None)
    heads, width = take("attention.head_count"), take("embedding_length")
    head_dim = take("attention.key_length", width // heads)
    for name in ("rope.dimension_count", "attention.value_length"):  # rotation of a part, values of another width
        same = take(name, head_dim)
        check(same == head_dim, f"llama.{name}", f"the head dim {head_dim}", same)
    values = {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "intermediate_size": take("feed_forward_length"),
        "num_hidden_layers": take("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": take("context_length"),
        "rms_norm_eps": _shortest(take("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    values["rope"] = {"theta": _shortest(take("rope.freq_base", 10_000.0))} | _rope(rest)
    config = configs.from_dict(LlamaConfig, values)
    if "rope_freqs.weight" in tensors:
        config = _llama3(config, np.asarray(tensors["rope_freqs.weight"].data, np.float32).reshape(-1))
    for name in sorted(rest.keys() - _HARMLESS):
        raise ConfigError(f"llama.{name} = {rest[name]!r} is not supported")
    return config


def _shortest(x: float) -> float:
    """GGUF holds float32: 9.999999747378752e-06 was 1e-5."""
    return float(str(np.float32(x)))


def _rope(rest: dict[str, Any]) -> dict[str, Any]:
    kind = rest.pop("rope.scaling.type", "none")
    linear = rest.pop("rope.scale_linear", 1.0)  # how files before rope.scaling.* said it
    factor = rest.pop("rope.scaling.factor", linear)
    original = rest.pop("rope.scaling.original_context_length", None)
    attention = rest.pop("rope.scaling.attn_factor", 1.0)
    check(attention in (0.0, 1.0), "llama.rope.scaling.attn_factor", "1", attention)  # 0: not set
    check(kind in ("none", "linear", "yarn"), "llama.rope.scaling.type", "none, linear or yarn", kind)
    if kind == "yarn":
        check(original is not None, "llama.rope.scaling.original_context_length", "a length, for yarn", None)
        return {"type": "yarn", "factor": _shortest(factor), "original_max_position_embeddings": original}
    if factor not in (0.0, 1.0):
        return {"type": "linear", "factor": _shortest(factor)}
    return {"type": "default"}


def _llama3(config: LlamaConfig, divisors: np.ndarray) -> LlamaConfig:
    """Recovers Llama 3's RoPE settings, of which the file holds only the result: what divides each frequency."""
    if np.all(divisors == 1):
        return config
    plain = rope.frequencies(config.rope, config, jnp.int32(1))[0]
    for original in (8192, config.max_position_embeddings):
        theta = config.rope.theta
        scaled = configs.Llama3Rope(_shortest(divisors.max()), 1.0, 4.0, original, theta)
        found = plain / rope.frequencies(scaled, config, jnp.int32(1))[0]
        if found.shape == divisors.shape and np.allclose(found, divisors, rtol=1e-4):
            return dataclasses.replace(config, rope=scaled)
    raise ConfigError("rope_freqs.weight: its RoPE scaling is not Llama 3's (low 1, high 4), which is all that the "
                      "file lets one recover; import the original Hugging Face folder")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------------------------


def _tensors(path: Path, config: LlamaConfig, tensors: dict[str, Any]) -> dict[str, Stored]:
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    rotated = {"query": config.num_attention_heads, "key": config.num_key_value_heads}
    stored = {}
    left = dict(tensors)
    left.pop("rope_freqs.weight", None)
    for leaf in leaves(config):
        for name in leaf.names:
            stem, _, suffix = name.rpartition(".")
            tensor = left.pop(f"{names.get_name(stem)}.{suffix}", None)
            if tensor is None:
                continue
            kind = leaf.path[-1].removesuffix("_bias")
            stored[name] = _stored(path, tensor, rotated.get(kind))
    for name, tensor in left.items():
        raise ValueError(f"{path}: unknown tensor {name} of shape {tuple(tensor.shape[::-1].tolist())}")
    return stored


def _stored(path: Path, tensor: Any, heads: int | None) -> Stored:
    """A GGUF tensor as Hugging Face has it: float32, its shape outputs first, and RoPE's pairs a half apart.

    GGUF interleaves each head's pairs in the rows of queries and keys: 0, H/2, 1, H/2 + 1, ...
    """
    from gguf import dequantize

    shape = tuple(int(n) for n in tensor.shape[::-1])
    order = np.arange(shape[0])
    if heads is not None:
        order = order.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        rows, *columns = index
        values = dequantize(tensor.data[order[rows]], tensor.tensor_type)
        return np.asarray(values, np.float32)[(slice(None), *columns)]

    try:
        read((slice(0, 1), *(slice(0, n) for n in shape[1:])))
    except NotImplementedError:
        kind = getattr(tensor.tensor_type, "name", tensor.tensor_type)
        raise ValueError(f"{path}: tensor {tensor.name}: quantisation {kind} is not supported") from None
    return Stored(path, shape, np.dtype(np.float32), read)
