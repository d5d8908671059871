"""LLaMA with zeros in its feed-forward activations, with routers, with packed weights, or with layers of different
widths, for `transformers` with `trust_remote_code=True`."""
# mypy: ignore-errors

import copy

import torch
from torch import nn
from transformers import Cache, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, rotate_half

from .configuration_sparsellama import JsparseConfig, SparseLlamaConfig


def keep(score, value, threshold):
    """`value` where `score` reaches the threshold, else 0. Compared in float32: the same in every dtype."""
    return torch.where(score.float() >= threshold, value, torch.zeros_like(value))


class FatRelu(nn.Module):
    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, gate):
        return keep(gate, gate, self.threshold)


class ShiftedRelu(nn.Module):
    def __init__(self, shift, threshold=0.0):
        super().__init__()
        self.shift, self.threshold = shift, threshold

    def forward(self, gate):
        shifted = torch.relu(gate - self.shift)
        return keep(shifted, shifted, self.threshold)


class Cats(nn.Module):
    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, gate):
        score = nn.functional.silu(gate)
        return keep(score.abs(), score, self.threshold)


ACTIVATIONS = {"fatrelu": FatRelu, "shifted_relu": ShiftedRelu, "cats": Cats}


class CettMLP(nn.Module):
    """A gated ReLU MLP whose neurons drop out where they contribute less than their threshold."""

    def __init__(self, mlp, width):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.threshold = nn.Parameter(torch.zeros(width, dtype=torch.float32), requires_grad=False)

    def forward(self, x):
        hidden = torch.relu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(keep(hidden.abs(), hidden, self.threshold.float()))


class RoutedMLP(nn.Module):
    """A gated MLP whose blocks of neurons each token multiplies by factors, most of them 0. Computes every block.

    mode "soft" multiplies by scores, "hard" by 1 where a score is above the threshold, "top" and "oracle" by 1 at the
    largest of the router's scores or of the activations, "softmax" by a softmax over the largest scores and their
    number, "off" by 1. The threshold is a score, or in the last four the share of blocks to drop.
    """

    def __init__(self, mlp, hidden_size, width, router):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = getattr(mlp, "act_fn", torch.relu)
        self.threshold = getattr(mlp, "threshold", None)
        self.block_size, self.mode = router["block_size"], router["mode"]
        if self.mode != "oracle":
            blocks = width // self.block_size
            self.router = nn.Linear(hidden_size, blocks, bias=False, dtype=torch.float32)
        self.router_threshold = nn.Parameter(torch.full((1,), 0.5, dtype=torch.float32), requires_grad=False)

    def forward(self, x):
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if self.threshold is not None:
            hidden = keep(hidden.abs(), hidden, self.threshold.float())
        blocks = hidden.unflatten(-1, (-1, self.block_size))
        scores = blocks.abs().float().sum(-1) if self.mode == "oracle" else self.router(x.float())
        return self.down_proj((blocks * self.factors(scores)[..., None].to(blocks.dtype)).flatten(-2))

    def factors(self, scores):
        threshold = self.router_threshold.float()
        if self.mode == "off":
            return torch.ones_like(scores)
        if self.mode == "soft":
            return scores.sigmoid()
        if self.mode == "hard":
            return (scores.sigmoid() > threshold).float()
        order = scores.argsort(dim=-1, descending=True, stable=True)
        count = scores.shape[-1] - round(threshold.item() * scores.shape[-1])
        kept = torch.zeros_like(scores).scatter(-1, order[..., :count], 1.0)
        if self.mode in ("top", "oracle"):
            return kept
        return count * scores.masked_fill(kept == 0, float("-inf")).softmax(-1)


