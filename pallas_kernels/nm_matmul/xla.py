"""The packed N:M products as dense ones in x's dtype: runs everywhere, saves memory between calls and no time."""

import functools

from pallas_kernels.dense import native
from pallas_kernels.nm_matmul import reference
from pallas_kernels.nm_matmul.reference import unsupported

__all__ = ["nm_ffn", "nm_matmul", "unsupported"]

nm_matmul = functools.partial(reference.nm_matmul, product=native)
nm_ffn = functools.partial(reference.nm_ffn, product=native)
