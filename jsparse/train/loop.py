"""`train`: a recipe in, a run folder out.

    config.yaml      the resolved recipe
    model.json       the model's shape and the folder of its tokenizer
    metrics.jsonl    see `metrics.py`
    tensorboard/     the same numbers, where tensorboardX is installed
    checkpoints/     see `checkpoint.py`
    profile/         a trace, where one was asked for
    summary.json     at the end

A run whose folder holds a checkpoint goes on from it; nothing has to be asked for. SIGTERM and Ctrl-C stop it after the
step in progress, with a checkpoint; the process then exits with 143 (130), so that a scheduler starts it again. Since
data, step and state are functions of the recipe, an interrupted run ends with the same bits as one left alone (on GPUs
with XLA_FLAGS=--xla_gpu_deterministic_ops=true).
"""

import contextlib
import dataclasses
import functools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jsparse import config as configs
from jsparse import hf, model, parallel
from jsparse.config import (
    Cett,
    ConfigError,
    Hold,
    LlamaConfig,
    LteStage1,
    LteStage2,
    PaperCodeL1,
    ProSparse,
    Source,
    TrainConfig,
    check,
)
from jsparse.data import Batch, Loader, Store, open_source
from jsparse.files import write_text
from jsparse.inference.perplexity import evaluate
from jsparse.methods import lte
from jsparse.methods.grouping import group, permute
from jsparse.methods.patterns import ATTENTION, MLP, check_claim, observe, parse_pattern
from jsparse.model import Params
from jsparse.train import checkpoint, console, state
from jsparse.train.checkpoint import Checkpoints
from jsparse.train.console import Progress
from jsparse.train.host import Clock, Profile, StopSignal
from jsparse.train.metrics import MetricsLog, Speed
from jsparse.train.optimizer import learning_rate
from jsparse.train.step import make_step
from jsparse.train.terms import AddsRouters, makes_zeros, training_config

IN_FLIGHT = 2  # steps handed to the devices before the metrics of the oldest are read


class TrainingError(RuntimeError):
    """The run cannot go on. The message is one line."""


@dataclass(frozen=True)
class Summary:
    """What summary.json holds."""

    run: str
    steps: int
    parameters: int
    tokens: int  # trained on, from step 1
    skipped: int  # steps with a non-finite loss or gradient
    loss: float | None  # of the last step, nats a token
    eval: dict[str, Any] | None  # the last evaluation, by source
    seconds: dict[str, float]  # where this process's time went


