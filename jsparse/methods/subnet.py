"""What a subnet is: the parts of a dense model that it keeps, its size, and its parameters, zero-filled or compact.

    genome = whole(config)                       everything kept
    zero_filled(params, genome)                  the dense shapes, zeros where something is gone: masks may be traced
    compact(params, config, genome)              the same function from smaller matrices, and their config
    Sizes.of(config).count(genome)               parameters, by formula

Kept or gone are: whole layers; FFN neurons (column of gate and up, row of down); RoPE pairs (i, i + H/2) of queries and
keys; dims of values (and the rows of the output projection that read them). Pairs and dims are chosen for each
key-value head and hold for all query heads of its group, and every head of a layer keeps equally many. A pair keeps its
own frequency, and the softmax the scale of the whole head: so the zero-filled and the compact model compute the same.
"""

import dataclasses
import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import model
from jsparse.config import LayerShape, LlamaConfig, check
from jsparse.methods.patterns import get, replace
from jsparse.model import Params


class Genome(NamedTuple):
    """True is kept. Arrays of numpy on the host, of jax where they are traced; a leading axis makes a population."""

    layers: Any  # bool [L]
    ffn: Any  # bool [L, F]
    pairs: Any  # bool [L, K, H/2]
    values: Any  # bool [L, K, H]


