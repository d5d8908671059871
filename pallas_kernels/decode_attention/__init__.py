"""Attention of one new token a row: rotates it, appends it to the key-value cache and attends to all that is there."""

from pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
