"""What several tests share: a small model's config, and the way to PyTorch's `LlamaForCausalLM` and back."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsparse import model
from jsparse.config import Gelu, LlamaConfig, Relu, Silu, to_dict

_TINY = LlamaConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)

_HIDDEN_ACT = {Silu(): "silu", Relu(): "relu", Gelu(): "gelu", Gelu(approximate=True): "gelu_pytorch_tanh"}

# Ours (a path in the tree of one layer): theirs.
_LAYER = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention.query": "self_attn.q_proj.weight",
    "attention.query_bias": "self_attn.q_proj.bias",
    "attention.key": "self_attn.k_proj.weight",
    "attention.key_bias": "self_attn.k_proj.bias",
    "attention.value": "self_attn.v_proj.weight",
    "attention.value_bias": "self_attn.v_proj.bias",
    "attention.output": "self_attn.o_proj.weight",
    "attention.output_bias": "self_attn.o_proj.bias",
    "ffn_norm.scale": "post_attention_layernorm.weight",
    "ffn.gate": "mlp.gate_proj.weight",
    "ffn.gate_bias": "mlp.gate_proj.bias",
    "ffn.up": "mlp.up_proj.weight",
    "ffn.up_bias": "mlp.up_proj.bias",
    "ffn.down": "mlp.down_proj.weight",
    "ffn.down_bias": "mlp.down_proj.bias",
}


def tiny_config(**changes: Any) -> LlamaConfig:
    """A grouped-query model of two layers that compiles in a second, with `changes`."""
    return dataclasses.replace(_TINY, **changes)


def tokens(config: LlamaConfig, batch: int, length: int, seed: int = 0) -> jax.Array:
    """Random tokens, int32 [B, T]."""
    return jnp.asarray(np.random.default_rng(seed).integers(config.vocab_size, size=(batch, length)), jnp.int32)


def random_params(config: LlamaConfig, seed: int = 0) -> model.Params:
    """Parameters without the cost of compiling `model.init`, and harder on the model: norms and biases are random too,
    and matrices large enough that attention is far from uniform."""
    rng = np.random.default_rng(seed)

    def one(path: Any, x: Any) -> jax.Array:
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.2 * rng.standard_normal(x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, model.abstract(config))


def torch_model(config: LlamaConfig, seed: int = 0) -> Any:
    """The same model in PyTorch, float32, eager attention. Every parameter is random, biases and norms too, and large
    enough that attention is far from uniform. Skips the test where torch is not installed."""
    torch = pytest.importorskip("torch")
    import transformers

    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    rope = {k: v for k, v in to_dict(fields.pop("rope")).items() if v is not None}
    rope = {"rope_type": rope.pop("type"), "rope_theta": rope.pop("theta")} | rope
    act = _HIDDEN_ACT[fields.pop("activation")]
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**fields, rope_parameters=rope, hidden_act=act, attn_implementation="eager")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return reference.eval()


def from_torch(tensors: dict[str, Any], config: LlamaConfig) -> model.Params:
    """Our tree, float32 and stacked, of a `LlamaForCausalLM`'s named tensors: its state dict or its gradients."""
    d, h = config.hidden_size, config.head_dim

    def ours(path: str, name: str) -> np.ndarray:
        x = tensors[name].detach().float().numpy()
        if path in ("attention.query", "attention.key", "attention.value"):
            return x.T.reshape(d, -1, h)
        if path == "attention.output":
            return x.T.reshape(-1, h, d)
        if path in ("attention.query_bias", "attention.key_bias", "attention.value_bias"):
            return x.reshape(-1, h)
        return x.T  # [out, in] -> [in, out]; a vector is its own transpose

    layers: dict[str, Any] = {}
    for path, name in _LAYER.items():
        names = [f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers)]
        if names[0] in tensors:
            part, leaf = path.split(".")
            layers.setdefault(part, {})[leaf] = jnp.asarray(np.stack([ours(path, n) for n in names]))
    tree = {
        "embed": jnp.asarray(tensors["model.embed_tokens.weight"].detach().float().numpy()),
        "norm": {"scale": jnp.asarray(tensors["model.norm.weight"].detach().float().numpy())},
        "layers": layers,
    }
    if not config.tie_word_embeddings:
        tree["head"] = jnp.asarray(ours("head", "lm_head.weight"))
    return tree


def torch_gradients(reference: Any, config: LlamaConfig) -> model.Params:
    """Our tree of the gradients that `backward` left in the model."""
    return from_torch({name: p.grad for name, p in reference.named_parameters()}, config)


def assert_trees_close(got: Any, expected: Any, rtol: float) -> None:
    """Every leaf of `got` within `rtol` of `expected`, relative to the leaf's largest magnitude."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, f"{name}: {a.shape}, expected {b.shape}"
        error, scale = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
        assert error <= rtol * scale, f"{name}: off by {error:.2e} where the largest is {scale:.2e}"


def save_byte_tokenizer(folder: Path) -> None:
    """Byte level without merges, the alphabet in the order of the bytes: token id = byte, then end (256), pad (257)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's map of bytes to visible characters
    others = iter(range(256, 512))
    alphabet = [chr(b if b in printable else next(others)) for b in range(256)]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|other|>")
    assert fast.convert_tokens_to_ids(["<|end|>", "<|other|>"]) == [256, 257]
    fast.save_pretrained(folder)
