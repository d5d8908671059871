"""The public function of the neuron-sparse FFN: checks and choice of backend."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.backend import Implementation
from pallas_kernels.ffn import Activation, Body, PackedFFN, check_ffn, sparse_ffn
from pallas_kernels.neuron_sparse_ffn import xla
from pallas_kernels.neuron_sparse_ffn.reference import Predictor


def neuron_sparse_ffn(
    x: jax.Array,
    weights: PackedFFN,
    predictor: Predictor | None = None,
    *,
    activation: Activation,
    cutoff: jax.Array | None = None,
    residual: jax.Array | None = None,
    implementation: Implementation | None = None,
    deterministic: bool = False,
    interpret: Any = False,
) -> jax.Array:
    """A gated FFN that computes only the neurons that do something.

        y = sum over the active neurons f of act(x . gate[f]) (x . up[f]) down[f]

    Without a predictor the result is exact: the gate is computed whole, and rows of up and down are read where the
    activation is not zero for some token. With one, the rows of all three matrices are read where it says so for some
    token, and neurons that it misses count as zero. Sums are float32.

    The derivative is with respect to x, the weights and the residual, through dense products; which neurons count has
    none, so the predictor's arrays and the cutoff get zeros.

    Args:
        x: [B, D] float32, bfloat16 or float16, 1 <= B <= 16 where a Pallas backend is to run it.
        weights: of x's dtype, [F, D] each.
        predictor: see `Predictor`.
        cutoff: float32 [F]; a product of activation and up that is smaller in magnitude counts as zero (CETT), and its
            row of down is not read.
        residual: float32 [B, D] to which the result is added.
        implementation: a backend's name, which fails where it cannot run; None takes the best that can.
        deterministic: the same bits at every run. Kernels that add with atomics store partial sums instead.
        interpret: runs a Pallas backend on the CPU; True, or the backend's own interpreter parameters.
    Returns:
        [B, D]: float32 with a residual, otherwise of x's dtype.
    Raises:
        ValueError: arguments that do not fit each other, or that the named backend does not take.
    """
    check_ffn(x, weights, residual)
    neurons, d = weights.gate.shape
    if predictor is not None:
        rank = predictor.down.shape[0]
        expected = {"down": (rank, d), "up": (neurons, rank), "threshold": (neurons,)}
        for (name, shape), array in zip(expected.items(), predictor, strict=True):
            if array.shape != shape:
                raise ValueError(f"predictor.{name}: expected shape {shape}, got {array.shape}")
        dtypes = (x.dtype,) if x.dtype == jnp.float16 else (x.dtype, jnp.dtype(jnp.int8))  # of 127s, float16 overflows
        if predictor.down.dtype not in dtypes or predictor.up.dtype != predictor.down.dtype:
            raise ValueError(f"predictor: expected down and up of {' or '.join(map(str, dtypes))}, "
                             f"got {predictor.down.dtype} and {predictor.up.dtype}")  # fmt: skip
        if predictor.threshold.dtype != jnp.float32:
            raise ValueError(f"predictor.threshold: expected float32, got {predictor.threshold.dtype}")
    if cutoff is not None and (cutoff.shape != (neurons,) or cutoff.dtype != jnp.float32):
        raise ValueError(f"cutoff: expected float32 {(neurons,)}, got {cutoff.dtype} {cutoff.shape}")

    operands = backend.vary_together((x, weights, (predictor, cutoff), residual))
    module = backend.choose(__package__, implementation, x, weights, predictor, cutoff)
    settings = {"activation": activation, "deterministic": deterministic, "interpret": interpret}
    y = sparse_ffn(Body(module.neuron_sparse_ffn, xla.neuron_sparse_ffn, tuple(settings.items())), *operands)
    return y if residual is not None else y.astype(x.dtype)
