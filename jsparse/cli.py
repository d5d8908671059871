"""The `jsparse` command: one door to everything that is done from a shell.

Every command prints its settings, writes what it found as JSON beside what it prints, and answers bad input in one
line: exit code 2 where the request was wrong, 1 where it failed.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.conf import Positional

from jsparse.config import ConfigError, MeshConfig, Source, check
from jsparse.files import write_text

CACHE = "~/.cache/jsparse"
Model = Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
Out = Annotated[Positional[str], tyro.conf.arg(metavar="OUT")]


@dataclass(frozen=True)
class Train:
    """Train by a recipe; goes on from its run folder's newest checkpoint.

    Settings are those of `jsparse.config.TrainConfig`; `jsparse train --help` lists them.
    """

    recipe: Annotated[Positional[str], tyro.conf.arg(metavar="RECIPE")]  # a YAML file, see configs/
    # field.sub=value, over the recipe's own
    overrides: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[FIELD=VALUE ...]")] = ()

    def run(self) -> None:
        import jax

        from jsparse import config, parallel
        from jsparse.train.loop import train

        recipe = config.load(self.recipe, self.overrides)
        parallel.initialize()
        if jax.process_index() == 0:
            print(config.dump(recipe))
        train(recipe)


@dataclass(frozen=True)
class Export:
    """Write a run's model as a Hugging Face folder."""

    source: Annotated[Positional[str], tyro.conf.arg(metavar="RUN")]  # run folder
    out: Out  # model folder to write
    step: int | None = None  # a checkpoint kept; the newest by default
    format: Literal["auto", "llama", "sparsellama", "jsparse"] = "auto"  # auto: the plainest that holds the model
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights written
    packed: bool = False  # pack the MLP's matrices whose zeros make N:M
    overwrite: bool = False  # replace an existing model folder

    def run(self) -> None:
        from jsparse import hf
        from jsparse.methods.packing import pack_params, packable
        from jsparse.train.checkpoint import load_run

        config, params, info = load_run(self.source, self.step)
        if self.packed:
            check(bool(packable(params)), "--packed", "matrices whose zeros make N:M with M of 2, 4, 8 or 16", "none")
            params = pack_params(params)
        hf.save(self.out, config, params, tokenizer=info["tokenizer"], dtype=self.dtype, format=self.format,
                overwrite=self.overwrite)  # fmt: skip
        print(f"{self.out}: step {info['step']} of {self.source}")


@dataclass(frozen=True)
class Import:
    """Read a GGUF file and write a model folder."""

    source: Annotated[Positional[str], tyro.conf.arg(metavar="FILE")]  # .gguf file
    out: Out  # model folder to write
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of the weights written
    overwrite: bool = False  # replace an existing model folder

    def run(self) -> None:
        from jsparse import hf

        hf.import_gguf(self.source, self.out, dtype=self.dtype, overwrite=self.overwrite)
        print(f"{self.out}: from {self.source}")


@dataclass(frozen=True)
class Compute:
    """Where and in what precision a model runs."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    mesh: tuple[int, int, int] = (-1, 1, 1)  # devices along data, fsdp and tensor; -1: what is left


@dataclass(frozen=True)
class Windows:
    """How a text is cut for evaluation."""

    seq_len: int = 2048  # tokens a window shows
    stride: int | None = None  # tokens from one window to the next; by default a whole window
    bos: Literal["auto", "yes", "no"] = "auto"  # a BOS token before each window; auto: as the model's tokenizer does
    max_tokens: int | None = None  # of the text; by default all
    batch_size: int = 8  # windows a forward pass


@dataclass(frozen=True)
class Result:
    """Where the result goes."""

    json: str | None = None  # by default a new file in the current folder
    overwrite: bool = False  # replace what exists


@dataclass(frozen=True)
class Eval:
    """Perplexity, token count, activation sparsity by layer, and the pattern that the weights' zeros make."""

    model: Model  # model folder
    data: str  # text, JSONL, Parquet, token store or `datasets` name
    split: str = "test"  # of a `datasets` name
    # N:M or a share to prune: exit with 1 where a matrix breaks it, and name the first group that does
    pattern: str | None = None
    scope: Literal["mlp", "all"] = "mlp"  # whose matrices must have --pattern: the MLP's, or attention's too
    windows: Annotated[Windows, tyro.conf.arg(name="")] = Windows()
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    result: Annotated[Result, tyro.conf.arg(name="")] = Result()

    def run(self) -> None:
        from jsparse import hf, report
        from jsparse.methods.patterns import ATTENTION, MLP, check_claim, observe, parse_pattern, shares

        if self.pattern is None:
            _refuse(self, ("scope",), "--pattern beside it", self.scope)
        out = _result_path(self.result, "eval", self.model, self.data)
        claim = parse_pattern(self.pattern) if self.pattern else None
        evaluate = _evaluator(self, hf.read_config(self.model))
        with _model(self.model, self.compute) as (config, params):
            if claim is not None:
                check_claim(params, claim, MLP + ATTENTION if self.scope == "all" else MLP)
            rows = observe(params)
            mlp, whole = shares(rows, params)
            found = evaluate(params, config)
        values = {"command": "eval", "model": self.model, "data": self.data} | dataclasses.asdict(found)
        values |= {"weights": {"pattern": self.pattern, "mlp_sparsity": mlp, "model_sparsity": whole,
                               "matrices": [dataclasses.asdict(row) for row in rows]}}  # fmt: skip
        _print_table(report.summary_table([values | {"name": Path(self.model).name}]))
        if any(found.sparsity):
            print("sparsity by layer, %: " + " ".join(f"{100 * s:.0f}" for s in found.sparsity))
        if found.block_sparsity:
            print("blocks left out by layer, %: " + " ".join(f"{100 * s:.0f}" for s in found.block_sparsity))
            print(f"tokens without a block in some layer, %: up to {100 * max(found.no_block):.2f}")
        pruned = [row for row in rows if row.zeros > 0.01 * row.weights]  # quantised weights have some by chance
        if pruned:
            made = _by_kind([(row.name, row.pattern or "no N:M") for row in pruned])
            print(f"zeros: {mlp:.2%} of the MLP's weights, {whole:.2%} of the model's; {made}")
        print(f"{found.tokens:,} tokens in {found.windows} windows of {found.seq_len}, stride {found.stride}, "
              f"{'no BOS' if found.bos is None else f'BOS {found.bos} before each'}")  # fmt: skip
        _write_json(out, values)


