"""The block-sparse product as dense ones in x's dtype: runs everywhere, in the dense time."""

import functools

from pallas_kernels.block_sparse_matmul import reference
from pallas_kernels.block_sparse_matmul.reference import unsupported
from pallas_kernels.dense import native

__all__ = ["block_products", "matmul", "transposed_matmul", "unsupported"]

matmul = functools.partial(reference.matmul, product=native)
transposed_matmul = functools.partial(reference.transposed_matmul, product=native)
block_products = functools.partial(reference.block_products, product=native)
