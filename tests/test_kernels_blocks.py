"""The block-sparse product: every backend against the float32 reference, forward and backward."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from pallas_kernels import BlockSparse, block_sparse_matmul, pack_blocks, unpack_blocks
from tests.aot import H100, TARGETS, compile_for
from tests.kernels import BACKENDS, assert_close, on_newest, random

pytestmark = pytest.mark.every_jax

REFERENCE = {"implementation": "reference"}
TPU = BACKENDS["mosaic_tpu"]
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one comparison."""

    tokens: int = 32
    inputs: int = 64
    outputs: int = 96
    block: int = 32
    density: float = 0.5
    dtype: Any = jnp.float32
    spare: int = 0

    def operands(self, seed: int = 0) -> tuple[jax.Array, BlockSparse, jax.Array]:
        x, dy = (random(seed, self.tokens, n, dtype=self.dtype) for n in (self.inputs, self.outputs))
        return x, self.weight(seed), dy

    def mask(self, seed: int = 0) -> np.ndarray:
        return (
            np.random.default_rng(seed).random((self.inputs // self.block, self.outputs // self.block)) < self.density
        )

    def weight(self, seed: int = 0) -> BlockSparse:
        weight = random(seed + 1, self.inputs, self.outputs, dtype=self.dtype, scale=self.inputs**-0.5)
        return pack_blocks(weight, self.mask(seed), capacity=int(self.mask(seed).sum()) + self.spare)


CASES = {  # a TPU's blocks are of 128
    "float32": Case(),
    "bfloat16": Case(dtype=jnp.bfloat16),
    "float16, blocks of 64": Case(dtype=jnp.float16, block=64, inputs=128, outputs=192),
    "blocks of 128": Case(dtype=jnp.bfloat16, block=128, inputs=256, outputs=256),
    "blocks of 128, odd sizes": Case(tokens=1031, block=128, inputs=256, outputs=384, density=0.3, spare=2),
    "blocks of 128, nothing active": Case(block=128, inputs=256, outputs=128, density=0.0, spare=3),
    "blocks of 128, all active": Case(block=128, inputs=128, outputs=256, density=1.0),
    "odd sizes": Case(tokens=21, inputs=5 * 32, outputs=3 * 32),
    "two tiles of tokens": Case(tokens=150),
    "nothing active": Case(density=0.0),
    "nothing active, room for three": Case(density=0.0, spare=3),
    "all active": Case(density=1.0),
    "spare room": Case(spare=5),
}


def value_and_gradients(x: jax.Array, weight: BlockSparse, dy: jax.Array, **backend: Any) -> Any:
    """y, and the gradients of sum(y dy) by x and by the weight's values."""

    @jax.jit
    def both(x: jax.Array, weight: BlockSparse, dy: jax.Array) -> Any:
        op = lambda x, values: block_sparse_matmul(x, dataclasses.replace(weight, values=values), **backend)
        y, vjp = jax.vjp(op, x, weight.values)
        return y, *vjp(dy)

    return both(x, weight, dy)


@functools.cache
def product(case: Case) -> tuple[tuple[jax.Array, BlockSparse, jax.Array], Any]:
    """The operands and what the reference makes of them, which all backends are held against."""
    operands = case.operands()
    return operands, value_and_gradients(*operands, **REFERENCE)


MARKS = on_newest({"bfloat16", "odd sizes", "blocks of 128", "blocks of 128, nothing active", "spare room"}, CASES)
RUNS = [
    pytest.param(case, backend, id=f"{case_name}-{name}", marks=MARKS[case_name])
    for case_name, case in CASES.items()
    for name, backend in BACKENDS.items()
    if case.block == 128 or name != "mosaic_tpu"
]


@pytest.mark.parametrize(("case", "backend"), RUNS)
def test_forward_and_gradients(case: Case, backend: dict[str, Any]) -> None:
    operands, expected = product(case)
    got = value_and_gradients(*operands, **backend)
    assert all(array.dtype == case.dtype for array in got)
    assert_close(got, expected, case.dtype)


def test_reference_is_the_masked_dense_product() -> None:
    case = Case(spare=2)
    x, weight, dy = case.operands()
    w = random(1, case.inputs, case.outputs, scale=case.inputs**-0.5)
    mask = jnp.asarray(np.kron(case.mask(), np.ones((case.block, case.block))), jnp.float32)
    np.testing.assert_array_equal(unpack_blocks(weight), w * mask)
    y, vjp = jax.vjp(lambda x, w: x @ (w * mask), x, w)
    dx, dw = vjp(dy)
    dblocks = pack_blocks(dw, case.mask(), capacity=len(weight.row)).values
    assert_close(value_and_gradients(x, weight, dy, **REFERENCE), (y, dx, dblocks))


@every_backend
def test_jit_vmap_and_scan(backend: dict[str, Any]) -> None:
    """Layers of different masks and one capacity share a program."""
    case = Case(outputs=64) if backend != TPU else Case(block=128, inputs=128, outputs=256)
    room = case.inputs * case.outputs // case.block**2
    layers = [pack_blocks(random(seed, case.inputs, case.outputs), case.mask(seed), capacity=room) for seed in range(3)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    xs = jnp.stack([random(10 + seed, case.tokens, case.inputs) for seed in range(3)])
    expected = jnp.stack([block_sparse_matmul(x, w, **REFERENCE) for x, w in zip(xs, layers, strict=True)])
    run = jax.jit(lambda x, w: block_sparse_matmul(x, w, **backend))
    assert_close(jax.vmap(run)(xs, stacked), expected)
    assert_close(jax.lax.scan(lambda carry, each: (carry, run(*each)), None, (xs, stacked))[1], expected)


@every_backend
def test_outputs_over_tensor(backend: dict[str, Any]) -> None:
    """Shards of different masks; value and gradients."""
    case = Case(outputs=8 * 32) if backend != TPU else Case(block=128, inputs=256, outputs=8 * 128)
    mask = case.mask()
    w = random(1, case.inputs, case.outputs, scale=case.inputs**-0.5)
    x, dy = random(0, case.tokens, case.inputs), random(0, case.tokens, case.outputs)
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    packed = pack_blocks(w, mask, shards=4)
    assert {int(part.sum()) for part in np.split(mask, 4, axis=1)} != {len(packed.row) // 4}  # some have spare places
    over = P("tensor")

    def shard(x: jax.Array, values: jax.Array, weight: BlockSparse) -> jax.Array:
        return block_sparse_matmul(x, dataclasses.replace(weight, values=values), **backend)

    # Pallas's interpreter cannot mark an index that a kernel loads as varying over the mesh.
    marked = "interpret" not in backend
    specs = {"in_specs": (P(), over, over), "out_specs": P(None, "tensor")}
    sharded = jax.shard_map(shard, mesh=mesh, check_vma=marked, **specs)
    y, vjp = jax.jit(lambda x, v: jax.vjp(lambda x, v: sharded(x, v, packed), x, v))(x, packed.values)
    whole = pack_blocks(w, mask)
    expected_y, expected_dx, expected_dv = value_and_gradients(x, whole, dy, **REFERENCE)
    dx, dv = vjp(dy)
    assert_close((y, dx), (expected_y, expected_dx))
    dense = unpack_blocks(dataclasses.replace(whole, values=expected_dv))
    assert_close(dv, pack_blocks(dense, mask, shards=4).values)


def test_no_races_on_tpus() -> None:
    operands, expected = product(CASES["blocks of 128, odd sizes"])
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    got = value_and_gradients(*operands, implementation="mosaic_tpu", interpret=interpret)
    assert_close(got, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target: str) -> None:
    """Forward and gradients of LLaMA2-7B's gate at half its blocks of 128."""
    implementation: Any = "triton" if target == H100 else "mosaic_tpu"
    inputs, outputs, half = 4096, 11008, 32 * 86 // 2
    index = lambda n: jax.ShapeDtypeStruct((n,), jnp.int32)
    values = jax.ShapeDtypeStruct((half, 128, 128), jnp.bfloat16)
    weight = BlockSparse(values, index(half), index(half), index(87), index(half), index(33))
    x, dy = (jax.ShapeDtypeStruct((2000, n), jnp.bfloat16) for n in (inputs, outputs))
    compile_for(target, lambda *o: value_and_gradients(*o, implementation=implementation), x, weight, dy)


def test_arguments_that_do_not_fit() -> None:
    x, weight, _ = Case().operands()
    dense = jnp.zeros((64, 96))
    for words, call in [
        ("mask: expected the square blocks of a matrix \\(64, 96\\), got shape \\(2, 2\\)",
         lambda: pack_blocks(dense, np.ones((2, 2)))),
        ("capacity: expected at least 6", lambda: pack_blocks(dense, np.ones((2, 3)), capacity=5)),
        ("shards: expected a divisor of 3 blocks of outputs, got 2",
         lambda: pack_blocks(dense, np.ones((2, 3)), shards=2)),
        ("x: expected \\[T, I\\], got shape \\(64,\\)", lambda: block_sparse_matmul(x[0], weight)),
        ("weight: expected 32 inputs, got 64", lambda: block_sparse_matmul(x[:, :32], weight)),
        ("weight: expected the dtype of x, bfloat16", lambda: block_sparse_matmul(x.astype(jnp.bfloat16), weight)),
        ("weight: expected one matrix", lambda: block_sparse_matmul(x, jax.tree.map(lambda a: a[None], weight))),
        ("implementation 'triton': expected blocks of 16, 32, 64 or 128, got 8",
         lambda: block_sparse_matmul(jnp.ones((8, 16)), pack_blocks(jnp.ones((16, 8)), np.ones((2, 1))),
                                     implementation="triton")),
        ("implementation 'mosaic_tpu': expected blocks of a multiple of 128, got 32",
         lambda: block_sparse_matmul(x, weight, implementation="mosaic_tpu")),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