@dataclass(frozen=True)
class Generate:
    """Continue prompts."""

    model: Model  # model folder
    prompt: tuple[str, ...]  # one or more
    max_new_tokens: int = 64  # the most that a prompt gets
    temperature: float = 0.0  # 0: the likeliest token always
    top_k: int | None = None  # draw from the k likeliest tokens
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability
    min_p: float = 0.0  # draw from tokens at least this share as probable as the likeliest
    seed: int = 0  # of the first prompt; the others take the numbers after it
    # how FFNs are computed: whole, by the best kernel that skips what is not used, or by a named one; auto: the faster
    implementation: Literal["auto", "dense", "sparse", "xla", "triton", "mosaic_gpu", "mosaic_tpu"] = "auto"
    predictor: bool = False  # let the folder's predictor choose the neurons (`jsparse predict`): approximate
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    result: Annotated[Result, tyro.conf.arg(name="")] = Result()

    def run(self) -> None:
        from jsparse.inference import Sampling, generate, pack
        from jsparse.methods import predictor

        check(len(self.prompt) > 0, "--prompt", "a text or more", "none")
        out = _result_path(self.result, "generate", self.model)
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        if self.temperature == 0:
            _refuse(self, ("top_k", "top_p", "min_p", "seed"), "--temperature above 0 beside it", self.temperature)
        tokenizer = _tokenizer(self.model)
        prompts = [tokenizer(text).input_ids for text in self.prompt]
        for text, ids in zip(self.prompt, prompts, strict=True):
            check(len(ids) > 0, "--prompt", "a text of at least one token", text)
        with _model(self.model, self.compute, packed=True) as (config, params):
            if self.predictor:
                params = pack(params, config, predictor.load(self.model, config))
            stream = _Stream(tokenizer, prompts[0]) if len(prompts) == 1 and sys.stdout.isatty() else None
            found = generate(params, config, prompts, max_new_tokens=self.max_new_tokens, sampling=sampling,
                             seed=self.seed, on_token=stream, implementation=self.implementation)  # fmt: skip
        texts = [_continuation(tokenizer, *both) for both in zip(prompts, found.tokens, strict=True)]
        if stream:
            print()
        else:
            print("\n\n".join(p + t for p, t in zip(self.prompt, texts, strict=True)))
        speed = found.decode_tokens_per_second
        print(
            f"[{sum(map(len, found.tokens))} tokens; decode {speed:.1f} tokens/s, {found.implementation}]",
            file=sys.stderr,
        )
        rows = [{"prompt": p, "text": t, "tokens": ids}
                for p, t, ids in zip(self.prompt, texts, found.tokens, strict=True)]  # fmt: skip
        _write_json(out, {"command": "generate", "model": self.model, "texts": rows,
                          "prefill_seconds": found.prefill_seconds, "decode_seconds": found.decode_seconds,
                          "decode_tokens_per_second": speed, "implementation": found.implementation})  # fmt: skip


@dataclass(frozen=True)
class Compare:
    """Prove a conversion: how far the predictions of two models are apart."""

    a: Annotated[Positional[str], tyro.conf.arg(metavar="A")]  # model folder, the reference
    # model folder; left out: a itself, against PyTorch
    b: Annotated[Positional[str], tyro.conf.arg(metavar="[B]")] = ""
    data: str = dataclasses.field(kw_only=True)  # text, JSONL, Parquet, token store or `datasets` name
    split: str = "test"  # of a `datasets` name
    torch: bool = False  # run the reference in PyTorch
    trust_remote_code: bool = False  # with --torch: let transformers execute the reference folder's Python files
    max_kl: float | None = None  # exit with 1 where the mean KL is above
    windows: Annotated[Windows, tyro.conf.arg(name="")] = Windows(seq_len=512)
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    result: Annotated[Result, tyro.conf.arg(name="")] = Result()

    def run(self) -> None:
        from jsparse import hf
        from jsparse.inference import compare, compare_torch
        from jsparse.inference.windows import Windows as Cut

        check(bool(self.b) or self.torch, "compare", "two model folders, or one and --torch", self.a)
        if not self.torch:
            _refuse(self, ("trust_remote_code",), "--torch beside it", self.trust_remote_code)
        b, w = self.b or self.a, self.windows
        out = _result_path(self.result, "compare", self.a, b)
        config = hf.read_config(b)
        tokens, bos = _tokens(self.data, self.split, b, config.vocab_size, w.max_tokens), _bos(w.bos, b, config)
        Cut(tokens, config, w.seq_len, w.stride, bos)  # whether it fits, before anything large is read
        shared: dict[str, Any] = dict(seq_len=w.seq_len, stride=w.stride, bos=bos, batch_size=w.batch_size,
                                      progress=_progress("windows"))  # fmt: skip
        with _model(b, self.compute) as (config, params):
            if self.torch:
                remote = self.trust_remote_code
                found = compare_torch(self.a, params, config, tokens, trust_remote_code=remote, **shared)
            else:
                with _model(self.a, self.compute) as (config_a, params_a):
                    found = compare(params_a, config_a, params, config, tokens, **shared)
        values = dataclasses.asdict(found)
        print("\n".join(f"{name:20} {value:.6g}" for name, value in values.items() if value is not None))
        _write_json(out, {"command": "compare", "a": self.a, "b": b, "data": self.data} | values)
        if self.max_kl is not None and not found.mean_kl <= self.max_kl:
            raise ValueError(f"mean_kl: expected at most {self.max_kl}, got {found.mean_kl:.3g}")


