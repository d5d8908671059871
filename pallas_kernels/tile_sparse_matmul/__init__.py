"""Matrix products in which every tile of tokens has its own blocks of outputs or of inputs."""

from pallas_kernels.tile_sparse_matmul.api import tile_sparse_matmul

__all__ = ["tile_sparse_matmul"]
