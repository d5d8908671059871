"""The sparse feed-forward operations: every backend against the float32 reference, forward and backward."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from pallas_kernels import Activation, PackedFFN, Predictor, block_sparse_ffn, neuron_sparse_ffn, pack_ffn
from pallas_kernels.ffn import activate
from pallas_kernels.triton import erf
from tests.kernels import BACKENDS, assert_close, on_newest, random, run

pytestmark = pytest.mark.every_jax

SILU, RELU = Activation("silu"), Activation("relu")


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and settings of one comparison."""

    tokens: int = 1
    width: int = 64
    neurons: int = 48
    block: int = 16
    dtype: Any = jnp.float32
    activation: Activation = SILU
    active: float = 0.5  # share of a token's active blocks, or of its active neurons
    residual: bool = True
    int8: bool = False  # the predictor's

    def x(self, seed: int = 0) -> jax.Array:
        return random(seed, self.tokens, self.width, dtype=self.dtype)

    def weights(self, seed: int = 1) -> PackedFFN:
        shape = self.width, self.neurons
        scale = self.width**-0.5
        return PackedFFN(*(random(seed + i, *shape[::-1], dtype=self.dtype, scale=scale) for i in range(3)))

    def mask(self, seed: int = 4) -> jax.Array:
        keep = np.random.default_rng(seed).random((self.tokens, self.neurons // self.block)) < self.active
        return jnp.asarray(keep)

    def predictor(self, rank: int = 8) -> Predictor:
        one = 32 if self.int8 else 1
        round_to = lambda x: jnp.round(one * x).astype(jnp.int8) if self.int8 else x.astype(self.dtype)
        down, up = round_to(random(5, rank, self.width)), round_to(random(6, self.neurons, rank))
        level = {0.0: jnp.inf, 1.0: -jnp.inf}.get(self.active, 3.0 * one**2)
        return Predictor(down, up, jnp.full(self.neurons, level))

    def base(self) -> jax.Array | None:
        return random(7, self.tokens, self.width) if self.residual else None


CASES = {
    "one token": Case(),
    "bfloat16, 16 tokens": Case(dtype=jnp.bfloat16, tokens=16, neurons=64, block=32),
    "float16": Case(dtype=jnp.float16, tokens=2, activation=RELU),
    "five tokens": Case(5, dtype=jnp.bfloat16, active=0.2, activation=Activation("fatrelu", 0.5), int8=True),
    "nothing active": Case(tokens=2, active=0.0),
    "all active": Case(tokens=3, active=1.0, residual=False),
    "odd sizes": Case(tokens=3, width=80, neurons=7 * 24, block=24, activation=RELU, int8=True),
}
MARKS = on_newest({"bfloat16, 16 tokens", "five tokens", "nothing active", "odd sizes"}, CASES)
every_case = pytest.mark.parametrize("case", [pytest.param(CASES[name], id=name, marks=MARKS[name]) for name in CASES])
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


@contextlib.contextmanager
def unless_unsupported(case: Case) -> Iterator[None]:
    """Half precision is the one thing that not every backend takes, and that they have to refuse by name."""
    try:
        yield
    except ValueError as e:
        assert case.dtype == jnp.float16 and "expected float32 or bfloat16, got float16" in str(e)


def block_ffn(case: Case, *operands: Any, **settings: Any) -> jax.Array:
    return block_sparse_ffn(*operands, activation=case.activation, block_size=case.block, **settings)


def masked_ffn(case: Case, **settings: Any) -> jax.Array:
    """The block-sparse FFN of a case's own operands."""
    op = lambda x, w, mask, y, **kw: block_ffn(case, x, w, mask=mask, residual=y, **kw)
    return run(op, case.x(), case.weights(), case.mask(), case.base(), **settings)


def neuron_ffn(case: Case, predicted: bool, **settings: Any) -> jax.Array:
    """The neuron-sparse FFN of a case's own operands."""
    op = lambda x, w, p, y, **kw: neuron_sparse_ffn(x, w, p, activation=case.activation, residual=y, **kw)
    predictor = case.predictor() if predicted else None
    return run(op, case.x(), case.weights(), predictor, case.base(), **settings)


@functools.cache
def expected_of(case: Case, op: str) -> jax.Array:
    """The reference's result, which all backends are held against."""
    if op == "block":
        return masked_ffn(case, implementation="reference")
    return neuron_ffn(case, op == "predicted", implementation="reference")


# --------------------------------------------------------------------------------------------------------------------
# Block-sparse
# --------------------------------------------------------------------------------------------------------------------


def test_reference_by_hand() -> None:
    """Two tokens, two blocks of one neuron: token 0 uses both, token 1 the second."""
    weights = pack_ffn(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, -1.0]]), jnp.array([[10.0], [100.0]]))
    x = jnp.array([[1.0], [-2.0]])
    mask = jnp.array([[True, True], [False, True]])
    y = block_sparse_ffn(x, weights, mask=mask, activation=Activation("fatrelu", -4.0), block_size=1)
    # token 0: 1 * 3 * 10 + 2 * -1 * 100; token 1: -4 * 2 * 100
    np.testing.assert_allclose(y, [[-170.0], [-800.0]])


