"""Packed N:M weights: the format byte by byte, and every backend against the float32 reference."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from pallas_kernels import Activation, PackedNM, nm_ffn, nm_matmul, pack, unpack
from tests.aot import H100, TARGETS, compile_for
from tests.kernels import BACKENDS, assert_close, on_newest, random, run

pytestmark = pytest.mark.every_jax

REFERENCE = {"implementation": "reference"}
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
every_axis = pytest.mark.parametrize("axis", ["input", "output"])


def sparse(seed: int, inputs: int, outputs: int, n: int, m: int, axis: str, dtype: Any = jnp.float32) -> jax.Array:
    """A random matrix [I, O] that keeps n of each m, fewer in its first quarter of rows."""
    rng = np.random.default_rng((seed, inputs, outputs))
    groups = (inputs, outputs // m, m) if axis == "output" else (outputs, inputs // m, m)
    keep = np.argsort(rng.random(groups), axis=-1) < n
    keep[: len(keep) // 4] &= rng.random(m) < 0.5
    keep = keep.reshape(groups[0], -1)
    weight = rng.standard_normal((inputs, outputs)) * (keep if axis == "output" else keep.T) * inputs**-0.5
    return jnp.asarray(weight, dtype)


# --------------------------------------------------------------------------------------------------------------------
# The format
# --------------------------------------------------------------------------------------------------------------------


def test_bytes_of_output_groups() -> None:
    """Two groups of four outputs, 16 inputs: the words of column c hold columns c, c + 2, ..., c + 14."""
    w = np.zeros((16, 8), np.float32)
    w[np.arange(16), np.arange(16) % 3] = 1 + np.arange(16)  # group 0, slot 0
    w[:, 3] = -1  # group 0, slot 1
    w[5, 6] = 50  # the only entry of its group in group 1: a zero at the lowest place, 0, goes before it
    packed = pack(jnp.asarray(w), 2, 4, "output")
    assert packed.values.shape == (2, 2, 16) and packed.indices.shape == (2, 2, 2, 2)
    np.testing.assert_array_equal(packed.values[0, 0], 1 + np.arange(16))
    np.testing.assert_array_equal(packed.values[1, 0], -np.ones(16))
    index = np.arange(16) % 3
    for column in range(2):
        word = sum(int(index[column + 2 * s]) << (2 * s) for s in range(8))
        assert packed.indices[0, 0, 0, column] == word & 255 and packed.indices[1, 0, 0, column] == word >> 8
    np.testing.assert_array_equal(packed.indices[:, 1, 0], 255)  # slot 1: index 3 everywhere
    assert packed.values[0, 1, 5] == 0 and packed.values[1, 1, 5] == 50
    # Column 5 is field 2 of column 1: bits 4 and 5 of byte 0. Columns without an entry fill with places 0 and 1.
    assert packed.indices[0, 0, 1, 1] == 0 and packed.indices[0, 1, 1, 1] == 0b01_10_01_01


def test_bytes_of_input_groups() -> None:
    """16 outputs, 12 inputs in groups of four: the words of row q hold outputs 8 q to 8 q + 7."""
    w = np.zeros((12, 16), np.float32)
    w[4 + np.arange(16) % 3, np.arange(16)] = 1 + np.arange(16)  # group 1, slot 0
    w[7] = -1  # group 1, slot 1
    packed = pack(jnp.asarray(w), 2, 4, "input")
    assert packed.values.shape == (2, 16, 3) and packed.indices.shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(packed.values[0, :, 1], 1 + np.arange(16))
    index = np.arange(16) % 3
    for row in range(2):
        word = sum(int(index[8 * row + s]) << (2 * s) for s in range(8))
        assert packed.indices[0, 0, row, 1] == word & 255 and packed.indices[1, 0, row, 1] == word >> 8
    np.testing.assert_array_equal(packed.indices[:, 1, :, 1], 255)


@given(st.data())
@settings(deadline=None, max_examples=6, derandomize=True)
def test_round_trip(data: Any) -> None:
    m = data.draw(st.sampled_from([2, 4, 8, 16]))
    n = data.draw(st.integers(1, m - 1))
    axis = data.draw(st.sampled_from(["input", "output"]))
    grouped, other = m * data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 7, 16, 27]))
    shape = (grouped, other) if axis == "input" else (other, grouped)
    weight = sparse(0, *shape, n, m, axis, jnp.bfloat16)
    packed = pack(weight, n, m, axis)
    assert (packed.n, packed.m, packed.shape, packed.dtype) == (n, m, shape, jnp.bfloat16)
    np.testing.assert_array_equal(unpack(packed).astype(jnp.float32), weight.astype(jnp.float32))


@every_axis
def test_size_of_half(axis: str) -> None:
    weight = sparse(0, 64, 128, 2, 4, axis, jnp.bfloat16)
    assert pack(weight, 2, 4, axis).nbytes == 0.5625 * weight.nbytes


@pytest.mark.parametrize(
    ("n", "m", "axis", "words"),
    [
        (2, 6, "input", "pattern: expected N:M with M of 2, 4, 8 or 16 and 0 < N < M, got 2:6"),
        (4, 4, "input", "pattern: .* got 4:4"),
        (2, 4, "matrix", "axis: expected 'input' or 'output', got 'matrix'"),
        (2, 8, "input", "weight: expected inputs in groups of 8, got 12 of them"),
        (2, 4, "input", "at most 2 nonzero inputs in each group of 4, got 3 in output 5, inputs 4 to 7"),
        (1, 4, "output", "at most 1 nonzero outputs in each group of 4, got 2 in input 3, outputs 8 to 11"),
    ],
)
def test_what_cannot_be_packed(n: int, m: int, axis: Any, words: str) -> None:
    weight = np.zeros((12, 16), np.float32)
    weight[4:7, 5] = 1
    weight[3, 9:11] = 1
    with pytest.raises(ValueError, match=words):
        pack(jnp.asarray(weight), n, m, axis)


# --------------------------------------------------------------------------------------------------------------------
# The products
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one comparison."""

    tokens: int = 1
    inputs: int = 64
    outputs: int = 96
    pattern: tuple[int, int] = (2, 4)
    dtype: Any = jnp.float32

    def x(self, seed: int = 0) -> jax.Array:
        return random(seed, self.tokens, self.inputs, dtype=self.dtype)

    def weight(self, axis: Any, seed: int = 1) -> PackedNM:
        return pack(sparse(seed, self.inputs, self.outputs, *self.pattern, axis, self.dtype), *self.pattern, axis)

    def ffn(self, axes: tuple[Any, Any]) -> tuple[PackedNM, PackedNM, PackedNM]:
        """Gate, up and down, `outputs` neurons."""
        turned = dataclasses.replace(self, inputs=self.outputs, outputs=self.inputs)
        return self.weight(axes[0], 1), self.weight(axes[0], 2), turned.weight(axes[1], 3)


