"""LTE on a real model beside its baselines, at equal tokens, in one process on one GPU.

    python tools/lte_study.py MODEL --train TOKENS.npy --eval TOKENS.npy [TOKENS.npy ...] --out results.json \\
        --variants lte,target_sparsity=0.5 lte,target_sparsity=0.5,grouping=coactivation,steps=36+108

A variant is one word: a kind, and settings after commas. Its word is its name in the results.

    dense         the model trained on; what everything is compared with
    lte           stage 1, calibration, stage 2, calibration; settings of method lte_stage1, and steps=A+B
    noisy         noisy top-k softmax; sparsity, block_size, grouping, router_lr
    predictor     on the dense variant's model, blocks by a learned predictor: MoEfication; the same settings. With
                  block_size=1 Deja Vu's neurons
    oracle        the same choices in hindsight

Every kind takes lr=..., seed=... and distill=WEIGHT, from the dense variant's model.

Numbers of a method that may be traced share a compiled step. Results are written after each variant. Started again with
the same --out, the tool leaves out the variants that are there; none starts after --seconds.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from jsparse import config as configs
from jsparse import hf, model, parallel
from jsparse.config import (
    ConfigError,
    CosineLr,
    DataConfig,
    Dense,
    Distill,
    LlamaConfig,
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
    check,
)
from jsparse.data import Loader, open_source
from jsparse.inference.perplexity import evaluate
from jsparse.methods import lte
from jsparse.methods.grouping import group, permute
from jsparse.train import state
from jsparse.train.loop import abstract_batch
from jsparse.train.step import make_update
from jsparse.train.terms import training_config

METHODS: dict[str, Any] = {"dense": Dense, "lte": LteStage1, "noisy": NoisyTopK, "predictor": Predictor,
                           "oracle": Predictor}  # fmt: skip
KNOBS = ("target_sparsity", "separation", "separation_ramp", "epsilon", "router_lr")  # of stage 1, traced
BEFORE = ("grouping", "init")  # of stage 1 too, but of no step: they make the parameters that it starts from
DEFAULT = [
    "dense",
    *[f"lte,target_sparsity={share}" for share in (0.5, 0.7, 0.3, 0.8)],
    *[f"{kind},sparsity={share}" for share in (0.5, 0.7, 0.3, 0.8) for kind in ("noisy", "oracle", "predictor")],
    *[f"{kind},sparsity={share},block_size=1" for share in (0.5, 0.7, 0.3, 0.8) for kind in ("oracle", "predictor")],
    "lte,target_sparsity=0.5,init=normal,epsilon=0,separation=0.5,separation_ramp=0",  # as printed
    "lte,target_sparsity=0.5,init=zeros,epsilon=1e-2,separation=0.5,separation_ramp=0",
    "lte,target_sparsity=0.5,init=open",
    "lte,target_sparsity=0.5,grouping=random",
    "lte,target_sparsity=0.5,seed=1",
    "lte,target_sparsity=0.5,seed=2",
]


@dataclass(frozen=True)
class Variant:
    """One word of --variants."""

    name: str
    kind: str
    method: Any
    steps: tuple[int, ...]  # of each stage
    lr: float
    seed: int = 0
    distill: float = 0.0  # weight of the dense model's distribution as a target; 0: none

    @property
    def on_dense(self) -> bool:
        """Whether it needs the dense variant's model."""
        return self.kind in ("predictor", "oracle") or self.distill > 0


