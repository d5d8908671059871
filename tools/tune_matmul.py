r"""Checks and times the packed N:M, block-sparse and tile-sparse products on a GPU, and tries how work is best cut.

    PYTHONPATH=. python tools/tune_matmul.py --out matmul.json --seconds 300

and on a CPU, of no meaning as a measurement:

    PYTHONPATH=. python tools/tune_matmul.py --out matmul.json --interpret --shapes 64x128 --layers 1 --steps 1 \
        --repeats 1 --rounds 1 --batches 1 3 --tokens 64 --matrix 64x128 --block 64 --tune-batches --tune-blocks

Decode: gated FFNs of 2:4 weights in bfloat16, the weights of several layers in turn, many tokens in one program, each
FFN reading what the one before left in the residual stream; beside them the same FFNs dense through XLA (its default,
cuBLAS alone; inputs first or neurons first) and the time that the bytes take at the card's measured rate. Training:
forward and both gradients of a block-sparse product beside the dense product with a masked weight. Tiles: the same of
products in which every tile of tokens has its own random blocks, beside the dense product between masks. Whatever is
timed runs many times over in one program, so that what the host takes to start it does not count.
"""

# ruff: noqa: B023, as every closure is called where it is made

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Activation, PackedNM, nm_ffn, nm_matmul, pack, unpack
from pallas_kernels.block_sparse_matmul import BlockSparse, block_sparse_matmul, pack_blocks
from pallas_kernels.block_sparse_matmul import mosaic_gpu as block_mosaic
from pallas_kernels.block_sparse_matmul import triton as block_triton
from pallas_kernels.nm_matmul import triton as nm_triton
from pallas_kernels.tile_sparse_matmul import mosaic_gpu as tile_mosaic
from pallas_kernels.tile_sparse_matmul import tile_sparse_matmul
from pallas_kernels.tile_sparse_matmul import triton as tile_triton
from pallas_kernels.tile_sparse_matmul.api import Sparse

SILU = Activation("silu")
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


@dataclass
class Run:
    """What the measurements share."""

    args: argparse.Namespace
    began: float = field(default_factory=time.perf_counter)
    rows: list[dict[str, Any]] = field(default_factory=list)
    rate: float = 1.0  # bytes a second

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    def try_(self, what: str, measure: Callable[[], Any]) -> Any:
        """The measurement, or None, with the reason printed, where it fails or there is no time left for it."""
        if time.perf_counter() - self.began > self.args.seconds:
            self.add(skipped=what, because="no time left")
            return None
        try:
            return measure()
        except Exception as error:
            self.add(failed=what, because=" ".join(str(error).split())[:300])
            return None

    def seconds(self, f: Callable[..., Any], *operands: Any, options: dict[str, Any] | None = None) -> float:
        """Median time of a call, compiled before."""
        compiled = jax.jit(f).lower(*operands).compile(compiler_options=options)
        jax.block_until_ready(compiled(*operands))
        taken = []
        for _ in range(self.args.repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*operands))
            taken.append(time.perf_counter() - start)
        return float(np.median(taken))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file of every row")
    parser.add_argument("--seconds", type=float, default=300, help="no measurement begins after so many")
    parser.add_argument("--shapes", nargs="+", default=["4096x11008", "576x1536"], help="D x F of FFNs to decode with")
    parser.add_argument("--layers", type=int, default=8, help="whose weights take turns")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=8192, help="of the block- and tile-sparse products")
    parser.add_argument("--matrix", default="4096x11008", help="I x O of those products")
    parser.add_argument(
        "--block", type=int, nargs="+", default=[128, 64], help="block sizes; a tile has as many tokens"
    )
    parser.add_argument(
        "--backends", nargs="+", choices=list(BACKENDS), default=list(BACKENDS), help="of those products"
    )
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts")
    parser.add_argument("--steps", type=int, default=96, help="tokens decoded in one program")
    parser.add_argument("--rounds", type=int, default=24, help="block-sparse products, and copies, in one program")
    parser.add_argument("--only", choices=["decode", "training", "tiles"])
    parser.add_argument("--tune-batches", type=int, nargs="*", default=[1, 8], help="at the first of the shapes")
    parser.add_argument("--tune-blocks", type=int, nargs="*", default=[128], help="block sizes, at half of them")
    parser.add_argument("--interpret", action="store_true", help="run the kernels on a CPU")
    run = Run(parser.parse_args())
    device = jax.devices()[0].device_kind
    if run.args.only in (None, "training"):
        run.try_("training", lambda: training(run, *sizes(run.args.matrix)))
    if run.args.only in (None, "tiles"):
        run.try_("tiles", lambda: tiles(run, *sizes(run.args.matrix)))
    if run.args.only in (None, "decode"):
        run.try_("bandwidth", lambda: bandwidth(run))
        for shape in run.args.shapes:
            run.try_(f"decode {shape}", lambda: decode(run, *sizes(shape)))
    run.args.out.write_text(json.dumps({"device": device, "jax": jax.__version__, "rows": run.rows}, indent=1))
    print_tables(run, device)


