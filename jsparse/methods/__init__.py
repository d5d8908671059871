"""Methods that make a model sparse: one file a paper."""

from jsparse.methods import dass, patterns, prosparse, pruning, search, sparsegpt

__all__ = ["dass", "patterns", "prosparse", "pruning", "search", "sparsegpt"]
