"""Atomic additions that order nothing else, for Pallas's Triton backend.

`plt.atomic_add` acquires and releases: each becomes two fences around the addition and an emptying of the first-level
cache, which a sum that nobody reads before the kernel ends does not need. Triton can say so, Pallas offers no argument
for it. What is used of JAX's inside here belongs to a backend that JAX develops no further; should it be missing, the
additions are ordered ones again.
"""

from typing import Any

import jax
from jax.experimental.pallas import triton as plt

try:
    from jax._src.lib.mlir import ir
    from jax._src.pallas.triton import primitives
    from jax._src.pallas.triton.lowering import register_lowering
    from jax._src.state import primitives as state
    from jax.extend.core import Primitive

    _ordered = primitives._atomic_lowering_rule
    _relaxed_add_p = Primitive("relaxed_atomic_add")
    _relaxed_add_p.multiple_results = False
    _KIND = {"atomic_type": primitives.AtomicOpType.ADD}

    @_relaxed_add_p.def_effectful_abstract_eval
    def _abstract(*avals: Any, args_tree: Any) -> Any:
        return primitives._atomic_abstract_eval(*avals, args_tree=args_tree, **_KIND)

    @register_lowering(_relaxed_add_p)
    def _lower(context: Any, *operands: Any, args_tree: Any) -> Any:
        old = _ordered(context, *operands, args_tree=args_tree, **_KIND)
        old.owner.attributes["sem"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 1)  # relaxed
        return old

    def add(ref: Any, index: tuple[Any, ...], value: jax.Array, mask: jax.Array | None = None) -> None:
        """ref[index] += value, atomically, where the mask is set."""
        ref, transforms = state.get_ref_and_transforms(ref, index, "atomic_add")
        operands, tree = jax.tree.flatten((ref, transforms, value, mask))
        _relaxed_add_p.bind(*operands, args_tree=tree)

except (ImportError, AttributeError):

    def add(ref: Any, index: tuple[Any, ...], value: jax.Array, mask: jax.Array | None = None) -> None:
        """ref[index] += value, atomically, where the mask is set."""
        plt.atomic_add(ref, index, value, mask=mask)
