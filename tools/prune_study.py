"""The pruning study of docs/results.md on one GPU: how fast, how good one-shot, how good after recovery.

    PYTHONPATH=. python tools/prune_study.py MODEL --calibration TOKENS [...] --eval TOKENS [...] --train TOKENS \\
        --out results.json

Three parts, in this order, each on request:

    speed      seconds to prune a model of random weights in a large model's shape
    quality    held-out perplexity of every method, pattern and scope, over calibration seeds
    recovery   2:4 models trained on with their zeros held, beside the dense model trained likewise

Quality goes from the most to the least important cell and stops to begin new ones after --quality-seconds. With
several --workers one cell compiles while another computes. Results are written after each; one that fails is
reported and leaves the others alone.
"""

import argparse
import dataclasses
import json
import os
import statistics
import threading
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import config as configs
from jsparse import hf, model
from jsparse.bench.shapes import SHAPES
from jsparse.config import Source
from jsparse.data import open_source
from jsparse.inference import evaluate
from jsparse.methods.patterns import parse_pattern
from jsparse.methods.pruning import METHODS, prune
from jsparse.train.checkpoint import load_run
from jsparse.train.loop import train

NAMES = ("magnitude", "wanda", "ria", "sparsegpt", "dass")
CELLS = (("2:4", "mlp"), ("4:8", "mlp"), ("2:4", "all"), ("0.5", "mlp"), ("4:8", "all"), ("0.5", "all"))
COMPILING = "/jax/core/compile/backend_compile_duration"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--calibration", required=True, nargs="+", help="token files that share the samples equally")
    parser.add_argument("--eval", required=True, nargs="+", help="held-out token files")
    parser.add_argument("--train", help="token file to recover on")
    parser.add_argument("--out", default="prune_study.json")
    parser.add_argument("--parts", nargs="+", default=["speed", "quality", "recovery"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="float32 on a CPU")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32, help="sequences a forward pass")
    parser.add_argument("--eval-tokens", type=int, default=131_072, help="of each held-out file")
    parser.add_argument("--speed-shape", default="llama2-7b", choices=SHAPES)
    parser.add_argument("--speed-layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--speed-batch", type=int, default=16, help="sequences a forward pass of the large model")
    parser.add_argument("--speed-runs", nargs="+", default=["dass:mlp", "wanda:all", "sparsegpt:all"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--cells", nargs="+", default=[f"{p}/{s}" for p, s in CELLS], help="PATTERN/SCOPE")
    parser.add_argument("--quality-seconds", type=float, default=110)
    # one: several threads in cuSOLVER at once, as by SparseGPT's factors, have crashed the process
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--recovery-tokens", type=int, default=8_000_000)
    parser.add_argument("--recovery-runs", nargs="+", default=["dass", "sparsegpt"], help="methods, or dense")
    parser.add_argument("--recovery-recipe", default="configs/dass_recovery.yaml")
    parser.add_argument("--recovery-override", nargs="*", default=["unroll=1"], help="of the recipe")
    parser.add_argument("--distill", action="store_true", help="recover with the dense model as a teacher")
    parser.add_argument("--runs", default="runs", help="folder for pruned models and run folders")
    study = Study(parser.parse_args())
    for part in study.args.parts:
        began = time.perf_counter()
        try:
            {"speed": study.speed, "quality": study.quality, "recovery": study.recovery}[part]()
        except Exception:
            traceback.print_exc()
        print(f"{part}: {time.perf_counter() - began:.1f} s", flush=True)
    study.tables()


class Study:
    """The model, the tokens and what was found so far."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.lock = args, threading.Lock()
        self.config, self.params = hf.load(args.model, dtype=args.dtype)
        self.texts = {name: self.tokens(name)[: args.eval_tokens + 1] for name in args.eval}
        device = jax.devices()[0].device_kind
        settings = dict(vars(args))
        self.results: dict[str, Any] = {"device": device, "jax": jax.__version__, "settings": settings,
                                        "speed": [], "quality": [], "recovery": []}  # fmt: skip

    def tokens(self, name: str) -> np.ndarray:
        return open_source(Source(name), self.args.model, "~/.cache/jsparse", self.config.vocab_size).tokens

    def windows(self, seed: int) -> np.ndarray:
        """Calibration windows [samples, T], an equal share from each file, drawn without repetition."""
        parts = []
        share = -(-self.args.samples // len(self.args.calibration))
        for name in self.args.calibration:
            tokens, length = self.tokens(name), self.args.seq_len
            drawn = np.random.default_rng(seed).permutation(len(tokens) // length)[:share]
            parts += [tokens[i * length : (i + 1) * length] for i in drawn]
        return np.stack(parts[: self.args.samples])

    def keep(self, part: str, row: dict) -> None:
        with self.lock:
            self.results[part].append(row)
            Path(self.args.out).write_text(json.dumps(self.results, indent=1))
            shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(f"{part}: {shown}", flush=True)

    def measure(self, params: Any) -> dict[str, float]:
        rows = {
            Path(name).stem: evaluate(
                params, self.config, text, seq_len=self.args.seq_len, batch_size=self.args.batch_size
            )
            for name, text in self.texts.items()
        }
        return {name: row.perplexity for name, row in rows.items()}

    # ---- Speed

    def speed(self) -> None:
        args, shape = self.args, SHAPES[self.args.speed_shape]
        if args.speed_layers:
            shape = dataclasses.replace(shape, num_hidden_layers=args.speed_layers)
        params = random_model(shape)
        windows = np.random.default_rng(0).integers(shape.vocab_size, size=(args.samples, args.seq_len))
        compiling: list[float] = []

        def listen(event: str, duration_secs: float, **_: str | int) -> None:
            if event == COMPILING:
                compiling.append(duration_secs)

        jax.monitoring.register_event_duration_secs_listener(listen)
        for run in args.speed_runs:
            method, _, scope = run.partition(":")
            compiling.clear()
            began = time.perf_counter()
            try:
                *_, found = prune(params, shape, windows, pattern=parse_pattern("2:4"), batch_size=args.speed_batch,
                                  **methods(method, scope))  # fmt: skip
            except Exception as error:
                self.keep("speed", {"method": method, "scope": scope, "failed": repr(error)[:200]})
                continue
            seconds = time.perf_counter() - began
            memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
            self.keep("speed", {"method": method, "scope": scope, "seconds": seconds, "compiling": sum(compiling),
                                "mlp_sparsity": found.mlp_sparsity, "peak_gib": memory / 2**30})  # fmt: skip

    # ---- Quality

    def quality(self) -> None:
        stop = time.perf_counter() + self.args.quality_seconds
        dense = {"pattern": "dense", "scope": "", "method": "dense", "seed": 0}
        self.keep("quality", dense | self.measure(self.params))
        windows = [self.windows(seed) for seed in range(self.args.seeds)]
        cells = [cell.split("/") for cell in self.args.cells]
        jobs = [(pattern, scope, method, seed)  # one seed of all that matters most, then the others of it
                for some in (cells[:2], cells[2:])
                for seed in range(self.args.seeds)
                for pattern, scope in some
                for method in self.args.methods
                if seed == 0 or method != "magnitude"]  # fmt: skip

        def one(job: tuple[str, str, str, int]) -> None:
            pattern, scope, method, seed = job
            began = time.perf_counter()
            if began > stop:
                print(f"quality: no time left for {job}", flush=True)
                return
            row = {"pattern": pattern, "scope": scope, "method": method, "seed": seed}
            try:
                params, _, found = prune(self.params, self.config, windows[seed], pattern=parse_pattern(pattern),
                                         batch_size=self.args.batch_size, **methods(method, scope))  # fmt: skip
                row |= self.measure(params)
            except Exception as error:
                self.keep("quality", row | {"failed": repr(error)[:200]})
                return
            self.keep("quality", row | {"mlp_sparsity": found.mlp_sparsity, "model_sparsity": found.model_sparsity,
                                        "seconds": time.perf_counter() - began})  # fmt: skip

        with ThreadPoolExecutor(self.args.workers) as pool:
            list(pool.map(one, jobs))

    # ---- Recovery

    def recovery(self) -> None:
        for method in self.args.recovery_runs:
            try:
                self.recover(method)
            except Exception as error:
                self.keep("recovery", {"method": method, "failed": repr(error)[:200]})

    def recover(self, method: str) -> None:
        args, home = self.args, Path(self.args.runs)
        home.mkdir(parents=True, exist_ok=True)
        row: dict[str, Any] = {"method": method}
        folder, hold = args.model, "hold=null"
        if method != "dense":
            params, _, _ = prune(self.params, self.config, self.windows(0), pattern=parse_pattern("2:4"),
                                 batch_size=args.batch_size, **methods(method, "mlp"))  # fmt: skip
            row |= {f"{name} before": value for name, value in self.measure(params).items()}
            folder, hold = str(home / f"{method}-2-4"), "hold={pattern: '2:4'}"
            hf.save(folder, self.config, params, tokenizer=args.model, overwrite=True)
        base = configs.load(args.recovery_recipe, [f"model.path={folder}", *args.recovery_override])
        steps = max(2, args.recovery_tokens // (base.data.batch_size * base.data.seq_len))
        overrides = [f"run={home / f'recover-{method}'}", f"model.path={folder}", f"steps={steps}", hold,
                     f"data.train=[{{path: {args.train}}}]", f"data.tokenizer={args.model}",
                     f"distill={{teacher: {args.model}}}" if args.distill else "distill=null"]  # fmt: skip
        began = time.perf_counter()
        summary = train(configs.load(args.recovery_recipe, [*overrides, *args.recovery_override]))
        seconds = time.perf_counter() - began
        config, params, _ = load_run(summary.run)
        values = self.measure(model.cast(params, config, args.dtype))
        self.keep("recovery", row | values | {"tokens": summary.tokens, "distilled": args.distill, "seconds": seconds})

    # ---- Tables

    def tables(self) -> None:
        texts = [Path(name).stem for name in self.args.eval]
        for row in self.results["speed"]:
            print(f"{row['method']:10} {row['scope']:4} " + " ".join(f"{k} {v:.1f}" for k, v in row.items()
                  if isinstance(v, float)))  # fmt: skip
        print(f"\n| pattern | matrices | method | {' | '.join(texts)} | seeds |")
        print("|---" * (4 + len(texts)) + "|")
        by_cell: dict[tuple, list[dict]] = {}
        for row in self.results["quality"]:
            by_cell.setdefault((row["pattern"], row["scope"], row["method"]), []).append(row)
        for (pattern, scope, method), rows in sorted(by_cell.items()):
            good = [row for row in rows if "failed" not in row]
            cells = [spread([row[text] for row in good]) for text in texts]
            print(f"| {pattern} | {scope} | {method} | {' | '.join(cells)} | {len(good)} |")
        for row in self.results["recovery"]:
            print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def methods(name: str, scope: str) -> dict[str, Any]:
    """Arguments of `prune`: attention takes the method itself, and Wanda beside DaSS."""
    attention = METHODS["wanda" if name == "dass" else name]() if scope == "all" else None
    return {"mlp": METHODS[name](), "attention": attention}


def random_model(config: configs.LlamaConfig) -> model.Params:
    """bfloat16 parameters of a shape, made on the device, one leaf at a time."""

    def one(path: Any, x: Any) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.ones(x.shape, x.dtype)
        seed = zlib.crc32(jax.tree_util.keystr(path).encode())  # matrices of one shape differ
        return _normal(jax.random.key(seed, impl="rbg"), x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(one, model.abstract(config, jnp.bfloat16))


def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


_normal = jax.jit(_random, static_argnames=("shape", "dtype"))


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation where there are several."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


if __name__ == "__main__":
    main()
