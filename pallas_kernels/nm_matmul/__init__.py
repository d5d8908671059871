"""Packed N:M weights, and products of few tokens with them that read the packed bytes alone."""

from pallas_kernels.nm_matmul.api import nm_ffn, nm_matmul
from pallas_kernels.nm_matmul.packing import PackedNM, pack, unpack

__all__ = ["PackedNM", "nm_ffn", "nm_matmul", "pack", "unpack"]
