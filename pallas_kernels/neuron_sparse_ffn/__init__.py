"""Neuron-sparse gated FFN: only the neurons whose gate is not zero, or that a predictor names, are computed."""

from pallas_kernels.neuron_sparse_ffn.api import Predictor, neuron_sparse_ffn

__all__ = ["Predictor", "neuron_sparse_ffn"]
