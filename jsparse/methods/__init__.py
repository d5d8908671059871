"""Methods that make a model sparse: one file a paper, and beside them what several share.

dass, sparsegpt, pruning (Wanda, RIA, magnitude)      weights to zero, by patterns; packing stores them
lte, grouping                                         routers over blocks of neurons
prosparse, predictor                                  zeros in activations, and which neurons will not be zero
search: importance, space, evolution, supernet, repair, subnet
"""

from jsparse.methods import (
    dass,
    evolution,
    grouping,
    importance,
    lte,
    packing,
    patterns,
    predictor,
    prosparse,
    pruning,
    repair,
    search,
    space,
    sparsegpt,
    subnet,
    supernet,
)

__all__ = [
    "dass",
    "evolution",
    "grouping",
    "importance",
    "lte",
    "packing",
    "patterns",
    "predictor",
    "prosparse",
    "pruning",
    "repair",
    "search",
    "space",
    "sparsegpt",
    "subnet",
    "supernet",
]
