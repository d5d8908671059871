"""Checkpoints of a run folder, through Orbax: asynchronous, whole or absent, readable onto any mesh.

A checkpoint is a folder `checkpoints/<step>` that appears by renaming. It holds two items, so that exporting reads
the parameters alone:

    params   the float32 masters
    rest     moments, step, penalty controller, counts of skipped steps

The data order is a function of the step, so nothing else is needed to go on to the bit.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from jsparse import config as configs
from jsparse import model, parallel
from jsparse.config import CheckpointConfig, ConfigError, LlamaConfig
from jsparse.files import write_text
from jsparse.model import Params
from jsparse.train.state import TrainState

# Orbax logs hundreds of lines from its threads when a save fails, and then raises the error that we report.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)

_NAMES = ocp.path.step.standard_name_format()
_REST = [f.name for f in dataclasses.fields(TrainState) if f.name != "params"]


def _folder(run: epath.PathLike) -> epath.Path:
    """Of a run's checkpoints; Orbax takes absolute paths only."""
    return epath.Path(run).expanduser().resolve() / "checkpoints"


def steps(run: epath.PathLike) -> list[int]:
    """The steps of a run folder's whole checkpoints, in order."""
    folder = _folder(run)
    return sorted(found.step for found in _NAMES.find_all(folder)) if folder.exists() else []


class Checkpoints:
    """Saves and restores a run's state. Leaving its context waits for the save in progress."""

    def __init__(self, run: epath.PathLike, config: CheckpointConfig = CheckpointConfig()):
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(config.keep)]
        if config.keep_every:
            keep.append(policies.EveryNSteps(config.keep_every))
        self.folder = _folder(run)
        with _one_line(f"{self.folder}: cannot be opened"):
            _finish_deletions(self.folder)
            self._orbax = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=policies.AnyPreservationPolicy(keep),
                step_name_format=_NAMES,
                cleanup_tmp_directories=True,
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        with _one_line(f"{self.folder}: the newest checkpoint could not be written"):
            self._orbax.close()

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state off the devices and writes it in the background; older ones then go by policy.

        Raises:
            OSError: this save, or the one before it, cannot be written.
        """
        items = {"params": state.params, "rest": {name: getattr(state, name) for name in _REST}}
        with _one_line(f"{self.folder}: the checkpoint of step {step} or the one before could not be written"):
            self._orbax.save_checkpointables_async(step, items, force=True)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of a step, onto the shapes and shardings of `abstract`."""
        target = {"params": abstract.params, "rest": {name: getattr(abstract, name) for name in _REST}}
        with _one_line(f"{self.folder / str(step)}: cannot be read"):
            items = self._orbax.load_checkpointables(step, target)
        return TrainState(params=items["params"], **items["rest"])


def _finish_deletions(folder: epath.Path) -> None:
    """Removes what a kill left of checkpoints under deletion: without this file Orbax cannot open the folder."""
    if jax.process_index() == 0 and folder.exists():
        for path in folder.iterdir():
            if path.name.isdecimal() and not (path / "_CHECKPOINT_METADATA").exists():
                path.rmtree()
    multihost_utils.sync_global_devices("deletions finished")


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise, pages long at times, into one line."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        text = text if len(text) < 500 else f"{text[:250]} ... {text[-250:]}"
        raise OSError(f"{what}: {text}") from error


# --------------------------------------------------------------------------------------------------------------------
# The model of a run, for export and evaluation
# --------------------------------------------------------------------------------------------------------------------


def save_model(run: epath.Path, config: LlamaConfig, tokenizer: str | None) -> None:
    """Writes model.json: what the parameters mean and which tokenizer goes with them."""
    values = {"config": configs.to_dict(config), "tokenizer": tokenizer}
    write_text(run / "model.json", json.dumps(values, indent=1) + "\n")


def load_model(run: epath.PathLike) -> tuple[LlamaConfig, dict[str, Any]]:
    """The model's config and the contents of model.json."""
    path = epath.Path(run).expanduser() / "model.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{run}: expected a run folder, but it has no model.json") from None
    return configs.from_dict(LlamaConfig, values["config"]), values


def load_run(
    run: epath.PathLike, step: int | None = None, mesh: Mesh | None = None
) -> tuple[LlamaConfig, Params, dict]:
    """The model of a run folder: (config, float32 params, info). Reads no optimizer state.

    Args:
        run: run folder.
        step: a checkpoint kept; the newest by default.
        mesh: where the parameters go; by default the first device.

    Returns:
        `info` has `step` and `tokenizer`, the folder of the tokenizer or None.

    Raises:
        ConfigError: not a run folder, or no such checkpoint.
    """
    config, values = load_model(run)
    found = steps(run)
    if not found or step not in (None, *found):
        asked = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        raise ConfigError(f"{run}: expected {asked}, got {', '.join(map(str, found)) or 'none'}")
    step = found[-1] if step is None else step
    folder = _folder(run)
    mesh = parallel.single_device_mesh() if mesh is None else mesh
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model.abstract(config),
                          model.shardings(config, mesh))  # fmt: skip
    with _one_line(f"{folder / str(step)}: cannot be read"):
        params = ocp.load_checkpointables(folder / str(step), {"params": target})["params"]
    return config, params, {"step": step, "tokenizer": values["tokenizer"]}
