"""How much each neuron, RoPE pair and value dim of a dense model matters: scores from one pass over calibration text.

    survey = importance(params, config, tokens, (Obs(), Magnitude()))

All matrices are seen as W [I, O], inputs first. X [I, tokens] is what W reads, H = X X^T its Gram matrix, float32.

    kind          score of one weight                             of a neuron, pair or dim
    Obs           W_ij^2 / [(H + damping)^-1]_ii                  rows and columns that live or die together, summed
    Magnitude     W_ij^2                                          likewise
    Fluctuation   variance of X_i over tokens * sum_j W_ij^2      of down's and output's inputs; pairs by magnitude
    RandomScore   none                                            uniform noise

The sums of Obs and Magnitude, by what is coupled ("Search for Efficient Large Language Models", Eqs. 1 to 3):

    neuron   columns of gate and up, row of down
    pair     columns of query and key, both dims of the pair, all query heads of the key-value head's group
    dim      columns of value, rows of output, all query heads of the group

Of pairs a sum misses what they are for: one whose queries are strong and whose keys are weak adds little to attention's
scores. Obs therefore takes, unless told otherwise, the energy that a pair has in them, which RoPE does not change:

    pair     sqrt(mean ||q||^2 mean ||k||^2), q and k the pair's two dims, queries summed over the group

Fluctuation is the metric of FLAP (An et al., arXiv 2312.11983). The pass also measures the influence of whole layers
as ShortGPT does (Men et al., arXiv 2403.03853): 1 - cos(what enters a layer, what leaves it), averaged over tokens.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jsparse import model
from jsparse.config import LlamaConfig, check
from jsparse.methods.patterns import matrix, pick
from jsparse.methods.pruning import embed
from jsparse.methods.sparsegpt import exact_dot
from jsparse.methods.subnet import check_dense
from jsparse.model import Params


@dataclass(frozen=True)
class Obs:
    """The second-order score of the paper."""

    type: ClassVar[str] = "obs"
    damp: float = 0.01  # added to the Gram matrix's diagonal, as a share of its mean
    # raw: terms of coupled matrices summed as they are; normalised: each divided by its own sum first; output: the
    # term of down and of output alone, the ones that know the module's output error
    terms: Literal["raw", "normalised", "output"] = "raw"
    pairs: Literal["logits", "weights"] = "logits"  # logits: energy in attention's scores; weights: Eq. 2's terms

    def __post_init__(self) -> None:
        check(self.damp > 0, "damp", "a positive number", self.damp)


@dataclass(frozen=True)
class Magnitude:
    type: ClassVar[str] = "magnitude"


@dataclass(frozen=True)
class Fluctuation:
    type: ClassVar[str] = "fluctuation"


@dataclass(frozen=True)
class RandomScore:
    type: ClassVar[str] = "random"
    seed: int = 0


Score = Obs | Magnitude | Fluctuation | RandomScore


class Importance(NamedTuple):
    """Scores of one kind, larger is kept; float32 on the host."""

    ffn: Any  # [L, F]
    pairs: Any  # [L, K, H/2]
    values: Any  # [L, K, H]


class Survey(NamedTuple):
    """What one pass over the calibration text found."""

    scores: tuple[Importance, ...]  # one of each kind asked for
    influence: np.ndarray  # float32 [L], of whole layers


# --------------------------------------------------------------------------------------------------------------------
# Statistics, streamed block by block
# --------------------------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Of what a matrix reads, C channels, summed over tokens; float32."""

    gram: jax.Array  # [C, C], X X^T
    total: jax.Array  # [C]
    tokens: jax.Array  # []

    @property
    def variance(self) -> jax.Array:
        return jnp.maximum(jnp.diag(self.gram) / self.tokens - (self.total / self.tokens) ** 2, 0.0)


