"""The block-sparse FFN as dense products in x's dtype, and a mask: runs everywhere, saves nothing."""

import functools

from pallas_kernels.block_sparse_ffn import reference
from pallas_kernels.block_sparse_ffn.reference import unsupported
from pallas_kernels.dense import native

__all__ = ["block_sparse_ffn", "unsupported"]

block_sparse_ffn = functools.partial(reference.block_sparse_ffn, product=native)
