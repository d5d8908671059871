"""SparseGPT: prunes inputs one after another and lets the later ones make up for what is lost.

Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774.

    H = 2 X X^T / sequences, damped;  H^-1 = U^T U, U upper triangular
    score of W[i, j] = W_ij^2 / U_ii^2, of weights as the earlier inputs left them
    pruning it:  W[i', j] -= U_{i,i'} W_ij / U_ii  for all i' >= i

    paper            here
    W (transposed)   [I, O], inputs first
    X                [I, tokens], what W reads
    B                SparseGpt.block
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jsparse.config import check
from jsparse.methods.patterns import NofM, Pattern, keep_largest


@dataclass(frozen=True)
class SparseGpt:
    type: ClassVar[str] = "sparsegpt"
    damp: float = 0.01  # added to H's diagonal, as a share of its mean
    block: int = 128  # inputs whose updates of later inputs are done at once; by ratio also those compared

    def __post_init__(self) -> None:
        check(self.damp >= 0, "damp", "a number of at least 0", self.damp)
        check(self.block > 0, "block", "a positive number", self.block)


def sparsegpt(
    weight: jax.Array, hessian: jax.Array, pattern: Pattern, *, damp: float = 0.01, block: int = 128
) -> tuple[jax.Array, jax.Array]:
    """SparseGPT of one matrix: prunes from the first input to the last, and lets the later inputs make up for it.

    Args:
        weight: W [I, O].
        hessian: H = 2 X X^T / sequences, float32 [I, I]. Inputs that are always 0 have their weights set to 0.
        pattern: N:M groups run along I; a ratio is met among the scores of each `block` of inputs.
        damp: raises H's diagonal by this share of its mean.
        block: inputs whose effect on later ones is applied at once. With N:M it changes nothing but speed.

    Returns:
        The new W, float32 [I, O], exactly 0 where pruned, and the mask, bool [I, O]. W is nan where the damped H is
        not positive definite.
    """
    inputs, outputs = weight.shape
    if isinstance(pattern, NofM):
        check(inputs % pattern.m == 0, "pattern", f"an input axis that {pattern.m} divides", inputs)
    step = pattern.m if isinstance(pattern, NofM) else min(block, inputs)
    block = max(step, min(block, inputs) // step * step)
    w, u = _eliminator(weight.astype(jnp.float32), hessian.astype(jnp.float32), damp)
    extra = -inputs % block
    w = jnp.pad(w, ((0, extra), (0, 0)))
    u = jnp.pad(u, ((0, extra), (0, extra))) + jnp.diag(jnp.pad(jnp.zeros(inputs), (0, extra), constant_values=1.0))

    def choose(scores: jax.Array, start: jax.Array) -> jax.Array:
        if isinstance(pattern, NofM):
            return keep_largest(scores, pattern, "input")
        last = start + block > inputs  # padded: its scores beyond the inputs come last
        real = (start + jnp.arange(block) < inputs)[:, None]
        at = jnp.where(last, pattern.pruned((block - extra) * outputs), pattern.pruned(block * outputs))
        return scores > jnp.sort(jnp.where(real, scores, jnp.inf).reshape(-1))[at]

    def one_block(w: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jax.lax.dynamic_slice_in_dim(w, start, block)  # [block, O]
        u_rows = jax.lax.dynamic_slice_in_dim(u, start, block)  # [block, I]
        u_here = jax.lax.dynamic_slice_in_dim(u_rows, start, block, axis=1)
        scale = jnp.diag(u_here)

        def one_group(rows: jax.Array, first: jax.Array) -> tuple[jax.Array, Any]:
            group = jax.lax.dynamic_slice_in_dim(rows, first, step)
            keep = choose((group / jax.lax.dynamic_slice_in_dim(scale, first, step)[:, None]) ** 2, start)

            def one_row(rows: jax.Array, row: Any) -> tuple[jax.Array, jax.Array]:
                at, keep = row
                error = jnp.where(keep, 0.0, rows[at]) / scale[at]
                return rows - u_here[at][:, None] * error[None], error  # u_here is 0 for earlier rows

            rows, errors = jax.lax.scan(one_row, rows, (first + jnp.arange(step), keep))
            return rows, (keep, errors)

        rows, (keep, errors) = jax.lax.scan(one_group, rows, jnp.arange(0, block, step))
        keep, errors = keep.reshape(rows.shape), errors.reshape(rows.shape)
        later = (jnp.arange(u.shape[1]) >= start + block)[None]
        w = w - exact_dot(jnp.where(later, u_rows, 0.0).T, errors)
        return jax.lax.dynamic_update_slice_in_dim(w, jnp.where(keep, rows, 0.0), start, axis=0), keep

    w, keep = jax.lax.scan(one_block, w, jnp.arange(0, inputs, block))
    w = jnp.where(jnp.all(jnp.isfinite(u)), w, jnp.nan)  # else all would be pruned, and no one would notice
    return w[:inputs], keep.reshape(w.shape)[:inputs]


def _eliminator(w: jax.Array, h: jax.Array, damp: float) -> tuple[jax.Array, jax.Array]:
    """W without its dead inputs, and U upper triangular with H^-1 = U^T U: row i holds what removing input i, once the
    earlier ones are gone, does to the later ones."""
    dead = jnp.diag(h) == 0
    eye = jnp.eye(len(h))
    h = h + jnp.diag(dead.astype(jnp.float32))  # before the mean
    h = h + damp * jnp.mean(jnp.diag(h)) * eye
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(h), True), eye)
    return jnp.where(dead[:, None], 0.0, w), jnp.linalg.cholesky(inverse).T


def exact_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 in earnest: accelerators would round the factors to fewer bits."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
