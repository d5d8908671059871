"""The subnet study of docs/results.md: search and repair of a real model beside their baselines, on one GPU.

    python tools/search_study.py MODEL --calibration TOKENS.npy --eval wiki=EVAL.npy docs=EVAL.npy --out search.json

Parts, in this order, each for every keep ratio but the last two:

    search      the initial subnet and the searched one, without and with repair, for either target
    levels      the search over pre-repaired weights
    seeds       further seeds of the search, at --one-keep
    baselines   magnitude, random, fluctuation (FLAP), whole layers alone (ShortGPT)
    attention   FFN widths alone, attention left whole: initial and searched
    ablations   settings of the repair and of the scores on the initial subnet, at --one-keep

All share one process and its compiled programs. Results are written after each piece, and none begins after --seconds;
the same command goes on with the pieces that --out does not have yet. The first of the evaluation texts is what the
table shows.

    python tools/search_study.py --decode llama2-7b --out decode.json

times decoding with the layer widths of the paper's released 80 % example beside the dense shape, on random weights.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jsparse import hf, model
from jsparse.bench.shapes import SHAPES
from jsparse.config import LayerShape, LlamaConfig, check
from jsparse.inference import evaluate, generate, pack
from jsparse.methods.evolution import Evolution, evolve
from jsparse.methods.importance import Fluctuation, Importance, Magnitude, Obs, RandomScore, Score, importance
from jsparse.methods.repair import Admm, Bias, ClosedForm, Levels, Repair, repair, repair_levels
from jsparse.methods.search import draw_texts
from jsparse.methods.space import (
    Budget,
    Ground,
    SpaceConfig,
    adaptive,
    depth_only,
    make_ground,
    make_space,
    starts,
    uniform,
)
from jsparse.methods.subnet import Genome, Sizes, compact, to_json, whole, zero_filled
from jsparse.methods.supernet import make_supernet, scorer

# FFN widths of the LLaMA-7B subnet at 80 % that the paper's authors publish with their code.
# fmt: off
PUBLISHED = (
    10496, 10496, 10496, 9984, 11008, 8960, 10496, 6400, 5376, 7936, 7936, 5888, 9984, 6912, 4864, 4864,
    8960, 6400, 5376, 7936, 7936, 6400, 6912, 4864, 6912, 5376, 5376, 6400, 8448, 5888, 10496, 8960,
)
# fmt: on
SCORES: dict[str, Score] = {
    "obs": Obs(),
    "obs, pairs by weights": Obs(pairs="weights"),
    "obs, terms normalised": Obs(terms="normalised"),
    "obs, output terms": Obs(terms="output"),
    "magnitude": Magnitude(),
    "fluctuation": Fluctuation(),
    "random": RandomScore(),
}
DENSE = ClosedForm(target="dense")
PARTS = ("search", "levels", "seeds", "baselines", "attention", "ablations")
FREE = {"out", "save", "parts", "keep", "seeds", "seconds"}  # settings that a run that goes on may change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model folder")
    parser.add_argument("--calibration", help="token ids, .npy")
    parser.add_argument("--eval", nargs="+", default=[], help="NAME=TOKENS.npy, held-out texts")
    parser.add_argument("--out", required=True, help="results, JSON")
    parser.add_argument("--save", help="folder for the searched and repaired models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5, 0.9, 0.7, 0.6])
    parser.add_argument("--one-keep", type=float, default=0.8, help="ratio of the seeds and the ablations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="generations of a search; the paper's are 50")
    parser.add_argument("--population", type=int, default=100)
    parser.add_argument("--windows", type=int, default=8, help="of the fitness")
    parser.add_argument("--seq-len", type=int, default=1024, help="of the fitness")
    parser.add_argument("--together", type=int, default=1, help="candidates a forward pass")
    parser.add_argument("--calibration-windows", type=int, default=32, help="of --eval-seq-len tokens")
    parser.add_argument("--eval-tokens", type=int, default=131_072, help="of each held-out text")
    parser.add_argument("--eval-seq-len", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=540, help="nothing begins after this")
    parser.add_argument("--decode", choices=SHAPES, help="time decoding instead")
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    if args.decode:
        decode(args)
    else:
        Study(args).run()


Scorers = tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]  # on the fitness windows, and held out


class Study:
    """What all variants share, and the rows found so far."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.began = args, time.perf_counter()
        self.config, self.params = hf.load(args.model, dtype=args.dtype)
        tokens = np.load(args.calibration)
        half = len(tokens) // 2
        self.texts = draw_texts(tokens[:half], seq_len=args.seq_len, calibration=1, windows=args.windows)
        self.calibration = draw_texts(tokens[half:], seq_len=args.eval_seq_len, calibration=args.calibration_windows,
                                      windows=1).calibration  # fmt: skip
        self.held_out = {name: np.load(path)[: args.eval_tokens]
                               for name, path in (text.split("=", 1) for text in args.eval)}  # fmt: skip
        self.head: dict[str, Any] = {
            "settings": json.loads(json.dumps({name: x for name, x in vars(args).items() if name not in FREE})),
            "parameters": model.count(self.params), "ends": Sizes.of(self.config).ends,
        }  # fmt: skip
        self.piece, self.done, self.rows = "", list[str](), list[dict[str, Any]]()
        if Path(args.out).exists():
            before = json.loads(Path(args.out).read_text())
            check(all(before[name] == x for name, x in self.head.items()), "--out", "a file of the same study or none",
                  args.out)  # fmt: skip
            self.done, self.rows = before["done"], [row for row in before["rows"] if row["piece"] in before["done"]]

    def run(self) -> None:
        args, at = self.args, functools.partial
        everything = whole(self.config)
        pieces: dict[str, Callable[[], None]] = {
            "dense": at(self.measure, "dense", 1.0, everything, self.params, self.config, {})
        }
        for part in (part for part in PARTS if part in args.parts):
            if part == "seeds":
                pieces |= {f"seed {seed}": at(self.search, args.one_keep, seed) for seed in range(1, args.seeds)}
            elif part == "ablations":
                pieces[part] = at(self.ablations, args.one_keep)
            else:
                pieces |= {f"{part} {keep:g}": at(getattr(self, part), keep) for keep in args.keep}
        for self.piece, compute in pieces.items():
            if self.piece in self.done:
                continue
            if self.seconds() > args.seconds:
                print(f"{self.piece}: no time left", flush=True)
                continue
            try:
                compute()
                self.done.append(self.piece)
                self.write()
            except Exception as error:  # a failing variant must not cost the others
                print(f"{self.piece}: failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        self.table()

    @functools.cached_property
    def survey(self) -> tuple[dict[str, Importance], np.ndarray]:
        """Scores by name, and the influence of layers."""
        found = importance(self.params, self.config, self.calibration, tuple(SCORES.values()))
        self.say("importance")
        return dict(zip(SCORES, found.scores, strict=True)), found.influence

    @functools.cached_property
    def plain(self) -> Scorers:
        """Losses of candidates with the weights they inherit."""
        return self.scorers()

    @functools.cached_property
    def repaired_beforehand(self) -> Scorers:
        """Losses of candidates with weights repaired for each width, once for all widths of all ratios."""
        widest = make_space(self.config, min(self.args.keep))
        levels = repair_levels(self.params, self.config, self.calibration, self.survey[0]["obs"],
                               widest.values.tolist(), widest.ffn.tolist())  # fmt: skip
        jax.block_until_ready(levels)
        self.say("levels repaired")
        return self.scorers(levels)

    def ground(self, keep: float, scores: str = "obs", **space: Any) -> Ground:
        return make_ground(self.config, self.survey[0][scores], Budget(keep),
                           make_space(self.config, keep, SpaceConfig(**space)))  # fmt: skip

    def search(self, keep: float, seed: int = 0) -> None:
        ground = self.ground(keep)
        if not seed:
            self.masked("initial", keep, uniform(ground))
            self.repaired("initial + repair", keep, uniform(ground))
            self.repaired("initial + repair, dense target", keep, uniform(ground), method=DENSE)
        genome, facts = self.evolved(ground, self.plain, seed)
        self.masked("search", keep, genome, facts)
        self.repaired("search + repair", keep, genome, facts)
        self.repaired("search + repair, dense target", keep, genome, facts, method=DENSE, save=not seed)

    def levels(self, keep: float) -> None:
        genome, facts = self.evolved(self.ground(keep), self.repaired_beforehand, mask_rate=0.0, first_mask_rate=0.0)
        self.repaired("pre-repaired search + repair", keep, genome, facts)
        self.repaired("pre-repaired search + repair, dense target", keep, genome, facts, method=DENSE)

    def baselines(self, keep: float) -> None:
        for name in ("magnitude", "random"):
            genome = uniform(self.ground(keep, name))
            self.masked(name, keep, genome)
            self.repaired(f"{name} + repair", keep, genome)
        genome = adaptive(self.ground(keep, "fluctuation"))
        self.repaired("fluctuation + bias", keep, genome, method=Bias())
        self.repaired("fluctuation + repair", keep, genome)
        self.masked("depth", keep, depth_only(self.config, self.survey[1], Budget(keep)))

    def attention(self, keep: float) -> None:
        """FFN widths and layers alone, the space that other runtimes load."""
        ground = self.ground(keep, attention_low=1.0)
        self.repaired("attention whole, initial + repair", keep, uniform(ground))
        genome, facts = self.evolved(ground, self.plain)
        self.repaired("attention whole, search + repair", keep, genome, facts)

    def ablations(self, keep: float) -> None:
        genome = uniform(self.ground(keep))
        methods: dict[str, Repair] = {"admm": Admm(), "admm on raw X X^T": Admm(normalise=False)}
        methods |= {f"damp {damp:g}": ClosedForm(damp) for damp in (1e-3, 1e-2, 0.3)}
        for name, method in methods.items():
            self.repaired(f"initial + repair, {name}", keep, genome, method=method)
        for name in (name for name in SCORES if name.startswith("obs,")):
            genome = uniform(self.ground(keep, name))
            self.masked(f"initial, {name}", keep, genome)
            self.repaired(f"initial + repair, {name}", keep, genome)

    # ----------------------------------------------------------------------------------------------------------------

    def evolved(self, ground: Ground, scorers: Scorers, seed: int = 0, **changes: Any) -> tuple[Genome, dict[str, Any]]:
        """The survivor that is best on held-out windows, and what is to be told of the search."""
        n = self.args.population
        settings = Evolution(epochs=self.args.epochs, population=n, mutants=n // 2, crossovers=n * 3 // 10, seed=seed,
                             **changes)  # fmt: skip
        began = time.perf_counter()
        state = evolve(starts(ground), scorers[0], ground, settings)
        best = state.parents[int(np.argmin(scorers[1]([survivor.genome for survivor in state.parents])))]
        return best.genome, {"seed": seed, "candidates": len(state.visited), "loss": best.loss,
                             "search_seconds": time.perf_counter() - began}  # fmt: skip

    def scorers(self, levels: Levels | None = None) -> Scorers:
        """Losses on the windows of the fitness, and on those held out."""
        together = self.args.together
        fitness, held_out = (
            scorer(make_supernet(self.params, self.config, windows, levels=levels), self.config,
                   batch=together * max(1, 20 // together), together=together)
            for windows in (self.texts.fitness, self.texts.heldout)
        )  # fmt: skip
        return fitness, held_out

    def masked(self, name: str, keep: float, genome: Genome, facts: dict[str, Any] | None = None) -> None:
        self.measure(name, keep, genome, _zero_filled(self.params, genome), self.config, facts or {})

    def repaired(
        self,
        name: str,
        keep: float,
        genome: Genome,
        facts: dict[str, Any] | None = None,
        method: Repair = ClosedForm(),
        save: bool = False,
    ) -> None:
        params, config, rows = repair(self.params, self.config, self.calibration, genome, method)
        errors = {
            part: [sum(getattr(row, when) for row in rows if row.name.endswith(part)) for when in ("before", "after")]
            for part in ("attention.output", "ffn.down")
        }
        self.measure(name, keep, genome, params, config, (facts or {}) | {"repair_errors": errors})
        if save and self.args.save:
            small, shapes = compact(params, config, genome)
            hf.save(Path(self.args.save) / f"{name.split()[0]}-{100 * keep:g}", shapes, small,
                    tokenizer=self.args.model, overwrite=True)  # fmt: skip

    def measure(self, name: str, keep: float, genome: Genome, params: Any, config: LlamaConfig, facts: Any) -> None:
        found = {text: evaluate(params, config, tokens, seq_len=self.args.eval_seq_len).perplexity
                 for text, tokens in self.held_out.items()}  # fmt: skip
        count = Sizes.of(config).count(genome)
        row = {"name": name, "keep": keep, "piece": self.piece, "parameters": count,
               "kept": count / self.head["parameters"], "perplexity": found, **facts, "genome": to_json(genome),
               "at": self.seconds(), "device": jax.devices()[0].device_kind, "jax": jax.__version__}  # fmt: skip
        self.rows.append(row)
        self.write()
        shown = "  ".join(f"{text} {value:9.3f}" for text, value in found.items())
        searched = f"  ({facts['candidates']} in {facts['search_seconds']:.1f} s)" if "candidates" in facts else ""
        self.say(f"{keep:4.0%} {name:42} {shown}  kept {row['kept']:.4f}{searched}")

    def write(self) -> None:
        scratch = Path(f"{self.args.out}.tmp")
        scratch.write_text(json.dumps(self.head | {"done": self.done, "rows": self.rows}) + "\n")
        scratch.replace(self.args.out)

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def say(self, text: str) -> None:
        print(f"[{self.seconds():6.1f} s] {text}", flush=True)

    def table(self) -> None:
        """Perplexity on the first text by variant and ratio; of several seeds the mean and the range."""
        text = next(iter(self.held_out))
        ratios = sorted({row["keep"] for row in self.rows[1:]}, reverse=True)
        print(f"\nperplexity on {text}, dense {self.rows[0]['perplexity'][text]:.3f}")
        print(f"{'':44}" + "".join(f"{keep:>20.0%}" for keep in ratios))
        for name in dict.fromkeys(row["name"] for row in self.rows[1:]):
            cells = []
            for keep in ratios:
                found = [r["perplexity"][text] for r in self.rows if (r["name"], r["keep"]) == (name, keep)]
                spread = f" {min(found):.2f}-{max(found):.2f}" if len(found) > 1 else ""
                cells.append(f"{np.mean(found):.2f}{spread}" if found else "")
            print(f"{name:44}" + "".join(f"{cell:>20}" for cell in cells))


@jax.jit
def _zero_filled(params: Any, genome: Genome) -> Any:
    return zero_filled(params, genome)


# --------------------------------------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------------------------------------


def decode(args: argparse.Namespace) -> None:
    """One row of text, random weights: the dense shape, then the published widths as shares of its FFN."""
    dense = SHAPES[args.decode]
    widths = [round(dense.intermediate_size * w / 11_008 / 64) * 64 for w in PUBLISHED]
    widths = [widths[i * len(widths) // dense.num_hidden_layers] for i in range(dense.num_hidden_layers)]
    narrow = dataclasses.replace(dense, layers=tuple(LayerShape(w, dense.head_dim) for w in widths))
    rows = []
    for name, config in (("dense", dense), ("published widths", narrow)):
        params = random_params(config, args.dtype)
        size = sum(x.nbytes for x in jax.tree.leaves(params))
        decoder = pack(params, config)
        del params
        began, rates = time.perf_counter(), []
        for seed in range(4):  # the first compiles
            prompt = np.random.default_rng(seed).integers(config.vocab_size, size=(1, 128))
            found = generate(decoder, config, prompt, max_new_tokens=args.new_tokens, stop_ids=())
            rates.append(found.decode_tokens_per_second)
        stats = jax.devices()[0].memory_stats() or {}
        rows.append({"name": name, "parameters": model.count(model.abstract(config)), "bytes": size,
                     "tokens_per_second": float(np.median(rates[1:])), "rates": rates,
                     "bytes_in_use": stats.get("bytes_in_use")})  # fmt: skip
        rate = rows[-1]["tokens_per_second"]
        print(f"{args.decode} {name:18} {rate:8.1f} tokens/s  {size / 2**30:6.2f} GiB of weights "
              f"{size * rate / 1e12:5.2f} TB/s  ({time.perf_counter() - began:.0f} s)", flush=True)  # fmt: skip
        Path(args.out).write_text(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}, indent=1) + "\n")
        del decoder
    print(f"speed-up {rows[1]['tokens_per_second'] / rows[0]['tokens_per_second']:.3f}, "
          f"bytes {rows[1]['bytes'] / rows[0]['bytes']:.3f}")  # fmt: skip


def random_params(config: LlamaConfig, dtype: str) -> Any:
    """Parameters of any model, made in the dtype to compute in: float32 ones would not fit beside them."""

    @functools.partial(jax.jit, static_argnames=("shape", "dtype"))
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, dtype)

    shapes = model.abstract(config, dtype)
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes)))
    leaves = [draw(key, x.shape, x.dtype) for key, x in zip(keys, jax.tree.leaves(shapes), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


if __name__ == "__main__":
    main()
