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

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.config import check
from jsparse.methods.patterns import NofM, Pattern, Ratio, keep_largest


@dataclass(frozen=True)
class SparseGpt:
    type: ClassVar[str] = "sparsegpt"
    damp: float = 0.01  # added to H's diagonal, as a share of its mean; times 10 while H cannot be factored
    block: int = 128  # inputs whose updates of later inputs are done at once; by ratio also those compared

    def __post_init__(self) -> None:
        check(self.damp >= 0, "damp", "a number of at least 0", self.damp)
        check(self.block > 0, "block", "a positive number", self.block)


def sparsegpt(
    weight: jax.Array,
    hessian: jax.Array,
    pattern: Pattern,
    *,
    damp: float = 0.01,
    block: int = 128,
    parts: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """SparseGPT of one matrix: prunes from the first input to the last, and lets the later inputs make up for it.

    Args:
        weight: W [I, O].
        hessian: H = 2 X X^T / sequences, float32 [I, I]. Inputs that are always 0 have their weights set to 0.
        pattern: N:M groups run along I; a ratio is met among the scores of each `block` of inputs.
        damp: raises H's diagonal by this share of its mean. Where the result is not positive definite, the share is
            multiplied by 10, at most until it is 1 or above (`dampings`). 0 stays 0.
        block: inputs whose effect on later ones is applied at once. With N:M it changes nothing but speed.
        parts: outputs of each of several matrices that stand side by side in W because they read the same inputs; a
            ratio is met in each. None: W is one matrix.

    Returns:
        The new W, float32 [I, O], exactly 0 where pruned, the mask, bool [I, O], and the place in `dampings(damp)` of
        the share that was used, int32 []. W is nan where none makes H positive definite.
    """
    inputs, outputs = weight.shape
    if isinstance(pattern, NofM):
        check(inputs % pattern.m == 0, "pattern", f"an input axis that {pattern.m} divides", inputs)
        step = pattern.m
        block = max(step, min(block, inputs) // step * step)
    else:
        block = min(block, inputs)
        step = math.gcd(block, 8)  # inputs that are worked off one by one; the rest of the block follows at once
    w, u, place = _eliminator(weight.astype(jnp.float32), hessian.astype(jnp.float32), damp)
    extra = -inputs % block
    w = jnp.pad(w, ((0, extra), (0, 0)))
    u = jnp.pad(u, ((0, extra), (0, extra))) + jnp.diag(jnp.pad(jnp.zeros(inputs), (0, extra), constant_values=1.0))
    ends = np.cumsum(parts or (outputs,))[:-1]

    def by_ratio(scores: jax.Array, start: jax.Array, share: Ratio) -> jax.Array:
        """The mask of a block, [block, outputs of one matrix]. What is padded comes last and is not counted."""
        real = (start + jnp.arange(block) < inputs)[:, None]
        whole, rest = (share.pruned(rows * scores.shape[1]) for rows in (block, block - extra))
        at = jnp.where(start + block > inputs, rest, whole)
        return scores > jnp.sort(jnp.where(real, scores, jnp.inf).reshape(-1))[at]

    def one_block(w: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jax.lax.dynamic_slice_in_dim(w, start, block)  # [block, O]
        u_rows = jax.lax.dynamic_slice_in_dim(u, start, block)  # [block, I]
        u_here = jax.lax.dynamic_slice_in_dim(u_rows, start, block, axis=1)
        scale = jnp.diag(u_here)[:, None]
        chosen = jnp.zeros(rows.shape, bool)
        if isinstance(pattern, Ratio):
            scores = jnp.split((rows / scale) ** 2, ends, axis=1)
            chosen = jnp.concatenate([by_ratio(part, start, pattern) for part in scores], axis=1)

        def one_group(rows: jax.Array, first: jax.Array) -> tuple[jax.Array, Any]:
            def cut(x: jax.Array, axis: int = 0) -> jax.Array:
                return jax.lax.dynamic_slice_in_dim(x, first, step, axis)

            group, u_group = cut(rows), cut(u_here)  # [step, O], [step, block]
            grouped = isinstance(pattern, NofM)
            keep = keep_largest((group / cut(scale)) ** 2, pattern, "input") if grouped else cut(chosen)
            errors = _errors(group, cut(u_group, 1), keep)
            return rows - exact_dot(u_group.T, errors), (keep, errors)  # u is 0 for the rows before these

        rows, (keep, errors) = jax.lax.scan(one_group, rows, jnp.arange(0, block, step))
        keep, errors = keep.reshape(rows.shape), errors.reshape(rows.shape)
        later = (jnp.arange(u.shape[1]) >= start + block)[None]
        w = w - exact_dot(jnp.where(later, u_rows, 0.0).T, errors)
        return jax.lax.dynamic_update_slice_in_dim(w, jnp.where(keep, rows, 0.0), start, axis=0), keep

    w, keep = jax.lax.scan(one_block, w, jnp.arange(0, inputs, block))
    w = jnp.where(jnp.all(jnp.isfinite(u)), w, jnp.nan)  # else all would be pruned, and no one would notice
    return w[:inputs], keep.reshape(w.shape)[:inputs], place


def dampings(damp: float) -> list[float]:
    """The shares tried one after another."""
    found = [damp]
    while 0 < found[-1] < 1:
        found.append(10 * found[-1])
    return found


def _errors(group: jax.Array, u: jax.Array, keep: jax.Array) -> jax.Array:
    """What each pruned weight loses, in units of U's diagonal, [step, O]: of a group [step, O], its U [step, step] and
    its mask, one input after another."""

    def one_row(left: jax.Array, row: Any) -> tuple[jax.Array, jax.Array]:
        at, keep = row
        error = jnp.where(keep, 0.0, left[at]) / u[at, at]
        return left - u[at][:, None] * error[None], error

    steps = len(group)
    return jax.lax.scan(one_row, group, (jnp.arange(steps), keep), unroll=min(steps, 8))[1]


def _eliminator(w: jax.Array, h: jax.Array, damp: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """W without its dead inputs, and U upper triangular with H^-1 = U^T U: row i holds what removing input i, once the
    earlier ones are gone, does to the later ones; and the place of the share that H was damped by.

    With H in reverse order L L^T, U is L^-1 in reverse order: H is never inverted, and factored once. More than once
    only where inputs that hardly change from token to token make entries of X X^T so alike that its rounding, which
    grows with the tokens, outweighs the damping and leaves H with negative eigenvalues.
    """
    dead = jnp.diag(h) == 0
    eye = jnp.eye(len(h))
    h = h + jnp.diag(dead.astype(jnp.float32))  # before the mean
    shares = jnp.asarray(dampings(damp), jnp.float32)

    def factor(place: jax.Array) -> jax.Array:
        lower = jnp.linalg.cholesky((h + shares[place] * jnp.mean(jnp.diag(h)) * eye)[::-1, ::-1])
        return jax.scipy.linalg.solve_triangular(lower, eye, lower=True)[::-1, ::-1]

    def again(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        place, u = state
        return (place < len(shares) - 1) & ~jnp.all(jnp.isfinite(u))

    def more(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return state[0] + 1, factor(state[0] + 1)

    first = jnp.int32(0)
    place, u = jax.lax.while_loop(again, more, (first, factor(first)))
    return jnp.where(dead[:, None], 0.0, w), jnp.triu(u), place


def exact_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b in float32. Of float32 in earnest, where accelerators would round the factors to fewer bits; products of
    half-precision numbers are exact as they are."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