def parse(word: str, args: argparse.Namespace) -> Variant:
    """Raises ConfigError where a word names no kind or a setting that its kind does not have."""
    kind, *items = word.split(",")
    check(kind in METHODS, word, f"a kind among {', '.join(METHODS)}", kind)
    steps = {"lte": tuple(args.steps), "predictor": (args.predictor_steps,), "oracle": ()}.get(kind, (sum(args.steps),))
    own: dict[str, Any] = {"steps": steps, "lr": args.lr}
    settings: dict[str, Any] = {"select": "oracle"} if kind == "oracle" else {}
    for item in items:
        name, _, text = item.partition("=")
        if name == "steps":
            own[name] = tuple(map(int, text.split("+")))
        elif name == "seed":
            own[name] = int(text)
        elif name in ("lr", "distill"):
            own[name] = float(text)
        else:
            settings[name] = yaml.safe_load(text)
    check(len(own["steps"]) == len(steps), word, f"steps of {len(steps)} stages", own["steps"])
    if kind == "lte":
        check("target_sparsity" in settings, word, "a target_sparsity", settings)
    return Variant(word, kind, configs.from_dict(METHODS[kind], settings, word), **own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, or a .gguf file")
    parser.add_argument("--train", required=True, help="token ids, .npy")
    parser.add_argument("--eval", required=True, nargs="+", help="held-out token ids, .npy")
    parser.add_argument("--out", default="lte.json")
    parser.add_argument("--variants", nargs="+", default=DEFAULT)
    parser.add_argument("--steps", type=int, nargs=2, default=[72, 72], help="of stage 1 and stage 2")
    parser.add_argument("--predictor-steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step, where memory is short")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--eval-tokens", type=int, default=131_072)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seconds", type=float, default=520, help="no variant starts after so many")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--unroll", type=int, help="layers a step of the scan runs; by default all")
    args = parser.parse_args()
    try:
        variants = [parse(word, args) for word in args.variants]
    except ConfigError as error:
        parser.error(str(error))
    mesh = parallel.single_device_mesh()
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        Study(args, mesh).run(variants)