def moments(x: jax.Array, counted: jax.Array) -> Moments:
    """Of x [B, T, C...], trailing axes joined, over the sequences counted, bool [B]."""
    x = x.reshape(*x.shape[:2], -1)
    length = x.shape[1]
    x = jnp.where(counted[:, None, None], x, 0).reshape(-1, x.shape[-1])
    if x.dtype == jnp.float32:
        gram = exact_dot(x.T, x)
    else:  # products of bfloat16 are exact in float32, on the units that are fast at them
        gram = jnp.einsum("ti,tj->ij", x, x, preferred_element_type=jnp.float32)
    tokens = jnp.sum(counted, dtype=jnp.float32) * length
    return Moments(gram, jnp.sum(x, axis=0, dtype=jnp.float32), tokens)


class BlockStats(NamedTuple):
    """Of one block of the dense model."""

    attention: Moments  # of what query, key and value read
    heads: Moments  # output
    ffn: Moments  # gate and up
    hidden: Moments  # down
    similarity: jax.Array  # float32 [], sum over tokens of cos(x, block(x))


# Of programs with exact products, which are to be cuBLAS calls: of Triton kernels XLA compiles and times many variants,
# a minute before the first result.
COMPILER = {"xla_gpu_enable_triton_gemm": False}


@functools.partial(jax.jit, static_argnames="config", compiler_options=COMPILER)
def block_stats(layer: Params, x: jax.Array, counted: jax.Array, config: LlamaConfig) -> tuple[jax.Array, BlockStats]:
    """One block on a batch x [B, T, D] of which the rows in `counted` (bool [B]) count: its output, and statistics."""
    y, trace = model.run_block(layer, x, config)
    a, b = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-20)
    similarity = jnp.sum(jnp.where(counted[:, None], cosine, 0.0))
    attention, heads, ffn, hidden = (moments(part, counted) for part in trace)
    return y, BlockStats(attention, heads, ffn, hidden, similarity)


def dense_blocks(
    params: Params, config: LlamaConfig, tokens: ArrayLike, batch_size: int = 8
) -> Iterator[tuple[int, Params, BlockStats]]:
    """Number, parameters and statistics of each block in turn, as the dense model runs over calibration tokens.

    Holds the residual stream of all tokens and the statistics of one block.

    Args:
        params: stacked.
        tokens: int [sequences, T].
        batch_size: sequences a forward pass.
    """
    check_dense(config)
    stream = embed(params["embed"], config, tokens, batch_size)
    for i in range(config.num_hidden_layers):
        layer, total = pick(params["layers"], i), None
        for k, (x, counted) in enumerate(stream):
            y, found = block_stats(layer, x, counted, config)
            stream[k] = y, counted
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        assert total is not None  # there is always a batch
        yield i, layer, total


# --------------------------------------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------------------------------------


def importance(
    params: Params, config: LlamaConfig, tokens: ArrayLike, kinds: Sequence[Score] = (Obs(),), *, batch_size: int = 8
) -> Survey:
    """Scores of several kinds from one pass over calibration tokens, int [sequences, T].

    Raises:
        ConfigError: tokens that do not fit the model, or a model that is a subnet already.
        ValueError: scores that are not finite; names the layer.
    """
    rows: list[list[Importance]] = [[] for _ in kinds]
    influence = []
    for i, layer, stats in dense_blocks(params, config, tokens, batch_size):
        for kind, row in zip(kinds, rows, strict=True):
            found = jax.device_get(score_block(layer, stats, kind, i))
            if not all(np.all(np.isfinite(x)) for x in found):
                raise ValueError(f"layers.{i}: {kind.type} scores are not finite: check the weights, or more damping")
            row.append(found)
        influence.append(1 - float(stats.similarity) / float(stats.heads.tokens))
    scores = tuple(Importance(*(np.stack(part) for part in zip(*row, strict=True))) for row in rows)
    return Survey(scores, np.array(influence, np.float32))