def sizes(text: str) -> tuple[int, int]:
    first, second = map(int, text.split("x"))
    return first, second


def bandwidth(run: Run) -> None:
    """Bytes a second of a copy and of a sum; the better is what the limits are counted by."""
    n, rounds = 1 << (20 if run.args.interpret else 30), run.args.rounds
    x = jax.random.bits(jax.random.key(0), (n // 4,), jnp.uint32)

    def copies(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, rounds, lambda i, x: x + jnp.uint32(1), x)

    def sums(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, rounds, lambda i, total: total + jnp.sum(x ^ total), jnp.uint32(0))

    copy, read = 2 * n * rounds / run.seconds(copies, x), n * rounds / run.seconds(sums, x)
    run.rate = max(copy, read)
    run.add(kind="bandwidth", copy_tb=copy / 1e12, read_tb=read / 1e12)


# --------------------------------------------------------------------------------------------------------------------
# Decode
# --------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def half(key: jax.Array, inputs: int, outputs: int, axis: str) -> jax.Array:
    """A random bfloat16 matrix [I, O] that keeps the two largest of each four."""
    w = jax.random.normal(key, (inputs, outputs)) * inputs**-0.5
    groups = jnp.abs(w if axis == "output" else w.T).reshape(-1, 4)
    keep = jnp.argsort(jnp.argsort(groups, axis=1), axis=1) >= 2
    keep = keep.reshape(inputs, outputs) if axis == "output" else keep.reshape(outputs, inputs).T
    return jnp.where(keep, w, 0.0).astype(jnp.bfloat16)


def decode(run: Run, width: int, neurons: int) -> None:
    """DaSS's axes: gate and up grouped by outputs, down by inputs."""
    packed, dense = [], []
    for layer in range(run.args.layers):
        keys = jax.random.split(jax.random.key(layer), 3)
        shapes = [(width, neurons, "output"), (width, neurons, "output"), (neurons, width, "input")]
        matrices = [half(k, *shape) for k, shape in zip(keys, shapes, strict=True)]
        packed.append([pack(w, 2, 4, axis) for w, (_, _, axis) in zip(matrices, shapes, strict=True)])  # type: ignore[arg-type]
        dense.append(matrices)
    run.try_("check", lambda: check(run, packed[0], width))

    calls = run.args.steps * run.args.layers
    shape = f"{width}x{neurons}"

    def loop(ffn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """Every layer's FFN on the residual stream, `steps` times over."""

        def step(_: Any, carry: Any) -> Any:
            residual, layers = carry
            for layer in layers:
                residual = ffn(jnp.clip(residual, -2.0, 2.0).astype(jnp.bfloat16), *layer, residual)
            return residual, layers

        return lambda residual, layers: jax.lax.fori_loop(0, run.args.steps, step, (residual, layers))[0]

    def plain(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, residual: jax.Array) -> jax.Array:
        dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        return residual + dot((jax.nn.silu(dot(x, gate)) * dot(x, up)).astype(x.dtype), down)

    def neuron_major(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, residual: jax.Array) -> jax.Array:
        return plain(x, gate.T, up.T, down, residual)

    turned = [[gate.T, up.T, down] for gate, up, down in dense]
    for tokens in run.args.batches:
        residual = jax.random.normal(jax.random.key(9), (tokens, width))
        limit = sum(w.nbytes for w in packed[0]) / run.rate
        dense_limit = sum(w.nbytes for w in dense[0]) / run.rate
        times: dict[str, float] = {}
        for name, ffn, layers, options in [
            ("XLA", plain, dense, None),
            ("XLA, neurons first", neuron_major, turned, None),
            ("cuBLAS, neurons first", neuron_major, turned, CUBLAS),
        ]:
            if run.args.interpret and options:
                continue
            taken = run.try_(name, lambda: run.seconds(loop(ffn), residual, layers, options=options))
            if taken:
                times[name] = taken / calls
        if not times:
            continue
        best = min(times, key=lambda name: times[name])

        def packed_time(tuning: Any) -> float | None:
            def ffn(x: jax.Array, gate: PackedNM, up: PackedNM, down: PackedNM, residual: jax.Array) -> jax.Array:
                return nm_triton.nm_ffn(x, gate, up, down, residual, SILU, run.args.interpret, tuning)

            taken = run.try_(f"nm_ffn {tuning}", lambda: run.seconds(loop(ffn), residual, packed))
            return taken / calls if taken else None

        gate_up, down = (nm_triton.default_tuning(tokens, packed[0][i]) for i in (0, 2))
        ours = packed_time((gate_up, down))
        if tokens in run.args.tune_batches and shape == run.args.shapes[0]:
            for i in (0, 1):
                for tuning in candidates(tokens, i, packed[0][2 * i]):
                    pair = (tuning, down) if i == 0 else (gate_up, tuning)
                    taken = packed_time(pair)
                    if not taken:
                        continue
                    run.add(kind="nm tuning", shape=shape, tokens=tokens, gate_up=str(pair[0]), down=str(pair[1]),
                            us=taken * 1e6)  # fmt: skip
                    if ours is None or taken < ours:
                        ours, (gate_up, down) = taken, pair
        if ours is None:
            continue
        run.add(kind="nm_ffn", shape=shape, tokens=tokens, us=ours * 1e6, limit_us=limit * 1e6, of_limit=limit / ours,
                dense_us=times[best] * 1e6, dense=best, dense_limit_us=dense_limit * 1e6, speedup=times[best] / ours,
                gate_up=str(gate_up), down=str(down), dense_all={k: v * 1e6 for k, v in times.items()})  # fmt: skip


def candidates(tokens: int, which: int, weight: PackedNM) -> list[nm_triton.Tuning]:
    """Tilings to try: of gate and up together, or of down."""
    width = weight.indices.shape[-1]
    fma = [
        [(1, 256, 1), (1, 512, 4), (2, 256, 2)],
        [(1, 512, 2), (1, 1024, 8), (1, 512, 4)],
    ][which]
    dot = [(8, 64, 1), (8, 64, 2), (16, 64, 2), (32, 32, 4)] if which == 0 else [(16, 64, 2), (16, 32, 2), (16, 64, 4)]
    paths = [("fma", cut) for cut in fma] * (tokens <= 2) + [("dot", cut) for cut in dot] * (tokens >= 2)
    return [nm_triton.Tuning(path, *cut) for path, cut in paths if cut[1] < 2 * width]  # type: ignore[arg-type]


def check(run: Run, matrices: list[PackedNM], width: int) -> None:
    """The kernels against float32, at every batch and along both axes."""
    gate, up, down = matrices
    for tokens in run.args.batches:
        x = jax.random.normal(jax.random.key(tokens), (tokens, width), jnp.bfloat16)
        wide = jax.random.normal(jax.random.key(tokens), (tokens, down.shape[0]), jnp.bfloat16)
        residual = jax.random.normal(jax.random.key(8), (tokens, width))
        kernel: dict[str, Any] = {"implementation": "triton", "interpret": run.args.interpret}
        for name, f in [
            ("matmul, outputs grouped", lambda **kw: nm_matmul(x, gate, **kw)),
            ("matmul, inputs grouped", lambda **kw: nm_matmul(wide, down, **kw)),
            ("ffn", lambda **kw: nm_ffn(x, gate, up, down, activation=SILU, residual=residual, **kw)),
        ]:

            def error() -> float:
                expected = f(implementation="reference").astype(jnp.float32)
                got = f(**kernel).astype(jnp.float32)
                return float(jnp.abs(got - expected).max() / jnp.abs(expected).max())

            found = run.try_(f"check {name}", error)
            if found is not None:
                run.add(kind="check", what=name, tokens=tokens, error=found, ok=found < 0.02)
    assert gate.nbytes == 0.5625 * unpack(gate).nbytes


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def training(run: Run, inputs: int, outputs: int) -> None:
    x, w, dy = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate([(run.args.tokens, inputs), (inputs, outputs), (run.args.tokens, outputs)])
    )
    dense = run.try_("dense", lambda: rounds(run, gradients(lambda x, w: x @ w), x, w, dy))
    for size in run.args.block:
        tunings = {name: dict.fromkeys(PARTS, backend.tilings[0]) for name, backend in BACKENDS.items()}
        for sparsity in sorted(run.args.sparsities, key=lambda s: abs(s - 0.5)):
            mask = np.random.default_rng(0).random((inputs // size, outputs // size)) >= sparsity
            packed = pack_blocks(w, mask)
            elements = jnp.asarray(np.kron(mask, np.ones((size, size), bool)))

            def masked_dense(x: jax.Array, weight: Any, dy: jax.Array) -> Any:
                w, mask = weight
                return gradients(lambda x, w: x @ jnp.where(mask, w, jnp.bfloat16(0)))(x, w, dy)

            masked = run.try_("masked dense", lambda: rounds(run, masked_dense, x, (w, elements), dy))
            flops = 6 * run.args.tokens * inputs * outputs
            for name in run.args.backends:
                if sparsity == 0.5:
                    run.try_(f"check blocks, {name}", lambda: check_blocks(run, name, x, packed, dy))
                    if size in run.args.tune_blocks:
                        labels = {"kind": "block tuning", "backend": name, "block": size}
                        tunings[name] = tune(run, labels, BACKENDS[name], PARTS, x, packed, dy)
                parts = time_parts(run, name, BACKENDS[name], PARTS, tunings[name], x, packed, dy)

                def three(x: jax.Array, w: BlockSparse, dy: jax.Array) -> Any:
                    f = functools.partial(block_sparse_matmul, implementation=name, interpret=run.args.interpret)
                    return gradients(f)(x, w, dy)

                default = run.try_(f"block_sparse_matmul, {name}", lambda: rounds(run, three, x, packed, dy))
                if None in (*parts.values(), default, masked, dense):
                    continue
                total = sum(parts.values())
                run.add(kind="blocks", backend=name, block=size, sparsity=sparsity, ms=total * 1e3,
                        default_ms=default * 1e3, masked_dense_ms=masked * 1e3, dense_ms=dense * 1e3,
                        speedup=masked / total, tflops=flops * float(mask.mean()) / total / 1e12,
                        dense_tflops=flops / dense / 1e12, **{f"{part}_ms": t * 1e3 for part, t in parts.items()},
                        tunings={part: str(t) for part, t in tunings[name].items()})  # fmt: skip


def gradients(f: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Forward and both gradients of f(x, w) at dy."""

    def call(x: jax.Array, w: Any, dy: jax.Array) -> Any:
        y, vjp = jax.vjp(f, x, w)
        return y, *jax.tree.leaves(vjp(dy))

    return call


# Forward and the two gradients of a backend's kernels, called alike.
PARTS: dict[str, Callable[..., jax.Array]] = {
    "y": lambda module, x, w, dy, **kw: module.matmul(x, w, **kw),
    "dx": lambda module, x, w, dy, **kw: module.transposed_matmul(dy, w, **kw),
    "dw": lambda module, x, w, dy, **kw: module.block_products(x, dy, w, **kw),
}


@dataclass(frozen=True)
class Backend:
    """A backend of a product and the tilings to try, its default first."""

    module: Any
    tilings: list[Any]


BACKENDS = {
    "triton": Backend(
        block_triton,
        [
            block_triton.default_tuning(jnp.bfloat16),
            block_triton.Tuning(stages=3),
            block_triton.Tuning(warps=4),
            block_triton.Tuning(depth=32, token_depth=32, warps=4, stages=5),
            block_triton.Tuning(group=16, warps=4, stages=3),
        ],
    ),
    "mosaic_gpu": Backend(
        block_mosaic,
        [
            block_mosaic.Tuning(),
            block_mosaic.Tuning(stages=3),
            block_mosaic.Tuning(group=4),
            block_mosaic.Tuning(group=16),
            block_mosaic.Tuning(tokens=64, stages=6),
            block_mosaic.Tuning(tokens=64, stages=6, group=16),
        ],
    ),
}


def time_parts(
    run: Run, name: str, backend: Backend, parts: Any, tunings: dict[str, Any], x: jax.Array, w: Any, dy: jax.Array
) -> dict[str, Any]:
    """Seconds of each part at its tuning, or None."""

    def timed(part: str) -> Any:
        call = functools.partial(parts[part], backend.module, interpret=run.args.interpret, tuning=tunings[part])
        return run.try_(f"{part}, {name}, {tunings[part]}", lambda: rounds(run, call, x, w, dy))

    return {part: timed(part) for part in parts}


def rounds(run: Run, f: Callable[..., Any], x: jax.Array, w: Any, dy: jax.Array) -> float:
    """Seconds of f(x, w, dy), each reading an element that the one before wrote."""

    def loop(x: jax.Array, w: Any, dy: jax.Array) -> Any:
        def again(_: Any, carry: Any) -> Any:
            x, w, dy = carry
            whole = jax.lax.optimization_barrier(jax.tree.leaves(f(x, w, dy)))
            one = sum(r.reshape(-1)[0].astype(jnp.float32) for r in whole if r.dtype == jnp.bfloat16)
            one = jnp.clip(one, -1.0, 1.0).astype(x.dtype)
            return x.at[0, 0].set(one), w, dy.at[0, 0].set(one)

        return jax.lax.fori_loop(0, run.args.rounds, again, (x, w, dy))[0]

    return run.seconds(loop, x, w, dy) / run.args.rounds


def tune(
    run: Run, labels: dict[str, Any], backend: Backend, parts: Any, x: jax.Array, w: Any, dy: jax.Array
) -> dict[str, Any]:
    """The fastest tiling for each of the parts."""
    best = dict.fromkeys(parts, (float("inf"), backend.tilings[0]))
    for tuning in backend.tilings:
        taken = time_parts(run, labels["backend"], backend, parts, dict.fromkeys(parts, tuning), x, w, dy)
        row = {part: seconds for part, seconds in taken.items() if seconds}
        for part, seconds in row.items():
            best[part] = min(best[part], (seconds, tuning), key=lambda pair: pair[0])
        run.add(**labels, tuning=str(tuning), **{f"{part}_ms": seconds * 1e3 for part, seconds in row.items()})
    return {part: tuning for part, (_, tuning) in best.items()}


def check_blocks(run: Run, backend: str, x: jax.Array, w: BlockSparse, dy: jax.Array) -> None:
    """Value and gradients against XLA's dense products."""

    def all_three(**kw: Any) -> Any:
        call = lambda x, values: block_sparse_matmul(x, dataclasses.replace(w, values=values), **kw)
        return gradients(call)(x, w.values, dy)

    expected = all_three(implementation="xla")
    got = all_three(implementation=backend, interpret=run.args.interpret)
    compare(run, f"blocks of {w.block_size}, {backend}", x.shape[0], got, expected)


def compare(run: Run, what: str, tokens: int, got: Any, expected: Any) -> None:
    """Value and gradients."""
    for name, a, b in zip(("y", "dx", "dw"), got, expected, strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        error = float(jnp.abs(a - b).max() / jnp.abs(b).max())
        run.add(kind="check", what=f"{what}, {name}", tokens=tokens, error=error, ok=error < 0.02)


# --------------------------------------------------------------------------------------------------------------------
# Tiles
# --------------------------------------------------------------------------------------------------------------------

TILE_BACKENDS = {
    "triton": Backend(
        tile_triton,
        [
            tile_triton.default_tuning(jnp.bfloat16),
            tile_triton.Tuning(stages=3),
            tile_triton.Tuning(warps=4, stages=3),
        ],
    ),
    "mosaic_gpu": Backend(
        tile_mosaic,
        [
            tile_mosaic.Tuning(),
            tile_mosaic.Tuning(group=8),
            tile_mosaic.Tuning(group=32),
            tile_mosaic.Tuning(stages=3),
        ],
    ),
}


def tiles(run: Run, inputs: int, outputs: int) -> None:
    """Blocks of outputs, tuned at half of them, then blocks of inputs, whose y and dx are cut like their dx and y."""
    x, w, dy = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate([(run.args.tokens, inputs), (inputs, outputs), (run.args.tokens, outputs)])
    )
    w = w * jnp.bfloat16(inputs**-0.5)
    dense = run.try_("dense", lambda: rounds(run, gradients(lambda x, w: x @ w), x, w, dy))
    flops = 6 * run.args.tokens * inputs * outputs
    sides: tuple[Sparse, ...] = ("outputs", "inputs")
    by_half = sorted(run.args.sparsities, key=lambda s: abs(s - 0.5))
    for size in run.args.block:
        tunings = {name: dict.fromkeys(("y", "dx", "dw"), TILE_BACKENDS[name].tilings[0]) for name in run.args.backends}
        for sparse, sparsity in [(sparse, sparsity) for sparse in sides for sparsity in by_half]:
            blocks = (outputs if sparse == "outputs" else inputs) // size
            kept = np.random.default_rng(0).random((-(-run.args.tokens // size), blocks)) >= sparsity
            weight, parts = (w, jnp.asarray(kept)), tile_parts(sparse, size)

            def three(implementation: Any) -> Callable[..., Any]:
                how: Any = {"implementation": implementation, "interpret": run.args.interpret}

                def f(x: jax.Array, weight: Any, dy: jax.Array) -> Any:
                    w, mask = weight
                    op = lambda x, w: tile_sparse_matmul(x, w, mask, sparse=sparse, tile_size=size, **how)
                    return gradients(op)(x, w, dy)

                return f

            masked = run.try_("masked dense", lambda: rounds(run, three("xla"), x, weight, dy))
            for name in run.args.backends:
                backend, what = TILE_BACKENDS[name], f"tiles of {size}, {sparse}, {name}"
                if sparsity == by_half[0]:
                    both = lambda: (jax.jit(three(by))(x, weight, dy) for by in (name, "xla"))
                    run.try_(f"check {what}", lambda: compare(run, what, run.args.tokens, *both()))
                    if sparse == "inputs":
                        tunings[name] |= {"y": tunings[name]["dx"], "dx": tunings[name]["y"]}
                    elif size in run.args.tune_blocks:
                        labels = {"kind": "tile tuning", "backend": name, "block": size}
                        tunings[name] = tune(run, labels, backend, parts, x, weight, dy)
                taken = time_parts(run, name, backend, parts, tunings[name], x, weight, dy)
                default = run.try_(f"tile_sparse_matmul, {name}", lambda: rounds(run, three(name), x, weight, dy))
                if None in (*taken.values(), default, masked, dense):
                    continue
                total = sum(taken.values())
                run.add(kind="tiles", backend=name, block=size, sparse=sparse, sparsity=sparsity, ms=total * 1e3,
                        default_ms=default * 1e3, masked_dense_ms=masked * 1e3, dense_ms=dense * 1e3,
                        speedup=masked / total, tflops=flops * float(kept.mean()) / total / 1e12,
                        dense_tflops=flops / dense / 1e12, **{f"{part}_ms": t * 1e3 for part, t in taken.items()},
                        tunings={part: str(t) for part, t in tunings[name].items()})  # fmt: skip


def tile_parts(sparse: Sparse, tile: int) -> dict[str, Callable[..., jax.Array]]:
    """Forward and the two gradients of a backend's kernels; w is the weight and the mask."""
    turned: Sparse = "inputs" if sparse == "outputs" else "outputs"
    return {
        "y": lambda module, x, w, dy, **kw: module.matmul(x, *w, sparse, tile, False, **kw),
        "dx": lambda module, x, w, dy, **kw: module.matmul(dy, *w, turned, tile, True, **kw),
        "dw": lambda module, x, w, dy, **kw: module.weight_gradient(x, dy, w[1], sparse, tile, **kw),
    }


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------


def print_tables(run: Run, device: str) -> None:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in run.rows:
        kinds.setdefault(row.get("kind", "failed"), []).append(row)
    print(f"\n{device}, jax {jax.__version__}, {run.rate / 1e12:.3f} TB/s")
    checks = kinds.get("check", [])
    print(f"checks: {sum(row['ok'] for row in checks)} of {len(checks)} within 0.02; "
          f"failed or skipped: {len(kinds.get('failed', []))}")  # fmt: skip
    for row in kinds.get("nm_ffn", []):
        print(f"nm_ffn {row['shape']:>11} B={row['tokens']:<2} {row['us']:7.1f} us, limit {row['limit_us']:6.1f} "
              f"({row['of_limit']:.0%}); dense {row['dense_us']:6.1f} ({row['dense']}): x{row['speedup']:.2f}   "
              f"gate, up {row['gate_up']}, down {row['down']}")  # fmt: skip
    for kind in ("blocks", "tiles"):
        for row in kinds.get(kind, []):
            parts = ", ".join(f"{name} {row[f'{name}_ms']:.3f}" for name in ("y", "dx", "dw"))
            print(f"{kind} of {row['block']:<3} {row.get('sparse', ''):7} {row['backend']:10} {row['sparsity']:4.0%} "
                  f"{row['ms']:7.3f} ms ({parts}), {row['tflops']:4.0f} TFLOP/s; masked dense "
                  f"{row['masked_dense_ms']:.3f}, dense {row['dense_ms']:.3f}: x{row['speedup']:.2f}; "
                  f"default tuning {row['default_ms']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
