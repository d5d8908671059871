"""LTE on a real model beside its baselines, at equal tokens, in one process on one GPU.

    python tools/lte_study.py MODEL --train TOKENS.npy --eval TOKENS.npy [TOKENS.npy ...] --out results.json

Trains the dense model on; LTE (stage 1, calibration, stage 2) at each target, with random blocks, as printed in the
paper and with other seeds; noisy top-k; and on the dense model the predictors of MoEfication and Deja Vu, the oracle's
blocks and the largest activations. Everything of one kind shares a compiled step: what differs is traced. Variants run
in the order of what they tell; none starts after --seconds. Results are written after each.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import hf, model, parallel
from jsparse.config import (
    CosineLr,
    DataConfig,
    Dense,
    LteStage1,
    LteStage2,
    Method,
    ModelSource,
    NoisyTopK,
    OptimizerConfig,
    Predictor,
    Router,
    Source,
    TrainConfig,
)
from jsparse.data import Loader, open_source
from jsparse.inference.perplexity import evaluate
from jsparse.methods import lte
from jsparse.methods.grouping import group, permute
from jsparse.train import state
from jsparse.train.loop import abstract_batch
from jsparse.train.step import make_update
from jsparse.train.terms import training_config

KNOBS = ("target_sparsity", "separation", "separation_ramp", "epsilon")  # of stage 1, traced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, or a .gguf file")
    parser.add_argument("--train", required=True, help="token ids, .npy")
    parser.add_argument("--eval", required=True, nargs="+", help="held-out token ids, .npy; the first decides")
    parser.add_argument("--out", default="lte.json")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.7, 0.3, 0.8])
    parser.add_argument("--steps", type=int, nargs=2, default=[56, 56], help="of stage 1 and stage 2")
    parser.add_argument("--predictor-steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--eval-tokens", type=int, default=131_072)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3, help="at the first target")
    parser.add_argument("--seconds", type=float, default=520, help="no variant starts after so many")
    parser.add_argument("--only", nargs="+", help="names of the variants to run; dense always runs")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--unroll", type=int, help="layers a step of the scan runs; by default all")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of method lte_stage1")
    args = parser.parse_args()
    mesh = parallel.single_device_mesh()
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        Study(args, mesh).run()


class Study:
    """The model, the data, the compiled steps and the results so far."""

    def __init__(self, args: argparse.Namespace, mesh: Any):
        self.args, self.mesh, self.began = args, mesh, time.perf_counter()
        jax.config.update("jax_compilation_cache_dir", str(Path(args.out).with_suffix(".xla").absolute()))
        read: Any = hf.load_gguf if args.model.endswith(".gguf") else hf.load
        self.config, self.params = read(args.model, dtype="float32")
        values = dict(item.split("=") for item in args.set)
        self.stage1 = dataclasses.replace(LteStage1(0.5), **{k: _value(v) for k, v in values.items()})
        self.data = DataConfig((Source(args.train),), seq_len=args.seq_len, batch_size=args.batch_size)
        open_tokens = functools.partial(open_source, tokenizer=None, cache="~/.cache/jsparse",
                                        vocab_size=self.config.vocab_size)  # fmt: skip
        self.train_store = open_tokens(Source(args.train))
        self.held_out = {Path(p).stem: open_tokens(Source(p)).tokens[: args.eval_tokens + 1] for p in args.eval}
        self.sample = self.train_store.tokens[: 8 * args.seq_len].reshape(8, -1).astype(np.int32)
        self.rows: list[dict[str, Any]] = []
        self.orders: dict[tuple[str, int], np.ndarray] = {}

    # ---- Training

    def recipe(self, method: Method, steps: int) -> TrainConfig:
        schedule = CosineLr(max(1, round(0.06 * steps)), 0.1)
        return TrainConfig(
            run="", model=ModelSource(path="-"), data=self.data, steps=steps, method=method, dtype=self.args.dtype,
            optimizer=OptimizerConfig(lr=self.args.lr, schedule=schedule), loss_chunk=8192,
            unroll=self.args.unroll or self.config.num_hidden_layers,
        )  # fmt: skip

    def kinds(self) -> dict[str, tuple[Method, int]]:
        """Method and number of steps of everything that is compiled."""
        first, second = self.args.steps
        size = self.stage1.block_size
        return {
            "dense": (Dense(), first + second),
            "stage1": (self.stage1, first),
            "stage2": (LteStage2(), second),
            "noisy": (NoisyTopK(0.5, size), first + second),
            "predictor": (Predictor(0.5, block_size=size), self.args.predictor_steps),
            "neurons": (Predictor(0.5, block_size=1), self.args.predictor_steps),
        }

    def config_of(self, kind: str) -> Any:
        method, _ = self.kinds()[kind]
        source = self.config
        if kind == "stage2":
            source = dataclasses.replace(source, router=Router(self.stage1.block_size))
        return training_config(method, source)

    def compile(self) -> None:
        """All steps at once: XLA compiles on as many threads."""
        began, self.steps = time.perf_counter(), {}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            pending = {kind: pool.submit(self.lower(kind).compile) for kind in self.kinds()}
            self.steps = {kind: future.result() for kind, future in pending.items()}
        say(f"compiled {len(self.steps)} steps in {time.perf_counter() - began:.0f} s")

    def lower(self, kind: str) -> Any:
        method, steps = self.kinds()[kind]
        config = self.config_of(kind)

        def step(now: Any, batch: Any, knobs: dict[str, Any]) -> Any:
            traced = dataclasses.replace(method, **knobs) if knobs else method
            return make_update(self.recipe(traced, steps), config, self.mesh)(now, batch)

        recipe = self.recipe(method, steps)
        abstract = state.abstract(recipe, config, self.mesh)
        return jax.jit(step, donate_argnums=0).lower(abstract, abstract_batch(recipe, self.mesh), self.knobs(kind))

    def knobs(self, kind: str, **changes: float) -> dict[str, jax.Array]:
        if kind != "stage1":
            return {}
        values = {name: getattr(self.stage1, name) for name in KNOBS} | changes
        return {name: jnp.float32(value) for name, value in values.items()}

    def fit(self, kind: str, params: Any, first: int = 0, seed: int = 0, **changes: float) -> tuple[Any, dict]:
        """Trains from copies of parameters on the batches from `first` on; the new ones, and what was seen."""
        method, steps = self.kinds()[kind]
        now = state.create(jax.tree.map(jnp.copy, params), self.recipe(method, steps), self.config_of(kind), self.mesh)
        loader = Loader([self.train_store], dataclasses.replace(self.data, seed=seed))
        knobs, seen, seconds = self.knobs(kind, **changes), [], []
        with loader.iterate(first, self.mesh) as batches:
            for _ in range(steps):
                batch = next(batches)
                began = time.perf_counter()
                now, metrics = self.steps[kind](now, batch, knobs)
                seen.append(jax.device_get(metrics))
                seconds.append(time.perf_counter() - began)
            fresh = next(batches)
        table = {name: [_plain(row[name]) for row in seen] for name in seen[0]}
        median = float(np.median(seconds[3:] or seconds))
        return now.params, {"metrics": table, "step_seconds": median, "fresh": fresh.tokens}

    def order(self, grouping: str = "kmeans", seed: int = 0) -> np.ndarray:
        key = grouping, seed
        if key not in self.orders:
            self.orders[key] = group(self.params, self.config, self.stage1.block_size, grouping, seed=seed)  # type: ignore[arg-type]
        return self.orders[key]

    # ---- Measuring

    def measure(self, name: str, params: Any, config: Any, **about: Any) -> None:
        """Perplexity and sparsity on the held-out texts, as a row of the results."""
        cast = model.cast(params, config, self.args.dtype)
        size = min(32, max(1, self.args.eval_tokens // self.args.seq_len))
        found = {
            text: dataclasses.asdict(evaluate(cast, config, tokens, seq_len=self.args.seq_len, batch_size=size))
            for text, tokens in self.held_out.items()
        }
        self.rows.append({"name": name, "eval": found, "at": time.perf_counter() - self.began} | about)
        say(line(self.rows[-1]))
        self.save()

    def save(self) -> None:
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "settings": vars(self.args),
                 "stage1": dataclasses.asdict(self.stage1), "rows": self.rows}  # fmt: skip
        Path(self.args.out).write_text(json.dumps(about))

    # ---- Variants

    def dense(self) -> None:
        self.measure("pretrained", self.params, self.config)
        self.trained, seen = self.fit("dense", self.params)
        self.measure("dense", self.trained, self.config, **told(seen))

    def lte(self, name: str, target: float, grouping: str = "kmeans", seed: int = 0, init: str | None = None,
            **changes: float) -> None:  # fmt: skip
        soft = self.config_of("stage1")
        params, _ = lte.add_routers(
            permute(self.params, self.order(grouping, seed)), self.config, soft.router, threshold=self.stage1.tau,
            init=init or self.stage1.init, key=jax.random.key(seed),  # type: ignore[arg-type]
            tokens=self.sample, dropped=target,
        )  # fmt: skip
        hard = lte.served(soft)
        params, seen = self.fit("stage1", params, 0, seed, target_sparsity=target, **changes)
        about = {"target": target, "seed": seed, "grouping": grouping} | changes
        self.measure(f"{name}, soft", params, soft, **about, **told(seen))
        params = self.calibrated(params, hard, seen["fresh"], target)
        self.measure(f"{name}, stage 1", params, hard, **about)
        params, seen = self.fit("stage2", params, self.args.steps[0], seed)
        params = self.calibrated(params, hard, seen["fresh"], target)
        thresholds = np.asarray(params["layers"]["ffn"]["router_threshold"]).tolist()
        rows = seen["fresh"][:16, :256]
        sizes = [size for size in (1, 2, 4, 8, 16) if len(rows) % size == 0]
        union = lte.union_density(model.cast(params, hard, self.args.dtype), hard, rows, sizes)
        self.measure(name, params, hard, **about, **told(seen), thresholds=thresholds,
                     union={size: layers.tolist() for size, layers in union.items()})  # fmt: skip

    def calibrated(self, params: Any, config: Any, tokens: Any, target: float) -> Any:
        cast = model.cast(params, config, self.args.dtype)
        return lte.set_thresholds(params, lte.calibrate(cast, config, [jnp.asarray(tokens)], target))

    def predictors(self, kind: str, name: str) -> None:
        """On the dense model: learned choices, and the same choices in hindsight."""
        config = self.config_of(kind)
        grouped = permute(self.trained, self.order()) if config.router.block_size > 1 else self.trained
        for target in self.args.targets:
            params, _ = lte.add_routers(grouped, self.config, config.router, threshold=target)
            oracle = dataclasses.replace(config, router=Router(config.router.block_size, "oracle"))
            alone, _ = lte.add_routers(grouped, self.config, oracle.router, threshold=target)
            self.measure(f"{name}, oracle", alone, oracle, target=target)
            params, seen = self.fit(kind, params)
            self.measure(f"{name}, predictor", params, lte.served(config), target=target, **told(seen))

    def noisy(self, target: float) -> None:
        config = self.config_of("noisy")
        params, _ = lte.add_routers(permute(self.params, self.order()), self.config, config.router, threshold=target)
        params, seen = self.fit("noisy", params)
        self.measure("noisy top-k", params, lte.served(config), target=target, **told(seen))

    def run(self) -> None:
        targets = self.args.targets
        first, *others = targets
        variants: list[tuple[str, Any]] = [
            ("lte", lambda: self.lte("LTE", first)),
            ("moefication", lambda: self.predictors("predictor", "MoEfication")),
            ("dejavu", lambda: self.predictors("neurons", "neurons (Deja Vu)")),
            ("open", lambda: self.lte("LTE, open routers", first, init="open")),
            *[("lte", functools.partial(self.lte, "LTE", t)) for t in others[:1]],
            *[("noisy", functools.partial(self.noisy, t)) for t in targets[:2]],
            *[("lte", functools.partial(self.lte, "LTE", t)) for t in others[1:]],
            ("printed", lambda: self.lte("LTE as printed", first, init="normal", epsilon=0.0, separation=0.5,
                                         separation_ramp=0.0)),
            ("spec", lambda: self.lte("LTE, zeros and epsilon", first, init="zeros", epsilon=1e-2, separation=0.5,
                                      separation_ramp=0.0)),
            *[("noisy", functools.partial(self.noisy, t)) for t in targets[2:]],
            ("random", lambda: self.lte("LTE, random blocks", first, grouping="random")),
            *[("seeds", functools.partial(self.lte, "LTE", first, seed=seed)) for seed in range(1, self.args.seeds)],
        ]  # fmt: skip
        self.compile()
        self.dense()
        for name, variant in variants:
            if self.args.only and name not in self.args.only:
                continue
            if time.perf_counter() - self.began > self.args.seconds:
                say(f"{name}: not started, the time is up")
                continue
            try:
                variant()
            except Exception:
                say(f"{name}: failed\n{traceback.format_exc()}")
        say("\n" + "\n".join(line(row) for row in self.rows))
        times = {
            name: row["step_seconds"] for row in self.rows for name in ("dense", "LTE, soft") if row["name"] == name
        }
        if len(times) == 2:
            say(f"step: dense {times['dense'] * 1e3:.1f} ms, stage 1 {times['LTE, soft'] * 1e3:.1f} ms "
                f"({times['LTE, soft'] / times['dense'] - 1:+.1%})")  # fmt: skip


def told(seen: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in seen.items() if name != "fresh"}


def line(row: dict[str, Any]) -> str:
    cells = []
    for text, found in row["eval"].items():
        off = found["block_sparsity"]
        share = f" at {np.mean(off):.1%} ({min(off):.0%} to {max(off):.0%})" if off else ""
        cells.append(f"{text} {found['perplexity']:.3f}{share}")
    skipped = row["metrics"]["skipped"][-1] if "metrics" in row else 0
    notes = f"  {skipped:.0f} steps not finite" if skipped else ""
    return f"{row['name']:28} {row.get('target', ''):5} {'; '.join(cells)}{notes}  [{row['at']:.0f} s]"


def say(text: str) -> None:
    print(text, flush=True)


def _plain(x: Any) -> Any:
    return np.asarray(x, np.float64).round(6).tolist()


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    main()
