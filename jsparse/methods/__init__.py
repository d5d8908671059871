"""Methods that make a model sparse: one file a paper."""

from jsparse.methods import prosparse

__all__ = ["prosparse"]