class PackedLinear(nn.Module):
    """A linear layer that holds, of each M consecutive outputs or inputs, the N weights that are not 0 and where they
    stood. Unpacks them at each call: it saves memory, not time.

    values   [N, O / M, I] along outputs, [N, O, I / M] along inputs
    indices  uint8 [b, N, O / M, I / 8] or [b, N, O / 8, I / M]: plane p holds byte p of words of eight b-bit indices
    """

    def __init__(self, linear, packed):
        super().__init__()
        pattern, self.axis = packed.split()
        self.n, self.m = map(int, pattern.split(":"))
        self.out, self.inputs = linear.out_features, linear.in_features
        if self.axis == "output":
            rows, columns = self.out // self.m, self.inputs
            words = rows, -(-columns // 8)
        else:
            rows, columns = self.out, self.inputs // self.m
            words = -(-rows // 8), columns
        self.bits = self.m.bit_length() - 1
        values, indices = torch.zeros(self.n, rows, columns), torch.zeros(self.bits, self.n, *words, dtype=torch.uint8)
        self.values = nn.Parameter(values.to(linear.weight.dtype), requires_grad=False)
        self.indices = nn.Parameter(indices, requires_grad=False)
        self.bias = linear.bias

    def dense(self):
        planes = self.indices.long()
        word = sum(planes[p] << (8 * p) for p in range(self.bits))
        fields = torch.stack([word >> (self.bits * s) & (self.m - 1) for s in range(8)], dim=2)
        index = fields.flatten(2) if self.axis == "output" else fields.flatten(1, 2)
        _, rows, columns = self.values.shape
        groups = self.values.new_zeros(self.m, rows, columns).scatter(0, index[:, :rows, :columns], self.values)
        order = (1, 0, 2) if self.axis == "output" else (1, 2, 0)
        return groups.permute(order).reshape(self.out, self.inputs)

    def forward(self, x):
        return nn.functional.linear(x, self.dense(), self.bias)


class NarrowAttention(LlamaAttention):
    """Attention that keeps some rotary pairs of queries and keys, each at its own frequency, and some dims of values.

    The softmax's scale stays that of the whole head.
    """

    def __init__(self, config, layer_idx, shape):
        super().__init__(config, layer_idx)
        n, k, d = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        bias = config.attention_bias
        pairs = shape["rope_pairs"] or [list(range(self.head_dim // 2))] * k
        half = self.head_dim // 2
        self.dims = [[*p, *(i + half for i in p)] for p in pairs]  # of the rotary table, of each key-value head
        self.value_dim, self.query_dim = shape["value_dim"], len(self.dims[0])
        self.q_proj = nn.Linear(d, n * self.query_dim, bias=bias)
        self.k_proj = nn.Linear(d, k * self.query_dim, bias=bias)
        self.v_proj = nn.Linear(d, k * self.value_dim, bias=bias)
        self.o_proj = nn.Linear(n * self.value_dim, d, bias=bias)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        cache = next((x for x in kwargs.values() if isinstance(x, Cache)), None)  # its name differs between versions
        shape = hidden_states.shape[:-1]
        q = self.q_proj(hidden_states).view(*shape, -1, self.query_dim).transpose(1, 2)
        k = self.k_proj(hidden_states).view(*shape, -1, self.query_dim).transpose(1, 2)
        v = self.v_proj(hidden_states).view(*shape, -1, self.value_dim).transpose(1, 2)
        cos, sin = (t[:, :, self.dims].transpose(1, 2) for t in position_embeddings)  # [B, K, T, query_dim]
        groups = self.num_key_value_groups
        q = q * cos.repeat_interleave(groups, 1) + rotate_half(q) * sin.repeat_interleave(groups, 1)
        k = k * cos + rotate_half(k) * sin
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        causal = attention_mask is None and q.shape[2] > 1
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, is_causal=causal, scale=self.scaling
        )
        return self.o_proj(y.transpose(1, 2).reshape(*shape, -1)), None


class _Sparse:
    def __init__(self, config):
        name, param = config.hidden_act, config.hidden_act_param
        ours = name in ACTIVATIONS or name == "cett"
        config.hidden_act = "relu" if ours else name  # LlamaMLP is built first, with an activation it knows
        super().__init__(config)
        config.hidden_act = name
        shapes = getattr(config, "layers", None)
        if shapes and config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(f"attn_implementation: expected 'eager' or 'sdpa', got {config._attn_implementation!r}")
        for i, layer in enumerate(getattr(self, "model", self).layers):
            width = shapes[i]["intermediate_size"] if shapes else config.intermediate_size
            if shapes:
                narrow = copy.copy(config)
                narrow.intermediate_size, narrow.hidden_act = width, "relu" if ours else name
                layer.mlp = LlamaMLP(narrow)
                layer.self_attn = NarrowAttention(config, i, shapes[i])
            if name in ACTIVATIONS:
                layer.mlp.act_fn = ACTIVATIONS[name](*(param if isinstance(param, list | tuple) else [param]))
            elif name == "cett":
                layer.mlp = CettMLP(layer.mlp, width)
            for matrix, packed in (getattr(config, "packed", None) or {}).items():
                setattr(layer.mlp, matrix, PackedLinear(getattr(layer.mlp, matrix), packed))
            if getattr(config, "router", None):
                layer.mlp = RoutedMLP(layer.mlp, config.hidden_size, width, config.router)


class SparseLlamaModel(_Sparse, LlamaModel):
    config_class = SparseLlamaConfig


class SparseLlamaForCausalLM(_Sparse, LlamaForCausalLM):
    config_class = SparseLlamaConfig


class JsparseModel(SparseLlamaModel):
    config_class = JsparseConfig


class JsparseForCausalLM(SparseLlamaForCausalLM):
    config_class = JsparseConfig
