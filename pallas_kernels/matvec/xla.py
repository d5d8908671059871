"""The product of few tokens with a matrix by XLA, which tunes it for the device while compiling."""

import functools

from pallas_kernels.dense import native
from pallas_kernels.matvec import reference
from pallas_kernels.matvec.reference import unsupported

__all__ = ["matvec", "unsupported"]

matvec = functools.partial(reference.matvec, product=native)