CASES = {
    "one token": Case(),
    "bfloat16": Case(dtype=jnp.bfloat16),
    "bfloat16, 16 tokens": Case(dtype=jnp.bfloat16, tokens=16),
    "float16": Case(dtype=jnp.float16, tokens=2),
    "five tokens": Case(tokens=5, inputs=32, outputs=32),
    "odd sizes": Case(tokens=3, inputs=4 * 19, outputs=4 * 33),
    "1:2": Case(pattern=(1, 2), tokens=2),
    "3:4": Case(pattern=(3, 4)),
    "4:8, bfloat16, odd sizes": Case(pattern=(4, 8), inputs=8 * 9, outputs=8 * 7, dtype=jnp.bfloat16),
    "3:16": Case(pattern=(3, 16), inputs=32, outputs=48),
}
MARKS = on_newest({"one token", "bfloat16, 16 tokens", "odd sizes", "3:16"}, CASES)
every_case = pytest.mark.parametrize("case", [pytest.param(CASES[name], id=name, marks=MARKS[name]) for name in CASES])


@functools.cache
def product(case: Case, axis: str) -> tuple[jax.Array, PackedNM, jax.Array]:
    """x, the weight and the reference's product, which all backends are held against."""
    x, weight = case.x(), case.weight(axis)
    return x, weight, run(nm_matmul, x, weight, **REFERENCE)


@functools.cache
def fed_forward(
    case: Case, axes: tuple[str, str], activation: Activation, residual: bool
) -> tuple[tuple[Any, ...], dict[str, Any], jax.Array]:
    """The operands of the FFN, its settings and the reference's result."""
    operands = case.x(), *case.ffn(axes)
    settings = {"activation": activation, "residual": random(7, case.tokens, case.inputs) if residual else None}
    return operands, settings, run(nm_ffn, *operands, **settings, **REFERENCE)


