"""The sparse feed-forward operations compiled for every TPU and for the H100, at the shapes of real models."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import Activation, PackedFFN, Predictor, block_sparse_ffn, neuron_sparse_ffn
from tests.aot import H100, TARGETS, compile_for

pytestmark = pytest.mark.every_jax

SHAPES = {"llama2-7b": (4096, 11008), "llama2-13b": (5120, 13824), "llama3-8b": (4096, 14336), "smollm2": (576, 1536)}
BLOCK, RANK = 32, 128


def backend(target: str) -> Any:
    return "triton" if target == H100 else "mosaic_tpu"


def shapes(model: str, tokens: int, dtype: Any = jnp.bfloat16) -> tuple[Any, PackedFFN, Any]:
    """x, the weights and the residual, as shapes."""
    d, f = SHAPES[model]
    w = jax.ShapeDtypeStruct((f, d), dtype)
    return jax.ShapeDtypeStruct((tokens, d), dtype), PackedFFN(w, w, w), jax.ShapeDtypeStruct((tokens, d), jnp.float32)


def compile_block(target: str, model: str, tokens: int, dtype: Any = jnp.bfloat16, **settings: Any) -> Any:
    x, weights, residual = shapes(model, tokens, dtype)
    router = jax.ShapeDtypeStruct((SHAPES[model][1] // BLOCK, x.shape[1]), dtype)
    op = functools.partial(block_sparse_ffn, activation=Activation("silu"), block_size=BLOCK, **settings)
    run = lambda x, w, router, y: op(x, w, router, residual=y, implementation=backend(target))
    return compile_for(target, run, x, weights, router, residual)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("model", "tokens"), [("llama2-7b", 1), ("llama2-13b", 8), ("smollm2", 16)])
def test_block_sparse(model: str, tokens: int, target: str) -> None:
    compile_block(target, model, tokens)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize(("model", "tokens"), [("llama3-8b", 1), ("smollm2", 4)])
def test_neuron_sparse(model: str, tokens: int, predicted: bool, target: str) -> None:
    x, weights, residual = shapes(model, tokens)
    d, f = SHAPES[model]
    dtype = jnp.int8 if model == "llama3-8b" else x.dtype
    parts = ((RANK, d), dtype), ((f, RANK), dtype), ((f,), jnp.float32)
    predictor = Predictor(*(jax.ShapeDtypeStruct(*part) for part in parts)) if predicted else None
    run = lambda x, w, p, y: neuron_sparse_ffn(
        x, w, p, residual=y, activation=Activation("relu"), implementation=backend(target)
    )
    compile_for(target, run, x, weights, predictor, residual)


def test_one_launch_adds_to_the_residual_on_the_h100() -> None:
    """Beside the router's, and without a copy of the residual: the output takes its place."""
    compiled = compile_block(H100, "llama2-7b", 1)
    assert compiled.as_text().count("__gpu$xla.gpu.triton") == 2
    assert compiled.memory_analysis().temp_size_in_bytes < 10_000


@pytest.mark.parametrize("settings", [{"deterministic": True}, {"dtype": jnp.float32, "tokens": 4}, {"most": True}])
def test_variants_on_the_h100(settings: dict[str, Any]) -> None:
    compile_block(H100, "llama2-7b", **({"tokens": 1} | settings))


@pytest.mark.parametrize("target", [H100, "v5e:2x2"])
def test_in_shard_map_with_its_checks(target: str) -> None:
    """The types that `jax.shard_map` checks agree, which interpreters do not carry through."""
    x, weights, _ = shapes("smollm2", 2)
    router = jax.ShapeDtypeStruct((weights.gate.shape[0] // BLOCK, x.shape[1]), jnp.float32)
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    op = functools.partial(block_sparse_ffn, activation=Activation("silu"), block_size=BLOCK)
    run = jax.shard_map(
        lambda x, w, r: jax.lax.psum(op(x, w, r, implementation=backend(target)), "tensor"),
        mesh=mesh,
        in_specs=(P(), P("tensor"), P("tensor")),
        out_specs=P(),
    )
    jax.eval_shape(run, x, weights, router)
    gradient = jax.grad(lambda x, w, r: run(x, w, r).astype(jnp.float32).sum(), argnums=(0, 1))
    jax.eval_shape(gradient, x, weights, router)
