"""LLaMA with zeros in its feed-forward activations, with routers, with packed weights, or with layers of different
widths: the config, for `transformers` with `trust_remote_code=True`.

hidden_act is any of transformers' own, or
    "fatrelu"       g where g >= hidden_act_param, else 0
    "shifted_relu"  max(g - hidden_act_param, 0); of [shift, threshold], also 0 below the threshold
    "cats"          silu(g) where |silu(g)| >= hidden_act_param, else 0
    "cett"          ReLU; neuron i drops out where |relu(g_i) u_i| < threshold_i, a tensor of each layer

router, of a model that uses some blocks of each MLP's neurons for each token, holds
    block_size          neurons of a block, side by side
    mode                how blocks are chosen: "hard", "soft", "top", "oracle", "softmax" or "off"

layers, of a searched subnet, holds for each layer
    intermediate_size   the width of its MLP
    value_dim           the width of a head's values
    rope_pairs          of each key-value head, which rotary pairs its keys and its group's queries keep; null: all

packed holds for gate_proj, up_proj and down_proj, where they are packed, the pattern and the axis of its groups:
"2:4 output" keeps 2 of each 4 consecutive outputs of an input.
"""

from transformers import LlamaConfig


class SparseLlamaConfig(LlamaConfig):
    model_type = "sparsellama"

    hidden_act_param: float | list[float] | None = None


class JsparseConfig(SparseLlamaConfig):
    model_type = "jsparse"

    router: dict | None = None
    layers: list[dict] | None = None
    packed: dict[str, str] | None = None

    def validate_architecture(self):
        """Heads need not divide the hidden size: head_dim is explicit."""
