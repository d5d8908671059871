"""The tile-sparse product as dense ones in x's dtype between masks: runs everywhere, in the dense time."""

import functools

from pallas_kernels.dense import native
from pallas_kernels.tile_sparse_matmul import reference
from pallas_kernels.tile_sparse_matmul.reference import unsupported

__all__ = ["matmul", "unsupported", "weight_gradient"]

matmul = functools.partial(reference.matmul, product=native)
weight_gradient = functools.partial(reference.weight_gradient, product=native)
