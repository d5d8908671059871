"""The public function of decode attention: checks and choice of backend."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.backend import Implementation


def decode_attention(
    qkv: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Grouped-query attention of one token a row, which is written to the next slot of a static cache.

    Queries and keys are rotated, pairs (i, i + H/2), and rounded to their dtype. Row b attends to the slots from
    start[b] up to `length`, the new token's own; so a row that has not started attends to itself. Logits are over
    sqrt(H); softmax and sums are float32.

    Args:
        qkv: [B, (N + 2 K) H], the query, key and value heads of the new tokens.
        keys: [B, S, K, H], rotated already; and
        values: of the same shape, both of qkv's dtype. Their buffers are reused where the caller has no other use.
        cos: float32 [B, H/2], of the new tokens' positions; and
        sin: of the same shape.
        start: int32 [B], the first slot of each row's text.
        length: int32 [], slots filled: the new token's slot.
        implementation: a backend's name, which fails where it cannot run; None takes the best that can.
        interpret: runs a Pallas backend on the CPU.
    Returns:
        [B, N H] of qkv's dtype, and the keys and values with the new token's.
    Raises:
        ValueError: arguments that do not fit each other, or that the named backend does not take.
    """
    b, _, kv_heads, head_dim = keys.shape
    joined = qkv.shape[-1]
    heads, odd = divmod(joined - 2 * kv_heads * head_dim, head_dim)
    if qkv.shape != (b, joined) or odd or heads < 1 or heads % kv_heads:
        raise ValueError(f"qkv: expected [{b}, heads of {head_dim}] for {kv_heads} key-value heads, got {qkv.shape}")
    expected = {"values": keys.shape, "cos": (b, head_dim // 2), "sin": (b, head_dim // 2), "start": (b,), "length": ()}
    given = {"values": values, "cos": cos, "sin": sin, "start": start, "length": length}
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {given[name].shape}")
    if not qkv.dtype == keys.dtype == values.dtype or not jnp.issubdtype(qkv.dtype, jnp.floating):
        raise ValueError(f"qkv, keys, values: expected one float dtype, got {qkv.dtype}, {keys.dtype}, {values.dtype}")
    module = backend.choose(__package__, implementation, qkv, keys)
    return module.decode_attention(qkv, keys, values, cos, sin, start, length, interpret=interpret)
