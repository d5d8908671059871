"""LLaMA whose feed-forward activation makes zeros: the config, for `transformers` with `trust_remote_code=True`.

hidden_act is any of transformers' own, or
    "fatrelu"       g where g >= hidden_act_param, else 0
    "shifted_relu"  max(g - hidden_act_param, 0); of [shift, threshold], also 0 below the threshold
    "cats"          silu(g) where |silu(g)| >= hidden_act_param, else 0
    "cett"          ReLU; neuron i drops out where |relu(g_i) u_i| < threshold_i, a tensor of each layer
"""

from transformers import LlamaConfig


class SparseLlamaConfig(LlamaConfig):
    model_type = "sparsellama"

    hidden_act_param: float | list[float] | None = None


class JsparseConfig(SparseLlamaConfig):
    model_type = "jsparse"

    def validate_architecture(self):
        """Heads need not divide the hidden size: head_dim is explicit."""