@every_backend
@every_axis
@every_case
def test_matmul(case: Case, axis: str, backend: dict[str, Any]) -> None:
    x, weight, expected = product(case, axis)
    if case.dtype == jnp.float16 and backend["implementation"] == "mosaic_tpu":
        with pytest.raises(ValueError, match="'mosaic_tpu': expected float32 or bfloat16, got float16"):
            nm_matmul(x, weight, **backend)
        return
    got = run(nm_matmul, x, weight, **backend)
    assert got.dtype == case.dtype
    assert_close(got, expected, case.dtype)


@every_axis
def test_reference_is_the_dense_product(axis: str) -> None:
    case = CASES["odd sizes"]
    x, dense = case.x(), sparse(1, case.inputs, case.outputs, *case.pattern, axis)
    assert_close(nm_matmul(x, case.weight(axis), **REFERENCE), x @ dense)


@every_backend
@pytest.mark.parametrize(
    "axes",
    [
        ("output", "input"),
        ("input", "input"),
        pytest.param(("output", "output"), marks=pytest.mark.further),
        pytest.param(("input", "output"), marks=pytest.mark.further),
    ],
)
def test_ffn(axes: tuple[str, str], backend: dict[str, Any]) -> None:
    operands, settings, expected = fed_forward(Case(tokens=2, outputs=48), axes, Activation("fatrelu", 0.3), True)
    assert_close(run(nm_ffn, *operands, **settings, **backend), expected)


@every_backend
@pytest.mark.parametrize("name", ["bfloat16, 16 tokens", "1:2"])
def test_ffn_of_other_cases(name: str, backend: dict[str, Any]) -> None:
    case = CASES[name]
    operands, settings, expected = fed_forward(case, ("output", "input"), Activation("gelu"), False)
    got = run(nm_ffn, *operands, **settings, **backend)
    assert got.dtype == case.dtype
    assert_close(got, expected, case.dtype)


@every_backend
def test_gradients(backend: dict[str, Any]) -> None:
    """With respect to x, the values of the packed matrices and the residual."""
    case = Case(tokens=2)
    x, matrices, residual = case.x(), case.ffn(("output", "input")), random(7, 2, case.inputs)
    dx, dy = random(8, 2, case.outputs), random(9, 2, case.inputs)

    def loss(values: Any, x: Any, residual: Any, **kw: Any) -> jax.Array:
        gate, up, down = (dataclasses.replace(w, values=v) for w, v in zip(matrices, values, strict=True))
        y = nm_ffn(x, gate, up, down, activation=Activation("silu"), residual=residual, **kw)
        return jnp.sum(y * dy) + jnp.sum(nm_matmul(x, gate, **kw) * dx)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnames=("implementation", "interpret"))
    operands = [w.values for w in matrices], x, residual
    assert_close(gradient(*operands, **backend), gradient(*operands, **REFERENCE))


@every_backend
@every_axis
def test_vmap_and_scan(axis: str, backend: dict[str, Any]) -> None:
    case = Case(tokens=2)
    layers = [case.weight(axis, seed) for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    xs = jnp.stack([case.x(seed) for seed in (10, 11, 12)])
    op = lambda x, weight: nm_matmul(x, weight, **backend)
    expected = jnp.stack([nm_matmul(x, weight, **REFERENCE) for x, weight in zip(xs, layers, strict=True)])
    assert_close(run(jax.vmap(op), xs, stacked), expected)
    _, scanned = jax.lax.scan(lambda carry, each: (carry, op(*each)), None, (xs, stacked))
    assert_close(scanned, expected)


@every_backend
def test_sharded(backend: dict[str, Any]) -> None:
    """Neurons split over `tensor`, as dense matrices split; the sum over it outside; value and gradients."""
    case = Case(tokens=2, outputs=128)
    x, matrices, dy = case.x(), case.ffn(("output", "input")), random(9, 2, case.inputs)
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))

    def split(weight: PackedNM) -> PackedNM:
        if weight.axis == "output":
            return PackedNM(P(None, "tensor", None), P(None, None, "tensor", None), weight.axis)
        return PackedNM(P(None, None, "tensor"), P(None, None, None, "tensor"), weight.axis)

    def shard(x: jax.Array, values: Any, indices: Any) -> jax.Array:
        gate, up, down = (PackedNM(v, i, w.axis) for v, i, w in zip(values, indices, matrices, strict=True))
        return jax.lax.psum(nm_ffn(x, gate, up, down, activation=Activation("silu"), **backend), "tensor")

    values, indices = [w.values for w in matrices], [w.indices for w in matrices]
    specs = [split(w) for w in matrices]
    # Pallas's interpreter cannot mark what a kernel indexes with as varying over the mesh.
    marked = "interpret" not in backend
    placed = P(), [s.values for s in specs], [s.indices for s in specs]
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=placed, out_specs=P(), check_vma=marked)

    def whole(x: jax.Array, values: Any, indices: Any) -> jax.Array:
        gate, up, down = (PackedNM(v, i, w.axis) for v, i, w in zip(values, indices, matrices, strict=True))
        return nm_ffn(x, gate, up, down, activation=Activation("silu"), **REFERENCE)

    value = lambda f: jax.jit(jax.value_and_grad(lambda x, v: jnp.sum(f(x, v, indices) * dy), argnums=(0, 1)))(
        x, values
    )
    assert_close(value(sharded), value(whole))


