"""The Mosaic GPU kernels: interpreted with race detection against the float32 reference, and compiled for the H100."""

import dataclasses
import types
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    Activation,
    BlockSparse,
    PackedFFN,
    Predictor,
    backend,
    block_sparse_ffn,
    block_sparse_matmul,
    neuron_sparse_ffn,
    tile_sparse_matmul,
)
from pallas_kernels.block_sparse_ffn import api as block_api
from pallas_kernels.block_sparse_ffn import reference as block_reference
from pallas_kernels.block_sparse_ffn.reference import Router
from pallas_kernels.block_sparse_matmul import api as block_product_api
from pallas_kernels.block_sparse_matmul import reference as matmul_reference
from pallas_kernels.neuron_sparse_ffn import reference as neuron_reference
from pallas_kernels.tile_sparse_matmul import api as tile_product_api
from pallas_kernels.tile_sparse_matmul import reference as tile_reference
from tests.aot import H100, compile_for
from tests.kernels import assert_close, random
from tests.test_kernels_blocks import Case as Product
from tests.test_kernels_blocks import value_and_gradients
from tests.test_kernels_ffn import RELU, SILU, Case
from tests.test_kernels_tiles import Case as Tiles
from tests.test_kernels_tiles import value_and_gradients as tile_gradients

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu", exc_type=ImportError)
if jax.__version_info__ < (0, 11):
    pytest.skip("needs JAX 0.11 or newer", allow_module_level=True)

from pallas_kernels import mosaic_gpu as shared  # noqa: E402
from pallas_kernels.block_sparse_ffn import mosaic_gpu as block_sparse  # noqa: E402
from pallas_kernels.block_sparse_ffn import mosaic_gpu_wgmma as more_tokens  # noqa: E402
from pallas_kernels.block_sparse_matmul import mosaic_gpu as matmul  # noqa: E402
from pallas_kernels.neuron_sparse_ffn import mosaic_gpu as neuron_sparse  # noqa: E402
from pallas_kernels.tile_sparse_matmul import mosaic_gpu as tile_sparse  # noqa: E402

pytestmark = pytest.mark.every_jax

