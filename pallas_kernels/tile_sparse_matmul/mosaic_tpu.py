"""The tile-sparse product and its gradients on a TPU: the lists of what is active are prefetched and say what to fetch.

A step that is not active computes nothing and fetches nothing: it names again what the last active step had. One kernel
serves the product by outputs, the product by inputs and the weight's gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.backend import like
from pallas_kernels.mosaic_tpu import dot
from pallas_kernels.tile_sparse_matmul.api import Sparse
from pallas_kernels.tile_sparse_matmul.masks import active


def unsupported(x: jax.Array, weight: jax.Array, mask: jax.Array, sparse: Sparse, tile: int) -> str | None:
    block = weight.shape[sparse == "outputs"] // mask.shape[1]
    if block % 128 or block > 1024 or weight.shape[sparse == "inputs"] % 128:
        return f"expected blocks and a weight of multiples of 128, blocks to 1024, got {block} and {weight.shape}"
    if tile % 16 or tile > 1024:
        return f"expected tiles of a multiple of 16, to 1024, got {tile}"
    if x.dtype == jnp.float16:
        return "expected float32 or bfloat16, got float16"
    return None


def matmul(
    x: jax.Array,
    weight: jax.Array,
    mask: jax.Array,
    sparse: Sparse,
    tile: int,
    transposed: bool,
    interpret: Any = False,
) -> jax.Array:
    """As `reference.matmul`."""
    inputs, outputs = weight.shape[::-1] if transposed else weight.shape
    out = like(x, (x.shape[0], outputs), x.dtype)
    rows, blocks = min(tile, x.shape[0]), mask.shape[1]
    how: dict[str, Any] = {"trans_b": transposed, "interpret": interpret}
    if sparse == "inputs":
        order, count = active(mask)
        listed = lambda i, j, s, order: (i, j, order[i * blocks + s])
        sizes = rows, _width(outputs), inputs // blocks
        return _sums(x, weight, order, count, lambda i, j: i, listed, blocks, sizes, out, **how)

    depth = _width(inputs)
    steps = inputs // depth
    flat = mask.reshape(-1)
    # The piece whose operands each piece fetches: itself or, where it is not active, the last one that was.
    held = jax.lax.cummax(jnp.where(flat, jnp.arange(len(flat), dtype=jnp.int32), 0))
    piece = lambda i, j: i * blocks + j

    def straight(i: Any, j: Any, s: Any, held: Any) -> tuple[Any, Any, Any]:
        of = held[piece(i, j)]
        return jax.lax.div(of, blocks), jax.lax.rem(of, blocks), jnp.where(of == piece(i, j), s, steps - 1)

    sizes = rows, outputs // blocks, depth
    return _sums(x, weight, held, flat.astype(jnp.int32) * steps, piece, straight, steps, sizes, out, **how)


def weight_gradient(
    x: jax.Array, dy: jax.Array, mask: jax.Array, sparse: Sparse, tile: int, interpret: Any = False
) -> jax.Array:
    """As `reference.weight_gradient`."""
    order, count = active(mask.T)
    inputs, outputs, (tiles, blocks) = x.shape[1], dy.shape[1], mask.shape
    out, depth = like(x, (inputs, outputs), x.dtype), min(tile, x.shape[0])
    how: dict[str, Any] = {"trans_a": True, "interpret": interpret}
    if sparse == "outputs":
        listed = lambda i, j, s, order: (i, j, order[j * tiles + s])
        sizes = _width(inputs), outputs // blocks, depth
        return _sums(x, dy, order, count, lambda i, j: j, listed, tiles, sizes, out, **how)
    listed = lambda i, j, s, order: (i, j, order[i * tiles + s])
    sizes = inputs // blocks, _width(outputs), depth
    return _sums(x, dy, order, count, lambda i, j: i, listed, tiles, sizes, out, **how)


def _sums(
    a: jax.Array,
    b: jax.Array,
    order: jax.Array,
    count: jax.Array,
    line: Callable[[Any, Any], Any],
    fetched: Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]],
    steps: int,
    sizes: tuple[int, int, int],
    out: jax.ShapeDtypeStruct,
    *,
    interpret: Any,
    trans_a: bool = False,
    trans_b: bool = False,
) -> jax.Array:
    """The product of a [M, K] and b [K, N], given transposed or not, in pieces of `sizes` (m, n, k).

    Piece (i, j) of the result takes `steps` steps, of which it sums the first count[line(i, j)]; step s has the
    operands at fetched(i, j, s, order) of (M, N, K).
    """
    m, n, k = sizes
    tokens = a.shape[0]

    def of_a(i: Any, j: Any, s: Any, order: Any, count: Any) -> tuple[Any, Any]:
        row, _, along = fetched(i, j, s, order)
        return (along, row) if trans_a else (row, along)

    def of_b(i: Any, j: Any, s: Any, order: Any, count: Any) -> tuple[Any, Any]:
        _, column, along = fetched(i, j, s, order)
        return (column, along) if trans_b else (along, column)

    def kernel(order: Any, count: Any, a_ref: Any, b_ref: Any, y_ref: Any, sums: Any) -> None:
        i, j, s = (pl.program_id(axis) for axis in range(3))

        @pl.when(s == 0)
        def _() -> None:
            sums[...] = jnp.zeros_like(sums)

        @pl.when(s < count[line(i, j)])
        def _() -> None:
            left, right = a_ref[...], b_ref[...]
            if trans_a and tokens % k:  # what lies beyond the last token is anything
                left_over = tokens - fetched(i, j, s, order)[2] * k
                left, right = (_before(v, left_over) for v in (left, right))
            sums[...] += dot(left, right, 0 if trans_a else 1, 1 if trans_b else 0)

        @pl.when(s == steps - 1)
        def _() -> None:
            y_ref[...] = sums[...].astype(y_ref.dtype)

    specs = [pl.BlockSpec((k, m) if trans_a else (m, k), of_a), pl.BlockSpec((n, k) if trans_b else (k, n), of_b)]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(out.shape[0], m), out.shape[1] // n, steps),
            in_specs=specs,
            out_specs=pl.BlockSpec((m, n), lambda i, j, s, order, count: (i, j)),
            scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="tile_sparse_matmul",
    )(order.reshape(-1), count, a, b)


def _width(size: int) -> int:
    """The largest of 512, 384, 256 and 128 that divides."""
    return next(width for width in (512, 384, 256, 128) if size % width == 0)


def _before(values: jax.Array, end: Any) -> jax.Array:
    """Zero from row `end` on."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < end, values, jnp.zeros((), values.dtype))
