"""Block-sparse gated FFN: a router or a mask chooses blocks of neurons, token by token."""

from pallas_kernels.block_sparse_ffn.api import block_sparse_ffn

__all__ = ["block_sparse_ffn"]
