"""What the product of few tokens with a matrix computes."""

from typing import Any

import jax

from pallas_kernels.dense import exact


def unsupported(x: jax.Array, weight: jax.Array) -> str | None:
    return None


def matvec(x: jax.Array, weight: jax.Array, dtype: Any, *, interpret: Any = False, product: Any = exact) -> jax.Array:
    """As `api.matvec`."""
    return product(x, weight, 1, 1).astype(dtype)
