"""LLaMA whose feed-forward activation makes zeros, for `transformers` with `trust_remote_code=True`."""
# mypy: ignore-errors

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

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


class _Sparse:
    def __init__(self, config):
        name, param = config.hidden_act, config.hidden_act_param
        ours = name in ACTIVATIONS or name == "cett"
        config.hidden_act = "relu" if ours else name  # LlamaMLP is built first, with an activation it knows
        super().__init__(config)
        config.hidden_act = name
        for layer in getattr(self, "model", self).layers:
            if name in ACTIVATIONS:
                layer.mlp.act_fn = ACTIVATIONS[name](*(param if isinstance(param, list | tuple) else [param]))
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
