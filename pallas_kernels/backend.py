"""Which implementation of an operation runs, and what all of them share.

An operation's folder holds one module a backend, named like the backend. Each module has

    unsupported(...) -> str | None      why it cannot take these shapes and dtypes; None where it can
    <the operation>(...)                the backend's body

and is imported when it is first chosen, so that a JAX without one of Pallas's backends still runs the others.
"""

import importlib
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

Implementation = Literal["reference", "xla", "triton", "mosaic_gpu", "mosaic_tpu"]

# By platform, the best first. Where its kernels are measured to be the faster ones, an operation puts Mosaic GPU first.
_PREFERRED: dict[str, tuple[Implementation, ...]] = {"gpu": ("triton",), "tpu": ("mosaic_tpu",)}


def choose(
    package: str, implementation: Implementation | None, *call: Any, on_hopper: tuple[Implementation, ...] = ()
) -> Any:
    """The module of `package` that runs this call: the named one, or the best of the default backend's.

    Args:
        package: the operation's package, as in `pallas_kernels.block_sparse_ffn`.
        implementation: a backend's name, or None: the platform's preferred one that takes the call, else "xla".
        call: what the backends' `unsupported` is asked about.
        on_hopper: names to prefer on an H100 or its kin, the best first.
    Raises:
        ValueError: the named backend does not exist, at all or of this operation, or cannot take this call.
        ImportError: this JAX lacks the named backend.
    """
    if implementation is not None:
        if implementation not in get_args(Implementation):
            raise ValueError(f"implementation: expected one of {', '.join(get_args(Implementation))}, "
                             f"got {implementation!r}")  # fmt: skip
        try:
            module = importlib.import_module(f"{package}.{implementation}")
        except ModuleNotFoundError as error:
            if error.name != f"{package}.{implementation}":  # of this JAX, not of ours
                raise
            operation = package.rpartition(".")[2]
            raise ValueError(f"implementation {implementation!r}: {operation} has no such backend") from None
        reason = module.unsupported(*call)
        if reason is not None:
            raise ValueError(f"implementation {implementation!r}: {reason}")
        return module
    preferred = _PREFERRED.get(jax.default_backend(), ())
    if on_hopper and getattr(jax.devices()[0], "compute_capability", None) == "9.0":
        preferred = on_hopper
    for name in preferred:
        try:
            module = importlib.import_module(f"{package}.{name}")
        except ImportError:  # the operation, or this JAX, has no such backend
            continue
        if module.unsupported(*call) is None:
            return module
    return importlib.import_module(f"{package}.xla")


def check_tokens(x: jax.Array, axes: str) -> None:
    """Raises ValueError where tokens x are no matrix of a dtype that kernels take; axes: as in "[T, I]"."""
    if x.ndim != 2:
        raise ValueError(f"x: expected {axes}, got shape {x.shape}")
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"x: expected float32, bfloat16 or float16, got {x.dtype}")


def vary_together(tree: Any) -> Any:
    """Every array of the tree marked as varying over the mesh axes that any of them varies over.

    Inside `jax.shard_map`, replicated tokens meet sharded weights. Said here once, the mark makes a kernel's operands
    agree and gives the tokens' gradient its sum over the shards. Outside it does nothing.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A kernel's result, varying over the same mesh axes as its operand x."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