@every_backend
@every_case
def test_block_sparse(case: Case, backend: dict[str, Any]) -> None:
    with unless_unsupported(case):
        got = masked_ffn(case, **backend)
        assert got.dtype == (jnp.float32 if case.residual else case.dtype)
        assert_close(got, expected_of(case, "block"), case.dtype)


@every_backend
@pytest.mark.parametrize("case", [Case(2, width=80, neurons=7 * 24, block=24), Case(dtype=jnp.bfloat16)])
def test_every_block(case: Case, backend: dict[str, Any]) -> None:
    """Neither a router nor a mask: the dense FFN."""
    x, weights = case.x(), case.weights()
    every = jnp.ones((case.tokens, case.neurons // case.block), bool)
    expected = block_ffn(case, x, weights, mask=every, implementation="reference")
    assert_close(run(functools.partial(block_ffn, case), x, weights, **backend), expected, case.dtype)


@pytest.mark.parametrize("case", [Case(activation=RELU), Case(5, activation=RELU, dtype=jnp.bfloat16, active=0.3)])
def test_deterministic(case: Case) -> None:
    """The kernels with atomics, without them: on ordinary cores, and on tensor cores, to which five tokens go."""
    backend = BACKENDS["triton"] | {"deterministic": True}
    assert_close(masked_ffn(case, **backend), expected_of(case, "block"), case.dtype)
    assert_close(neuron_ffn(case, False, **backend), expected_of(case, "exact"), case.dtype)
    assert_close(neuron_ffn(case, True, **backend), expected_of(case, "predicted"), case.dtype)


@every_backend
@pytest.mark.parametrize(("router_dtype", "threshold"), [(jnp.float32, 0.5), (jnp.bfloat16, 0.3)])
def test_router(threshold: float, router_dtype: Any, backend: dict[str, Any]) -> None:
    case = Case(tokens=3, width=80, dtype=jnp.bfloat16)
    x, weights = case.x(), case.weights()
    router = random(8, case.neurons // case.block, case.width, dtype=router_dtype, scale=0.2)
    scores = jax.nn.sigmoid(jnp.dot(x.astype(jnp.float32), router.astype(jnp.float32).T))
    mask = scores > threshold
    assert 0 < mask.sum() < mask.size
    expected = block_ffn(case, x, weights, mask=mask, implementation="reference")
    got = jax.jit(lambda t: block_ffn(case, x, weights, router, t, **backend))(jnp.float32(threshold))
    assert_close(got, expected, jnp.bfloat16)


@every_backend
def test_block_sparse_gradients(backend: dict[str, Any]) -> None:
    case = Case(tokens=3)
    x, weights, mask, residual = case.x(), case.weights(), case.mask(), case.base()
    router, dy = random(8, case.neurons // case.block, case.width), random(9, case.tokens, case.width)

    def loss(implementation: dict[str, Any], x: Any, weights: Any, residual: Any) -> jax.Array:
        by_mask = block_ffn(case, x, weights, mask=mask, residual=residual, **implementation)
        return jnp.sum((by_mask + block_ffn(case, x, weights, router, 0.4, **implementation)) * dy)

    gradient = lambda settings: jax.jit(jax.grad(functools.partial(loss, settings), argnums=(0, 1, 2)))
    expected = gradient({"implementation": "reference"})(x, weights, residual)
    assert_close(gradient(backend)(x, weights, residual), expected)
    assert not jax.grad(lambda r: block_ffn(case, x, weights, r, 0.4, **backend).sum())(router).any()


def vmapped_and_scanned(op: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Of xs [N, B, D], what op makes of each: by `jax.vmap`, and by `jax.lax.scan`."""

    def both(xs: jax.Array, **settings: Any) -> tuple[jax.Array, jax.Array]:
        one = functools.partial(op, **settings)
        return jax.vmap(one)(xs), jax.lax.scan(lambda carry, x: (carry, one(x)), None, xs)[1]

    return both


@every_backend
def test_block_sparse_in_vmap_and_scan(backend: dict[str, Any]) -> None:
    case = Case(tokens=2)
    weights, mask = case.weights(), case.mask()
    xs = jnp.stack([case.x(seed) for seed in (10, 11, 12)])
    one = lambda x, **kw: block_ffn(case, x, weights, mask=mask, **kw)
    expected = jnp.stack([run(one, x, implementation="reference") for x in xs])
    assert_close(run(vmapped_and_scanned(one), xs, **backend), (expected, expected))


@every_backend
def test_block_sparse_sharded(backend: dict[str, Any]) -> None:
    """Blocks split over `tensor`, the sum over it outside; value and gradients."""
    case = Case(tokens=2, neurons=128)
    x, weights, dy = case.x(), case.weights(), random(9, case.tokens, case.width)
    router = random(8, case.neurons // case.block, case.width)
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(x: jax.Array, weights: PackedFFN, router: jax.Array) -> jax.Array:
        return jax.lax.psum(block_ffn(case, x, weights, router, **backend), "tensor")

    over = P("tensor", None)
    specs = P(), PackedFFN(over, over, over), over
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=not backend.get("interpret"))
    one = lambda x, weights, router: block_ffn(case, x, weights, router, implementation="reference")
    value = lambda f: jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(f(x, w, router) * dy), argnums=(0, 1)))(
        x, weights
    )
    assert_close(value(sharded), value(one))


# --------------------------------------------------------------------------------------------------------------------
# Neuron-sparse
# --------------------------------------------------------------------------------------------------------------------


@every_backend
@every_case
@pytest.mark.parametrize("predicted", [False, True])
def test_neuron_sparse(predicted: bool, case: Case, backend: dict[str, Any]) -> None:
    with unless_unsupported(case):
        got = neuron_ffn(case, predicted, **backend)
        assert got.dtype == (jnp.float32 if case.residual else case.dtype)
        assert_close(got, expected_of(case, "predicted" if predicted else "exact"), case.dtype)


@every_backend
@pytest.mark.parametrize("predicted", [False, True])
def test_cutoff(predicted: bool, backend: dict[str, Any]) -> None:
    case = Case(tokens=2, activation=RELU)
    x, weights, predictor = case.x(), case.weights(), case.predictor() if predicted else None
    op = lambda cutoff, **kw: neuron_sparse_ffn(x, weights, predictor, cutoff=cutoff, activation=RELU, **kw)
    cutoff = jnp.abs(random(10, case.neurons))
    expected = run(op, cutoff, implementation="reference")
    assert_close(run(op, cutoff, **backend), expected)
    without = run(op, None, implementation="reference")
    assert jnp.abs(expected - without).max() > 1e-2


@every_backend
def test_neuron_sparse_gradients(backend: dict[str, Any]) -> None:
    case = Case(tokens=2, activation=RELU)
    x, weights, residual, predictor = case.x(), case.weights(), case.base(), case.predictor()
    dy = random(9, case.tokens, case.width)

    def loss(implementation: dict[str, Any], x: Any, weights: Any, residual: Any) -> jax.Array:
        exact = neuron_sparse_ffn(x, weights, activation=RELU, residual=residual, **implementation)
        return jnp.sum((exact + neuron_sparse_ffn(x, weights, predictor, activation=RELU, **implementation)) * dy)

    gradient = lambda settings: jax.jit(jax.grad(functools.partial(loss, settings), argnums=(0, 1, 2)))
    expected = gradient({"implementation": "reference"})(x, weights, residual)
    assert_close(gradient(backend)(x, weights, residual), expected)


@every_backend
def test_neuron_sparse_in_vmap_scan_and_shards(backend: dict[str, Any]) -> None:
    case = Case(tokens=2, activation=RELU, neurons=128)
    weights, predictor = case.weights(), case.predictor()
    xs = jnp.stack([case.x(seed) for seed in (10, 11, 12)])
    op = lambda x, w, p, **kw: neuron_sparse_ffn(x, w, p, activation=RELU, **kw)
    expected = jnp.stack([run(op, x, weights, predictor, implementation="reference") for x in xs])
    one = lambda x, **kw: op(x, weights, predictor, **kw)
    assert_close(run(vmapped_and_scanned(one), xs, **backend), (expected, expected))

    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    over = P("tensor", None)
    sharded = jax.shard_map(
        lambda x, w, p: jax.lax.psum(op(x, w, p, **backend), "tensor"),
        mesh=mesh,
        in_specs=(P(), PackedFFN(over, over, over), Predictor(P(), over, P("tensor"))),
        out_specs=P(),
        check_vma=not backend.get("interpret"),  # which Pallas's interpreters do not carry through
    )
    assert_close(jax.jit(sharded)(xs[0], weights, predictor), expected[0])


@pytest.mark.parametrize("op", ["block", "exact", "predicted"])
def test_no_races_on_a_tpu(op: str, capfd: pytest.CaptureFixture[str]) -> None:
    """In the TPU interpreter that follows copies and semaphores; it prints the races that it finds."""
    case = Case(tokens=2, activation=RELU)
    settings = {"implementation": "mosaic_tpu", "interpret": pltpu.InterpretParams(detect_races=True)}
    got = masked_ffn(case, **settings) if op == "block" else neuron_ffn(case, op == "predicted", **settings)
    assert_close(got, expected_of(case, op))
    assert "RACE" not in capfd.readouterr().out.upper()


# --------------------------------------------------------------------------------------------------------------------
# Bad arguments
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 36}, "block_size: expected a divisor of the 48 neurons, got 36"),
        ({"router": jnp.ones((3, 64))}, "router, mask: expected at most one of them, got both"),
        ({"mask": jnp.ones((1, 5), bool)}, r"mask: expected bool \(1, 3\)"),
        ({"x": jnp.ones((1, 32))}, r"weights.gate: expected shape \(48, 32\)"),
        ({"x": jnp.ones((1, 64), jnp.bfloat16)}, "weights.gate: expected the dtype of x, bfloat16, got float32"),
        ({"residual": jnp.ones((1, 64), jnp.bfloat16)}, "residual: expected float32"),
        ({"implementation": "cuda"}, "expected one of reference, xla, triton, mosaic_gpu, mosaic_tpu, got 'cuda'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    case = Case()
    arguments = {"x": case.x(), "weights": case.weights(), "mask": case.mask(), "block_size": 16} | change
    with pytest.raises(ValueError, match=message):
        block_sparse_ffn(**arguments, activation=SILU)


def test_bad_predictor() -> None:
    case = Case()
    good = case.predictor()
    for predictor, message in [
        (good._replace(up=jnp.ones((47, 8))), r"predictor.up: expected shape \(48, 8\)"),
        (good._replace(up=good.up.astype(jnp.int8)), "expected down and up of float32 or int8, got float32 and int8"),
        (good._replace(threshold=jnp.zeros(48, jnp.int8)), "predictor.threshold: expected float32, got int8"),
    ]:
        with pytest.raises(ValueError, match=message):
            neuron_sparse_ffn(case.x(), case.weights(), predictor, activation=RELU)
    half = dataclasses.replace(case, dtype=jnp.float16)
    with pytest.raises(ValueError, match="expected down and up of float16, got int8 and int8"):
        predictor = dataclasses.replace(case, int8=True).predictor()
        neuron_sparse_ffn(half.x(), half.weights(), predictor, activation=RELU)


@pytest.mark.parametrize("erf", [jax.lax.erf, erf])
def test_activations(erf: Any) -> None:
    g = jnp.linspace(-6, 6, 1001)
    expected = {
        "silu": jax.nn.silu(g),
        "gelu": jax.nn.gelu(g, approximate=False),
        "gelu_tanh": jax.nn.gelu(g, approximate=True),
        "relu": jax.nn.relu(g),
        "fatrelu": jnp.where(g >= 0.7, g, 0.0),
        "cats": jnp.where(jnp.abs(jax.nn.silu(g)) >= 0.7, jax.nn.silu(g), 0.0),
    }
    for kind, y in expected.items():
        np.testing.assert_allclose(activate(Activation(kind, 0.7), g, erf), y, atol=1e-6, rtol=1e-6, err_msg=kind)


def test_bad_activation() -> None:
    with pytest.raises(ValueError, match="activation: expected one of silu"):
        Activation("swish")  # type: ignore[arg-type]
