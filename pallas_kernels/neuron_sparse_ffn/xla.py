"""The neuron-sparse FFN as dense products in x's dtype, and a mask: runs everywhere, saves nothing."""

import functools

from pallas_kernels.dense import native
from pallas_kernels.neuron_sparse_ffn import reference
from pallas_kernels.neuron_sparse_ffn.reference import unsupported

__all__ = ["neuron_sparse_ffn", "unsupported"]

neuron_sparse_ffn = functools.partial(reference.neuron_sparse_ffn, product=native)
