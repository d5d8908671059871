"""Our parameter tree and Hugging Face's LLaMA tensors: one table of names and axes.

Our matrices have their inputs first ([D, F]); a PyTorch `Linear` has its outputs first and knows no head axis.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jsparse import model
from jsparse.config import LlamaConfig

# fmt: off
#   ours                      Hugging Face                       axes: ours -> theirs
ENDS = {
    "embed":                 ("model.embed_tokens.weight",       "V D"),
    "norm.scale":            ("model.norm.weight",               "D"),
    "head":                  ("lm_head.weight",                  "D V -> V D"),
}
BLOCK = {
    "attention_norm.scale":  ("input_layernorm.weight",          "D"),
    "attention.query":       ("self_attn.q_proj.weight",         "D N H -> (N H) D"),
    "attention.key":         ("self_attn.k_proj.weight",         "D K H -> (K H) D"),
    "attention.value":       ("self_attn.v_proj.weight",         "D K H -> (K H) D"),
    "attention.output":      ("self_attn.o_proj.weight",         "N H D -> D (N H)"),
    "attention.query_bias":  ("self_attn.q_proj.bias",           "N H -> (N H)"),
    "attention.key_bias":    ("self_attn.k_proj.bias",           "K H -> (K H)"),
    "attention.value_bias":  ("self_attn.v_proj.bias",           "K H -> (K H)"),
    "attention.output_bias": ("self_attn.o_proj.bias",           "D"),
    "ffn_norm.scale":        ("post_attention_layernorm.weight", "D"),
    "ffn.gate":              ("mlp.gate_proj.weight",            "D F -> F D"),
    "ffn.up":                ("mlp.up_proj.weight",              "D F -> F D"),
    "ffn.down":              ("mlp.down_proj.weight",            "F D -> D F"),
    "ffn.gate_bias":         ("mlp.gate_proj.bias",              "F"),
    "ffn.up_bias":           ("mlp.up_proj.bias",                "F"),
    "ffn.down_bias":         ("mlp.down_proj.bias",              "D"),
    "ffn.threshold":         ("mlp.threshold",                   "F"),  # CETT; ours, no runtime but ours knows it
    "ffn.router":            ("mlp.router.weight",               "D E -> E D"),  # ours too
    "ffn.router_threshold":  ("mlp.router_threshold",            " -> ()"),  # a number; there a vector of one
}
# fmt: on

# Buffers that old checkpoints hold and that follow from the config.
HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Layout:
    """The axes of a tensor here and there. Brackets join axes into one, "D N H -> (N H) D"; none at all, of a number,
    into one of size 1: " -> ()"."""

    ours: tuple[str, ...]
    theirs: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, axes: str) -> "Layout":
        ours, _, theirs = axes.partition(" -> ")
        groups = re.findall(r"\(.*?\)|\S+", theirs or ours)
        return cls(tuple(ours.split()), tuple(tuple(g.strip("()").split()) for g in groups))

    def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """Their shape of a tensor of our shape."""
        sizes = dict(zip(self.ours, ours, strict=True))
        return tuple(int(np.prod([sizes[a] for a in group])) for group in self.theirs)

    def view(self, x: np.ndarray) -> np.ndarray:
        """Their view of our contiguous array; writing to it writes to the array."""
        order = [self.ours.index(a) for group in self.theirs for a in group]
        return x.transpose(order).reshape(self.shape(x.shape))

    def index(self, index: Sequence[slice], ours: Sequence[int]) -> tuple[slice, ...]:
        """Their slices for slices of a tensor of our shape. Of joined axes only the first may be cut."""
        sizes = dict(zip(self.ours, ours, strict=True))
        cuts = {a: s.indices(sizes[a])[:2] for a, s in zip(self.ours, index, strict=True)}
        slices = []
        for first, *rest in filter(None, self.theirs):
            if any(cuts[a] != (0, sizes[a]) for a in rest):
                raise ValueError(f"axes {rest} cannot be sharded: Hugging Face joins them with {first}")
            inner = int(np.prod([sizes[a] for a in rest]))
            slices.append(slice(cuts[first][0] * inner, cuts[first][1] * inner))
        return tuple(slices) or (slice(0, 1),)


@dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree: a tensor of Hugging Face, or L of them where it is stacked."""

    path: tuple[Any, ...]  # names; after "layers" a number, where the layers are a list
    names: tuple[str, ...]  # Hugging Face's; one a layer
    layout: Layout  # of one of them
    shape: tuple[int, ...]  # ours, of one of them

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers" and not isinstance(self.path[1], int)


def leaves(config: LlamaConfig) -> list[Leaf]:
    """Every leaf that a model of this config has, in the order of `jax.tree.leaves`."""
    found = []
    for keys, x in jax.tree_util.tree_leaves_with_path(model.abstract(config)):
        path = tuple(key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key for key in keys)
        if path[0] == "layers" and config.layers is not None:
            name, axes = BLOCK[".".join(path[2:])]
            found.append(Leaf(path, (f"model.layers.{path[1]}.{name}",), Layout.parse(axes), x.shape))
        elif path[0] == "layers":
            name, axes = BLOCK[".".join(path[1:])]
            names = tuple(f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers))
            found.append(Leaf(path, names, Layout.parse(axes), x.shape[1:]))
        else:
            name, axes = ENDS[".".join(path)]
            found.append(Leaf(path, (name,), Layout.parse(axes), x.shape))
    return found


def in_order(tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors under Hugging Face's names, embedding first and head last."""

    def depth(name: str) -> float:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        return int(layer[1]) if layer else -1 if name.startswith("model.embed_tokens.") else float("inf")

    return {name: tensors[name] for name in sorted(tensors, key=depth)}


def tree(values: dict[tuple[Any, ...], Any]) -> Any:
    """The nested dict of values by path; numbers make a list."""
    root: dict[Any, Any] = {}
    for (*parents, last), value in values.items():
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    layers = root["layers"]
    return root | {"layers": [layers[i] for i in range(len(layers))]} if 0 in layers else root