@every_axis
def test_no_races_on_tpus(axis: str) -> None:
    case = Case(tokens=3, outputs=640, inputs=128, dtype=jnp.bfloat16)
    x, weight = case.x(), case.weight(axis)
    interpret = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized"
    )
    got = nm_matmul(x, weight, implementation="mosaic_tpu", interpret=interpret)
    assert_close(got, nm_matmul(x, weight, **REFERENCE), jnp.bfloat16)


@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target: str) -> None:
    """LLaMA2-7B's FFN as DaSS groups it; SmolLM2's for eight tokens, and for two as the other methods group it."""
    implementation: Any = "triton" if target == H100 else "mosaic_tpu"

    def packed(inputs: int, outputs: int, axis: Any) -> PackedNM:
        make = lambda: pack(jnp.zeros((inputs, outputs), jnp.bfloat16), 2, 4, axis)
        return jax.eval_shape(make)

    def ffn(x: jax.Array, gate: Any, up: Any, down: Any, residual: jax.Array) -> jax.Array:
        return nm_ffn(
            x, gate, up, down, activation=Activation("gelu"), residual=residual, implementation=implementation
        )

    for tokens, width, neurons, axis in [
        (1, 4096, 11008, "output"),
        (8, 576, 1536, "output"),
        (2, 576, 1536, "input"),
    ]:
        gate, down = packed(width, neurons, axis), packed(neurons, width, "input")
        x, residual = (jax.ShapeDtypeStruct((tokens, width), dtype) for dtype in (jnp.bfloat16, jnp.float32))
        compile_for(target, ffn, x, gate, gate, down, residual)


def test_arguments_that_do_not_fit() -> None:
    case = Case()
    gate, up, down = case.ffn(("output", "input"))
    silu = Activation("silu")
    for words, call in [
        ("x: expected \\[B, I\\], got shape \\(64,\\)", lambda: nm_matmul(case.x()[0], gate)),
        ("weight: expected 64 inputs, got 96", lambda: nm_matmul(case.x(), down)),
        ("weight: expected the dtype of x, bfloat16", lambda: nm_matmul(case.x().astype(jnp.bfloat16), gate)),
        ("x: expected float32, .* got int32", lambda: nm_matmul(case.x().astype(jnp.int32), gate)),
        ("up: expected gate's pattern and shape, 2:4 along the outputs of \\(64, 96\\), got 2:4 along the inputs",
         lambda: nm_ffn(case.x(), gate, case.weight("input"), down, activation=silu)),
        ("down: expected 96 inputs, got 64", lambda: nm_ffn(case.x(), gate, up, up, activation=silu)),
        ("residual: expected float32 \\(1, 64\\)",
         lambda: nm_ffn(case.x(), gate, up, down, activation=silu, residual=case.x().astype(jnp.bfloat16))),
        ("weight: expected one matrix", lambda: nm_matmul(case.x(), jax.tree.map(lambda x: x[None], gate))),
        ("implementation 'mosaic_gpu': nm_matmul has no such backend",
         lambda: nm_matmul(case.x(), gate, implementation="mosaic_gpu")),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
