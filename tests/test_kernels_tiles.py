"""The tile-sparse product: every backend against the float32 reference, forward and backward."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from pallas_kernels import tile_sparse_matmul
from tests.aot import H100, TARGETS, compile_for
from tests.kernels import BACKENDS, assert_close, on_newest, random

pytestmark = pytest.mark.every_jax

REFERENCE = {"implementation": "reference"}
TPU = BACKENDS["mosaic_tpu"]
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
either_side = pytest.mark.parametrize("sparse", ["outputs", "inputs"])


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one comparison; the sparse axis has `blocks` of a size, the other a width."""

    tokens: int = 96
    tile: int = 32
    width: int = 48
    block: int = 32
    blocks: int = 3
    density: float = 0.5
    dtype: Any = jnp.float32

    def operands(self, sparse: str, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """x, weight, mask and dy."""
        inputs, outputs = self.width, self.block * self.blocks
        if sparse == "inputs":
            inputs, outputs = outputs, inputs
        x, dy = (random(seed, self.tokens, n, dtype=self.dtype) for n in (inputs, outputs))
        weight = random(seed + 1, inputs, outputs, dtype=self.dtype, scale=inputs**-0.5)
        tiles = -(-self.tokens // self.tile)
        mask = np.random.default_rng(seed).random((tiles, self.blocks)) < self.density
        return x, weight, jnp.asarray(mask), dy


SMALL = Case(block=128, blocks=2, width=128)  # that a TPU takes, too
CASES = {
    "float32": Case(),
    "bfloat16": Case(dtype=jnp.bfloat16),
    "float16": Case(dtype=jnp.float16, block=64, tile=64),
    "odd sizes": Case(tokens=53, tile=16, block=16, blocks=5, width=80),
    "fewer tokens than a tile": Case(tokens=5, tile=64),
    "blocks of 128": dataclasses.replace(SMALL, dtype=jnp.bfloat16, blocks=3, width=256),
    "blocks of 128, odd sizes": dataclasses.replace(SMALL, tokens=71, width=640),
    "blocks of 128, fewer tokens than a tile": dataclasses.replace(SMALL, tokens=21),
    "blocks of 128, nothing active": dataclasses.replace(SMALL, density=0.0),
    "blocks of 128, all active": dataclasses.replace(SMALL, density=1.0, tokens=53),
}


def value_and_gradients(
    sparse: Any, tile: int, x: jax.Array, weight: jax.Array, mask: jax.Array, dy: jax.Array, **backend: Any
) -> Any:
    """y, and the gradients of sum(y dy) by x and by the weight."""

    @jax.jit
    def both(x: jax.Array, weight: jax.Array, mask: jax.Array, dy: jax.Array) -> Any:
        op = lambda x, w: tile_sparse_matmul(x, w, mask, sparse=sparse, tile_size=tile, **backend)
        y, vjp = jax.vjp(op, x, weight)
        return y, *vjp(dy)

    return both(x, weight, mask, dy)


@functools.cache
def product(case: Case, sparse: str) -> tuple[tuple[jax.Array, ...], Any]:
    """The operands and what the reference makes of them, which all backends are held against."""
    operands = case.operands(sparse)
    return operands, value_and_gradients(sparse, case.tile, *operands, **REFERENCE)


MARKS = on_newest({"bfloat16", "odd sizes", "blocks of 128", "blocks of 128, nothing active"}, CASES)
RUNS = [
    pytest.param(case, backend, id=f"{case_name}-{name}", marks=MARKS[case_name])
    for case_name, case in CASES.items()
    for name, backend in BACKENDS.items()
    if case.block == 128 or name != "mosaic_tpu"
]


@either_side
@pytest.mark.parametrize(("case", "backend"), RUNS)
def test_forward_and_gradients(case: Case, backend: dict[str, Any], sparse: str) -> None:
    operands, expected = product(case, sparse)
    got = value_and_gradients(sparse, case.tile, *operands, **backend)
    assert all(array.dtype == case.dtype for array in got)
    assert_close(got, expected, case.dtype)


@either_side
def test_reference_is_the_product_tile_by_tile(sparse: str) -> None:
    case = Case(tokens=53)
    x, weight, mask, dy = case.operands(sparse)

    def by_tile(x: jax.Array, weight: jax.Array) -> jax.Array:
        kept = jnp.repeat(mask, case.block, axis=1).astype(jnp.float32)
        matrices = [weight * (row[None] if sparse == "outputs" else row[:, None]) for row in kept]
        split = zip(jnp.split(x, [32]), matrices, strict=True)
        return jnp.concatenate([tile @ matrix for tile, matrix in split])

    y, vjp = jax.vjp(by_tile, x, weight)
    assert_close(value_and_gradients(sparse, case.tile, x, weight, mask, dy, **REFERENCE), (y, *vjp(dy)))


@either_side
@every_backend
def test_what_is_masked_is_not_used(backend: dict[str, Any], sparse: str) -> None:
    """Values that no tile should touch are not numbers: masked places of x or dy, and a block that nobody uses."""
    x, weight, mask, dy = SMALL.operands(sparse)
    mask = jnp.asarray([[True, False], [False, False], [True, False]])
    place = jnp.repeat(jnp.repeat(mask, SMALL.tile, axis=0), SMALL.block, axis=1)
    expected = value_and_gradients(sparse, SMALL.tile, x, weight, mask, dy, **REFERENCE)
    if sparse == "inputs":
        x = jnp.where(place, x, jnp.nan)
    else:
        dy = jnp.where(place, dy, jnp.nan)
    if backend["implementation"] != "xla":  # a dense product reads the whole weight
        row, column = (slice(128, None), slice(None)) if sparse == "inputs" else (slice(None), slice(128, None))
        weight = weight.at[row, column].set(jnp.nan)
    assert_close(value_and_gradients(sparse, SMALL.tile, x, weight, mask, dy, **backend), expected)


@every_backend
def test_jit_vmap_and_scan(backend: dict[str, Any]) -> None:
    """One program serves every mask."""
    each = [SMALL.operands("outputs", seed)[:3] for seed in range(3)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
    product = lambda x, w, mask, **backend: tile_sparse_matmul(x, w, mask, sparse="outputs", tile_size=32, **backend)
    expected = jnp.stack([product(*operands, **REFERENCE) for operands in each])
    run = jax.jit(lambda x, w, mask: product(x, w, mask, **backend))
    assert_close(jax.vmap(run)(*stacked), expected)
    assert_close(jax.lax.scan(lambda carry, each: (carry, run(*each)), None, stacked)[1], expected)


@every_backend
def test_ffn_with_blocks_over_tensor(backend: dict[str, Any]) -> None:
    """A block-sparse FFN whose tokens choose under jit: every device has its blocks; value and gradients."""
    x, up, _, dy = (SMALL.operands("outputs")[k] for k in (0, 1, 2, 0))
    up, down = jnp.concatenate([up, -up], 1), random(7, 512, 128, scale=512**-0.5)
    mask = jnp.asarray(np.random.default_rng(3).random((3, 4)) < 0.5)
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))

    def ffn(x: jax.Array, up: jax.Array, down: jax.Array, mask: jax.Array, **backend: Any) -> jax.Array:
        hidden = jax.nn.relu(tile_sparse_matmul(x, up, mask, sparse="outputs", tile_size=32, **backend))
        return tile_sparse_matmul(hidden, down, mask, sparse="inputs", tile_size=32, **backend)

    # Pallas's interpreter cannot mark an index that a kernel loads as varying over the mesh.
    marked = "interpret" not in backend
    specs = {"in_specs": (P(), P(None, "tensor"), P("tensor"), P(None, "tensor")), "out_specs": P()}
    part = lambda *operands: jax.lax.psum(ffn(*operands, **backend), "tensor")
    sharded = jax.shard_map(part, mesh=mesh, check_vma=marked, **specs)
    y, vjp = jax.jit(lambda x, up, down: jax.vjp(lambda *w: sharded(*w, mask), x, up, down))(x, up, down)
    expected, expected_vjp = jax.vjp(lambda *w: ffn(*w, mask, **REFERENCE), x, up, down)
    assert_close((y, *vjp(dy)), (expected, *expected_vjp(dy)))


@either_side
def test_no_races_on_tpus(sparse: str) -> None:
    case = CASES["blocks of 128, odd sizes"]
    operands, expected = product(case, sparse)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    got = value_and_gradients(sparse, case.tile, *operands, implementation="mosaic_tpu", interpret=interpret)
    assert_close(got, expected)


@either_side
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target: str, sparse: str) -> None:
    """Forward and gradients of LLaMA2-7B's gate and down, in blocks of 128."""
    implementation: Any = "triton" if target == H100 else "mosaic_tpu"
    inputs, outputs = (4096, 11008) if sparse == "outputs" else (11008, 4096)
    x, weight, dy = (
        jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2000, inputs), (inputs, outputs), (2000, outputs))
    )
    mask = jax.ShapeDtypeStruct((16, 86), jnp.bool_)
    run = lambda *o: value_and_gradients(sparse, 128, *o, implementation=implementation)
    compile_for(target, run, x, weight, mask, dy)


