"""The residual addition with RMSNorm by XLA, which runs it everywhere: the reference itself, two or three kernels."""

from pallas_kernels.add_rms_norm.reference import add_norm_route, add_rms_norm, unsupported

__all__ = ["add_norm_route", "add_rms_norm", "unsupported"]
