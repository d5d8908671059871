"""Predictors on trial: what those of a recall read and cost in perplexity, and which of several to keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from jsparse.config import LlamaConfig
from jsparse.inference.decoder import pack
from jsparse.inference.perplexity import predicted_perplexity
from jsparse.methods.predictor import Candidates, Curve, Pick, assemble, choose
from jsparse.model import Params


@dataclass(frozen=True)
class Trial:
    """The predictors chosen at one recall; the figures are means over layers, as their curves have them."""

    wanted: float  # recall asked for, of every layer
    recall: float
    precision: float
    sparsity: float  # predicted
    share: float  # of the bytes of the FFNs, what a token reads
    perplexity: float  # with the predictors on
    layers: tuple[Pick, ...]


def try_recall(
    made: Candidates,
    measured: Mapping[int, Curve],
    params: Params,
    config: LlamaConfig,
    tokens: ArrayLike,
    recall: float,
    *,
    seq_len: int,
) -> Trial:
    """Chooses predictors at a recall and measures the perplexity with them on a text of token ids, in windows of
    `seq_len`.

    Args:
        made: of `jsparse.methods.predictor.train`.
        measured: their `curves`.
    """
    picks = choose(measured, config, recall)
    recalls, precision, sparsity, share = (
        float(np.mean([getattr(pick, name) for pick in picks])) for name in ("recall", "precision", "sparsity", "share")
    )
    packed = pack(params, config, assemble(made, picks))
    perplexity = predicted_perplexity(packed, config, tokens, seq_len=seq_len)
    return Trial(recall, recalls, precision, sparsity, share, perplexity, tuple(picks))


def keep(trials: Sequence[Trial], exact: float, rise: float) -> tuple[Trial, bool]:
    """The trial that reads least of those whose perplexity is at most (1 + rise) `exact`, and True; where there is
    none the one of the least perplexity, and False."""
    within = [trial for trial in trials if trial.perplexity <= exact * (1 + rise)]
    if within:
        return min(within, key=lambda trial: trial.share), True
    return min(trials, key=lambda trial: trial.perplexity), False
