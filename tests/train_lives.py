"""Many lives of one run, each a process of its own that dies somewhere, and one run left alone to compare with.

    python -m tests.train_lives FOLDER

Prints how each life ended, as JSON. The lives are forked from a process that has imported everything and started
nothing, which saves their imports.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import tests.conftest  # noqa: F401  first: it sets up the fake devices
import jax  # isort: skip
import tensorboardX  # noqa: F401  what a run imports when it begins: once for all lives
from orbax.checkpoint._src.path import atomicity, deleter

from jsparse.config import CheckpointConfig, DataConfig, LogConfig, MeshConfig, ProSparse, Target, TrainConfig
from jsparse.train import loop, metrics
from jsparse.train.checkpoint import Checkpoints
from jsparse.train.host import StopSignal
from tests.train_helpers import recipe

Patch = Callable[[], Any]
STEPS = 16


def config(folder: Path, run: str) -> TrainConfig:
    """Everything that has a state: moments, a penalty controller, data order, several devices."""
    base = recipe(folder)
    return recipe(
        folder,
        run=str(folder / run),
        data=DataConfig(train=base.data.train, eval=base.data.train, seq_len=16, batch_size=8),
        steps=STEPS,
        method=ProSparse(Target(0.8, start=2, reach=12)),
        mesh=MeshConfig(2, 2, 2, max_replicated=0.1),
        checkpoint=CheckpointConfig(every=4, keep=1),
        log=LogConfig(every=1, tensorboard=True, eval_every=8, eval_tokens=200),
        accumulate=2,
        compile_cache=str(folder / "xla"),
    )


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_step(number: int, act: Callable[[], None]) -> Patch:
    original = StopSignal.requested

    def requested(self: StopSignal, step: int) -> bool:
        if step == number:
            act()
        return original(self, step)

    return lambda: mock.patch.object(StopSignal, "requested", requested)


def around_rename(step: str, *, before: bool) -> Patch:
    original = atomicity.AtomicRenameTemporaryPath.finalize

    async def finalize(self: Any) -> None:
        here = self.get_final().name == step
        if here and before:
            kill()
        await original(self)
        if here:
            kill()

    return lambda: mock.patch.object(atomicity.AtomicRenameTemporaryPath, "finalize", finalize)


def in_a_line(step: int) -> Patch:
    original = metrics.MetricsLog.write

    def write(self: metrics.MetricsLog, number: int, values: dict) -> None:
        if number == step:
            with self._path.open("a") as f:
                f.write('{"step": 6, "loss": 4.')
            kill()
        original(self, number, values)

    return lambda: mock.patch.object(metrics.MetricsLog, "write", write)


def in_a_deletion() -> Patch:
    def delete(self: Any, path: Any, **_: Any) -> None:
        next(p for p in Path(path).rglob("*") if p.is_file()).unlink()
        kill()

    return lambda: mock.patch.object(deleter.PathDeleter, "delete", delete)


def on_a_full_disk() -> Patch:
    original = Checkpoints.save

    def save(self: Checkpoints, *arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes a file: the moments need more
        original(self, *arguments)

    return lambda: mock.patch.object(Checkpoints, "save", save)


LIVES: list[tuple[str, Patch]] = [
    ("before the first checkpoint", after_step(3, kill)),
    ("while the first checkpoint is written", around_rename("4", before=True)),
    ("as soon as it is there", around_rename("4", before=False)),
    ("in the middle of a line of metrics", in_a_line(6)),
    ("in an evaluation", lambda: mock.patch.object(loop, "evaluate", kill)),
    ("asked to stop", after_step(10, lambda: os.kill(os.getpid(), signal.SIGTERM))),
    ("on a full disk", on_a_full_disk()),
    ("while an older checkpoint is deleted", in_a_deletion()),
    ("while the last checkpoint is written", around_rename("16", before=True)),
    ("before the summary", lambda: mock.patch.object(loop, "Summary", kill)),
    ("never", lambda: mock.patch.object(loop, "unused", None, create=True)),
]


def live(patch: Patch, folder: Path, run: str) -> int:
    """The wait status of a process that trains, patched."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        with patch():
            loop.train(config(folder, run))
    except SystemExit as stop:
        os._exit(stop.code)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main() -> None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # all but the first life compile nothing
    folder = Path(sys.argv[1])
    alone = live(LIVES[-1][1], folder, "alone")
    ends = []
    for name, patch in LIVES:
        status = live(patch, folder, "many")
        kept = [p.name for p in (folder / "many" / "checkpoints").iterdir() if p.name.isdecimal()]
        ends.append((name, status, max(map(int, kept), default=0)))
    print(json.dumps({"alone": alone, "ends": ends}))


if __name__ == "__main__":
    main()
