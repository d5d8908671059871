"""What the benchmarks of memory-bound kernels share: a clock, the memory's bandwidth, and compiling in parallel."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CUBLAS = {"xla_gpu_enable_triton_gemm": False}  # compiler options: matrix products by cuBLAS alone
# The loop over tokens itself in one CUDA graph, so that the host starts it once
ONE_GRAPH = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}


class Budget:
    """The seconds that a benchmark may take. What does not fit is left out, and told."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of a call, after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - began)
    return float(np.median(taken[1:]))


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second of the device's memory, in this run."""

    copy: float  # read and written
    read: float  # read alone

    @property
    def limit(self) -> float:
        """The larger: a step of decoding reads, and a copy may be the better measured reader of the two."""
        return max(self.copy, self.read)


def bandwidth(size: int = 2**30, rounds: int = 160) -> Bandwidth:
    """Measures a copy and a sum of `size` random bytes."""
    x = jax.random.bits(jax.random.key(0), (size // 4096, 1024), jnp.uint32)
    copied = seconds(lambda: _copy(x, rounds))
    summed = seconds(lambda: _sum(x, rounds))
    return Bandwidth(copy=2 * x.nbytes * rounds / copied, read=x.nbytes * rounds / summed)


@partial(jax.jit, static_argnums=1)
def _copy(x: jax.Array, rounds: int) -> jax.Array:
    return jax.lax.fori_loop(0, rounds, lambda i, y: y ^ i.astype(jnp.uint32), x)


@partial(jax.jit, static_argnums=1)
def _sum(x: jax.Array, rounds: int) -> jax.Array:
    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + jnp.sum(x ^ (total[:1] + i.astype(jnp.uint32))[:, None], axis=1, dtype=jnp.uint32)

    return jax.lax.fori_loop(0, rounds, add, jnp.zeros(x.shape[0], jnp.uint32))


def compile_all(jobs: Sequence[Callable[[], Any]], budget: Budget) -> list[Any]:
    """What each job returns, or the exception that it raised: a variant that fails takes no other with it.

    They run at once, on threads that nobody waits for beyond the budget: a job that is late counts as failed.
    """
    results: list[Any] = [TimeoutError("no time left to compile it")] * len(jobs)

    def run(i: int, job: Callable[[], Any]) -> None:
        try:
            results[i] = job()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i, job), daemon=True) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, budget.left))
    return list(results)
