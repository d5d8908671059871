"""Dense products, the two ways in which the implementations that run everywhere take them.

An operation's `reference.py` is written over `exact`, and its `xla.py` is the same function over `native`.
"""

import jax
import jax.numpy as jnp


def exact(a: jax.Array, b: jax.Array, of_a: int = 1, of_b: int = 0) -> jax.Array:
    """The product over an axis of each matrix in float32, whatever the operands' dtypes and JAX's default precision."""
    return _dot(a.astype(jnp.float32), b.astype(jnp.float32), of_a, of_b, "highest")


def native(a: jax.Array, b: jax.Array, of_a: int = 1, of_b: int = 0) -> jax.Array:
    """The product over an axis of each matrix in b's dtype, to which a is rounded; sums and result are float32."""
    return _dot(a.astype(b.dtype), b, of_a, of_b, None)


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int, precision: str | None) -> jax.Array:
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), precision, jnp.float32)