def train(config: TrainConfig) -> Summary:
    """Trains as the recipe says, from the newest checkpoint of the run folder where there is one.

    Raises:
        ConfigError: the recipe does not fit the model, the data, the devices or the run's earlier recipe.
        TrainingError: too many steps in a row were not finite.
        OSError: something cannot be read or written.
        SystemExit, KeyboardInterrupt: stopped by SIGTERM or Ctrl-C, after a checkpoint.
    """
    clock, out = Clock(), console.make_console()
    run = epath.Path(config.run).expanduser()
    if config.compile_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(config.compile_cache).expanduser()))

    # ---- Whether the recipe fits: all that can be wrong with it shows here, before anything heavy

    start = max(checkpoint.steps(run), default=0)
    if start:
        check_same_recipe(run, config, start)
    model_config, tokenizer = describe_model(config, run, start)
    mesh = parallel.make_mesh(config.mesh)
    check_recipe(config, model_config, mesh)
    abstract = state.abstract(config, model_config, mesh)
    check_sharded(config, abstract.params, mesh)

    def open_store(source: Source) -> Store:
        return open_source(source, tokenizer, config.data.cache, model_config.vocab_size)

    with clock("data"):
        loader = Loader([open_store(source) for source in config.data.train], config.data)
        held_out = dict(zip(names(config.data.eval), map(open_store, config.data.eval), strict=True))

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))  # jax's bfloat16 attention fails under "strict"

        # ---- The state, from the newest checkpoint or from the model; a run folder appears once all that is read fits

        with clock("load"):
            teacher_config, *teacher = load_teacher(config, model_config, mesh)
            params = None if start else starting_params(config, model_config, mesh, loader)
            if params is not None:
                check_held(params, config.hold)
            checkpoints = stack.enter_context(Checkpoints(run, config.checkpoint))
            if params is None:
                now = checkpoints.restore(start, abstract)
            else:
                now = state.create(params, config, model_config, mesh)
        if jax.process_index() == 0:
            write_text(run / "config.yaml", configs.dump(config))
            checkpoint.save_model(run, lte.served(model_config), tokenizer)
        log = stack.enter_context(MetricsLog(run, start, config.log.tensorboard))

        # ---- The step, compiled once and ahead of time: what the loop calls is an executable and never compiles again

        if start < config.steps:
            step = make_step(config, model_config, mesh, teacher_config)
            with clock("compile"):
                compiled = step.lower(abstract, abstract_batch(config, mesh), *teacher).compile()
            console.report(out, config, model_config, mesh, abstract, compiled, clock.seconds["compile"])
        out.print(f"{run}: {start} of {config.steps} steps done")

        # ---- The loop

        running: deque[tuple[int, dict[str, jax.Array]]] = deque()

        def settle(at_most: int) -> None:
            """Waits until at most so many steps are on their way, and reads the metrics of the others."""
            while len(running) > at_most:
                number, values = running.popleft()
                in_a_row = int(values.pop("skipped_in_a_row"))
                if in_a_row >= config.optimizer.max_skipped:
                    raise TrainingError(f"step {number}: the loss or its gradient was not finite for {in_a_row} steps "
                                        f"in a row; the newest checkpoint in {run} is from before")  # fmt: skip
                progress.step(number)
                if number % config.log.every == 0 or number == config.steps:
                    found = jax.device_get(values) | speed(number)
                    log.write(number, found)
                    progress.line(number, found)

        def measure(number: int) -> None:
            with clock("eval"):
                found = evaluate_held_out(now.params, config, model_config, held_out)
            log.write(number, {"eval": found})
            progress.evaluation(number, found)

        progress = stack.enter_context(Progress(out, start, config.steps))
        profile = stack.enter_context(Profile(run / "profile", config.log.profile))
        stop = stack.enter_context(StopSignal())
        batches = stack.enter_context(loader.iterate(start, mesh))
        if held_out and start == 0:
            measure(0)
        speed = Speed(config, model_config, mesh, clock, start)
        number = start
        while number < config.steps:
            if profile.due(number + 1):
                settle(0)
                profile.turn()
            with clock("wait for data"):
                batch = next(batches)
            with clock("step"), jax.profiler.StepTraceAnnotation("step", step_num=number + 1):
                now, values = compiled(now, batch, *teacher)
                number += 1
                running.append((number, values))
                settle(IN_FLIGHT)
            last = number == config.steps or stop.requested(number)
            if number == config.steps:
                settle(0)
                now = calibrate(now, config, model_config, batches)
            if held_out and (number % config.log.eval_every == 0 or number == config.steps):
                settle(0)
                measure(number)  # before saving: a run that goes on from the checkpoint has this behind it
            if last or number % config.checkpoint.every == 0:
                settle(0)
                with clock("checkpoint"):
                    checkpoints.save(number, now)
            if last:
                break

    # ---- The end: every context is left, the last checkpoint is on the disk

    if number < config.steps:
        out.print(f"{run}: stopped after step {number} and saved; the same command goes on from there")
        stop.leave()
    summary = Summary(
        run=str(run),
        steps=number,
        parameters=model.count(abstract.params),
        tokens=number * config.data.batch_size * config.data.seq_len,
        skipped=log.last["skipped"],
        loss=log.last["loss"],
        eval=log.last.get("eval"),
        seconds=dict(clock.seconds) | {"total": clock.total()},
    )
    if jax.process_index() == 0:
        write_text(run / "summary.json", json.dumps(dataclasses.asdict(summary), indent=1) + "\n")
    out.print(f"{run}: complete after {config.steps} steps")
    return summary


# --------------------------------------------------------------------------------------------------------------------
# Whether the recipe fits
# --------------------------------------------------------------------------------------------------------------------


def check_recipe(config: TrainConfig, model_config: LlamaConfig, mesh: Mesh) -> None:
    """Raises ConfigError where the recipe's parts do not fit each other, the model or the mesh."""
    longest = model_config.max_position_embeddings
    check(config.data.seq_len <= longest, "data.seq_len", f"at most the model's max_position_embeddings ({longest})",
          config.data.seq_len)  # fmt: skip
    rows = config.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
    check(config.data.batch_size % rows == 0, "data.batch_size",
          f"a multiple of accumulate x mesh.data x mesh.fsdp ({rows})", config.data.batch_size)  # fmt: skip
    if isinstance(config.method, ProSparse):
        check(makes_zeros(model_config.activation), "model.activation",
              "one that makes zeros, such as relu, for method prosparse", model_config.activation.type)  # fmt: skip
    if config.hold is not None and config.hold.pattern is not None:
        parse_pattern(config.hold.pattern)
    learning_rate(config.optimizer, config.steps)


