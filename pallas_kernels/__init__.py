"""Sparse operations for JAX: each computes only what a mask, a router or a zero activation leaves.

Every operation has a folder: `api.py` the public function, `reference.py` what it computes in plain jax.numpy, and one
file a backend. Nothing here knows of jsparse.
"""

from pallas_kernels.block_sparse_ffn import block_sparse_ffn
from pallas_kernels.block_sparse_matmul import BlockSparse, block_sparse_matmul, pack_blocks, unpack_blocks
from pallas_kernels.ffn import Activation, PackedFFN, pack_ffn
from pallas_kernels.neuron_sparse_ffn import Predictor, neuron_sparse_ffn
from pallas_kernels.nm_matmul import PackedNM, nm_ffn, nm_matmul, pack, unpack
from pallas_kernels.tile_sparse_matmul import tile_sparse_matmul

__all__ = [
    "Activation",
    "BlockSparse",
    "PackedFFN",
    "PackedNM",
    "Predictor",
    "block_sparse_ffn",
    "block_sparse_matmul",
    "neuron_sparse_ffn",
    "nm_ffn",
    "nm_matmul",
    "pack",
    "pack_blocks",
    "pack_ffn",
    "tile_sparse_matmul",
    "unpack",
    "unpack_blocks",
]
