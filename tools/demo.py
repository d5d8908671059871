"""`make demo`: the main job end to end, on a real pretrained LLaMA, on two CPU cores.

Imports SmolLM2-135M, measures it, replaces SiLU by ReLU, trains a little with ProSparse's penalty, shifts thresholds,
generates, exports, reloads and checks. A few dozen steps on a CPU repair only a part of what the substitution breaks:
docs/results.md shows the same recipe with 52 million tokens on a GPU.

After an interruption the same command goes on: what was fetched, imported and trained is kept, and only measured again.
A demo that came to its end trains anew.
"""

import dataclasses
import importlib.util
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import assets
import numpy as np
from rich.console import Console

from jsparse import hf, report
from jsparse.config import LlamaConfig, Relu, Source, from_dict
from jsparse.config import TrainConfig as Recipe
from jsparse.data import open_source
from jsparse.inference import Evaluation, compare, compare_torch, evaluate, generate
from jsparse.methods import prosparse
from jsparse.model import Params
from jsparse.train.checkpoint import load_run
from jsparse.train.loop import train

HOME = Path(".demo")
FINISHED = HOME / "report"  # written last
TOKENS = 4097  # of the held-out text
PROMPT = "The capital of France is"
RISE = 0.02  # of the perplexity, that threshold shifting may cost

RECIPE = {
    "run": str(HOME / "run"),
    "model": {"path": str(HOME / "model"), "activation": "relu"},
    "data": {
        "train": [{"path": str(HOME / "train.jsonl")}, {"path": str(HOME / "calibration.jsonl")}],
        "seq_len": 256,
        "batch_size": 2,
        "cache": str(HOME / "cache"),
    },
    "steps": 80,
    "method": {"type": "prosparse", "weight": {"type": "stages", "peaks": [0.02, 0.2, 0.2], "steps": [24, 32, 60, 80]}},
    "optimizer": {"lr": 5e-4, "schedule": {"type": "cosine", "warmup_steps": 5}},
    "checkpoint": {"every": 1000, "keep": 1},
    "log": {"every": 1, "tensorboard": False},
    "dtype": "float32",
    "mesh": {"data": 1},
    "compile_cache": None,
}


def main() -> None:
    console, began = Console(), time.perf_counter()
    if FINISHED.exists():  # the earlier demo's last step: this one trains again
        shutil.rmtree(HOME / "run", ignore_errors=True)
        shutil.rmtree(FINISHED)

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - began:5.0f} s[/]  {text}", highlight=False)

    say("fetching the model and the text")
    assets.fetch(HOME)
    if not (HOME / "model").exists():
        say("importing the GGUF file as a Hugging Face folder")
        hf.import_gguf(HOME / "model.gguf", HOME / "model", dtype="float32")
    config, params = hf.load(HOME / "model")
    store = open_source(Source(str(HOME / "held_out.jsonl")), HOME / "model", HOME / "cache", config.vocab_size)
    text = np.asarray(store.tokens[:TOKENS])
    rows: list[dict[str, Any]] = []

    def measure(name: str, params: Params, config: LlamaConfig, **more: Any) -> Evaluation:
        found = evaluate(params, config, text, seq_len=512, batch_size=2, **more)
        rows.append({"name": name} | dataclasses.asdict(found))
        say(f"{name}: perplexity {found.perplexity:.2f}, sparsity {np.mean(found.sparsity):.1%}")
        return found

    measure("dense (SiLU)", params, config)
    say(f"generated: {continue_text(params, config)}")
    measure("ReLU, untrained", params, dataclasses.replace(config, activation=Relu()))
    del params

    recipe = from_dict(Recipe, RECIPE)
    tokens = recipe.steps * recipe.data.batch_size * recipe.data.seq_len
    say(f"training {recipe.steps} steps of ProSparse, {tokens:,} tokens")
    train(recipe)
    config, params, _ = load_run(HOME / "run")
    measure("ProSparse, trained", params, config)

    def at(threshold: float) -> tuple[float, Any]:
        found = evaluate(params, config, text[: TOKENS // 2], seq_len=512, batch_size=2, threshold=threshold)
        say(f"threshold {threshold:.4f}: perplexity {found.perplexity:.2f}, sparsity {np.mean(found.sparsity):.1%}")
        return found.perplexity, found.sparsity

    say(f"solving for the threshold that costs {RISE:.0%} of perplexity, on half of that text")
    point = prosparse.solve(at, rise=RISE, tolerance=5e-3)
    shifted = prosparse.shift(config, point.setting)
    measure(f"and threshold {point.setting:.3f}", params, shifted)
    say(f"generated: {continue_text(params, shifted)}")

    out = HOME / "exported"
    hf.save(out, shifted, params, tokenizer=HOME / "model", overwrite=True)
    reloaded_config, reloaded = hf.load(out)
    again = compare(params, shifted, reloaded, reloaded_config, text[:513], seq_len=512)
    say(f"exported to {out} and reloaded: logits differ by {again.max_abs_difference:.1e}")
    if importlib.util.find_spec("torch"):
        theirs = compare_torch(out, reloaded, reloaded_config, text[:257], seq_len=256, trust_remote_code=True)
        # A threshold cuts values off: where a gate lies within rounding of it, two programs may decide differently.
        say(f"PyTorch runs it: KL {theirs.mean_kl:.1e} nats a token, same top token at {theirs.top1_agreement:.1%}")

    page = report.report([HOME / "run"], FINISHED)
    console.print(report.summary_table(rows))
    console.print(f"The pictures: {page}")


def continue_text(params: Params, config: LlamaConfig) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(HOME / "model", trust_remote_code=False)
    found = generate(params, config, [tokenizer(PROMPT).input_ids], max_new_tokens=24)
    return repr(PROMPT + str(tokenizer.decode(found.tokens[0])))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
