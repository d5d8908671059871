"""Times every tuning of the sparse FFN kernels on this GPU, beside the dense baselines and the limit.

    python tools/tune_kernels.py --out tune.json
    python tools/tune_kernels.py --out tune.json --ops block --batch 1 8 --shape llama2-13b --seconds 200
    python tools/tune_kernels.py --out tune.json --ops exact --only rows=16 warps=8
    python tools/tune_kernels.py --out tune.json --ops block --batch 8 16 --only mosaic_gpu triton
    python tools/tune_kernels.py --out tune.json --ops predicted --rank 128 256 1024 --predictor int8 bfloat16
    python tools/tune_kernels.py --out tune.json --shape tiny --layers 2 --tokens 2      # anywhere, in the interpreter

jax is all it needs; without an installed jsparse, put the repository on PYTHONPATH.

A run decodes `--tokens` tokens through `--layers` layers of random weights in one compiled loop, each layer added to
the float32 residual stream: layers enough that none is found in the cache, and no host in between. The time of a layer
is the median over `--repeats` runs; the table's last line, a loop whose body does next to nothing, is what the loop
itself costs. Every tuning is first held against the float32 reference. A tuning that fails is listed and left out, and
when `--seconds` are over, so are those that are left.

Bytes: the active rows of the three matrices, the router or predictor, x and the output, each once. The limit is these
bytes at the bandwidth of this card: the larger of copying and reading, measured first.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import Activation, PackedFFN, Predictor
from pallas_kernels import mosaic_gpu as mosaic
from pallas_kernels.block_sparse_ffn import mosaic_gpu as block_mosaic
from pallas_kernels.block_sparse_ffn import mosaic_gpu_wgmma as block_wgmma
from pallas_kernels.block_sparse_ffn import reference as block_reference
from pallas_kernels.block_sparse_ffn import triton as block
from pallas_kernels.block_sparse_ffn.reference import Router
from pallas_kernels.neuron_sparse_ffn import mosaic_gpu as neuron_mosaic
from pallas_kernels.neuron_sparse_ffn import reference as neuron_reference
from pallas_kernels.neuron_sparse_ffn import triton as neuron

SHAPES = {  # D, F
    "llama2-7b": (4096, 11008),
    "llama2-13b": (5120, 13824),
    "llama3-8b": (4096, 14336),
    "smollm2-135m": (576, 1536),
    "tiny": (256, 256),
}
BLOCK = 32
SILU, RELU = Activation("silu"), Activation("relu")


def block_tunings(tokens: int) -> Iterator[block.Tuning | mosaic.Tuning | block_wgmma.Tuning]:
    """The most promising first."""
    if tokens <= mosaic.MOST:
        yield from mosaic_tunings(tokens)
    else:
        yield block_wgmma.Tuning()
        yield block_wgmma.Tuning(neurons=32)
        yield block_wgmma.Tuning(columns=128)
        yield block_wgmma.Tuning(depth=128, columns=128)
    fma, dot = functools.partial(block.Tuning, "fma"), functools.partial(block.Tuning, "dot")
    if tokens <= 4:
        yield fma(rows=4, chunk=4096, down_chunk=4096, warps=16)
        yield fma(rows=8, chunk=2048, down_chunk=4096, warps=8, ahead=False)
        yield fma(rows=4, chunk=4096, down_chunk=4096, warps=8)
        yield fma(rows=4, chunk=4096, down_chunk=4096, warps=8, ahead=False)
        yield fma(rows=4, chunk=2048, down_chunk=4096, warps=8, ahead=False)
        yield fma(rows=4, chunk=2048, down_chunk=2048, warps=4)
        yield fma(rows=8, chunk=1024, down_chunk=2048, warps=4, ahead=False)
        yield fma(rows=8, chunk=2048, down_chunk=2048, warps=8)
        yield fma(rows=2, chunk=4096, down_chunk=4096, warps=8)
    yield dot(rows=32, chunk=128, down_chunk=128, warps=4, stages=4)
    yield dot(rows=32, chunk=256, down_chunk=128, warps=4, stages=3)
    if tokens > 1:
        yield dot(rows=16, chunk=256, down_chunk=256, warps=4, stages=4)
        yield dot(rows=32, chunk=64, down_chunk=64, warps=4, stages=6)
        yield dot(rows=16, chunk=128, down_chunk=128, warps=2, stages=4)


def mosaic_tunings(tokens: int) -> Iterator[mosaic.Tuning]:
    """The most promising first."""
    if tokens == 1:
        yield mosaic.Tuning(rows=1, stages=4, warpgroups=1, blocks=264)
        yield mosaic.Tuning(rows=1, stages=4, warpgroups=2, blocks=264)
        yield mosaic.Tuning(rows=2, stages=4, warpgroups=1)
    yield mosaic.Tuning(rows=2, stages=8, warpgroups=2)
    yield mosaic.Tuning(rows=1, stages=8, warpgroups=2)


def neuron_tunings(predicted: bool) -> Iterator[neuron.Tuning | neuron_mosaic.Tuning | mosaic.Tuning]:
    """The most promising first."""
    if predicted:
        yield mosaic.Tuning(rows=1, stages=4, warpgroups=1, blocks=264)
        yield mosaic.Tuning(rows=1, stages=8, warpgroups=2)
        choices = [(64, 4, 4096, 16), (32, 4, 2048, 8), (64, 4, 2048, 8), (32, 2, 4096, 16)]
    else:
        yield neuron_mosaic.Tuning()
        yield neuron_mosaic.Tuning(rows=8, stages=2)
        yield neuron_mosaic.Tuning(warpgroups=4)
        yield neuron_mosaic.Tuning(rows=2, stages=3, slots=2, blocks=264)
        choices = [(16, 4, 2048, 8), (16, 2, 4096, 16), (8, 2, 2048, 8)]
    for choice in choices:
        yield neuron.Tuning(*choice)


# --------------------------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------------------------


def seconds_of(f: Callable[..., Any], *args: Any, repeats: int) -> float:
    """The median of a few runs after a first."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bandwidth(mib: int, passes: int, repeats: int) -> dict[str, float]:
    """TB/s of copying and of reading, each many times over a buffer that no cache holds, in one compiled loop."""
    x = jax.random.normal(jax.random.key(0), (mib * 2**18,), jnp.float32)

    @jax.jit
    def copy(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, passes, lambda _, x: x + 1, x)

    @jax.jit
    def read(x: jax.Array) -> jax.Array:
        def body(_: Any, total: jax.Array) -> jax.Array:
            held, total = jax.lax.optimization_barrier((x, total))
            return total + jnp.sum(held)

        return jax.lax.fori_loop(0, passes, body, jnp.float32(0))

    moved = passes * x.nbytes / 1e12
    return {
        "copy": 2 * moved / seconds_of(copy, x, repeats=repeats),
        "read": moved / seconds_of(read, x, repeats=repeats),
    }


