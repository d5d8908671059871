"""What reads a model: generated text, perplexity with sparsity, and comparisons of two models."""

from jsparse.inference.compare import Comparison, compare, compare_torch
from jsparse.inference.decoder import Decoder, pack
from jsparse.inference.generate import Generation, Sampling, generate
from jsparse.inference.perplexity import Evaluation, evaluate

__all__ = [
    "Comparison",
    "Decoder",
    "Evaluation",
    "Generation",
    "Sampling",
    "compare",
    "compare_torch",
    "evaluate",
    "generate",
    "pack",
]