def whole(config: LlamaConfig) -> Genome:
    """The genome of the dense model itself."""
    count, k, h = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    shapes = Genome((count,), (count, config.intermediate_size), (count, k, h // 2), (count, k, h))
    return Genome(*(np.ones(shape, bool) for shape in shapes))


def digest(genome: Genome) -> str:
    """A name for what a genome computes: what a layer keeps does not matter where the layer is gone."""
    layers, *parts = (np.asarray(x) for x in genome)
    parts = [x & layers.reshape(-1, *[1] * (x.ndim - 1)) for x in parts]
    return hashlib.sha256(b"".join(np.packbits(x).tobytes() for x in (layers, *parts))).hexdigest()[:24]


def to_json(genome: Genome) -> dict[str, Any]:
    """Kept indices of every layer: the first, then the distances from one to the next."""

    def steps(row: np.ndarray) -> list[int]:
        return np.diff(np.flatnonzero(row), prepend=0).tolist()

    return {
        "layers": np.flatnonzero(genome.layers).tolist(),
        "ffn": [steps(row) for row in genome.ffn],
        "rope_pairs": [[steps(row) for row in heads] for heads in genome.pairs],
        "value_dims": [[steps(row) for row in heads] for heads in genome.values],
    }


def from_json(values: dict[str, Any], config: LlamaConfig) -> Genome:
    """The inverse of `to_json`, for the dense model's config."""
    genome = jax.tree.map(np.zeros_like, whole(config))
    genome.layers[values["layers"]] = True
    for i, row in enumerate(values["ffn"]):
        genome.ffn[i, np.cumsum(row)] = True
    for name, rows in (("rope_pairs", genome.pairs), ("value_dims", genome.values)):
        for i, heads in enumerate(values[name]):
            for head, row in enumerate(heads):
                rows[i, head, np.cumsum(row)] = True
    return genome


# --------------------------------------------------------------------------------------------------------------------
# Size
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Parameters by what they belong to, of a model whose layers are of one shape."""

    ends: int  # embedding, final norm and head
    layer: int  # of a layer, whatever it keeps: norms, biases of the residual stream
    neuron: int  # of one FFN neuron
    pair: int  # of one RoPE pair of one key-value head, its query heads included
    value: int  # of one value dim of one key-value head, likewise
    layers: int  # L

    @classmethod
    def of(cls, config: LlamaConfig) -> "Sizes":
        tree = model.abstract(config)
        sizes = {f"{part}.{leaf}": x.size // config.num_hidden_layers
                 for part, leaves in tree["layers"].items() for leaf, x in leaves.items()}  # fmt: skip
        owned = {name: sum(sizes.pop(leaf, 0) for leaf in leaves) for name, leaves in LEAVES.items()}
        heads, h = config.num_key_value_heads, config.head_dim
        return cls(
            ends=model.count({name: x for name, x in tree.items() if name != "layers"}),
            layer=sum(sizes.values()),
            neuron=owned["ffn"] // config.intermediate_size,
            pair=owned["pairs"] // (heads * h // 2),
            value=owned["values"] // (heads * h),
            layers=config.num_hidden_layers,
        )

    def count(self, genome: Genome) -> int:
        """Parameters of a subnet."""
        layers, *parts = genome
        kept = [x.reshape(len(layers), -1).sum(axis=1) for x in parts]
        return self.by_layer(layers, *kept)

    def by_layer(self, layers: np.ndarray, ffn: np.ndarray, pairs: np.ndarray, values: np.ndarray) -> int:
        """Parameters of a subnet that keeps so many neurons, pairs and value dims (over all heads) of its layers."""
        each = self.layer + self.neuron * ffn + self.pair * pairs + self.value * values
        return self.ends + int(np.sum(each, where=layers))


# What of a layer's leaves a gene decides about.
LEAVES = {
    "ffn": ("ffn.gate", "ffn.up", "ffn.down", "ffn.gate_bias", "ffn.up_bias", "ffn.threshold"),
    "pairs": ("attention.query", "attention.key", "attention.query_bias", "attention.key_bias"),
    "values": ("attention.value", "attention.output", "attention.value_bias"),
}


def check_dense(config: LlamaConfig) -> None:
    """Raises ConfigError where a model's layers are not all of one shape: a subnet is taken of a dense model."""
    check(config.layers is None, "model", "a model whose layers are of one shape",
          "layers of different shapes")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Parameters
# --------------------------------------------------------------------------------------------------------------------


def zero_filled(params: Params, genome: Genome) -> Params:
    """The subnet in the shapes of the dense model, with zeros for all that is gone.

    Args:
        params: stacked.
        genome: of numpy or traced arrays.
    """
    layers = params["layers"]
    groups = layers["attention"]["query"].shape[2] // genome.pairs.shape[1]
    here = jnp.asarray(genome.layers)
    ffn = jnp.asarray(genome.ffn) & here[:, None]
    keys = jnp.concatenate([genome.pairs, genome.pairs], axis=-1) & here[:, None, None]
    values = jnp.asarray(genome.values) & here[:, None, None]
    queries, heads = (jnp.repeat(x, groups, axis=1) for x in (keys, values))
    masks = {
        "attention.query": queries[:, None], "attention.query_bias": queries,
        "attention.key": keys[:, None], "attention.key_bias": keys,
        "attention.value": values[:, None], "attention.value_bias": values,
        "attention.output": heads[..., None], "attention.output_bias": here[:, None],
        "ffn.gate": ffn[:, None], "ffn.gate_bias": ffn,
        "ffn.up": ffn[:, None], "ffn.up_bias": ffn,
        "ffn.down": ffn[..., None], "ffn.down_bias": here[:, None],
    }  # fmt: skip
    there = {name: mask for name, mask in masks.items() if name.split(".")[1] in layers[name.split(".")[0]]}
    kept = {name: jnp.where(mask, get(layers, name), 0) for name, mask in there.items()}
    return params | {"layers": replace(layers, kept)}


def compact(params: Params, config: LlamaConfig, genome: Genome) -> tuple[Params, LlamaConfig]:
    """The subnet in its own shapes: what is gone is cut out.

    Args:
        params: stacked; of the dense model, or zero-filled and repaired.
        config: the dense model's.

    Returns:
        Parameters and config: the plainest that hold the subnet, so stacked where its layers are of one shape and
        their heads whole, and else a list of layers.
    """
    check_dense(config)
    host = jax.device_get(params["layers"])
    kept = np.flatnonzero(genome.layers).tolist()
    layers, shapes = zip(*(_compact_layer(host, genome, i) for i in kept), strict=True)
    first = shapes[0]
    config = dataclasses.replace(config, num_hidden_layers=len(kept))
    if set(shapes) == {LayerShape(first.intermediate_size, config.head_dim)}:
        config = dataclasses.replace(config, intermediate_size=first.intermediate_size)
        return model.stack(params | {"layers": list(layers)}), config
    return params | {"layers": list(layers)}, dataclasses.replace(config, layers=shapes)


def _compact_layer(layers: Params, genome: Genome, i: int) -> tuple[Params, LayerShape]:
    neurons = np.flatnonzero(genome.ffn[i])
    pairs, values = (np.stack([np.flatnonzero(row) for row in x[i]]) for x in (genome.pairs, genome.values))
    half, heads = genome.pairs.shape[2], genome.pairs.shape[1]
    keys = np.concatenate([pairs, pairs + half], axis=1)

    def cut(path: Any, stack: np.ndarray) -> jax.Array:
        name, x = ".".join(key.key for key in path), stack[i]
        if name in LEAVES["ffn"]:
            x = x[neurons] if name in ("ffn.down", "ffn.threshold") else x[..., neurons]
        elif name in LEAVES["pairs"] + LEAVES["values"]:
            dims = keys if name in LEAVES["pairs"] else values
            axis = 1 if name == "attention.output" else x.ndim - 1  # of H; the heads are before it
            dims = np.repeat(dims, x.shape[axis - 1] // heads, axis=0)
            dims = dims.reshape(*[1] * (axis - 1), *dims.shape, *[1] * (x.ndim - axis - 1))
            x = np.take_along_axis(x, dims, axis)
        return jnp.asarray(x)

    shape = LayerShape(
        intermediate_size=len(neurons),
        value_dim=values.shape[1],
        rope_pairs=None if pairs.shape[1] == half else tuple(tuple(row) for row in pairs.tolist()),
    )
    return jax.tree_util.tree_map_with_path(cut, layers), shape


def widened(genome: Genome, multiple: int) -> Genome:
    """The genome whose heads are whole and whose FFN widths are multiples, for runtimes that know no others.

    Of a zero-filled model it cuts out the same function: what comes back is zeros.

    Raises:
        ConfigError: a width that goes up beyond the dense model's.
    """
    ffn = genome.ffn.copy()
    for i in np.flatnonzero(genome.layers):
        wanted = -(-int(ffn[i].sum()) // multiple) * multiple
        room = f"an FFN width that goes up to a multiple of {multiple} within the dense model's {ffn.shape[1]}"
        check(wanted <= ffn.shape[1], f"layers.{i}", room, int(ffn[i].sum()))
        gone = np.flatnonzero(~ffn[i])
        ffn[i, gone[: wanted - int(ffn[i].sum())]] = True
    return Genome(genome.layers, ffn, np.ones_like(genome.pairs), np.ones_like(genome.values))