@functools.partial(jax.jit, static_argnames="kind", compiler_options=COMPILER)
def score_block(layer: Params, stats: BlockStats, kind: Score, index: Any) -> Importance:
    """Scores of one block; `index` is its number, which random scores depend on."""
    attention, ffn = layer["attention"], layer["ffn"]
    k, h = attention["key"].shape[1:]
    if isinstance(kind, RandomScore):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(kind.seed), index), 3)
        shapes = (ffn["down"].shape[0],), (k, h // 2), (k, h)
        return Importance(*(jax.random.uniform(key, shape) for key, shape in zip(keys, shapes, strict=True)))

    def divisor(read: Moments) -> jax.Array:
        return _inverse_diagonal(read.gram, kind.damp) if isinstance(kind, Obs) else jnp.ones_like(read.total)

    def saliency(name: str, divisor: jax.Array) -> jax.Array:
        """float32 [I, O] of one matrix."""
        part, leaf = name.split(".")
        return matrix(layer[part][leaf], name).astype(jnp.float32) ** 2 / divisor[:, None]

    def by_group(x: jax.Array) -> jax.Array:
        """Sum over the query heads of each group, [K, H] of [heads * H]."""
        return jnp.sum(x.reshape(k, -1, h), axis=1)

    def by_pair(x: jax.Array) -> jax.Array:
        """Sum over both dims of each RoPE pair, [K, H/2] of [K, H]."""
        return x[:, : h // 2] + x[:, h // 2 :]

    before_attention, before_ffn = divisor(stats.attention), divisor(stats.ffn)
    query, key, value = (by_group(jnp.sum(saliency(f"attention.{name}", before_attention), axis=0))
                         for name in ("query", "key", "value"))  # fmt: skip
    gate, up = (jnp.sum(saliency(f"ffn.{name}", before_ffn), axis=0) for name in ("gate", "up"))
    output = jnp.sum(saliency("attention.output", divisor(stats.heads)), axis=1)
    down = jnp.sum(saliency("ffn.down", divisor(stats.hidden)), axis=1)
    if isinstance(kind, Fluctuation):
        output, down = output * stats.heads.variance, down * stats.hidden.variance
    output = by_group(output)
    if isinstance(kind, Obs) and kind.terms == "normalised":
        query, key, value, output = (x / jnp.sum(x) for x in (query, key, value, output))
        gate, up, down = (x / jnp.sum(x) for x in (gate, up, down))
    pairs = by_pair(query + key)
    if isinstance(kind, Obs) and kind.pairs == "logits":
        query, key = (by_pair(by_group(_energies(attention, name, stats.attention))) for name in ("query", "key"))
        pairs = jnp.sqrt(query * key)
    if isinstance(kind, Fluctuation) or (isinstance(kind, Obs) and kind.terms == "output"):
        return Importance(down, pairs, output)
    return Importance(gate + up + down, pairs, value + output)


def _energies(attention: Params, name: str, read: Moments) -> jax.Array:
    """Mean squares over tokens of what query or key puts out, float32 [heads * H]."""
    weight = matrix(attention[name], f"attention.{name}").astype(jnp.float32)
    squares = jnp.sum(weight * exact_dot(read.gram, weight), axis=0) / read.tokens
    if (bias := attention.get(f"{name}_bias")) is None:
        return squares
    bias = bias.astype(jnp.float32).reshape(-1)
    return squares + 2 * bias * exact_dot(read.total, weight) / read.tokens + bias**2


def _inverse_diagonal(gram: jax.Array, damp: float) -> jax.Array:
    """diag((H + damping)^-1), float32 [C]: twice its inverse is the energy of a channel that the others do not explain.

    With H = L L^T it is the sum of squares of the columns of L^-1.
    """
    eye = jnp.eye(len(gram))
    factor = jnp.linalg.cholesky(gram + damp * jnp.mean(jnp.diag(gram)) * eye)
    return jnp.sum(jax.scipy.linalg.solve_triangular(factor, eye, lower=True) ** 2, axis=0)


def keep_top(scores: np.ndarray, count: int) -> np.ndarray:
    """bool like scores [..., n]: the `count` largest of each row; among equals the first."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    kept = np.zeros(scores.shape, bool)
    np.put_along_axis(kept, order[..., :count], True, axis=-1)
    return kept
