"""Matrix products with block-sparse weights, forward and backward in the time of the blocks that are there."""

from pallas_kernels.block_sparse_matmul.api import block_sparse_matmul
from pallas_kernels.block_sparse_matmul.packing import BlockSparse, pack_blocks, unpack_blocks

__all__ = ["BlockSparse", "block_sparse_matmul", "pack_blocks", "unpack_blocks"]
