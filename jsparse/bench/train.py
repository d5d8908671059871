"""`jsparse bench train`: the training step."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jsparse import model, parallel
from jsparse.bench.shapes import SHAPES
from jsparse.config import (
    DataConfig,
    Dense,
    Fixed,
    LlamaConfig,
    Method,
    ModelSource,
    ProSparse,
    Relu,
    Silu,
    TrainConfig,
)
from jsparse.data import Batch
from jsparse.train import state
from jsparse.train.metrics import PEAK_FLOPS, flops_per_token
from jsparse.train.step import make_step

# What is trained: activation and method. The first is what the others are compared with.
TRAINED: dict[str, tuple[Any, Method]] = {
    "dense (SiLU)": (Silu(), Dense()),
    "ReLU": (Relu(), Dense()),
    "ProSparse": (Relu(), ProSparse(Fixed(0.1))),
}


@dataclass(frozen=True)
class TrainSpeed:
    """One measured training step."""

    name: str
    step_seconds: float  # median
    tokens_per_second: float
    mfu: float | None  # None where the device's peak is not known
    overhead: float  # of the step's time over the first row's
    memory_bytes: int  # state and temporaries of the step, a device
    compile_seconds: float


def bench_train(
    shape: str,
    *,
    batch_size: int = 32,
    seq_len: int = 2048,
    dtype: str = "bfloat16",
    remat: str = "none",
    unroll: int | None = None,
    loss_chunk: int = 8192,
    accumulate: int = 1,
    steps: int = 20,
) -> list[TrainSpeed]:
    """Times the training step of `jsparse train` for a named shape: dense, ReLU and ProSparse, one after the other.

    Args:
        shape: one of `SHAPES`.
        batch_size: sequences a step, over all devices.
        unroll: layers a step of the scan runs; None: all.
        steps: timed, after three that are not.
    """
    base = SHAPES[shape]
    mesh = parallel.make_mesh()
    rows: list[TrainSpeed] = []
    for name, (activation, method) in TRAINED.items():
        shaped = dataclasses.replace(base, activation=activation)
        config = TrainConfig(
            run="",
            model=ModelSource(config=shaped),
            data=DataConfig(seq_len=seq_len, batch_size=batch_size),
            method=method,
            dtype=dtype,  # type: ignore[arg-type]
            remat=remat,  # type: ignore[arg-type]
            unroll=unroll or base.num_hidden_layers,
            loss_chunk=loss_chunk,
            accumulate=accumulate,
        )
        with jax.set_mesh(mesh):
            rows.append(_time_step(name, config, shaped, mesh, steps, rows[0].step_seconds if rows else None))
    return rows


def _time_step(
    name: str, config: TrainConfig, shaped: LlamaConfig, mesh: Any, steps: int, baseline: float | None
) -> TrainSpeed:
    now = state.create(model.init(jax.random.key(0), shaped, mesh), config, shaped, mesh)
    batches = [_random_batch(config, shaped, mesh, seed) for seed in range(4)]
    began = time.perf_counter()
    compiled = make_step(config, shaped, mesh).lower(now, batches[0]).compile()
    compile_seconds = time.perf_counter() - began
    seconds = []
    for i in range(steps + 3):
        began = time.perf_counter()
        now, metrics = compiled(now, batches[i % len(batches)])
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    median = float(np.median(seconds[3:]))
    tokens = config.data.batch_size * config.data.seq_len / median
    peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    memory = compiled.memory_analysis()
    return TrainSpeed(
        name=name,
        step_seconds=median,
        tokens_per_second=tokens,
        mfu=tokens * flops_per_token(shaped, config.data.seq_len) / (peak * mesh.size) if peak else None,
        overhead=median / baseline - 1 if baseline else 0.0,
        memory_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        compile_seconds=compile_seconds,
    )


def _random_batch(config: TrainConfig, shaped: LlamaConfig, mesh: Any, seed: int) -> Batch:
    shape = (config.data.batch_size, config.data.seq_len + 1)
    tokens = np.random.default_rng(seed).integers(shaped.vocab_size, size=shape, dtype=np.int32)
    place = parallel.batch_sharding(mesh)
    inputs, targets, mask = (jax.device_put(x, place) for x in (tokens[:, :-1], tokens[:, 1:], tokens[:, 1:] >= 0))
    return Batch(inputs, targets, mask, None)