def decode_loop(layer: Callable[..., jax.Array], count: int) -> Callable[..., jax.Array]:
    """`count` tokens through layers, jitted: layer(x, y, one layer's weights) adds to the float32 residual y."""
    layer = jax.jit(layer)  # lowered once for all layers

    @jax.jit
    def run(x: jax.Array, layers: list[Any]) -> jax.Array:
        def token(_: Any, y: jax.Array) -> jax.Array:
            for weights in layers:
                held, y = jax.lax.optimization_barrier((x, y))  # x stands for what a norm would make of y
                y = layer(held, y, weights)
            return y

        return jax.lax.fori_loop(0, count, token, x.astype(jnp.float32))

    return run


class Bench:
    """Weights of one shape, and what is measured with them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.width, self.neurons = SHAPES[args.shape]
        self.interpret = jax.default_backend() != "gpu"
        self.end = time.perf_counter() + args.seconds
        self.rows: list[dict[str, Any]] = []

        @jax.jit
        def make(key: jax.Array) -> PackedFFN:
            shape = self.neurons, self.width
            scales = (self.width**-0.5, self.width**-0.5, 1e-3 * self.neurons**-0.5)
            keys = jax.random.split(key, 3)
            return PackedFFN(
                *(s * jax.random.normal(k, shape, jnp.bfloat16) for k, s in zip(keys, scales, strict=True))
            )

        self.layers = [make(jax.random.key(i)) for i in range(args.layers)]
        self.bandwidth = bandwidth(args.bandwidth_mib, args.bandwidth_passes, args.repeats)
        print("  ".join(f"{k} {v:.2f} TB/s" for k, v in self.bandwidth.items()), flush=True)

    def x(self, tokens: int) -> jax.Array:
        return jax.random.normal(jax.random.key(99), (tokens, self.width), jnp.bfloat16)

    def time(self, layer: Callable[..., jax.Array], x: jax.Array, layers: list[Any]) -> float:
        """Microseconds a layer."""
        run = decode_loop(layer, self.args.tokens)
        return seconds_of(run, x, layers, repeats=self.args.repeats) / self.args.tokens / len(layers) * 1e6

    def record(self, op: str, tuning: str, sparsity: float, tokens: int, microseconds: float, moved: int) -> None:
        limit = moved / max(self.bandwidth.values()) / 1e6
        row = {"op": op, "tuning": tuning, "batch": tokens, "sparsity": sparsity, "us": microseconds, "bytes": moved,
               "limit_us": limit, "of_limit": limit / microseconds}  # fmt: skip
        self.rows.append(row)
        self.show(row)

    def show(self, row: dict[str, Any]) -> None:
        what = f"{row['op']:10} batch {row['batch']:2} sparsity {row['sparsity']:4.2f}"
        size = f"{row['bytes'] / 1e6:7.1f} MB  {row['of_limit']:4.0%} of the limit"
        print(f"{what} {row['us']:8.1f} us  {size}  {row['tuning']}", flush=True)

    def try_all(self, op: str, tunings: Iterator[Any], tokens: int, check: Any, layer: Any, inputs: Any) -> None:
        """Checks and times each tuning over all sparsities. layer(tuning) -> a layer;
        inputs: sparsity, weights of the layers, bytes a layer."""
        x = self.x(tokens)
        for tuning in tunings:
            if time.perf_counter() > self.end:
                print(f"{op}: out of time before {tuning}", flush=True)
                return
            backend = type(tuning).__module__.split(".")[-1].removesuffix("_wgmma")
            label = f"{backend}.{tuning}"  # as the backend's file spells it
            settings = [backend, *(f"{k}={v}" for k, v in dataclasses.asdict(tuning).items())]
            backends = [part for part in self.args.only if "=" not in part]
            if (backends and backend not in backends) or not set(self.args.only) <= {*backends, *settings}:
                continue
            try:
                run = decode_loop(layer(tuning), self.args.tokens)
                for sparsity, layers, moved in inputs:
                    got = jax.jit(layer(tuning))(x, jnp.zeros(x.shape, jnp.float32), layers[0])
                    expected = check(x, layers[0])
                    error = float(jnp.max(jnp.abs(got - expected)) / jnp.max(jnp.abs(expected)))
                    if not error < 2e-2:
                        raise ValueError(f"off by {error:.1e} at sparsity {sparsity}")
                    duration = seconds_of(run, x, layers, repeats=self.args.repeats)
                    us = duration / self.args.tokens / len(layers) * 1e6
                    self.record(op, label, sparsity, tokens, us, moved)
            except Exception as e:  # a tuning may ask for too much memory on the chip; the others go on
                print(f"{op} {label}: {type(e).__name__}: {str(e)[:200]}", flush=True)
                self.rows.append({"op": op, "tuning": label, "batch": tokens, "error": str(e)[:500]})

    def io_bytes(self, tokens: int) -> int:
        return tokens * self.width * (2 + 4 + 4)

    def dense(self, tokens: int) -> None:
        """XLA's own products, as the compiler chooses."""

        def layer(x: jax.Array, y: jax.Array, w: PackedFFN) -> jax.Array:
            hidden = jax.nn.silu(x @ w.gate.T) * (x @ w.up.T)
            return y + (hidden @ w.down).astype(jnp.float32)

        moved = 3 * self.width * self.neurons * 2 + self.io_bytes(tokens)
        self.record("dense xla", "default", 0.0, tokens, self.time(layer, self.x(tokens), self.layers), moved)

    def block(self, tokens: int) -> None:
        """Block-sparse, the router's time and bytes included."""
        x, blocks = self.x(tokens), self.neurons // BLOCK
        make = jax.jit(lambda key: jax.random.normal(key, (blocks, self.width), jnp.bfloat16) * self.width**-0.5)
        routers = [make(jax.random.key(1000 + i)) for i in range(len(self.layers))]
        inputs = []
        for sparsity in self.args.sparsity:
            layers, active = [], 0
            for w, router in zip(self.layers, routers, strict=True):
                scores = jax.nn.sigmoid(x.astype(jnp.float32) @ router.astype(jnp.float32).T)
                ordered = jnp.concatenate([jnp.zeros(1), jnp.sort(scores.ravel())])
                cut = round(sparsity * scores.size)
                threshold = jnp.mean(ordered[cut : cut + 2])[None]  # halfway, so that rounding moves no block
                layers.append((w, Router(router, threshold)))
                active += int(jnp.sum(jnp.any(scores > threshold, axis=0)))
            moved = active * BLOCK * 3 * self.width * 2 // len(layers) + blocks * self.width * 2
            inputs.append((sparsity, layers, moved + self.io_bytes(tokens)))

        def layer(tuning: Any) -> Callable[..., jax.Array]:
            run: Any = block.block_sparse_ffn
            if not isinstance(tuning, block.Tuning):
                run = block_mosaic.block_sparse_ffn
            return lambda x, y, w: run(
                x, *w, residual=y, activation=SILU, block_size=BLOCK, tuning=tuning, interpret=self.interpret
            )

        check = jax.jit(
            lambda x, w: block_reference.block_sparse_ffn(x, *w, residual=None, activation=SILU, block_size=BLOCK)
        )
        self.try_all("block", block_tunings(tokens), tokens, check, layer, inputs)

    def neuron(self, rank: int, kind: str) -> None:
        """Neuron-sparse, one token. Exact, at rank 0: rows of the gate change sign until ReLU leaves the wanted share.
        Predicted: the thresholds of a predictor of a rank and dtype leave it."""
        x, kept = self.x(1), jax.random.uniform(jax.random.key(3), (self.neurons,))
        shapes, predicted = [(rank, self.width), (self.neurons, rank)], rank > 0
        row = self.width * 2
        inputs = []
        for sparsity in self.args.sparsity:
            layers: list[Any] = []
            active = kept >= jnp.sort(kept)[min(round(sparsity * self.neurons), self.neurons - 1)]
            moved = (2 + predicted) * int(jnp.sum(active)) * row + self.io_bytes(1)
            parameters = rank * (self.width + self.neurons) * jnp.dtype(kind).itemsize
            moved += parameters + self.neurons * 4 if predicted else self.neurons * row
            for i, w in enumerate(self.layers):
                positive = jnp.dot(w.gate, x[0], preferred_element_type=jnp.float32) > 0
                w = w._replace(gate=jnp.where((positive == active)[:, None], w.gate, -w.gate))
                predictor = None
                if predicted:
                    keys = jax.random.split(jax.random.key(2000 + i))
                    drawn = [20 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
                    down, up = (jnp.clip(jnp.round(w), -127, 127).astype(kind) for w in drawn)
                    predictor = Predictor(down, up, jnp.where(active, -jnp.inf, jnp.inf))
                layers.append((w, predictor))
            inputs.append((sparsity, layers, moved))

        def layer(tuning: Any) -> Callable[..., jax.Array]:
            run: Any = neuron.neuron_sparse_ffn
            if not isinstance(tuning, neuron.Tuning):
                run = neuron_mosaic.neuron_sparse_ffn
            return lambda x, y, w: run(
                x, w[0], w[1], None, residual=y, activation=RELU, tuning=tuning, interpret=self.interpret
            )

        check = jax.jit(
            lambda x, w: neuron_reference.neuron_sparse_ffn(x, w[0], w[1], None, residual=None, activation=RELU)
        )
        op = f"predicted, rank {rank}, {kind}" if predicted else "exact"
        self.try_all(op, neuron_tunings(predicted), 1, check, layer, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file of everything measured")
    parser.add_argument("--ops", nargs="+", default=["block", "exact", "predicted"])
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="tokens; the neuron-sparse ones take one")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9])
    parser.add_argument("--rank", type=int, nargs="+", default=[256], help="of the predictors")
    parser.add_argument("--predictor", nargs="+", default=["int8"], choices=["int8", "bfloat16"])
    parser.add_argument(
        "--only", nargs="*", default=[], help="backends, as in triton; all of these settings, as in rows=8"
    )
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="decoded in one run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=240, help="after these, what is left is not tried")
    parser.add_argument("--bandwidth-mib", type=int, default=2048)
    parser.add_argument("--bandwidth-passes", type=int, default=40)
    args = parser.parse_args()

    bench = Bench(args)
    for tokens in args.batch:
        bench.dense(tokens)
        if "block" in args.ops:
            bench.block(tokens)
    if "exact" in args.ops:
        bench.neuron(0, "int8")
    if "predicted" in args.ops:
        for rank, kind in itertools.product(args.rank, args.predictor):
            bench.neuron(rank, kind)
    bench.record("loop", "y + 1 a layer", 0.0, 1, bench.time(lambda x, y, w: y + 1, bench.x(1), bench.layers), 0)

    print("\nfastest of each:")
    measured = [row for row in bench.rows if "us" in row]
    for _, group in itertools.groupby(
        sorted(measured, key=lambda r: (r["op"], r["batch"], r["sparsity"], r["us"])),
        key=lambda r: (r["op"], r["batch"], r["sparsity"]),
    ):
        bench.show(next(group))
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "bandwidth": bench.bandwidth,
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "rows": bench.rows,
    }
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
