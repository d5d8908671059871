"""The Mosaic GPU kernels: interpreted with race detection against the float32 reference, and compiled for the H100."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import Activation, PackedFFN, block_sparse_ffn
from pallas_kernels.block_sparse_ffn import reference
from pallas_kernels.block_sparse_ffn.reference import Router
from tests.aot import H100, compile_for
from tests.kernels import assert_close, random
from tests.test_kernels_ffn import RELU, SILU, Case

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)
if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("needs JAX 0.11 or newer", allow_module_level=True)

from pallas_kernels import mosaic_gpu as shared  # noqa: E402
from pallas_kernels.block_sparse_ffn import mosaic_gpu as block_sparse  # noqa: E402

Tuning = shared.Tuning
NARROW = Case(width=128, neurons=24, block=4)  # the narrowest that the layouts allow: the interpreter is slow
CASES = {
    "one token": (NARROW, Tuning(blocks=2)),
    "bfloat16, 4 tokens": (Case(4, 256, 24, 4, jnp.bfloat16), Tuning(blocks=3, stages=2)),
    "float16, two warpgroups": (Case(2, 512, 24, 4, jnp.float16), Tuning(blocks=2, stages=2)),
    "three panels, rows that do not divide": (Case(1, 384, 30, 5, activation=RELU), Tuning(rows=3, blocks=2)),
    "nothing active": (dataclasses.replace(NARROW, tokens=2, active=0.0), Tuning(blocks=2)),
    "all active": (dataclasses.replace(NARROW, active=1.0), Tuning(blocks=2)),
    "more thread blocks than steps": (dataclasses.replace(NARROW, neurons=4, active=1.0), Tuning(blocks=3)),
    "gelu": (dataclasses.replace(NARROW, activation=Activation("gelu")), Tuning(blocks=2)),
    "cats": (dataclasses.replace(NARROW, activation=Activation("cats", 0.1)), Tuning(blocks=2)),
    "more flags than one copy holds": (Case(1, 128, 300, 1, active=0.02), Tuning(blocks=2)),
    "no residual": (dataclasses.replace(NARROW, residual=False), Tuning(blocks=2)),
}


def racing(capfd: pytest.CaptureFixture[str]) -> bool:
    """Whether the interpreter reported a race; it prints them."""
    return "RACE DETECTED" in capfd.readouterr().out


@pytest.mark.parametrize(("case", "tuning"), CASES.values(), ids=CASES)
def test_block_sparse(case: Case, tuning: Any, capfd: pytest.CaptureFixture[str]) -> None:
    operands = case.x(), case.weights(), case.mask()
    keywords = {"residual": case.base(), "activation": case.activation, "block_size": case.block}
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    run = partial(block_sparse.block_sparse_ffn, **keywords, tuning=tuning, interpret=interpret)
    got = jax.jit(run)(*operands)
    assert not racing(capfd)
    assert_close(got, reference.block_sparse_ffn(*operands, **keywords))


def test_block_sparse_by_name_routed_in_vmap_and_shards() -> None:
    """Through the public function: a router, its gradient, a batch of batches, a mesh."""
    case = dataclasses.replace(NARROW, tokens=2)
    weights, router = case.weights(), random(8, case.neurons // case.block, case.width)
    xs = jnp.stack([case.x(seed) for seed in (10, 11)])
    run = lambda x, weights, router, **how: block_sparse_ffn(
        x, weights, router, 0.4, activation=SILU, block_size=case.block, **how
    )
    mosaic = partial(run, implementation="mosaic_gpu", interpret=True)
    over = P("tensor", None)
    sharded = jax.shard_map(
        lambda x, weights, router: jax.lax.psum(mosaic(x, weights, router), "tensor"),
        mesh=jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,)),  # the interpreter takes one
        in_specs=(P(), PackedFFN(over, over, over), over),
        out_specs=P(),
    )

    def values(f: Any) -> Any:
        batched = jax.vmap(lambda x: f(x, weights, router))
        return batched(xs), jax.grad(lambda weights: f(xs[0], weights, router).sum())(weights)

    expected = values(partial(run, implementation="reference"))
    assert_close(jax.jit(lambda: values(mosaic))(), expected)
    assert_close(jax.jit(sharded)(xs[0], weights, router), expected[0][0])


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (Case(5, 128), "1 to 4 tokens"),
        (Case(1, 64), "width that 128 divides"),
        (Case(4, 8192, 32), "at most 16384 values"),
    ],
)
def test_refusals(case: Case, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        block_sparse_ffn(
            case.x(),
            case.weights(),
            mask=case.mask(),
            activation=SILU,
            block_size=case.block,
            implementation="mosaic_gpu",
        )


# --------------------------------------------------------------------------------------------------------------------
# For the H100
# --------------------------------------------------------------------------------------------------------------------


def shapes(tokens: int, width: int, neurons: int, block: int, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """x, weights, router and residual."""
    weight = jax.ShapeDtypeStruct((neurons, width), dtype)
    return (
        jax.ShapeDtypeStruct((tokens, width), dtype),
        PackedFFN(weight, weight, weight),
        Router(jax.ShapeDtypeStruct((neurons // block, width), dtype), jax.ShapeDtypeStruct((1,), jnp.float32)),
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
    )


@pytest.mark.parametrize(
    ("tokens", "width", "neurons", "block", "dtype"),
    [
        (1, 4096, 11008, 32, jnp.bfloat16),  # LLaMA2-7B
        (4, 4096, 11008, 32, jnp.bfloat16),
        (3, 5120, 13824, 32, jnp.float16),  # LLaMA2-13B
        (2, 2560, 6912, 12, jnp.float32),
    ],
)
def test_block_sparse_compiles_for_the_h100(tokens: int, width: int, neurons: int, block: int, dtype: Any) -> None:
    def run(x: Any, weights: Any, router: Any, residual: Any) -> jax.Array:
        return block_sparse.block_sparse_ffn(
            x, weights, router, residual=residual, activation=SILU, block_size=block, tuning=None
        )

    compiled = compile_for(H100, run, *shapes(tokens, width, neurons, block, dtype))
    assert "mosaic_gpu" in compiled.as_text()
