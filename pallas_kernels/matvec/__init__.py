"""The product of a few tokens with a whole matrix, rows of weights read once."""

from pallas_kernels.matvec.api import matvec

__all__ = ["matvec"]
