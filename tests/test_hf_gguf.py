"""GGUF import: every quantisation, the rows of queries and keys, RoPE scaling, tokenizers, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import hf, model
from jsparse.config import ConfigError, DefaultRope, LinearRope, Llama3Rope, LlamaConfig, YarnRope
from jsparse.model.rope import frequencies
from tests.helpers import random_params, tiny_config, tokens

Q = gguf.GGMLQuantizationType
WRITABLE = [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0]
K_QUANTS = [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K]

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if stem in ends:
        return f"{ends[stem]}.{suffix}"
    _, _, i, rest = stem.split(".", 3)
    return f"blk.{i}.{NAMES[rest]}.{suffix}"


def permute(x: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter, Hugging Face to GGUF: the halves of each head's rows become interleaved pairs."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def hf_tensors(config: LlamaConfig, params: model.Params, folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    hf.save(folder, config, params)
    return load_file(folder / "model.safetensors")


def write(
    path: Path,
    config: LlamaConfig,
    tensors: dict[str, np.ndarray],
    quant: Any = Q.F32,
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a GGUF file as llama.cpp's converter does; returns what its tensors mean, under Hugging Face's names."""
    writer = gguf.GGUFWriter(path, "llama")
    fields: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope.theta,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    }
    for name, value in (fields | (keys or {})).items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    meaning = {}
    random = np.random.default_rng(0)
    for name, x in tensors.items():
        kind = quant if x.ndim == 2 else Q.F32
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if kind in K_QUANTS:  # the package cannot make them: random blocks mean something, too
            block, size = gguf.GGML_QUANT_SIZES[kind]
            data = random.integers(0, 60, (x.shape[0], x.shape[1] // block * size), np.uint8)
        else:
            data = gguf.quantize(x if heads is None else permute(x, heads), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        value = gguf.dequantize(data, kind)
        if heads is not None:  # back, one row at a time
            rows = [permute(np.arange(x.shape[0]), heads).tolist().index(i) for i in range(x.shape[0])]
            value = value[rows]
        meaning[name] = value
    for name, x in (extra or {}).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    config = tiny_config()
    return config, hf_tensors(config, random_params(config), tmp_path / "source")


@pytest.mark.parametrize("quant", WRITABLE + K_QUANTS, ids=lambda q: q.name)
def test_every_quantisation(quant: Any, tmp_path: Path) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64, vocab_size=32)
    params = random_params(config)
    tensors = hf_tensors(config, params, tmp_path / "source")
    meaning = write(tmp_path / "m.gguf", config, tensors, quant)
    got_config, got = hf.load_gguf(tmp_path / "m.gguf")
    assert got_config == config
    back = hf_tensors(got_config, got, tmp_path / "back")
    assert back.keys() == meaning.keys()
    for name, x in meaning.items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)
    if quant in WRITABLE:  # and it is close to what was quantised, row by row
        error = max(np.abs(back[n] - tensors[n]).max() for n in tensors)
        assert error <= {Q.F32: 0, Q.F16: 1e-3, Q.BF16: 4e-3}.get(quant, 0.2)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True},
                                     {"head_dim": 16, "num_key_value_heads": 1}])  # fmt: skip
def test_float32_is_the_same_model(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(**changes)
    params = random_params(config)
    write(tmp_path / "m.gguf", config, hf_tensors(config, params, tmp_path / "source"))
    got_config, got = hf.load_gguf(tmp_path / "m.gguf")
    assert got_config == config
    ids = tokens(config, 1, 8)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, params))
    assert (model.forward(got, ids, config).logits == model.forward(params, ids, config).logits).all()


def test_same_tensors_as_transformers(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config, tensors = tiny
    write(tmp_path / "m.gguf", config, tensors, Q.F16)
    hf.import_gguf(tmp_path / "m.gguf", tmp_path / "model")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=ours)["tensors"]
    assert theirs.keys() == ours.state_dict().keys()
    for name, x in ours.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), theirs[name].numpy(), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_writes_what_load_gives(dtype: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jsparse.hf.tensors.PIECE", 1000)
    config, tensors = tiny
    write(tmp_path / "m.gguf", config, tensors, Q.F16)
    hf.import_gguf(tmp_path / "m.gguf", tmp_path / "model", dtype, max_shard_bytes=20_000)
    assert (tmp_path / "model/model.safetensors.index.json").exists()
    got_config, got = hf.load(tmp_path / "model")
    assert got_config == config and {x.dtype.name for x in jax.tree.leaves(got)} == {dtype}
    expected = jax.tree.map(lambda x: x.astype(dtype), hf.load_gguf(tmp_path / "m.gguf")[1])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), got, expected))
    assert hf.load_gguf(tmp_path / "m.gguf", jnp.bfloat16)[1]["norm"]["scale"].dtype == jnp.float32
    with pytest.raises(ConfigError, match="model: exists already"):
        hf.import_gguf(tmp_path / "m.gguf", tmp_path / "model")


