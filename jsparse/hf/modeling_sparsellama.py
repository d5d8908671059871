"""LLaMA whose feed-forward activation makes zeros, for `transformers` with `trust_remote_code=True`."""
# mypy: ignore-errors

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_sparsellama import JsparseConfig, SparseLlamaConfig


class FatRelu(nn.Module):
    """Keeps values of at least `threshold`; compares in float32, so that the threshold is the same in every dtype."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, gate):
        return torch.where(gate.float() >= self.threshold, gate, torch.zeros_like(gate))


class ShiftedRelu(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, gate):
        return torch.relu(gate - self.shift)


class CettMLP(nn.Module):
    """A gated ReLU MLP whose neurons drop out where they contribute less than their threshold."""

    def __init__(self, mlp, width):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.threshold = nn.Parameter(torch.zeros(width, dtype=torch.float32), requires_grad=False)

    def forward(self, x):
        hidden = torch.relu(self.gate_proj(x)) * self.up_proj(x)
        kept = hidden.float().abs() >= self.threshold.float()
        return self.down_proj(torch.where(kept, hidden, torch.zeros_like(hidden)))


class _Sparse:
    def __init__(self, config):
        name = config.hidden_act
        known = name not in ("fatrelu", "shifted_relu", "cett")
        config.hidden_act = name if known else "relu"  # LlamaMLP is built first, with an activation it knows
        super().__init__(config)
        config.hidden_act = name
        for layer in getattr(self, "model", self).layers:
            if name == "fatrelu":
                layer.mlp.act_fn = FatRelu(config.hidden_act_param)
            elif name == "shifted_relu":
                layer.mlp.act_fn = ShiftedRelu(config.hidden_act_param)
            elif name == "cett":
                layer.mlp = CettMLP(layer.mlp, config.intermediate_size)


class SparseLlamaModel(_Sparse, LlamaModel):
    config_class = SparseLlamaConfig


class SparseLlamaForCausalLM(_Sparse, LlamaForCausalLM):
    config_class = SparseLlamaConfig


class JsparseModel(SparseLlamaModel):
    config_class = JsparseConfig


class JsparseForCausalLM(SparseLlamaForCausalLM):
    config_class = JsparseConfig