def check_held(params: Params, hold: Hold | None) -> None:
    """Raises ConfigError where the starting model has no zeros to hold, or not those of the claimed pattern."""
    if hold is None:
        return
    zeros = sum(row.zeros for row in observe(params))
    check(zeros > 0, "hold", "a starting model with zeros in its blocks' matrices", zeros)
    if hold.pattern is not None:
        try:
            check_claim(params, parse_pattern(hold.pattern), MLP if hold.scope == "mlp" else MLP + ATTENTION)
        except ValueError as error:
            raise ConfigError(f"hold.pattern: {error}") from None


def check_sharded(config: TrainConfig, params: Params, mesh: Mesh) -> None:
    """Raises ConfigError where more of the parameters than `mesh.max_replicated` lies whole on every device."""
    share, names = parallel.replicated_share(params, jax.tree.map(lambda x: x.sharding, params), mesh)
    check(share <= config.mesh.max_replicated, "mesh.max_replicated",
          f"at least {share:.3f}, the share that no mesh axis splits ({', '.join(names[:3])})",
          config.mesh.max_replicated)  # fmt: skip


# What may change between the parts of a run: none of it moves the numbers by more than rounding.
_FREE = ("run", "mesh", "checkpoint", "log", "accumulate", "remat", "unroll", "attention", "loss_chunk",
         "compile_cache", "data.eval", "data.cache", "data.prefetch", "optimizer.max_skipped")  # fmt: skip


def check_same_recipe(run: epath.Path, config: TrainConfig, step: int) -> None:
    """Raises ConfigError where going on from `step` with this recipe would not be the same run.

    `steps` may change where the learning rate of the steps done stays what it was: always with a constant schedule,
    with WSD before its decay, never with cosine; and not with LTE, whose stages go by the share of steps done and set
    thresholds at the end.
    """
    before = recipe_of(run)
    old, new = _flat(configs.to_dict(before)), _flat(configs.to_dict(config))
    free = set(_FREE)
    if isinstance(before.method, ProSparse) and isinstance(before.method.penalty, PaperCodeL1):
        free -= {"mesh", "accumulate"}  # this penalty depends on the size of a device's micro-batch
    check(config.steps >= step, "steps", f"at least the {step} that {run} has done", config.steps)
    done = jnp.arange(1, step + 1)
    same_rates = np.array_equal(*(learning_rate(c.optimizer, c.steps)(done) for c in (before, config)))
    if same_rates and not isinstance(before.method, LteStage1 | LteStage2):
        free.add("steps")
    changed = [
        f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name) and not any(name == f or name.startswith(f"{f}.") for f in free)
    ]
    if changed:
        raise ConfigError(f"{run}: cannot go on from step {step} with another recipe ({'; '.join(changed)}): "
                          "put the old values back or start another run folder")  # fmt: skip


def recipe_of(run: epath.Path) -> TrainConfig:
    """The recipe of a run folder."""
    import yaml

    return configs.from_dict(TrainConfig, yaml.safe_load((run / "config.yaml").read_text()))


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {name: values}
    return {k: v for key, value in values.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}


# --------------------------------------------------------------------------------------------------------------------
# The parts of a run
# --------------------------------------------------------------------------------------------------------------------


def describe_model(config: TrainConfig, run: epath.Path, start: int) -> tuple[LlamaConfig, str | None]:
    """The config of the model to train and the folder of its tokenizer; a run under way has them in model.json."""
    if start:
        model_config, about = checkpoint.load_model(run)
        return training_config(config.method, model_config), about["tokenizer"]
    source, folder = config.model, None
    if source.path is not None:
        path = str(epath.Path(source.path).expanduser().resolve())
        model_config, folder = hf.read_config(path), hf.tokenizer_in(path)
    elif source.run is not None:
        before = epath.Path(source.run).expanduser()
        model_config, about = checkpoint.load_model(before)
        done, steps = max(checkpoint.steps(before), default=0), recipe_of(before).steps
        check(source.step is not None or done == steps, "model.run",
              "a complete run (`model.step` takes one of its checkpoints as it is)",
              f"{source.run} after {done} of {steps} steps")  # fmt: skip
        folder = about["tokenizer"]
    else:
        assert source.config is not None
        model_config = source.config
    if source.activation is not None:
        check(not isinstance(source.activation, Cett) and not isinstance(model_config.activation, Cett),
              "model.activation", "none where cett is involved: its thresholds are parameters of a model folder",
              source.activation.type)  # fmt: skip
        model_config = dataclasses.replace(model_config, activation=source.activation)
    if isinstance(config.method, AddsRouters):
        check(model_config.router is None, "model", f"one without routers for method {config.method.type}", "routers")
    tokenizer = str(epath.Path(config.data.tokenizer).expanduser().resolve()) if config.data.tokenizer else folder
    return training_config(config.method, model_config), tokenizer