# --------------------------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------------------------

ROPES = {
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LinearRope(4.0)),
    "linear, old": ({"rope.scale_linear": 4.0}, LinearRope(4.0)),
    "none": ({"rope.scaling.type": "none"}, DefaultRope()),
    "yarn": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32,
         "rope.scaling.finetuned": True},
        YarnRope(4.0, 32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
def test_rope_keys(case: str, tiny: Any, tmp_path: Path) -> None:
    config, tensors = tiny
    keys, expected = ROPES[case]
    write(tmp_path / "m.gguf", config, tensors, keys={f"llama.{name}": value for name, value in keys.items()})
    assert hf.load_gguf(tmp_path / "m.gguf")[0].rope == expected


def test_llama3_scaling_is_recovered_from_its_divisors(tmp_path: Path) -> None:
    config = tiny_config(rope=Llama3Rope(32.0, 1.0, 4.0, 8192, 500_000.0), head_dim=64)
    tensors = hf_tensors(config, random_params(config), tmp_path / "source")
    unscaled = dataclasses.replace(config, rope=DefaultRope(500_000.0))
    divisors = frequencies(unscaled.rope, unscaled, jnp.int32(1))[0] / frequencies(config.rope, config, jnp.int32(1))[0]
    assert divisors.min() == 1 and divisors.max() == 32
    write(tmp_path / "m.gguf", config, tensors, extra={"rope_freqs.weight": np.array(divisors)})
    assert hf.load_gguf(tmp_path / "m.gguf")[0] == config

    write(tmp_path / "m.gguf", config, tensors, extra={"rope_freqs.weight": np.ones(32, np.float32)})
    assert hf.load_gguf(tmp_path / "m.gguf")[0] == unscaled

    write(tmp_path / "m.gguf", config, tensors, extra={"rope_freqs.weight": np.linspace(1, 9, 32, dtype=np.float32)})
    with pytest.raises(ConfigError, match=r"rope_freqs.weight: its RoPE scaling is not Llama 3's"):
        hf.load_gguf(tmp_path / "m.gguf")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type: expected none, linear or yarn"),
    "attn_factor": ({"llama.rope.scaling.attn_factor": 1.5}, "llama.rope.scaling.attn_factor: expected 1, got 1.5"),
    "per layer": ({"llama.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv: expected one number"),
    "widths": ({"llama.feed_forward_length": [48, 32]}, "llama.feed_forward_length: expected one number"),
    "partial": ({"llama.rope.dimension_count": 4}, r"llama.rope.dimension_count: expected the head dim 8"),
    "missing": ({"llama.block_count": None}, "llama.block_count: expected one number for all layers, got None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tiny: Any, tmp_path: Path) -> None:
    config, tensors = tiny
    keys, message = REFUSED[case]
    write(tmp_path / "m.gguf", config, tensors, keys=keys)
    with pytest.raises(ConfigError, match=f"m.gguf: {message}") as error:
        hf.load_gguf(tmp_path / "m.gguf")
    assert "\n" not in str(error.value)


def test_other_architectures(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"m.gguf: general.architecture: expected llama, got 'qwen2'"):
        hf.import_gguf(tmp_path / "m.gguf", tmp_path / "model")


def test_tensors_that_do_not_fit(tiny: Any, tmp_path: Path) -> None:
    config, tensors = tiny

    def refuse(tensors: dict[str, np.ndarray], message: str, **options: Any) -> None:
        write(tmp_path / "m.gguf", config, tensors, **options)
        for read in (hf.load_gguf, lambda path: hf.import_gguf(path, tmp_path / "model")):
            with pytest.raises(ValueError, match=message):
                read(tmp_path / "m.gguf")
        assert not (tmp_path / "model").exists()

    name = "model.layers.1.mlp.up_proj.weight"
    refuse({k: v for k, v in tensors.items() if k != name}, rf"m.gguf: missing tensor {name} of shape \(48, 32\)")
    refuse(tensors | {name: np.ones((4, 32), np.float32)}, rf"{name}: expected shape \(48, 32\), got \(4, 32\)")
    refuse(tensors, r"m.gguf: unknown tensor blk.0.fc1.weight of shape \(2, 3\)",
           extra={"blk.0.fc1.weight": np.ones((2, 3), np.float32)})  # fmt: skip


def test_truncated_and_foreign_files(tiny: Any, tmp_path: Path) -> None:
    config, tensors = tiny
    file = tmp_path / "m.gguf"
    write(file, config, tensors)
    whole = file.read_bytes()
    for length in (5, 12, 30, 200, 700, 1500, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"m.gguf: truncated or damaged GGUF file$"):
            hf.load_gguf(file)
    for content in (b"", b"GG", b"PK\x03\x04" + whole):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"m.gguf: not a GGUF file$"):
            hf.load_gguf(file)
    with pytest.raises(ConfigError, match=r"gone.gguf: no such file"):
        hf.load_gguf(tmp_path / "gone.gguf")


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------------------------

TEXTS = [
    "the cat  sat on 1234 mats,\n\tand so\u2014on: caf\u00e9 \U0001f600!",
    " the<|end|>the 12",
    "",
    "a  1 'll they'll",
]


def byte_level() -> dict[str, Any]:
    """A byte-level vocabulary with a few merges, a control token and a word of the user's."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["t h", "th e", "\u0120 the", "c a", "ca t", "\u0120 \u0120", "1 2", "12 3", "' l", "'l l", "\u0120 1"]
    vocab = ["<|start|>", "<|end|>", "<think>", *bytes_to_unicode().values(), *(m.replace(" ", "") for m in merges)]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": vocab, "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(vocab) - 3), "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1, "tokenizer.chat_template": "{{ messages[0].content }}"}  # fmt: skip


def sentencepiece() -> dict[str, Any]:
    letters = [chr(c) for c in range(33, 127)]
    words = ["\u2581", "th", "the", "\u2581the", "at", "cat", "\u2581cat", "on", "\u2581on", "12", "\u2581\u2581"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *words]
    scores = [0.0] * (len(vocab) - len(words)) + [-float(i) for i in range(len(words))]
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": vocab, "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(vocab) - 259),
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0}  # fmt: skip


@pytest.mark.parametrize("case", ["gpt-2", "llama-bpe", "sentencepiece"])
def test_tokenizers_equal_transformers(case: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")  # transformers reads GGUF with it
    import transformers

    keys = sentencepiece() if case == "sentencepiece" else byte_level() | {"tokenizer.ggml.pre": case}
    config = tiny_config(vocab_size=len(keys["tokenizer.ggml.tokens"]))
    tensors = hf_tensors(config, random_params(config), tmp_path / "source")
    write(tmp_path / "m.gguf", config, tensors, keys=keys)
    hf.import_gguf(tmp_path / "m.gguf", tmp_path / "model")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    bos = [ours.bos_token_id] if case in ("llama-bpe", "sentencepiece") else []  # llama.cpp's defaults
    for text in TEXTS:
        got = ours(text).input_ids
        if case == "sentencepiece" and text.startswith(" "):  # transformers adds no space to one, llama.cpp does
            assert ours.convert_ids_to_tokens(got[1:3]) == ["\u2581", "\u2581the"]
        else:
            assert got == bos + theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(got[len(bos) :]) == text
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.chat_template == theirs.chat_template and len(ours) == config.vocab_size


def test_smollm_cuts_digits_off_first() -> None:
    """As llama.cpp defines it; transformers leaves the first digit with the space before it."""
    from tokenizers import Tokenizer

    from jsparse.hf.gguf_tokenizer import files

    made = files(byte_level() | {"tokenizer.ggml.pre": "smollm"}, "m.gguf")
    tokenizer = Tokenizer.from_str(made["tokenizer.json"])
    assert tokenizer.encode("a  1 123").tokens == ["a", "\u0120\u0120", "1", "\u0120", "1", "2", "3"]


def test_tokenizer_of_ones_own(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=len(byte_level()["tokenizer.ggml.tokens"]))
    tensors = hf_tensors(config, random_params(config), tmp_path / "source")
    write(tmp_path / "m.gguf", config, tensors, keys=byte_level() | {"tokenizer.ggml.pre": "exotic"})
    with pytest.raises(ConfigError, match=r"m.gguf: tokenizer 'gpt2' with pre-tokenizer 'exotic' is not supported"):
        hf.import_gguf(tmp_path / "m.gguf", tmp_path / "model")
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text("{}")
    hf.import_gguf(tmp_path / "m.gguf", tmp_path / "model", tokenizer=tmp_path / "tok")
    assert (tmp_path / "model/tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "model/generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 1}
