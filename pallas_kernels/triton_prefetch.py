"""Asks for an array's bytes in the second-level cache, for Pallas's Triton backend: a hint, on Hopper.

A launch that leaves most of the memory's bandwidth idle can ask for what the next launch reads. Nobody waits for the
bytes: one instruction a warp hands a range of addresses to the copy engine, and the program goes on. Pallas has no such
operation. What is used of JAX's inside here belongs to a backend that JAX develops no further; should it be missing,
nothing is asked for.
"""

from typing import Any

import jax

from pallas_kernels import backend

CACHE = 50 << 20  # bytes that an H100's cache holds,
LINE = 128  # in lines of so many


def share(array: jax.Array | None, wanted: int, warps: int, beside: int = 0) -> int:
    """Bytes that each of `warps` warps asks for, whole lines, so that all together ask for `wanted` bytes of the array
    or a little less; 0 where there is nothing to ask for, or no way to.

    Args:
        beside: bytes that the launch itself reads, which would drive others out of a full cache.
    """
    if array is None or not backend.is_hopper():
        return 0
    return max(0, min(wanted, array.size * array.dtype.itemsize, CACHE - beside)) // (warps * LINE) * LINE


try:
    from jax._src.lib.mlir import ir
    from jax._src.lib.triton import dialect
    from jax._src.pallas.triton.lowering import register_lowering
    from jax._src.state import WriteEffect
    from jax.extend.core import Primitive

    _prefetch_p = Primitive("prefetch")
    _prefetch_p.multiple_results = True

    @_prefetch_p.def_effectful_abstract_eval
    def _abstract(*_: Any, bytes_: int, step: int) -> Any:
        return [], {WriteEffect(0)}  # as one that only reads, it would be dropped

    @register_lowering(_prefetch_p)
    def _lower(_: Any, pointer: Any, first: Any, *, bytes_: int, step: int) -> Any:
        asm = f"""{{
            .reg .pred p; .reg .b32 place, lane; .reg .b64 at;
            mov.u32 place, %tid.x; and.b32 lane, place, 31; shr.u32 place, place, 5;
            setp.eq.u32 p, lane, 0;
            add.u32 place, place, $2; mad.wide.u32 at, place, {step}, $1;
            @p cp.async.bulk.prefetch.L2.global [at], {bytes_};
            mov.u32 $0, 0;
        }}"""
        address = dialect.ptr_to_int(ir.IntegerType.get_signless(64), pointer)
        dialect.elementwise_inline_asm([ir.IntegerType.get_signless(32)], asm, constraints="=r,l,r", pure=False,
                                       packed_element=1, args=[address, first])  # fmt: skip
        return []

    def prefetch(ref: Any, first: jax.Array, warps: int, bytes_: int) -> None:
        """Of the array cut into `warps` parts, warp w of the program asks for the first bytes of part first + w.

        So the bytes lie all over the array, and whoever reads it gets some from the cache and some from the memory at
        any time.
        """
        step = ref.size * ref.dtype.itemsize // (warps * LINE) * LINE
        _prefetch_p.bind(ref, first, bytes_=bytes_, step=step)

except (ImportError, AttributeError):

    def prefetch(ref: Any, first: jax.Array, warps: int, bytes_: int) -> None:
        """Nothing."""
