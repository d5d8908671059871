"""Methods that make a model sparse: one file a paper."""

from jsparse.methods import dass, grouping, lte, patterns, prosparse, pruning, search, sparsegpt

__all__ = ["dass", "grouping", "lte", "patterns", "prosparse", "pruning", "search", "sparsegpt"]
