"""Measured speed: `jsparse bench`. Weights and tokens are random, never zeros; every figure is the median of several
runs after a warm-up."""
