"""The real-model study of docs/results.md: ProSparse and its baselines at equal tokens, on one or several GPUs.

    python tools/study.py MODEL --train TRAIN --eval EVAL [EVAL ...] --out results.json VARIANT [VARIANT ...]

A variant is `NAME=OVERRIDE,OVERRIDE,...` (overrides of the recipe, parted by commas outside brackets). Each is trained
in a process of its own, as many at a time as there are GPUs, then measured: perplexity and sparsity by layer of every
held-out text, with a sweep of thresholds.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
CETT_ERRORS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("variants", nargs="+", help="NAME=OVERRIDE,...")
    parser.add_argument("--recipe", default="configs/smollm2_135m.yaml")
    parser.add_argument("--train", required=True, help="training text or token store")
    parser.add_argument("--eval", required=True, nargs="+", help="held-out texts or token stores")
    parser.add_argument("--eval-tokens", type=int, default=262_144, help="of each held-out text")
    parser.add_argument("--runs", default="runs", help="folder for the run folders")
    parser.add_argument("--out", default="results.json")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--only", action="store_true", help="run the one variant here (used internally)")
    args = parser.parse_args()
    if args.only:
        one(args, args.variants[0])
    else:
        schedule(args)


def schedule(args: argparse.Namespace) -> None:
    """Keeps every GPU busy with one variant at a time; a failed variant is reported and does not stop the others."""
    waiting = list(args.variants)
    running: dict[int, tuple[str, subprocess.Popen]] = {}
    results = []
    while waiting or running:
        for gpu in range(args.gpus):
            if gpu not in running and waiting:
                variant = waiting.pop(0)
                name = variant.partition("=")[0]
                log = open(Path(args.out).with_name(f"{name}.log"), "w")  # noqa: SIM115
                command = [sys.executable, __file__, *sys.argv[1:]]
                command = [c for c in command if c not in args.variants] + [variant, "--only"]
                env = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
                running[gpu] = name, subprocess.Popen(command, env=env, stdout=log, stderr=log)
        for gpu, (name, process) in list(running.items()):
            if process.poll() is not None:
                del running[gpu]
                path = result_path(args, name)
                if path.exists():
                    results.append(json.loads(path.read_text()))
                    Path(args.out).write_text(json.dumps(results, indent=1))
                    line(results[-1])
                else:
                    print(f"{name}: failed with {process.returncode}, see {name}.log", flush=True)
        time.sleep(0.5)


def result_path(args: argparse.Namespace, name: str) -> Path:
    return Path(args.out).with_name(f"result-{name}.json")


def line(result: dict) -> None:
    cells = [f"{Path(text).name} {p[0]['perplexity']:.3f} at {sum(p[0]['sparsity']) / len(p[0]['sparsity']):.4f}"
             for text, p in result["points"].items()]  # fmt: skip
    print(f"{result['name']:16} {'; '.join(cells)}; loss {result['loss']:.4f}, {result['seconds']:.0f} s", flush=True)


def one(args: argparse.Namespace, variant: str) -> None:
    """Trains a variant and measures it."""
    import jax

    from jsparse import config, model
    from jsparse.data import open_source
    from jsparse.inference import evaluate
    from jsparse.methods import prosparse
    from jsparse.train.checkpoint import load_run
    from jsparse.train.loop import train

    began = time.perf_counter()
    name, _, text = variant.partition("=")
    overrides = [o for o in re.split(r",(?![^\[{]*[\]}])", text) if o]
    run = str(Path(args.runs) / name)
    recipe = config.load(args.recipe, [
        f"run={run}", f"model.path={args.model}", f"data.train=[{{path: {args.train}}}]", *overrides
    ])  # fmt: skip
    summary = train(recipe)
    model_config, params, _ = load_run(run)
    params = model.cast(params, model_config, "bfloat16")

    def tokens_of(text: str, count: int) -> Any:
        return open_source(config.Source(text), args.model, recipe.data.cache, model_config.vocab_size).tokens[:count]

    held_out = {text: tokens_of(text, args.eval_tokens) for text in args.eval}
    points: dict[str, list[dict]] = {text: [] for text in held_out}

    def measure(params: Any, model_config: config.LlamaConfig, **setting: float) -> None:
        for text, tokens in held_out.items():
            found = evaluate(params, model_config, tokens, batch_size=32, threshold=setting.get("threshold"))
            points[text].append(setting | dataclasses.asdict(found))

    measure(params, model_config)
    for threshold in THRESHOLDS:
        measure(params, model_config, threshold=threshold)
    if isinstance(model_config.activation, config.Relu):
        calibration = tokens_of(args.train, 32 * 512).reshape(8, 4, 512).astype("int32")
        curve = prosparse.cett_curve(params, model_config, calibration)
        for error in CETT_ERRORS:
            measure(*prosparse.apply_cett(params, model_config, curve.tau_at(error)), cett_error=error)
    result = {
        "name": name,
        "overrides": overrides,
        "steps": summary.steps,
        "tokens": summary.tokens,
        "loss": summary.loss,
        "seconds": time.perf_counter() - began,
        "device": jax.devices()[0].device_kind,
        "points": points,
        "metrics": [json.loads(row) for row in (Path(run) / "metrics.jsonl").read_text().splitlines()],
    }
    result_path(args, name).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
