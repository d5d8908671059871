"""One of two processes that train together: first a short run to its end, then one that never ends by itself.

python -m tests.train_pair FOLDER     with the environment that jsparse.parallel.initialize reads
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import tests.conftest  # noqa: F401  first: it sets up jax
import jax  # isort: skip

from jsparse import parallel
from jsparse.config import MeshConfig, TrainConfig
from jsparse.train import loop
from jsparse.train.host import StopSignal
from tests.train_helpers import recipe


def config(folder: Path, run: str) -> TrainConfig:
    base = recipe(folder, run=str(folder / run), mesh=MeshConfig(2, 2, 2, max_replicated=0.1))
    return dataclasses.replace(base, data=dataclasses.replace(base.data, eval=base.data.train))


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    parallel.initialize()
    assert (jax.process_count(), jax.device_count()) == (2, 8)
    folder = Path(sys.argv[1])
    loop.train(config(folder, "pair"))

    def requested(self: StopSignal, step: int) -> bool:
        if step == 3 and jax.process_index() == 1:  # one of them is told, both have to stop
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    original, StopSignal.requested = StopSignal.requested, requested  # type: ignore[method-assign]
    endless = config(folder, "endless")
    loop.train(dataclasses.replace(endless, steps=10**9, log=dataclasses.replace(endless.log, eval_every=10**9)))


if __name__ == "__main__":
    main()