ONE = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))  # the interpreter takes no more
Tuning, Exact, Wide = shared.Tuning, neuron_sparse.Tuning, more_tokens.Tuning
NARROW = Case(width=128, neurons=24, block=4)  # the narrowest that the layouts allow: the interpreter is slow
CASES = {
    "one token, gelu, no residual": (
        dataclasses.replace(NARROW, activation=Activation("gelu"), residual=False),
        Tuning(blocks=2),
    ),
    "bfloat16, 4 tokens": (Case(4, 256, 12, 4, jnp.bfloat16), Tuning(blocks=2, stages=2)),
    "float16, two warpgroups": (Case(2, 512, 12, 4, jnp.float16), Tuning(blocks=2, stages=2)),
    "three panels, rows that do not divide": (Case(1, 384, 30, 5, activation=RELU), Tuning(rows=3, blocks=2)),
    "nothing active": (dataclasses.replace(NARROW, tokens=2, active=0.0), Tuning(blocks=2)),
    "all active, more thread blocks than steps": (
        dataclasses.replace(NARROW, neurons=4, active=1.0),
        Tuning(blocks=3),
    ),
    "cats, more flags than one copy holds": (
        Case(1, 128, 300, 1, active=0.02, activation=Activation("cats", 0.1)),
        Tuning(blocks=2),
    ),
    "5 tokens, columns and neurons that end within a step": (
        Case(5, 192, 80, 16, jnp.bfloat16),
        Wide(depth=64, columns=128, stages=2, blocks=2),
    ),
    "8 tokens, float16, blocks of two units, a ring longer than the work": (
        Case(8, 64, 96, 32, jnp.float16, RELU),
        Wide(stages=8, blocks=3),
    ),
    "11 tokens, gelu, no residual, one slice, one thread block": (
        Case(11, 128, 256, 64, jnp.bfloat16, Activation("gelu"), residual=False),
        Wide(neurons=32, depth=64, columns=64, stages=2, blocks=1),
    ),
    "16 tokens, fatrelu, more blocks than 128 flags": (
        Case(16, 64, 2080, 16, jnp.bfloat16, Activation("fatrelu", 0.2), active=0.002),
        Wide(blocks=2),
    ),
    "16 tokens, all active, blocks of 128": (
        Case(16, 64, 128, 128, jnp.bfloat16, active=1.0),
        Wide(neurons=32, blocks=5),
    ),
    "6 tokens, nothing active": (Case(6, 64, 64, 32, jnp.bfloat16, active=0.0), Wide(blocks=2)),
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
    wide = isinstance(tuning, Wide)  # rounds the hidden values
    assert_close(got, block_reference.block_sparse_ffn(*operands, **keywords), case.dtype if wide else jnp.float32)


def test_scores_of_no_more_than_the_tokens_and_blocks() -> None:
    """What pads either scores 0, and sigmoid(0) is above the threshold."""
    case = Case(9, 192, 128, 16, jnp.bfloat16)
    router = Router(random(8, 8, case.width, dtype=case.dtype, scale=0.1), jnp.full(1, 0.4))
    x = jnp.pad(case.x(), ((0, 7), (0, 0)))
    got = jax.jit(lambda: more_tokens._scored(x, case.tokens, router, True, Wide(depth=64, stages=2)))()
    mask = block_reference.active_blocks(case.x(), router, 8)
    assert 0 < mask.sum() < mask.size
    assert (got == more_tokens._users(mask)).all()


NEURON_CASES = {
    "exact": (Case(1, 256, 24, dtype=jnp.bfloat16, activation=RELU), Exact(blocks=2)),
    "exact, two tokens and warpgroups, a short ring": (
        Case(2, 512, 12, dtype=jnp.float16, activation=RELU),
        Exact(rows=3, stages=2, slots=2, blocks=2),
    ),
    "exact, all active, one slot": (dataclasses.replace(NARROW, activation=SILU), Exact(slots=1, blocks=3)),
    "exact, none active": (
        dataclasses.replace(NARROW, activation=Activation("fatrelu", 100.0), residual=False),
        Exact(blocks=2),
    ),
    "predicted": (dataclasses.replace(NARROW, tokens=2, activation=RELU), Tuning(blocks=2)),
}


@pytest.mark.parametrize(("case", "tuning"), NEURON_CASES.values(), ids=NEURON_CASES)
def test_neuron_sparse(case: Case, tuning: Any, capfd: pytest.CaptureFixture[str]) -> None:
    predictor = case.predictor() if isinstance(tuning, Tuning) else None
    operands = case.x(), case.weights(), predictor, None
    keywords = {"residual": case.base(), "activation": case.activation}
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    got = jax.jit(partial(neuron_sparse.neuron_sparse_ffn, **keywords, tuning=tuning, interpret=interpret))(*operands)
    assert not racing(capfd)
    assert_close(got, neuron_reference.neuron_sparse_ffn(*operands, **keywords))


@pytest.mark.parametrize("case", [dataclasses.replace(NARROW, tokens=2, neurons=8), Case(9, 64, 128, 16, jnp.bfloat16)])
def test_block_sparse_by_name_routed_in_transformations(case: Case) -> None:
    """Through the public function: a router, its gradient, a batch of batches in a loop, a mesh."""
    weights, router = case.weights(), random(8, case.neurons // case.block, case.width, dtype=case.dtype, scale=0.1)
    xs = jnp.stack([case.x(seed) for seed in (10, 11)])
    run = lambda x, weights, router, **how: block_sparse_ffn(
        x, weights, router, 0.6, activation=SILU, block_size=case.block, **how
    )
    mosaic = partial(run, implementation="mosaic_gpu", interpret=True)
    over = P("tensor", None)
    sharded = jax.shard_map(
        lambda x, weights, router: jax.lax.psum(mosaic(x, weights, router), "tensor"),
        mesh=ONE,
        in_specs=(P(), PackedFFN(over, over, over), over),
        out_specs=P(),
    )

    def values(f: Any) -> Any:
        one = lambda x: f(x, weights, router)
        gradient = jax.grad(lambda weights: f(xs[0], weights, router).astype(jnp.float32).sum())(weights)
        return jax.lax.map(jax.vmap(one), xs[None])[0], gradient

    expected = values(partial(run, implementation="reference"))
    assert_close(jax.jit(lambda: values(mosaic))(), expected, case.dtype)
    in_float32 = router.astype(jnp.float32)  # which XLA scores, whatever the number of tokens
    assert_close(jax.jit(sharded)(xs[0], weights, in_float32), expected[0][0], case.dtype)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (Case(17, 128, dtype=jnp.bfloat16), "1 to 16 tokens"),
        (Case(1, 64), "width that 128 divides"),
        (Case(4, 8192, 32), "at most 16384 values"),
        (Case(5), "bfloat16 or float16 for 5 tokens, which go to tensor cores, got float32"),
        (Case(5, 96, dtype=jnp.bfloat16), "width that 64 divides for 5 tokens, got 96"),
        (Case(5, block=24, dtype=jnp.bfloat16), "block size that 16 divides for 5 tokens, got 24"),
        (Case(9, 5184, 16, dtype=jnp.bfloat16), "at most 81920 values of x, .* got 16 x 5184"),
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


Tiling = matmul.Tuning
PRODUCTS = {
    "bfloat16, blocks of 128, all active, a short ring": (
        Product(tokens=64, inputs=256, outputs=256, block=128, density=1.0, dtype=jnp.bfloat16),
        Tiling(tokens=64, stages=2, programs=1),
    ),
    "float16, tokens beyond two tiles, odd columns, spare places": (
        Product(tokens=136, inputs=192, outputs=128, block=64, dtype=jnp.float16, spare=3),
        Tiling(tokens=64, stages=3, group=1, programs=2),
    ),
    "nothing active, fewer tokens than a tile": (
        Product(tokens=8, inputs=64, outputs=64, block=64, density=0.0, dtype=jnp.bfloat16, spare=1),
        Tiling(tokens=64, programs=1),
    ),
}


@pytest.mark.parametrize(("case", "tuning"), PRODUCTS.values(), ids=PRODUCTS)
def test_block_sparse_matmul(case: Product, tuning: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Forward, dX and dW."""
    x, weight, dy = case.operands()

    def three(module: Any, *how: Any) -> Any:
        products = module.matmul(x, weight, *how), module.transposed_matmul(dy, weight, *how)
        return *products, module.block_products(x, dy, weight, *how)

    got = jax.jit(lambda: three(matmul, plgpu.InterpretGPUParams(detect_races=True), tuning))()
    assert not racing(capfd)
    assert_close(got, three(matmul_reference), case.dtype)


def test_block_sparse_matmul_by_name_in_vmap_and_shards() -> None:
    """Through the public function: a batch of batches, and with its gradients in a mesh."""
    case = Product(tokens=16, inputs=64, outputs=64, block=64, density=1.0, dtype=jnp.bfloat16)
    x, weight, dy = case.operands()
    how: Any = {"implementation": "mosaic_gpu", "interpret": True}
    over, columns = P("tensor"), P(None, "tensor")
    sharded = jax.shard_map(
        partial(value_and_gradients, **how), mesh=ONE, in_specs=(P(), over, columns), out_specs=(columns, P(), over)
    )
    batched = jax.vmap(lambda x: block_sparse_matmul(x, weight, **how))
    got = jax.jit(lambda: (batched(jnp.stack([x, 2 * x])), sharded(x, weight, dy)))()
    y, *gradients = value_and_gradients(x, weight, dy, implementation="reference")
    assert_close(got, (jnp.stack([y, 2 * y]), (y, *gradients)), case.dtype)


Slices = tile_sparse.Tuning
TILES = {
    "bfloat16, tiles that end early, odd blocks and slices, a slice over the edge": (
        Tiles(tokens=136, tile=64, width=192, block=64, blocks=3, dtype=jnp.bfloat16),
        Slices(stages=3, group=1, programs=2),
    ),
    "float16, tiles and blocks of 128, all active, a short ring": (
        Tiles(tokens=128, tile=128, width=128, block=128, blocks=2, density=1.0, dtype=jnp.float16),
        Slices(width=64, stages=2, programs=1),
    ),
    "nothing active, fewer tokens than a tile": (
        Tiles(tokens=8, tile=64, width=64, block=64, blocks=3, density=0.0, dtype=jnp.bfloat16),
        Slices(width=64, programs=2),
    ),
}


@pytest.mark.parametrize("sparse", ["outputs", "inputs"])
@pytest.mark.parametrize(("case", "tuning"), TILES.values(), ids=TILES)
def test_tile_sparse_matmul(case: Tiles, tuning: Any, sparse: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Forward, dX and dW."""
    x, weight, mask, dy = case.operands(sparse)
    turned: Any = "inputs" if sparse == "outputs" else "outputs"

    def three(module: Any, *how: Any) -> Any:
        return (
            module.matmul(x, weight, mask, sparse, case.tile, False, *how),
            module.matmul(dy, weight, mask, turned, case.tile, True, *how),
            module.weight_gradient(x, dy, mask, sparse, case.tile, *how),
        )

    got = jax.jit(lambda: three(tile_sparse, plgpu.InterpretGPUParams(detect_races=True), tuning))()
    assert not racing(capfd)
    assert_close(got, three(tile_reference), case.dtype)


def test_tile_sparse_matmul_by_name_in_vmap_scan_and_shards() -> None:
    """Through the public function: masks that differ, and with its gradients in a mesh."""
    case = Tiles(tokens=16, tile=64, width=64, block=64, blocks=2, dtype=jnp.bfloat16)
    how: Any = {"implementation": "mosaic_gpu", "interpret": True}
    masks = jnp.asarray([[[True, False]], [[False, True]]])
    x, weight, _, dy = case.operands("outputs")
    columns = P(None, "tensor")
    sharded = jax.shard_map(
        partial(tile_gradients, "outputs", case.tile, **how),
        mesh=ONE,
        in_specs=(P(), columns, columns, columns),
        out_specs=(columns, P(), columns),
    )
    product = lambda mask, **how: tile_sparse_matmul(x, weight, mask, sparse="outputs", tile_size=case.tile, **how)
    run = partial(product, **how)
    got = jax.jit(lambda: (jax.vmap(run)(masks), jax.lax.map(run, masks), sharded(x, weight, masks[0], dy)))()
    expected = jnp.stack([product(mask, implementation="reference") for mask in masks])
    gradients = tile_gradients("outputs", case.tile, x, weight, masks[0], dy, implementation="reference")
    assert_close(got, (expected, expected, gradients), case.dtype)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (Tiles(tile=64, block=64), "expected bfloat16 or float16, got float32"),
        (Tiles(dtype=jnp.bfloat16), "expected tiles and blocks of 64 or 128, got 32 and 32"),
        (Tiles(tile=64, block=64, dtype=jnp.bfloat16), "expected a weight that 64 divides, got \\(48, 192\\)"),
        (Tiles(12, 64, 64, 64, dtype=jnp.bfloat16), "expected a number of tokens that 8 divides, got 12"),
    ],
)
def test_refused_tiles(case: Tiles, names: str) -> None:
    x, weight, mask, _ = case.operands("outputs")
    with pytest.raises(ValueError, match=names):
        tile_sparse_matmul(x, weight, mask, sparse="outputs", tile_size=case.tile, implementation="mosaic_gpu")


@pytest.mark.parametrize(("block", "chosen"), [(8, "triton"), (4, "xla")])
def test_has_to_be_named(block: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, too, and where Triton's kernel does not take the call."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    package = block_sparse.__name__.rpartition(".")[0]
    module = backend.choose(package, None, NARROW.x(), NARROW.weights(), block)
    assert module.__name__ == f"{package}.{chosen}"


@pytest.mark.parametrize(
    ("capability", "dtype", "chosen"),
    [("9.0", jnp.bfloat16, "mosaic_gpu"), ("9.0", jnp.float32, "triton"), ("8.0", jnp.bfloat16, "triton")],
)
def test_products_go_to_it_on_hopper(capability: str, dtype: Any, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    called = []
    for api in (block_product_api, tile_product_api):
        monkeypatch.setattr(api, "_matmul", lambda module, *_: called.append(module.__name__.rpartition(".")[2]))
    x, weight, _ = Product(64, 64, 64, 64, 1.0, dtype).operands()
    block_sparse_matmul(x, weight)
    tile_sparse_matmul(x, jnp.zeros((64, 64), dtype), jnp.ones((1, 1), bool), sparse="outputs", tile_size=64)
    assert called == [chosen, chosen]


@pytest.mark.parametrize(("tokens", "chosen"), [(4, "triton"), (5, "mosaic_gpu"), (16, "mosaic_gpu")])
def test_ffn_of_more_tokens_goes_to_it_on_hopper(tokens: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    called = []
    monkeypatch.setattr(block_api, "sparse_ffn", lambda body, x, *_: called.append(body.run.__module__) or x)
    case = Case(tokens, 128, 64, 32, jnp.bfloat16)
    block_sparse_ffn(case.x(), case.weights(), mask=jnp.ones((tokens, 2), bool), block_size=32, activation=SILU)
    assert called[0].rpartition(".")[2] == chosen


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (Product(), "expected bfloat16 or float16, got float32"),
        (Product(dtype=jnp.bfloat16), "expected blocks of 64 or 128, got 32"),
        (Product(12, 64, 64, 64, 1.0, jnp.bfloat16), "expected a number of tokens that 8 divides, got 12"),
    ],
)
def test_refused_products(case: Product, names: str) -> None:
    x, weight, _ = case.operands()
    with pytest.raises(ValueError, match=names):
        block_sparse_matmul(x, weight, implementation="mosaic_gpu")


def test_no_cutoff() -> None:
    with pytest.raises(ValueError, match="takes no cutoff"):
        neuron_sparse_ffn(
            NARROW.x(),
            NARROW.weights(),
            activation=RELU,
            cutoff=jnp.zeros(NARROW.neurons),
            implementation="mosaic_gpu",
        )


# --------------------------------------------------------------------------------------------------------------------
# For the H100
# --------------------------------------------------------------------------------------------------------------------


def shapes(tokens: int, width: int, neurons: int, dtype: Any) -> tuple[Any, PackedFFN, Any]:
    """x, weights and residual."""
    weight = jax.ShapeDtypeStruct((neurons, width), dtype)
    residual = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    return jax.ShapeDtypeStruct((tokens, width), dtype), PackedFFN(weight, weight, weight), residual


@pytest.mark.parametrize(
    ("tokens", "width", "neurons", "block", "dtype", "deterministic"),
    [
        (1, 4096, 11008, 32, jnp.bfloat16, False),  # LLaMA2-7B
        (4, 4096, 11008, 32, jnp.bfloat16, True),
        (3, 5120, 13824, 32, jnp.float16, False),  # LLaMA2-13B
        (2, 2560, 6912, 12, jnp.float32, True),
        (8, 4096, 11008, 32, jnp.bfloat16, False),
        (13, 5120, 13824, 64, jnp.float16, True),  # as many values of x as fit
        (16, 4096, 14336, 112, jnp.bfloat16, False),  # Llama 3 8B, its blocks in no multiple of 64
        (5, 576, 1536, 16, jnp.bfloat16, False),  # SmolLM2
    ],
)
def test_block_sparse_compiles_for_the_h100(
    tokens: int, width: int, neurons: int, block: int, dtype: Any, deterministic: bool
) -> None:
    def run(x: Any, weights: Any, residual: Any, router: Any) -> jax.Array:
        keywords = {"activation": SILU, "block_size": block, "deterministic": deterministic}
        return block_sparse.block_sparse_ffn(x, weights, router, residual=residual, **keywords)

    router = jax.ShapeDtypeStruct((neurons // block, width), dtype), jax.ShapeDtypeStruct((1,), jnp.float32)
    compiled = compile_for(H100, run, *shapes(tokens, width, neurons, dtype), Router(*router))
    launches = compiled.as_text().count('custom_call_target="mosaic_gpu')
    assert launches == (1 if tokens <= shared.MOST else 3 if neurons // block % 8 == 0 else 2)
    partials = 4 * (132 if tokens <= shared.MOST else 6) * tokens * width
    assert (compiled.memory_analysis().temp_size_in_bytes >= partials) == deterministic


@pytest.mark.parametrize("tokens", [4, 8])
def test_block_sparse_in_shard_map_with_its_checks(tokens: int) -> None:
    """The types that `jax.shard_map` checks agree, which the interpreter does not carry through."""
    x, weights, _ = shapes(tokens, 1024, 2048, jnp.bfloat16)
    router = jax.ShapeDtypeStruct((2048 // 32, 1024), jnp.bfloat16)
    op = partial(block_sparse_ffn, activation=SILU, block_size=32, implementation="mosaic_gpu")
    run = jax.shard_map(
        lambda x, w, r: jax.lax.psum(op(x, w, r), "tensor"),
        mesh=ONE,
        in_specs=(P(), P("tensor"), P("tensor")),
        out_specs=P(),
    )
    assert jax.eval_shape(run, x, weights, router).shape == x.shape


@pytest.mark.parametrize("rank", [None, 128])
def test_neuron_sparse_compiles_for_the_h100(rank: int | None) -> None:
    """Exact and predicted, in a mesh of one: the in-place addition keeps its types."""
    x, weights, residual = shapes(1, 4096, 11008, jnp.bfloat16)
    predictor = None
    if rank is not None:
        sizes = [((rank, 4096), jnp.bfloat16), ((11008, rank), jnp.bfloat16), ((11008,), jnp.float32)]
        predictor = Predictor(*(jax.ShapeDtypeStruct(*size) for size in sizes))
    run = partial(neuron_sparse_ffn, activation=RELU, implementation="mosaic_gpu")
    compiled = compile_for(H100, lambda x, w, r, p: run(x, w, p, residual=r), x, weights, residual, predictor)
    assert "mosaic_gpu" in compiled.as_text()


@pytest.mark.parametrize(("block", "dtype"), [(128, jnp.bfloat16), (64, jnp.float16)])
def test_block_sparse_matmul_compiles_for_the_h100(block: int, dtype: Any) -> None:
    """Forward and gradients of LLaMA2-7B's gate at half its blocks, and tokens that fill no tile."""
    inputs, outputs = 4096, 11008
    rows, columns = inputs // block, outputs // block
    index = lambda n: jax.ShapeDtypeStruct((n,), jnp.int32)
    half = rows * columns // 2
    values = jax.ShapeDtypeStruct((half, block, block), dtype)
    weight = BlockSparse(values, index(half), index(half), index(columns + 1), index(half), index(rows + 1))
    x, dy = (jax.ShapeDtypeStruct((2008, n), dtype) for n in (inputs, outputs))
    compiled = compile_for(H100, partial(value_and_gradients, implementation="mosaic_gpu"), x, weight, dy)
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 3
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20  # lists; nothing like a matrix


@pytest.mark.parametrize(("sparse", "size"), [("outputs", 128), ("inputs", 64)])
def test_tile_sparse_matmul_compiles_for_the_h100(sparse: str, size: int) -> None:
    """Forward and gradients of LLaMA2-7B's gate and down, and a last tile that is not full."""
    inputs, outputs = (4096, 11008) if sparse == "outputs" else (11008, 4096)
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    mask = shape(-(-2008 // size), 11008 // size, dtype=jnp.bool_)
    run = partial(tile_gradients, sparse, size, implementation="mosaic_gpu")
    compiled = compile_for(H100, run, shape(2008, inputs), shape(inputs, outputs), mask, shape(2008, outputs))
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 3
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20  # lists; nothing like a matrix
