"""What the kernel tests share: the backends as they run on a CPU, and the comparison with float32."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# How a test runs each backend here: the arguments that an operation takes. The reference itself is what they are held
# against.
BACKENDS: dict[str, dict[str, Any]] = {
    "xla": {"implementation": "xla"},
    "triton": {"implementation": "triton", "interpret": True},
    "mosaic_tpu": {"implementation": "mosaic_tpu", "interpret": True},
}


def on_newest(newest: Collection[str], cases: Mapping[str, Any]) -> dict[str, Any]:
    """The marks of each case: none of those in `newest`, `further` of the others."""
    assert cases.keys() >= set(newest)
    return {name: () if name in newest else pytest.mark.further for name in cases}


def run(op: Callable[..., Any], *operands: Any, **settings: Any) -> Any:
    """op(*operands, **settings), compiled as one program: much faster than one for each of its steps."""
    return jax.jit(functools.partial(op, **settings))(*operands)


def random(seed: int, *shape: int, dtype: Any = jnp.float32, scale: float = 1.0) -> jax.Array:
    """Normal numbers of a standard deviation."""
    return jnp.asarray(scale * np.random.default_rng((seed, *shape)).standard_normal(shape), dtype)


def assert_close(got: Any, expected: Any, dtype: Any = jnp.float32) -> None:
    """Every leaf within a few roundings of `dtype` of the expected one, relative to the largest magnitude."""
    tolerance = {jnp.float32: 2e-6, jnp.bfloat16: 1.5e-2, jnp.float16: 2e-3}[dtype]
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        error, scale = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
        assert error <= tolerance * max(scale, 1e-30), f"off by {error:.2e} where the largest is {scale:.2e}"