class Study:
    """The model, the data, the compiled steps and the results so far."""

    def __init__(self, args: argparse.Namespace, mesh: Any):
        self.args, self.mesh, self.began = args, mesh, time.perf_counter()
        jax.config.update("jax_compilation_cache_dir", str(Path(args.out).with_suffix(".xla").absolute()))
        read: Any = hf.load_gguf if args.model.endswith(".gguf") else hf.load
        self.config, self.params = read(args.model, dtype="float32")
        self.data = DataConfig((Source(args.train),), seq_len=args.seq_len, batch_size=args.batch_size)
        open_tokens = functools.partial(open_source, tokenizer=None, cache="~/.cache/jsparse",
                                        vocab_size=self.config.vocab_size)  # fmt: skip
        self.train_store = open_tokens(Source(args.train))
        self.held_out = {Path(p).stem: open_tokens(Source(p)).tokens[: args.eval_tokens + 1] for p in args.eval}
        self.sample = jnp.asarray(self.train_store.tokens[: 8 * args.seq_len].reshape(8, -1), jnp.int32)
        out = Path(args.out)
        self.rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.exists() else []
        self.grouped = functools.cache(self.group)
        self.compiled: dict[Any, concurrent.futures.Future] = {}
        self.trained: Any = None  # parameters of the dense variant

    def run(self, variants: list[Variant]) -> None:
        done = {row["name"] for row in self.rows}
        wanted = [variant for variant in variants if variant.name not in done]
        if any(variant.on_dense for variant in wanted) and not any(variant.kind == "dense" for variant in wanted):
            wanted.append(parse("dense", self.args))
        wanted.sort(key=lambda variant: variant.kind != "dense")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:  # XLA compiles on as many threads
            for job in dict.fromkeys(job for variant in wanted for job in self.jobs(variant)):
                self.compiled[job] = pool.submit(self.lower(*job).compile)
            for variant in wanted:
                if time.perf_counter() - self.began > self.args.seconds:
                    say(f"{variant.name}: not started, the time is up")
                    continue
                try:
                    getattr(self, variant.kind)(variant)
                except Exception:
                    say(f"{variant.name}: failed\n{traceback.format_exc()}")
            say("\n" + "\n".join(line(row) for row in self.rows))

    # ---- Training

    def jobs(self, variant: Variant) -> list[tuple[TrainConfig, LlamaConfig]]:
        """What is trained, one after the other: recipe, whose traced numbers are the defaults', and model."""
        method = variant.method
        if isinstance(method, LteStage1):
            plain = {name: getattr(LteStage1(0.5), name) for name in (*KNOBS, *BEFORE)}
            first = dataclasses.replace(method, **plain)
            methods: list[Method] = [first, LteStage2()]
        else:  # sparsity is a parameter of the model
            methods = [method if isinstance(method, Dense) else dataclasses.replace(method, sparsity=0.5)]
        recipes = [
            TrainConfig(
                run="-", model=ModelSource(path="-"), data=self.data, steps=steps, method=method, dtype=self.args.dtype,
                optimizer=OptimizerConfig(lr=variant.lr, schedule=CosineLr(round(0.06 * steps), 0.1)),
                distill=Distill("-", variant.distill) if variant.distill else None, loss_chunk=8192,
                accumulate=self.args.accumulate, unroll=self.args.unroll or self.config.num_hidden_layers,
            )
            for method, steps in zip(methods, variant.steps, strict=False)
        ]  # fmt: skip
        return [(recipe, self.routed(recipe.method, method)) for recipe in recipes]

    def routed(self, trained: Method, variant: Method) -> LlamaConfig:
        """The config that a method trains, in a variant of another method where it is a later stage."""
        source = self.config
        if isinstance(trained, LteStage2):
            source = dataclasses.replace(source, router=Router(variant.block_size))  # type: ignore[union-attr]
        return training_config(trained, source)

    def lower(self, recipe: TrainConfig, config: LlamaConfig) -> Any:
        def step(now: Any, batch: Any, knobs: dict[str, Any], *teacher: Any) -> Any:
            traced = dataclasses.replace(recipe, method=dataclasses.replace(recipe.method, **knobs))
            return make_update(traced, config, self.mesh, self.config if teacher else None)(now, batch, *teacher)

        shapes = state.abstract(recipe, config, self.mesh), abstract_batch(recipe, self.mesh)
        teacher = [jax.eval_shape(self.cast, self.params)] if recipe.distill else []
        return jax.jit(step, donate_argnums=0).lower(*shapes, knobs(recipe.method), *teacher)

    def cast(self, params: Any) -> Any:
        return model.cast(params, self.config, self.args.dtype)

    def fit(self, variant: Variant, params: Any, stage: int = 0) -> tuple[Any, dict]:
        """Trains one stage from copies of parameters; the new ones, and what was seen."""
        recipe, config = self.jobs(variant)[stage]
        run = self.compiled[recipe, config].result()
        now = state.create(jax.tree.map(jnp.copy, params), recipe, config, self.mesh)
        loader = Loader([self.train_store], dataclasses.replace(self.data, seed=variant.seed))
        values = knobs(variant.method) if stage == 0 else {}
        teacher = [self.cast(self.trained)] if recipe.distill else []
        seen, seconds = [], []
        with loader.iterate(sum(variant.steps[:stage]), self.mesh) as batches:
            for _ in range(recipe.steps):
                batch = next(batches)
                began = time.perf_counter()
                now, metrics = run(now, batch, values, *teacher)
                seen.append(jax.device_get(metrics))
                seconds.append(time.perf_counter() - began)
            fresh = next(batches)
        table = {name: [_plain(row[name]) for row in seen] for name in seen[0]}
        about = {"metrics": table, "step_seconds": float(np.median(seconds[3:] or seconds))}
        return now.params, {"about": about, "fresh": fresh.tokens}

    def group(self, block_size: int, grouping: Any, seed: int) -> list[np.ndarray]:
        return group(self.params, self.config, block_size, grouping, tokens=self.sample[:1], seed=seed)

    def with_routers(self, variant: Variant, router: Router | None, params: Any, **options: Any) -> Any:
        assert router is not None
        order = self.grouped(variant.method.block_size, variant.method.grouping, variant.seed)
        return lte.add_routers(permute(params, order), self.config, router, key=jax.random.key(variant.seed),
                               tokens=self.sample, **options)[0]  # fmt: skip

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
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "settings": vars(self.args)}
        Path(self.args.out).write_text(json.dumps(about | {"rows": self.rows}))

    # ---- Variants

    def dense(self, variant: Variant) -> None:
        names = [row["name"] for row in self.rows]
        if "pretrained" not in names:
            self.measure("pretrained", self.params, self.config)
        self.trained, seen = self.fit(variant, self.params)
        if variant.name not in names:  # else it is trained again for others' sake
            self.measure(variant.name, self.trained, self.config, **seen["about"])

    def lte(self, variant: Variant) -> None:
        method, soft = variant.method, self.routed(variant.method, variant.method)
        hard, target = lte.served(soft), method.target_sparsity
        assert soft.router is not None
        params = self.with_routers(variant, soft.router, self.params, threshold=method.tau, init=method.init,
                                   dropped=target)  # fmt: skip
        params, seen = self.fit(variant, params)
        self.measure(f"{variant.name}: soft", params, soft, **seen["about"])
        params = self.calibrated(params, hard, seen["fresh"], target)
        self.measure(f"{variant.name}: stage 1", params, hard)
        params, seen = self.fit(variant, params, stage=1)
        params = self.calibrated(params, hard, seen["fresh"], target)
        rows = seen["fresh"][:16, :256]
        sizes = [size for size in (1, 2, 4, 8, 16) if len(rows) % size == 0]
        union = lte.union_density(model.cast(params, hard, self.args.dtype), hard, rows, sizes)
        thresholds = np.asarray(params["layers"]["ffn"]["router_threshold"]).tolist()
        self.measure(variant.name, params, hard, **seen["about"], thresholds=thresholds,
                     union={size: layers.tolist() for size, layers in union.items()})  # fmt: skip

    def calibrated(self, params: Any, config: Any, tokens: Any, target: float) -> Any:
        cast = model.cast(params, config, self.args.dtype)
        return lte.set_thresholds(params, lte.calibrate(cast, config, [jnp.asarray(tokens)], target))

    def noisy(self, variant: Variant) -> None:
        self.chooser(variant, self.params)

    def predictor(self, variant: Variant) -> None:
        self.chooser(variant, self.trained)

    def chooser(self, variant: Variant, params: Any) -> None:
        [(_, config)] = self.jobs(variant)
        params = self.with_routers(variant, config.router, params, threshold=variant.method.sparsity)
        params, seen = self.fit(variant, params)
        self.measure(variant.name, params, lte.served(config), **seen["about"])

    def oracle(self, variant: Variant) -> None:
        config = training_config(variant.method, self.config)
        assert config.router is not None
        params = self.with_routers(variant, config.router, self.trained, threshold=variant.method.sparsity)
        self.measure(variant.name, params, config)


def knobs(method: Method) -> dict[str, jax.Array]:
    """The numbers of a method that its compiled step takes as arguments."""
    return {name: jnp.float32(getattr(method, name)) for name in KNOBS} if isinstance(method, LteStage1) else {}


def line(row: dict[str, Any]) -> str:
    cells = []
    for text, found in row["eval"].items():
        off = found["block_sparsity"]
        share = f" at {np.mean(off):.1%} ({min(off):.0%} to {max(off):.0%})" if off else ""
        cells.append(f"{text} {found['perplexity']:.3f}{share}")
    skipped = row["metrics"]["skipped"][-1] if "metrics" in row else 0
    notes = f"  {skipped:.0f} steps not finite" if skipped else ""
    seconds = f"  {row['step_seconds'] * 1e3:.1f} ms a step" if "step_seconds" in row else ""
    return f"{row['name']:44} {'; '.join(cells)}{notes}{seconds}  [{row['at']:.0f} s]"


def say(text: str) -> None:
    print(text, flush=True)


def _plain(x: Any) -> Any:
    return np.asarray(x, np.float64).round(6).tolist()


if __name__ == "__main__":
    main()
