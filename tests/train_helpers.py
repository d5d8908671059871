"""What the training tests share: a small recipe, and batches for it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse import parallel
from jsparse.config import (
    CheckpointConfig,
    ConstantLr,
    DataConfig,
    LogConfig,
    MeshConfig,
    ModelSource,
    OptimizerConfig,
    Relu,
    Source,
    TrainConfig,
)
from jsparse.data import Batch
from tests.helpers import tiny_config

MODEL = tiny_config(
    vocab_size=64, intermediate_size=64, num_attention_heads=8, num_key_value_heads=2, activation=Relu()
)  # every size but the kv heads' is a multiple of 8


def recipe(folder: Path, **changes: Any) -> TrainConfig:
    """Eight steps of a model of 30 000 parameters on random tokens, kept in `folder`."""
    text = folder / "tokens.npy"
    if not text.exists():
        folder.mkdir(exist_ok=True)
        ramp = np.arange(4000) * 7 % 64  # something to learn, and noise
        np.save(text, np.where(np.random.default_rng(0).random(4000) < 0.2, 3, ramp).astype(np.uint16))
    config = TrainConfig(
        run=str(folder / "run"),
        model=ModelSource(config=MODEL),
        data=DataConfig(train=(Source(str(text)),), seq_len=16, batch_size=8),
        steps=8,
        optimizer=OptimizerConfig(lr=3e-3, schedule=ConstantLr(), eps=1e-4),  # Adam with a small eps magnifies rounding
        mesh=MeshConfig(max_replicated=0.1),
        checkpoint=CheckpointConfig(every=4),
        log=LogConfig(every=1, tensorboard=False, eval_every=4, eval_tokens=300),
        dtype="float32",
        compile_cache=None,
    )
    return dataclasses.replace(config, **changes)


def batches(count: int, mesh: Any, *, packed: bool = False, size: int = 8, length: int = 16) -> list[Batch]:
    """Random batches on a mesh; a third of the tokens take no loss, unevenly over the rows."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(count):
        tokens = rng.integers(64, size=(size, length + 1))
        counted = rng.random((size, length)) < np.linspace(0.3, 1, size)[:, None]
        segments = np.sort(rng.integers(0, 3, (size, length)), axis=1) if packed else None
        if segments is not None:
            counted &= segments > 0
        arrays = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32), counted
        placed = [jax.device_put(jnp.asarray(x), parallel.batch_sharding(mesh)) for x in arrays]
        placed.append(None if segments is None else jax.device_put(jnp.asarray(segments, jnp.int32),
                                                                   parallel.batch_sharding(mesh)))  # fmt: skip
        found.append(Batch(*placed))
    return found