@dataclass(frozen=True)
class Threshold:
    """Set a model's thresholds: one for all neurons (FATReLU, CATS), by neuron (CETT), or of LTE's routers by layer.

    Prints a sweep, then solves for one goal and writes the model with its new thresholds.
    """

    model: Model  # model folder
    out: Out  # model folder to write
    data: str  # text to measure on
    calibration: str = ""  # text for the statistics of cett and lte; by default the data itself
    # fatrelu or cett for ReLU, cats for SiLU, lte for routers; by default the first that fits the model
    criterion: Literal["fatrelu", "cats", "cett", "lte"] | None = None
    target_sparsity: float | None = None  # goal: at least this mean sparsity, or share of blocks left out (lte)
    target_perplexity: float | None = None  # goal: at most this perplexity
    target_rise: float | None = None  # goal: at most this relative rise of the perplexity, 0.01 is one per cent
    # thresholds (fatrelu, cats), errors (cett) or shares of blocks to leave out (lte); by default a few, by criterion
    sweep: tuple[float, ...] | None = None
    split: str = "test"  # of a `datasets` name
    windows: Annotated[Windows, tyro.conf.arg(name="")] = Windows(max_tokens=65_536)
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    overwrite: bool = False  # replace an existing model folder

    def run(self) -> None:
        from jsparse import hf
        from jsparse.hf.folder import check_target

        goal = {"sparsity": self.target_sparsity, "perplexity": self.target_perplexity, "rise": self.target_rise}
        given = {name: value for name, value in goal.items() if value is not None}
        check(len(given) == 1, "threshold", "one of --target-sparsity, --target-perplexity and --target-rise",
              given or "none")  # fmt: skip
        for name, value in given.items():
            limit, what = (1.0, "a share between 0 and 1") if name == "sparsity" else (math.inf, "a positive number")
            check(0 < value < limit, f"--target-{name}", what, value)
        check_target(Path(self.out), self.overwrite, self.model)

        config = hf.read_config(self.model)
        criterion, evaluate = self._criterion(config), _evaluator(self, config)
        with _model(self.model, self.compute) as (config, params):
            params, config, points, point = self._solve(criterion, evaluate, params, config, given)
            values = {"command": "threshold", "model": self.model, "data": self.data, "criterion": criterion,
                      "goal": given, "setting": point.setting, "perplexity": point.perplexity,
                      "sparsity": point.sparsity,
                      "points": [dataclasses.asdict(p) | {"threshold": p.setting} for p in points]}  # fmt: skip
            hf.save(self.out, config, params, tokenizer=hf.tokenizer_in(self.model), overwrite=self.overwrite,
                    extra={"threshold.json": json.dumps(values, indent=1) + "\n"})  # fmt: skip
        print(f"{self.out}: {criterion} at {point.setting:.5g}, perplexity {point.perplexity:.3f}, "
              f"sparsity {point.mean_sparsity:.4f}")  # fmt: skip
        print(Path(self.out) / "threshold.json", file=sys.stderr)

    def _criterion(self, config: Any) -> str:
        """The criterion asked for, or the model's own. Raises ConfigError where it does not fit the model."""
        kind = config.activation.type
        default = "lte" if config.router else "cats" if kind in ("silu", "cats") else "fatrelu"
        criterion = self.criterion or default
        if criterion == "lte":
            mode = config.router.mode if config.router else "no router"
            check(mode == "hard", "--criterion lte", "a model with LTE's routers, mode 'hard'", mode)
        else:
            fitting = {"fatrelu": ("relu", "fatrelu", "shifted_relu"), "cats": ("silu", "cats"),
                       "cett": ("relu", "fatrelu", "cett")}[criterion]  # fmt: skip
            check(kind in fitting, f"--criterion {criterion}", f"a model of activation {' or '.join(fitting)}", kind)
        if criterion not in ("cett", "lte"):
            _refuse(self, ("calibration",), "--criterion cett or lte beside it", criterion)
        return criterion

    def _solve(
        self, criterion: str, evaluate: Callable[..., Any], params: Any, config: Any, given: dict[str, float]
    ) -> tuple[Any, Any, Any, Any]:
        """The model that meets the goal, params and config, with the points of the sweep and its own."""
        from jsparse.config import with_threshold
        from jsparse.methods import lte, prosparse

        def measure(params: Any, config: Any = config, threshold: float | None = None) -> tuple[float, Any]:
            found = evaluate(params, config, threshold)
            sparsity = found.block_sparsity if criterion == "lte" else found.sparsity
            print(f"  perplexity {found.perplexity:8.3f}  sparsity {sum(sparsity) / len(sparsity):.4f}", flush=True)
            return found.perplexity, sparsity

        what, settings = _SWEEPS[criterion]
        settings = settings if self.sweep is None else self.sweep
        print(f"sweep of {what} {', '.join(map(str, settings))}")
        aim = ", ".join(f"{name} {value:g}" for name, value in given.items())
        if criterion in ("fatrelu", "cats"):
            points = prosparse.sweep(lambda t: measure(params, config, t), settings)
            print(f"solving for {aim}")
            point = prosparse.solve(lambda t: measure(params, config, t), **given)
            activation = with_threshold(config.activation, point.setting)
            return params, dataclasses.replace(config, activation=activation), points, point
        text = self.calibration or self.data
        tokens = _tokens(text, self.split, self.model, config.vocab_size, 16_384)
        length = min(512, len(tokens))
        batches = tokens[: len(tokens) // length * length].reshape(-1, 1, length).astype("int32")
        if criterion == "lte":
            points = prosparse.sweep(lambda s: measure(lte.leave_out(params, config, batches, s)), settings)
            print(f"solving for {aim}")
            params, point = lte.solve_thresholds(measure, params, config, batches, **given)
            return params, config, points, point
        curve = prosparse.cett_curve(params, config, batches)
        points = prosparse.sweep(lambda e: measure(*prosparse.apply_cett(params, config, curve.tau_at(e))), settings)
        print(f"solving for {aim}")
        params, config, point = prosparse.solve_cett(measure, params, config, curve, **given)
        return params, config, points, point


_SHIFTS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
_SWEEPS: dict[str, tuple[str, tuple[float, ...]]] = {  # by criterion: what a setting is, and those swept by default
    "fatrelu": ("thresholds", _SHIFTS),
    "cats": ("thresholds", _SHIFTS),
    "cett": ("errors", _SHIFTS),
    "lte": ("shares of blocks left out", (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
}


# Options of `Prune` that magnitude does not use.
_OF_CALIBRATION = ("calibration", "samples", "seq_len", "seed", "batch_size", "split")


@dataclass(frozen=True)
class Prune:
    """Set weights to zero in one shot, by a pattern such as 2:4, and write the model.

    Statistics come from calibration text, block by block; nothing is trained. prune.json, in the new folder, tells what
    was pruned.
    """

    model: Model  # model folder
    out: Out  # model folder to write
    method: Literal["dass", "wanda", "sparsegpt", "magnitude", "ria"]  # how weights are chosen, see docs/pruning.md
    pattern: str  # N:M, N kept of each M consecutive weights, or the share to prune, such as 0.5
    calibration: str = ""  # text, JSONL, Parquet, token store or `datasets` name; magnitude needs none
    scope: Literal["mlp", "all"] = "mlp"  # all: attention's matrices too
    # with --scope all, the method for attention: by default --method itself, and Wanda where that is DaSS
    attention: Literal["wanda", "sparsegpt", "magnitude", "ria"] | None = None
    axis: Literal["input", "output"] | None = None  # along which groups of gate and up run; the method's own by default
    alpha: float | None = None  # DaSS: exponent of the activation's norm for gate and up; 0.5 by default
    damp: float | None = None  # SparseGPT: share of the mean added to the Hessian's diagonal; 0.01 by default
    samples: int = 128  # windows of calibration text, drawn without repetition; all where the text has fewer
    seq_len: int = 2048  # tokens of a window
    seed: int = 0  # of the draw
    batch_size: int | None = None  # windows a forward pass; by default 8, on a CPU 1, which its cache holds
    split: str = "train"  # of a `datasets` name
    remainder: Literal["refuse", "skip"] = "refuse"  # a matrix that groups of M do not fill: refuse, or leave it dense
    packed: bool = False  # write the MLP's matrices without their zeros, see docs/pruning.md
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    overwrite: bool = False  # replace an existing model folder

    def run(self) -> None:
        import jax

        from jsparse import hf, parallel
        from jsparse.hf.folder import check_target
        from jsparse.methods.patterns import parse_pattern
        from jsparse.methods.sparsegpt import SparseGpt

        pattern = parse_pattern(self.pattern)
        mlp, attention = self._methods()
        check_target(Path(self.out), self.overwrite, self.model)
        needs = {self.method, attention.type if attention else self.method} - {"magnitude"}
        if not needs:
            _refuse(self, _OF_CALIBRATION, "a --method that looks at text beside it", self.method)
        check(bool(self.calibration) or not needs, "--calibration", f"a text for {' and '.join(sorted(needs))}", "none")
        windows = self._windows(hf.read_config(self.model)) if needs else None
        if windows is not None:
            print(f"calibration on {len(windows)} windows of {self.seq_len} tokens")

        size = self.batch_size
        if size is None:
            size = 1 if jax.default_backend() == "cpu" else 8
        about = {"command": "prune", "settings": dataclasses.asdict(self) | {"batch_size": size}}
        mesh = parallel.make_mesh(MeshConfig(*self.compute.mesh))
        with jax.set_mesh(mesh):
            folder = hf.prune_folder(self.model, self.out, windows, pattern=pattern, mlp=mlp, attention=attention,
                                     remainder=self.remainder, packed=self.packed, batch_size=size,
                                     dtype=self.compute.dtype, mesh=mesh, overwrite=self.overwrite, about=about,
                                     progress=_progress("blocks"))  # fmt: skip
        found = folder.report
        dead = [f"{row.dead} of {row.name}" for row in found.matrices if row.dead]
        if dead:
            more = f" and {len(dead) - 1} more matrices" if dead[1:] else ""
            print(f"channels that no calibration token reached: {dead[0]}{more}, see prune.json", file=sys.stderr)
        asked = {method.damp for method in (mlp, attention) if isinstance(method, SparseGpt)}
        raised = [f"{row.damp:g} for {row.name}" for row in found.matrices if row.damp not in asked | {None}]
        if raised:
            more = f" and {len(raised) - 1} more matrices, see prune.json" if raised[1:] else ""
            print(f"damping raised, as the calibration's Gram matrix could not be factored: {raised[0]}{more}",
                  file=sys.stderr)  # fmt: skip
        if found.skipped:
            first = f"{len(found.skipped)} matrices, first {found.skipped[0]}"
            print(f"left dense, as {pattern} does not divide them: {first}")
        print(_by_kind([(row.name, f"{row.method} {pattern} along the {row.groups}") for row in found.matrices]))
        print(f"{self.out}: {found.mlp_sparsity:.2%} of the MLP's weights are zero, {found.model_sparsity:.2%} of the "
              f"model's; {folder.bytes:,} bytes, {folder.bytes / folder.dense_bytes:.2f} of dense")  # fmt: skip
        print(Path(self.out) / "prune.json", file=sys.stderr)

    def _methods(self) -> tuple[Any, Any]:
        """The methods for the MLP and for attention. Refuses options that neither of them has."""
        from jsparse.methods.pruning import METHODS

        check(self.attention is None or self.scope == "all", "--attention", "--scope all beside it", self.scope)
        attention = self.attention or ("wanda" if self.method == "dass" else self.method)
        chosen = (self.method, attention) if self.scope == "all" else (self.method,)
        check(self.alpha is None or self.method == "dass", "--alpha", "--method dass beside it", self.method)
        check(self.damp is None or "sparsegpt" in chosen, "--damp", "sparsegpt beside it", " and ".join(chosen))
        along = f"'input', along which {self.method} compares"
        check(self.axis != "output" or self.method == "dass", "--axis", along, self.axis)
        options: dict[str, dict[str, Any]] = {"dass": {"alpha": self.alpha, "axis": self.axis},
                                              "sparsegpt": {"damp": self.damp}}  # fmt: skip

        def build(name: str) -> Any:
            return METHODS[name](**{key: value for key, value in options.get(name, {}).items() if value is not None})

        return build(self.method), build(attention) if self.scope == "all" else None

    def _windows(self, config: Any) -> Any:
        """Calibration sequences, int [windows, T], drawn from the text's own windows."""
        import numpy as np

        from jsparse.inference.windows import positions

        limit = positions(config)
        check(0 < self.seq_len <= limit, "--seq-len", f"1 to the model's {limit} positions", self.seq_len)
        check(self.samples > 0, "--samples", "a positive number", self.samples)
        tokens = _tokens(self.calibration, self.split, self.model, config.vocab_size, None)
        count = len(tokens) // self.seq_len
        check(count > 0, "--calibration", f"at least one window of {self.seq_len} tokens", len(tokens))
        drawn = np.random.default_rng(self.seed).permutation(count)[: self.samples]
        return np.stack([tokens[i * self.seq_len : (i + 1) * self.seq_len] for i in drawn])


# Options of `Search` that not every method uses.
_OF_SEARCH = ("fitness", "levels", "epochs", "population", "parents", "masks", "ratios", "together", "run_folder")
_OF_WIDTHS = ("ffn_low", "ffn_multiple", "attention_low", "attention_multiple", "depth")


@dataclass(frozen=True)
class Search:
    """Find a smaller model in a model and repair it, without training.

    Writes the subnet as a model folder of its own widths; subnet.json, in it, tells what was kept and what it costs. A
    search that is stopped goes on when the same command is run again.
    """

    model: Model  # model folder
    out: Out  # model folder to write
    keep: float  # share of the parameters to keep
    calibration: str  # text, JSONL, Parquet, token store or `datasets` name
    # search: evolution. The others are its baselines: one ratio for all layers (uniform), the same by magnitude or at
    # random, FLAP's fluctuation and widths, whole layers alone (depth, ShortGPT)
    method: Literal["search", "uniform", "magnitude", "fluctuation", "depth", "random"] = "search"
    of: Literal["total", "decoder"] = "total"  # what keep is a share of; decoder: without embedding, norm and head
    band: float = 0.01  # a subnet keeps from keep - band to keep
    # closed: least squares; admm: the paper's iteration; bias: FLAP's compensation
    repair: Literal["closed", "admm", "bias", "none"] = "closed"
    damp: float | None = None  # of closed and admm, added to the unit diagonal of the Gram matrix; by default 0.1
    # of closed and admm; own: a matrix is to put out what it did; dense: it also makes up for what went wrong before it
    target: Literal["own", "dense"] = "own"
    # how search and uniform rank RoPE pairs; logits: by their energy in attention's scores; weights: as the paper does
    pairs: Literal["logits", "weights"] = "logits"
    fitness: Literal["perplexity", "kl"] = "perplexity"  # kl: KL(dense || subnet)
    levels: bool = False  # search over weights repaired for each width
    ffn_low: float | None = None  # smallest share of an FFN; by default the paper's for the ratio
    ffn_multiple: int = 64  # FFN widths are multiples of it; 256 to export as DeciLM without padding
    attention_low: float | None = None  # smallest share of a head's dims; 1 leaves attention whole
    attention_multiple: int = 8  # head dims are multiples of it
    depth: int | None = None  # most layers that may go; by default the paper's for the ratio
    epochs: int = 50  # generations
    population: int = 100  # candidates a generation
    parents: int = 10  # of the next generation
    masks: Literal["constructive", "rejection"] = "constructive"  # how index sets change; rejection: the paper's
    ratios: Literal["near", "grid"] = "near"  # how widths change: by a step or two, or to anywhere on their grid
    samples: int = 128  # calibration windows, drawn from the text; fewer where it has no more
    windows: int = 16  # windows to search with, and as many held out, for the last choice and the report
    seq_len: int = 2048  # tokens of a window
    seed: int = 0  # of the windows drawn and of the search
    batch_size: int = 8  # calibration windows a forward pass
    together: int = 1  # candidates a forward pass, where few short windows leave the device idle
    split: str = "train"  # of a `datasets` name
    run_folder: str | None = None  # of the search's state and candidates.jsonl; by default OUT.search
    zero_filled: str | None = None  # also write the subnet in the model's own shapes, which any runtime loads
    decilm: str | None = None  # also write it as DeciLM, with whole heads and FFN widths that are multiples of 256
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    overwrite: bool = False  # replace existing model folders

    def run(self) -> None:
        from jsparse import hf
        from jsparse.hf.decilm import MULTIPLE
        from jsparse.hf.folder import check_target
        from jsparse.inference.windows import positions
        from jsparse.methods import search
        from jsparse.methods.subnet import compact, widened

        settings = self._settings()
        for path in filter(None, (self.out, self.zero_filled, self.decilm)):
            check_target(Path(path), self.overwrite, self.model)
        folder = Path(self.run_folder or f"{self.out}.search") if self.method == "search" else None
        config = hf.read_config(self.model)
        limit, width = positions(config), config.intermediate_size
        check(0 < self.seq_len <= limit, "--seq-len", f"1 to the model's {limit} positions", self.seq_len)
        check(not self.decilm or width % MULTIPLE == 0, "--decilm", f"an FFN width that {MULTIPLE} divides", width)
        tokens = _tokens(self.calibration, self.split, self.model, config.vocab_size, None)
        texts = search.draw_texts(tokens, seq_len=self.seq_len, calibration=self.samples, windows=self.windows,
                                  seed=self.seed)  # fmt: skip
        print(f"{len(texts.calibration)} calibration windows, {len(texts.fitness)} to search with, "
              f"{len(texts.heldout)} held out, of {self.seq_len} tokens")  # fmt: skip
        with _model(self.model, self.compute) as (config, params):
            found = search.search(params, config, texts, settings, folder=folder, on_stage=print,
                                  progress=_generations())  # fmt: skip
            report = found.report
            values = {"command": "search", "settings": dataclasses.asdict(self), **dataclasses.asdict(report)}
            small, shapes = compact(found.params, found.config, found.genome)
            tokenizer = hf.tokenizer_in(self.model)
            hf.save(self.out, shapes, small, tokenizer=tokenizer, overwrite=self.overwrite,
                    extra={"subnet.json": json.dumps(values, indent=1) + "\n"})  # fmt: skip
            if self.zero_filled:
                hf.save(self.zero_filled, found.config, found.params, tokenizer=tokenizer, overwrite=self.overwrite)
            if self.decilm:
                small, shapes = compact(found.params, found.config, widened(found.genome, MULTIPLE))
                hf.save(self.decilm, shapes, small, tokenizer=tokenizer, format="nemotron-nas",
                        overwrite=self.overwrite)  # fmt: skip
        print(f"{self.out}: {report.parameters:,} parameters, {report.keep:.2%} of all, {report.keep_decoder:.2%} of "
              "the decoder's")  # fmt: skip
        chose = ", which chose among the last survivors" if self.method == "search" else ""
        print(f"perplexity on the windows held out of the search{chose}: dense {report.perplexity_dense:.3f}, subnet "
              f"{report.perplexity_before:.3f}, repaired {report.perplexity:.3f}")  # fmt: skip
        print(Path(self.out) / "subnet.json", file=sys.stderr)

    def _settings(self) -> Any:
        """Refuses what does not fit before anything is loaded."""
        from jsparse.methods.evolution import Evolution
        from jsparse.methods.importance import Obs
        from jsparse.methods.repair import Admm, Bias, ClosedForm
        from jsparse.methods.search import SearchConfig
        from jsparse.methods.space import Budget, SpaceConfig

        for names, fits, wanted, got in (
            (_OF_SEARCH, self.method == "search", "--method search beside it", self.method),
            (("pairs",), self.method in ("search", "uniform"), "--method search or uniform beside it", self.method),
            (_OF_WIDTHS, self.method != "depth", "a --method that cuts widths beside it", self.method),
            (("masks",), not self.levels, "no --levels beside it, which fix the index sets", "--levels"),
            (("damp", "target"), self.repair in ("closed", "admm"), "--repair closed or admm beside it", self.repair),
        ):
            if not fits:
                _refuse(self, names, wanted, got)
        given: dict[str, Any] = {"target": self.target} | ({} if self.damp is None else {"damp": self.damp})
        repairs: dict[str, Any] = {"closed": ClosedForm(**given), "admm": Admm(**given), "bias": Bias(), "none": None}
        half, third = self.population // 2, self.population * 3 // 10  # the paper's shares
        return SearchConfig(
            method=self.method,
            budget=Budget(self.keep, self.of, self.band),
            space=SpaceConfig(ffn_low=self.ffn_low, ffn_multiple=self.ffn_multiple, attention_low=self.attention_low,
                              attention_multiple=self.attention_multiple, depth=self.depth),
            score=Obs(pairs=self.pairs),
            evolution=Evolution(epochs=self.epochs, population=self.population, mutants=half, crossovers=third,
                                parents=self.parents, masks=self.masks, ratios=self.ratios, seed=self.seed),
            repair=repairs[self.repair],
            fitness=self.fitness,
            levels=self.levels,
            batch_size=self.batch_size,
            together=self.together,
        )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Draw runs and results: pictures and one HTML page."""

    # run folders, result files or folders of them
    paths: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="PATH [PATH ...]")]
    out: str  # folder to write
    overwrite: bool = False  # replace an earlier report

    def run(self) -> None:
        from jsparse.report import report

        check(len(self.paths) > 0, "PATH", "a run folder or a result file, or more", "none")
        page = report([Path(p) for p in self.paths], Path(self.out), overwrite=self.overwrite)
        print(page)


@dataclass(frozen=True)
class BenchTrain:
    """Time the training step: dense, ReLU and ProSparse."""

    shape: str = "smollm2-135m"  # a named model shape, see jsparse.bench.shapes
    batch_size: int = 32  # sequences a step
    seq_len: int = 2048  # tokens of a sequence
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation
    remat: Literal["none", "full", "dots", "attention"] = "none"  # what is computed again, as in a recipe
    unroll: int | None = None  # layers a step of the scan runs; by default all
    steps: int = 20  # timed
    result: Annotated[Result, tyro.conf.arg(name="")] = Result()

    def run(self) -> None:
        from jsparse.bench.train import bench_train

        _shape(self.shape)
        out = _result_path(self.result, "bench", "train", self.shape)
        found = bench_train(self.shape, batch_size=self.batch_size, seq_len=self.seq_len, dtype=self.dtype,
                            remat=self.remat, unroll=self.unroll, steps=self.steps)  # fmt: skip
        for row in found:
            mfu = "" if row.mfu is None else f"  MFU {row.mfu:.1%}"
            print(f"{row.name:14} {row.step_seconds * 1e3:8.1f} ms  {row.tokens_per_second:10,.0f} tokens/s{mfu}"
                  f"  {row.overhead:+.1%}  {row.memory_bytes / 2**30:.1f} GiB")  # fmt: skip
        _write_measurements(out, "train", self, {"rows": [dataclasses.asdict(row) for row in found]})


@dataclass(frozen=True)
class BenchFfn:
    """Time a layer's FFN in a step of decoding, dense and sparse, beside the limit that its bytes set."""

    shape: tuple[str, ...] = ("llama2-7b",)  # named model shapes, see jsparse.bench.shapes
    kind: tuple[Literal["blocks", "neurons", "predicted"], ...] = ("blocks", "neurons", "predicted")  # what is skipped
    # kernels; sparse: the best
    implementation: tuple[Literal["sparse", "xla", "triton", "mosaic_gpu", "mosaic_tpu"], ...] = ("sparse",)
    batch: tuple[int, ...] = (1, 2, 4, 8, 16)  # rows
    # shares of the blocks or neurons that no row uses
    sparsity: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
    rank: int = 1024  # of the predictors, which are of int8
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of weights and computation
    seconds: float = 300.0  # what does not fit is left out
    probe_bytes: int = 2**30  # of the arrays that measure the bandwidth
    result: Annotated[Result, tyro.conf.arg(name="")] = Result()

    def run(self) -> None:
        from jsparse.bench.ffn import bench_ffn, fit_lines
        from jsparse.bench.timing import Budget, bandwidth

        shapes = {name: _shape(name) for name in self.shape}
        for flag, value in (("--rank", self.rank), *(("--batch", rows) for rows in self.batch)):
            check(value > 0, flag, "a positive number", value)
        for share in self.sparsity:
            check(0 <= share < 1, "--sparsity", "shares from 0 up to, not including, 1", share)
        out = _result_path(self.result, "bench", "ffn", *self.shape)
        budget = Budget(self.seconds)
        speed = bandwidth(self.probe_bytes)
        print(f"copy {speed.copy / 1e12:.3f} TB/s, read {speed.read / 1e12:.3f} TB/s", flush=True)
        rows, lines = [], {}
        for name, shape in shapes.items():
            print(name)
            found = bench_ffn(shape, speed, kinds=self.kind, implementations=self.implementation, batches=self.batch,
                              sparsities=self.sparsity, dtype=self.dtype, rank=self.rank, budget=budget,
                              tell=_tell)  # fmt: skip
            lines[name] = fit_lines(found, speed)
            rows += [{"shape": name} | dataclasses.asdict(row) for row in found]
        for name, fitted in lines.items():
            print(f"\n{name}: a layer in us, start + bytes / rate (jsparse.inference.costs.LINES)")
            for kind, by_batch in fitted.items():
                shown = ", ".join(f"{b}: Line({x.start:.1f}, {x.rate / 1e6:.2f}e6)" for b, x in by_batch.items())
                print(f'    "{kind}": {{{shown}}},')
        _print_speeds(rows, ("shape", "batch", "kind", "implementation", "measured", "us"))
        fits = {name: {kind: {b: dataclasses.asdict(x) for b, x in by.items()} for kind, by in fitted.items()}
                for name, fitted in lines.items()}  # fmt: skip
        _write_measurements(out, "ffn", self, {"bandwidth": dataclasses.asdict(speed), "rows": rows, "lines": fits})


@dataclass(frozen=True)
class BenchDecode:
    """Time decoding of a whole model, dense and sparse, beside the limit that its bytes set."""

    shape: str = "llama2-7b"  # a named model shape, see jsparse.bench.shapes
    variant: tuple[str, ...] = ()  # see jsparse.bench.decode.VARIANTS; by default all
    # kernel of sparse FFNs; sparse: the best
    implementation: Literal["sparse", "xla", "triton", "mosaic_gpu", "mosaic_tpu"] = "sparse"
    batch: tuple[int, ...] = (1,)  # rows
    context: int = 512  # tokens in the cache at the first step
    steps: int = 64  # timed
    rank: int = 1024  # of the predictors, which are of int8
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of weights and computation
    seconds: float = 300.0  # what does not fit is left out
    probe_bytes: int = 2**30  # of the arrays that measure the bandwidth
    result: Annotated[Result, tyro.conf.arg(name="")] = Result()

    def run(self) -> None:
        from jsparse.bench.decode import VARIANTS, bench_decode
        from jsparse.bench.timing import Budget, bandwidth

        shape = _shape(self.shape)
        for flag, value in (("--context", self.context), ("--steps", self.steps), ("--rank", self.rank),
                            *(("--batch", rows) for rows in self.batch)):  # fmt: skip
            check(value > 0, flag, "a positive number", value)
        for name in self.variant:
            check(name in VARIANTS, "--variant", f"one of {'; '.join(VARIANTS)}", name)
        out = _result_path(self.result, "bench", "decode", self.shape)
        budget = Budget(self.seconds)
        speed = bandwidth(self.probe_bytes)
        print(f"copy {speed.copy / 1e12:.3f} TB/s, read {speed.read / 1e12:.3f} TB/s", flush=True)
        rows = []
        for batch in self.batch:
            found = bench_decode(shape, speed, variants=self.variant or tuple(VARIANTS), batch=batch,
                                 implementation=self.implementation, context=self.context, steps=self.steps,
                                 dtype=self.dtype, rank=self.rank, budget=budget, tell=_tell)  # fmt: skip
            rows += [{"shape": self.shape} | dataclasses.asdict(row) for row in found]
        _print_speeds(rows, ("shape", "batch", "name", "measured", "ms", "tokens_per_second"))
        _write_measurements(out, "decode", self, {"bandwidth": dataclasses.asdict(speed), "rows": rows})


@dataclass(frozen=True)
class Bench:
    """Measure speed on this machine: of the training step, of a layer's FFN while decoding, of decoding."""

    what: Union[  # noqa: UP007
        Annotated[BenchTrain, tyro.conf.subcommand("train")],
        Annotated[BenchFfn, tyro.conf.subcommand("ffn")],
        Annotated[BenchDecode, tyro.conf.subcommand("decode")],
    ]

    def run(self) -> None:
        self.what.run()


def _shape(name: str) -> Any:
    from jsparse.bench.shapes import SHAPES

    check(name in SHAPES, "--shape", f"one of {', '.join(SHAPES)}", name)
    return SHAPES[name]


def _tell(line: str) -> None:
    print(line, flush=True)


def _print_speeds(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Measurements as a table, each beside its limit and the best dense one."""
    from rich.table import Table

    table = Table(*columns, "limit", "of limit", "speed-up", "its limit", box=None)
    for row in rows:
        limit = row.get("limit_us", row.get("limit_ms"))
        shown = [f"{x:.1%}" if name == "measured" else f"{x:.3g}" if isinstance(x, float) else str(x)
                 for name, x in ((name, row[name]) for name in columns)]  # fmt: skip
        table.add_row(*shown, f"{limit:.3g}", f"{row['fraction']:.0%}", f"{row['speedup']:.2f}x",
                      f"{row['speedup_limit']:.2f}x")  # fmt: skip
    _print_table(table)


def _write_measurements(path: Path, what: str, command: Any, values: dict[str, Any]) -> None:
    """The JSON of a benchmark, with the device that it ran on."""
    import jax

    _write_json(path, {"command": f"bench {what}", "device": jax.devices()[0].device_kind,
                       "devices": jax.device_count(), "jax": jax.__version__,
                       "settings": dataclasses.asdict(command)} | values)  # fmt: skip


@dataclass(frozen=True)
class Predict:
    """Train predictors of a ReLU model's active neurons, and put them into its folder.

    Each layer gets the rank that reads the fewest bytes at the recall asked for, or no predictor where its gate is
    cheaper. Prints recall, precision, predicted sparsity, bytes and the perplexity with the predictors on, for each
    recall asked for. Kept is what reads least within --rise, or the least perplexity where nothing is. predictor.json
    holds the choices by layer and the whole curves.
    """

    model: Model  # model folder
    data: str  # text, JSONL, Parquet, token store or `datasets` name
    held_out: int = 16  # windows of the text to measure on, its last ones
    split: str = "train"  # of a `datasets` name
    rank: tuple[int, ...] = ()  # to choose from, layer by layer; by default 1/32, 1/16, 1/8 and 1/4 of the width
    steps: int = 1000  # of training
    seq_len: int = 512  # tokens of a window
    batch_size: int = 2  # windows a step
    lr: float = 1e-3  # learning rate
    negatives: float = 0.005  # larger: fewer neurons are predicted, with a lower recall
    recall: tuple[float, ...] = (0.999, 0.99, 0.95, 0.9)  # of every layer
    rise: float = 0.02  # of the perplexity, that is acceptable
    powerinfer: str | None = None  # a new folder, for PowerInfer's converter
    seed: int = 0  # of the start and of the windows drawn
    compute: Annotated[Compute, tyro.conf.arg(name="")] = Compute()
    overwrite: bool = False  # replace the folder's predictors

    def run(self) -> None:
        from jsparse import hf
        from jsparse.inference import evaluate
        from jsparse.inference.predictors import keep, try_recall
        from jsparse.methods import predictor

        target = Path(self.model) / predictor.FILE
        check(self.overwrite or not target.exists(), "model", f"one without {predictor.FILE} (or --overwrite)",
              self.model)  # fmt: skip
        check(len(self.recall) > 0 and self.held_out > 0, "--recall, --held-out", "at least one each", self.recall)
        check(self.rise >= 0, "--rise", "0 or more", self.rise)
        check(self.powerinfer is None or not Path(self.powerinfer).exists(), "--powerinfer", "a new folder",
              self.powerinfer)  # fmt: skip
        tokens = _tokens(self.data, self.split, self.model, hf.read_config(self.model).vocab_size, None)
        count = len(tokens) // self.seq_len
        check(count > self.held_out, "--data", f"more than {self.held_out} windows of {self.seq_len} tokens", count)
        windows = tokens[: count * self.seq_len].reshape(count, self.seq_len)
        with _model(self.model, self.compute) as (config, params):
            made = predictor.train(params, config, windows[: -self.held_out], ranks=self.rank or None,
                                   steps=self.steps, batch_size=self.batch_size, lr=self.lr, negatives=self.negatives,
                                   seed=self.seed, progress=_progress("steps"))  # fmt: skip
            measured = predictor.curves(made, params, config, windows[-self.held_out :])
            held_out = windows[-self.held_out :].reshape(-1)
            exact = evaluate(params, config, held_out, seq_len=self.seq_len).perplexity
            active = next(iter(measured.values())).active
            print(f"active: {active.mean():.2%} of the neurons; without predictors a token reads "
                  f"{(1 + 2 * active.mean()) / 3:.2%} of the FFNs; perplexity {exact:.3f}")  # fmt: skip
            trials = []
            for recall in self.recall:
                trials.append(try_recall(made, measured, params, config, held_out, recall, seq_len=self.seq_len))
                found = trials[-1]
                print(f"recall {found.recall:.2%}  precision {found.precision:.2%}  predicted sparsity "
                      f"{found.sparsity:.2%}  reads {found.share:.2%} of the FFNs  perplexity {found.perplexity:.3f}  "
                      f"ranks {_ranks(found.layers)}", flush=True)  # fmt: skip
            kept, cheap = keep(trials, exact, self.rise)
            dear = "" if cheap else f", though it costs more than {self.rise:.1%} of the perplexity"
            print(f"kept: recall {kept.wanted:g}{dear}")
            predictor.save(self.model, predictor.assemble(made, kept.layers))
            if self.powerinfer:
                largest = max(made)
                ranked = [made[pick.rank or largest][layer] for layer, pick in enumerate(kept.layers)]
                predictor.powerinfer(self.powerinfer, ranked, params)
        whole = {rank: {name: x.tolist() for name, x in vars(curve).items()} for rank, curve in measured.items()}
        _write_json(target.with_suffix(".json"),
                    {"command": "predict", "settings": dataclasses.asdict(self), "perplexity": exact,
                     "chosen": [dataclasses.asdict(trial) for trial in trials], "kept": kept.wanted,
                     "curves": whole})  # fmt: skip


def _ranks(picks: Sequence[Any]) -> str:
    """How many layers have which predictor."""
    counted = sorted(Counter(pick.rank for pick in picks).items())
    return ", ".join(f"{rank or 'none'}: {count}" for rank, count in counted)


COMMANDS = {
    "train": Train,
    "export": Export,
    "import": Import,
    "eval": Eval,
    "generate": Generate,
    "threshold": Threshold,
    "predict": Predict,
    "prune": Prune,
    "search": Search,
    "compare": Compare,
    "report": Report,
    "bench": Bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits 0 on success, 2 on a usage error, 1 on failure."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs one command; returns its exit code."""
    try:
        command = _parse(arguments)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its tokenizers warn of model types that are ours
        print(f"settings: {_settings(command)}", file=sys.stderr)
        command.run()
    except ConfigError as error:
        return _fail(2, error)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if os.environ.get("JSPARSE_TRACEBACK"):
            raise
        return _fail(1, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")
    return 0


def _settings(command: Any) -> str:
    """Every setting of a command on one line, defaults included."""
    values = ((f.name, getattr(command, f.name)) for f in dataclasses.fields(command))
    return ", ".join(_settings(v) if dataclasses.is_dataclass(v) else f"{name}={v!r}" for name, v in values)


def _fail(code: int, error: object) -> int:
    print(f"jsparse: {' '.join(str(error).split()) or repr(error)}", file=sys.stderr)
    return code


def _parse(arguments: Sequence[str]) -> Any:
    """tyro answers bad arguments with a framed page; ours is one line."""
    kinds = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())
    page = io.StringIO()
    arguments = list(arguments) or ["--help"]
    if arguments[0] == "train" and "--help" in arguments:
        print(_recipe_help())
    if arguments == ["--version"]:
        print(_versions())
        raise SystemExit(0)
    try:
        with contextlib.redirect_stderr(page):
            return tyro.cli(
                tyro.conf.OmitArgPrefixes[Union[kinds]],  # type: ignore[misc, valid-type]  # noqa: UP007
                prog="jsparse",
                description="Sparse LLaMA models in JAX. --version shows the versions of jsparse, jax and Python.",
                args=arguments,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_unframed(page.getvalue())) from None


def _versions() -> str:
    import platform

    import jax

    import jsparse

    return f"jsparse {jsparse.__version__}, jax {jax.__version__}, Python {platform.python_version()}"


def _unframed(page: str) -> str:
    """tyro's framed answer to bad arguments, without its title, what it quotes of the help, and the way there."""
    told = between = ""
    for line in page.splitlines()[1:]:
        framed = line.strip("╭╮╰╯│+|").rstrip()  # in unicode or, where the terminal has none, in ASCII
        text = framed.strip()
        indent = len(framed) - len(framed.lstrip())  # 1 in the frame, 5 of an item, 9 of an item's help
        if text.startswith(("For full helptext", "Argument helptext")):
            break
        if not text.strip("─-"):
            between = "; "
        elif indent < 9:
            told += (between or (" " if indent < 5 or told.endswith(":") else ", ")) + text
            between = ""
    return told.strip("; ")


def _recipe_help() -> str:
    """Every field of a recipe with its meaning, from the comments of `jsparse/config.py`."""
    from jsparse import config

    return f"Settings of a recipe:\n\n{config.describe(config.TrainConfig)}\n"


# --------------------------------------------------------------------------------------------------------------------
# What the commands share
# --------------------------------------------------------------------------------------------------------------------


def _refuse(command: Any, names: Sequence[str], wanted: str, got: Any) -> None:
    """Raises ConfigError where one of the options that have no effect here was given: what they want beside them."""
    for name in names:
        check(getattr(command, name) == getattr(type(command), name), "--" + name.replace("_", "-"), wanted, got)


@contextlib.contextmanager
def _model(path: str, compute: Compute, packed: bool = False) -> Iterator[tuple[Any, Any]]:
    """A model folder's config and parameters, with the mesh they are on in context. `packed`: N:M matrices stay packed
    where one device holds the model."""
    import jax

    from jsparse import hf, parallel

    mesh = parallel.make_mesh(MeshConfig(*compute.mesh))
    with jax.set_mesh(mesh):
        yield hf.load(path, dtype=compute.dtype, mesh=mesh, packed=packed and mesh.size == 1)


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    from jsparse import hf

    hf.read_config(model)  # of what is no model folder, transformers would speak as of a name on the Hub
    check(hf.tokenizer_in(model) is not None, model, "a model folder with a tokenizer", "none")
    return AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)


def _tokens(data: str, split: str, model: str, vocab_size: int, limit: int | None) -> Any:
    from jsparse import hf
    from jsparse.data import open_source

    return open_source(Source(data, split=split), hf.tokenizer_in(model), CACHE, vocab_size).tokens[:limit]


def _bos(policy: str, model: str, config: Any) -> int | None:
    from jsparse import hf

    if policy == "auto" and hf.tokenizer_in(model) is None:
        policy = "no"
    if policy == "auto":
        policy = "yes" if _tokenizer(model)("").input_ids[:1] == [config.bos_token_id] else "no"
    return config.bos_token_id if policy == "yes" else None


def _evaluator(command: "Eval | Threshold", config: Any) -> Callable[..., Any]:
    """(params, config, threshold=None) -> Evaluation of the command's text, which is opened once: here, before a model
    is read, so that a text that does not fit is told at once."""
    from jsparse.inference import evaluate
    from jsparse.inference.windows import Windows as Cut

    w = command.windows
    tokens = _tokens(command.data, command.split, command.model, config.vocab_size, w.max_tokens)
    bos = _bos(w.bos, command.model, config)
    Cut(tokens, config, w.seq_len, w.stride, bos)

    def measure(params: Any, config: Any, threshold: float | None = None) -> Any:
        return evaluate(params, config, tokens, seq_len=w.seq_len, stride=w.stride, bos=bos, batch_size=w.batch_size,
                        threshold=threshold, progress=_progress("windows"))  # fmt: skip

    return measure


def _progress(what: str) -> Callable[[int, int], None]:
    """A line on the terminal, redrawn, with an estimate of what is left; silent where nobody watches."""
    import time

    began = time.perf_counter()

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            left = (time.perf_counter() - began) / done * (total - done)
            end = "\r" if done < total else "\r\033[K"
            print(f"{done}/{total} {what}, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)

    return show


def _generations() -> Callable[[Any], None]:
    """A line for each generation of a search: the best so far and how long the rest will take."""
    import math
    import time

    began, before = time.perf_counter(), -1

    def show(now: Any) -> None:
        nonlocal before
        before = now.epoch - 1 if before < 0 else before  # generations that an earlier run did
        left = (time.perf_counter() - began) / (now.epoch - before) * (now.epochs - now.epoch)
        best = f"{math.exp(min(now.best.loss, 700)):.3f} with {now.best.parameters:,} parameters"
        print(f"  generation {now.epoch}/{now.epochs}: {now.candidates} candidates, best exp(loss) {best}, "
              f"{left:.0f} s left", flush=True)  # fmt: skip

    return show


def _continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text of new tokens behind a prompt: SentencePiece would drop the space that they alone begin with."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + new))
    return whole[len(before) :]


class _Stream:
    """Prints text as its tokens come; a token may be half a character, so what is printed is the text's growth."""

    def __init__(self, tokenizer: Any, prompt: list[int]):
        self.tokenizer, self.prompt, self.shown = tokenizer, prompt, ""
        self.ids: list[int] = []
        print(tokenizer.decode(prompt, skip_special_tokens=True), end="", flush=True)

    def __call__(self, row: int, token: int) -> None:
        self.ids.append(token)
        text = _continuation(self.tokenizer, self.prompt, self.ids)
        if not text.endswith("�"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text


def _by_kind(rows: Sequence[tuple[str, str]]) -> str:
    """Of names such as `layers.0.ffn.gate`, each with a property: how many of each kind have which."""
    counts: dict[str, dict[str, int]] = {}
    for name, kind in rows:
        names = counts.setdefault(kind, {})
        names[name.split(".", 2)[2]] = names.get(name.split(".", 2)[2], 0) + 1
    shown = {kind: ", ".join(f"{n} {name}" for name, n in names.items()) for kind, names in counts.items()}
    return "; ".join(f"{kind}: {names}" for kind, names in shown.items())


def _result_path(result: Result, *parts: str) -> Path:
    """Where the JSON goes: the file asked for, or a new name in the current folder."""
    if result.json:
        path = Path(result.json)
        check(result.overwrite or not path.exists(), "--json", "a new file (or --overwrite)", str(path))
        return path
    stem = "-".join(Path(p).name for p in parts)
    names = (Path(f"{stem}{f'-{i}' if i else ''}.json") for i in range(10_000))
    return next(p for p in names if result.overwrite or not p.exists())


def _write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=1) + "\n")
    print(path, file=sys.stderr)


def _print_table(table: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(table)  # in a pipe or a file nothing is to be cut off