def test_arguments_that_do_not_fit() -> None:
    x, weight, mask, _ = Case().operands("outputs")
    run = lambda x=x, weight=weight, mask=mask, sparse="outputs", tile_size=32, **backend: tile_sparse_matmul(
        x, weight, mask, sparse=sparse, tile_size=tile_size, **backend
    )
    for words, call in [
        ("x: expected \\[T, I\\], got shape \\(48,\\)", lambda: run(x[0])),
        ("x: expected float32, bfloat16 or float16, got int32", lambda: run(x.astype(jnp.int32))),
        ("weight: expected \\[48, O\\], got shape \\(96, 48\\)", lambda: run(weight=weight.T)),
        ("weight: expected the dtype of x, bfloat16", lambda: run(x.astype(jnp.bfloat16))),
        ("sparse: expected 'outputs' or 'inputs', got 'both'", lambda: run(sparse="both")),
        ("tile_size: expected at least 1, got 0", lambda: run(tile_size=0)),
        ("mask: expected bool \\[2, blocks\\], got bool of shape \\(3, 3\\)", lambda: run(tile_size=64)),
        ("mask: expected bool \\[3, blocks\\], got int32", lambda: run(mask=mask.astype(jnp.int32))),
        ("mask: expected a number of blocks that divides 96 outputs, got 5",
         lambda: run(mask=jnp.ones((3, 5), bool))),
        ("implementation 'triton': expected tiles and blocks of 16, 32, 64 or 128, got 32 and 96",
         lambda: run(mask=mask[:, :1], implementation="triton")),
        ("implementation 'mosaic_tpu': expected blocks and a weight of multiples of 128",
         lambda: run(implementation="mosaic_tpu")),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