def starting_params(config: TrainConfig, model_config: LlamaConfig, mesh: Mesh, loader: Loader) -> Params:
    """float32 parameters on the mesh: those of the model folder or run, or fresh ones; with the method's routers."""
    method, source = config.method, config.model
    bare = dataclasses.replace(model_config, router=None) if isinstance(method, AddsRouters) else model_config
    if source.path is not None:
        params = hf.load(epath.Path(source.path).expanduser(), dtype=jnp.float32, mesh=mesh)[1]
    elif source.run is not None:
        params = checkpoint.load_run(epath.Path(source.run).expanduser(), source.step, mesh)[1]
    else:
        params = model.init(jax.random.key(config.seed), bare, mesh)
    if not isinstance(method, AddsRouters):
        return params
    assert model_config.router is not None
    sample = loader.batch(0, range(min(8, config.data.batch_size))).tokens
    order = group(params, bare, method.block_size, method.grouping, tokens=sample[:1], seed=config.seed)
    params = permute(params, order)
    add = functools.partial(lte.add_routers, params, bare, model_config.router)
    if not isinstance(method, LteStage1):
        return add(threshold=method.sparsity)[0]
    return add(threshold=method.tau, init=method.init, key=jax.random.key(config.seed), tokens=sample,
               dropped=method.target_sparsity or 0.5)[0]  # fmt: skip


CALIBRATION = 4096  # tokens at least


def calibrate(
    now: state.TrainState, config: TrainConfig, model_config: LlamaConfig, batches: Iterator[Batch]
) -> state.TrainState:
    """The state with thresholds that meet the method's target on the next batches; as it is without a target."""
    target = config.method.target_sparsity if isinstance(config.method, LteStage1 | LteStage2) else None
    if target is None:
        return now
    params = _cast(now.params, model_config, config.dtype)
    count = -(-CALIBRATION // (config.data.batch_size * config.data.seq_len))
    thresholds = lte.calibrate(params, model_config, [jnp.asarray(next(batches).tokens) for _ in range(count)], target)
    return dataclasses.replace(now, params=lte.set_thresholds(now.params, thresholds))


def load_teacher(config: TrainConfig, model_config: LlamaConfig, mesh: Mesh) -> Any:
    """(config, params) of the teacher in the computation's dtype; (None,) without one."""
    if config.distill is None:
        return (None,)
    teacher_config, params = hf.load(
        epath.Path(config.distill.teacher).expanduser(), dtype=jnp.dtype(config.dtype), mesh=mesh
    )
    check(teacher_config.vocab_size == model_config.vocab_size, "distill.teacher",
          f"a model of the same vocabulary ({model_config.vocab_size})", teacher_config.vocab_size)  # fmt: skip
    return teacher_config, params


def names(sources: Sequence[Source]) -> list[str]:
    """What the sources are called in metrics: their file names, numbered where two are the same."""
    found = [epath.Path(source.path).name for source in sources]
    return [name if found.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(found)]


def abstract_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Shapes and shardings of a batch."""

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        shape = config.data.batch_size, config.data.seq_len
        return jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.batch_sharding(mesh))

    packed = config.data.documents == "packed"
    return Batch(array(jnp.int32), array(jnp.int32), array(jnp.bool_), array(jnp.int32) if packed else None)  # type: ignore[arg-type]


def evaluate_held_out(
    params: Params, config: TrainConfig, model_config: LlamaConfig, held_out: dict[str, Store]
) -> dict[str, dict[str, Any]]:
    """The evaluation of each held-out source on its first `log.eval_tokens` tokens, in the computation's dtype.

    Models with routers are evaluated as they will be used. LTE's stage 1 adds `soft_loss`, with scores in place of
    masks, and `soft_to_hard`, by how much the masks' loss is above it.
    """
    params = _cast(params, model_config, config.dtype)
    found = {}
    for name, store in held_out.items():
        measure = functools.partial(evaluate, params, tokens=store.tokens[: config.log.eval_tokens + 1],
                                    seq_len=config.data.seq_len,
                                    batch_size=config.data.batch_size // config.accumulate)  # fmt: skip
        found[name] = dataclasses.asdict(measure(config=lte.served(model_config)))
        if isinstance(config.method, LteStage1):
            soft = measure(config=model_config).loss
            found[name] |= {"soft_loss": soft, "soft_to_hard": found[name]["loss"] - soft}
    return found


_cast = jax.jit(model.cast, static_argnums=(1, 2))
