"""Decode attention in one launch on an NVIDIA GPU, or two where the text is long for the number of heads.

A program has one key-value head of one row, with all queries that share it, and a part of the text, whose keys and
values it streams once. The first part rotates and stores the new token too, which nobody else reads. Where there are
several parts their weighted sums meet in a second, elementwise kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.triton import call, power_of_two

PROGRAMS = 160  # that are wanted at once, a few more than an H100 has processors: more parts cost more to join
PART = 64  # slots of the shortest part that is worth a program
BLOCK = 128  # slots that are loaded together
GRAIN = 16  # slots of which a part has a multiple
WARPS = 8
NEVER = -1e30  # the largest logit of a part without slots: finite, so that no difference of two is nan


def unsupported(qkv: jax.Array, keys: jax.Array) -> str | None:
    _, slots, _, head_dim = keys.shape
    if head_dim & (head_dim - 1) or head_dim < 32:
        return f"expected heads of a power of two and at least 32, got {head_dim}"
    if slots % 16:
        return f"expected slots that 16 divides, got {slots}"
    return None


def decode_attention(
    qkv: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `reference.decode_attention`, the weights of the values unrounded."""
    rows, slots, kv_heads, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    parts = max(1, min(-(-PROGRAMS // (rows * kv_heads)), slots // PART))
    shape = (rows, heads, head_dim)
    sums = [jax.ShapeDtypeStruct(shape, qkv.dtype)]
    if parts > 1:
        sums = [jax.ShapeDtypeStruct((parts, *s), jnp.float32) for s in (shape, shape[:2], shape[:2])]
    keys, values, *sums = call(
        functools.partial(_kernel, heads=heads, parts=parts, block=power_of_two(BLOCK, slots)),
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)] + sums,
        programs=(rows, kv_heads, parts),
        warps=WARPS,
        aliases={1: 0, 2: 1},
        interpret=interpret,
        name="decode_attention",
    )(qkv, keys, values, cos, sin, start, length.reshape(1))
    y = sums[0] if parts == 1 else _join(*sums).astype(qkv.dtype)
    return y.reshape(rows, -1), keys, values


def _join(sums: jax.Array, totals: jax.Array, largest: jax.Array) -> jax.Array:
    """The whole text's weighted mean [B, N, H] of its parts'. Written out over the parts, so that it is one kernel."""
    parts = range(sums.shape[0])
    most = functools.reduce(jnp.maximum, [largest[p] for p in parts])
    weights = [jnp.exp(largest[p] - most) for p in parts]
    total = functools.reduce(jnp.add, [totals[p] * w for p, w in enumerate(weights)])
    return functools.reduce(jnp.add, [sums[p] * w[..., None] for p, w in enumerate(weights)]) / total[..., None]


def _kernel(
    qkv_ref: Any, _keys: Any, _values: Any, cos_ref: Any, sin_ref: Any, start_ref: Any, length_ref: Any,
    k_ref: Any, v_ref: Any, *out_refs: Any, heads: int, parts: int, block: int,
) -> None:  # fmt: skip
    row, kv, part = (pl.program_id(i) for i in range(3))
    kv_heads, head_dim = k_ref.shape[2:]
    half, group, dtype = head_dim // 2, heads // kv_heads, qkv_ref.dtype
    low, high = pl.ds(0, half), pl.ds(half, half)
    cos, sin, start, length = cos_ref[row], sin_ref[row], start_ref[row], length_ref[0]

    def rotated(head: Any) -> tuple[jax.Array, jax.Array]:
        a = qkv_ref[row, pl.ds(head * head_dim, half)].astype(jnp.float32)
        b = qkv_ref[row, pl.ds(head * head_dim + half, half)].astype(jnp.float32)
        return (a * cos - b * sin).astype(dtype), (b * cos + a * sin).astype(dtype)

    new_k = rotated(heads + kv)
    new_v = qkv_ref[row, pl.ds((heads + kv_heads + kv) * head_dim, head_dim)]
    queries = [tuple(x.astype(jnp.float32) * head_dim**-0.5 for x in rotated(kv * group + g)) for g in range(group)]

    def begin(q: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Largest logit, sum of weights and weighted values: of the new token in the first part, elsewhere of none."""
        logit = sum(jnp.sum(a * b.astype(jnp.float32)) for a, b in zip(q, new_k, strict=True))
        first = (part == 0).astype(jnp.float32)
        return jnp.where(part == 0, logit, NEVER), first, first * new_v.astype(jnp.float32)

    size = pl.cdiv(length, parts * GRAIN) * GRAIN  # slots of a part
    first = part * size
    last = jnp.minimum(first + size, length)

    def attend(i: jax.Array, states: Any) -> Any:
        index = first + i * block + jnp.arange(block, dtype=jnp.int32)
        seen = (index < last) & (index >= start)

        def load(ref: Any, columns: Any) -> jax.Array:
            place = index[:, None], kv, (columns.start + jnp.arange(columns.size))[None]
            return plt.load(ref.at[(row, *place)], mask=seen[:, None], other=0.0).astype(jnp.float32)

        k, v = (load(k_ref, low), load(k_ref, high)), load(v_ref, pl.ds(0, head_dim))
        out = []
        for q, (most, total, mean) in zip(queries, states, strict=True):
            logits = sum(jnp.sum(a * b[None], axis=1) for a, b in zip(k, q, strict=True))
            larger = jnp.maximum(most, jnp.max(jnp.where(seen, logits, NEVER)))
            weights = jnp.where(seen, jnp.exp(logits - larger), 0.0)
            shrink = jnp.exp(most - larger)
            mean = mean * shrink + jnp.sum(weights[:, None] * v, axis=0)
            out.append((larger, total * shrink + jnp.sum(weights), mean))
        return out

    blocks = jnp.maximum(pl.cdiv(last - first, block), 0)
    states = jax.lax.fori_loop(0, blocks, attend, [begin(q) for q in queries])

    @pl.when(part == 0)  # no earlier: a branch waits for what it stores, and loads behind it would wait, too
    def _() -> None:
        k_ref[row, length, kv, low], k_ref[row, length, kv, high] = new_k
        v_ref[row, length, kv, :] = new_v

    for g, (most, total, mean) in enumerate(states):
        head = kv * group + g
        if parts == 1:
            out_refs[0][row, head, :] = (mean / total).astype(dtype)
        else:
            out_refs[0][part, row, head, :] = mean
            out_refs[1][part, row, head] = total
            out_refs[2][part, row, head] = most
