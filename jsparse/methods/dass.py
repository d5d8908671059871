"""DaSS: N:M pruning of a gated FFN that weighs gate and up by what they feed, the intermediate activation.

Guo, Kamigaito, Watanabe, "Dependency-Aware Semi-Structured Sparsity of GLU Variants in Large Language Models",
arXiv 2405.01943 (TMLR 2025). The scores are those of the authors' released code.

    h = act(x W_gate) * (x W_up)                 the intermediate activation, the input of W_down
    s_i = sum over calibration tokens of h_i^2   so sqrt(s_i) = ||h_i||_2

    score of gate[:, i], up[:, i]  =  |W[j, i]| ||h_i||^alpha,   alpha = 0.5     compared over the outputs i
    score of down[i, :]            =  |W[i, j]| ||h_i||          (Wanda's)       compared over the inputs i

    paper                           here
    W_gate, W_up, W_down            layers.ffn.gate, .up [D, F], .down [F, D]: inputs first
    h                               FFNTrace.hidden, BlockTrace.hidden
    s                               pruning.Stats.squares of "hidden", float32 [F]
    alpha                           Dass.alpha

The column i of gate, the column i of up and the row i of down depend on one another; all three are weighted by the
same h_i. What is compared decides what the scores can say. Among the outputs i of one input j (DaSS) the norm of that
input is common to all, so it is left out. Among the inputs of one output i the factor ||h_i||^alpha is common to all,
so nothing of DaSS would be left: it would be Wanda, or without the input's norm plain magnitude. That is why groups of
gate and up along the input axis are refused.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jsparse.config import ConfigError, check


@dataclass(frozen=True)
class Dass:
    """DaSS, for the FFN only. alpha = 0 is magnitude, compared over the outputs."""

    type: ClassVar[str] = "dass"
    alpha: float = 0.5  # exponent of ||h_i|| for gate and up
    alpha_down: float = 1.0  # and for down, where 1 is Wanda
    axis: Literal["output", "input"] = "output"  # along which the groups of gate and up run

    def __post_init__(self) -> None:
        for name in ("alpha", "alpha_down"):
            check(getattr(self, name) >= 0, name, "a number of at least 0", getattr(self, name))
        if self.axis != "output":
            raise ConfigError(
                f"axis: expected 'output' for DaSS's gate and up, got {self.axis!r}: along the input axis the weight "
                "of an output is common to its whole group, and DaSS would be Wanda; use wanda for such groups"
            )


def input_scores(weight: jax.Array, squares: jax.Array, alpha: float = 0.5) -> jax.Array:
    """Scores of gate or up, float32 [D, F], to compare over the last axis.

    Args:
        weight: [D, F].
        squares: s, float32 [F].
        alpha: exponent of the norm.
    """
    return jnp.abs(weight.astype(jnp.float32)) * norm_power(squares, alpha)[None, :]


def down_scores(weight: jax.Array, squares: jax.Array, alpha: float = 1.0) -> jax.Array:
    """Scores of down, float32 [F, D], to compare over the first axis; `squares` is s, float32 [F]."""
    return jnp.abs(weight.astype(jnp.float32)) * norm_power(squares, alpha)[:, None]


def norm_power(squares: jax.Array, alpha: float) -> jax.Array:
    """||.||^alpha of sums of squares, [C]. Where all are 0 (channels that no token reached) all are 1: magnitude."""
    powers = jnp.sqrt(squares) ** alpha
    return jnp.where(jnp.any(squares > 0), powers, 1.0)
