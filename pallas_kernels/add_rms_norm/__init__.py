"""Adds to the residual stream and normalises it, and scores a router on the result, in one launch."""

from pallas_kernels.add_rms_norm.api import add_norm_route, add_rms_norm

__all__ = ["add_norm_route", "add_rms_norm"]
