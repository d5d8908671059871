"""Peak host memory of loading and saving a model folder, measured in fresh processes.

    python tools/measure_memory.py                      # TinyLlama's shape, 1.1 billion parameters, 2.2 GB on disk
    python tools/measure_memory.py --layers 2           # a small one

Writes random bfloat16 weights to a temporary folder, then prints for each operation the size of the parameters, the
peak of resident memory above what the process held before, and the difference. The targets: at most the model's size
plus 1 GiB on the way in, at most 2 GiB above the live parameters on the way out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GIB = 2**30
CASES: dict[str, dict[str, Any]] = {
    "load": {},
    "load, mesh 1x8x1": {"fsdp": 8},
    "load as float32": {"dtype": "float32"},
    "save": {"save": True},
    "save, mesh 1x8x1": {"save": True, "fsdp": 8},
    "save from float32": {"save": True, "dtype": "float32"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # runs one case in this process
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(Path(args.folder), **CASES[args.case])))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "model", args.layers, args.hidden, args.vocab)
        print(f"{'':20} {'parameters':>11} {'peak above':>11} {'over':>8} {'limit':>8} {'time':>7}")
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--folder", folder]
            result = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"}
            )
            r = json.loads(result.stdout)
            print(f"{case:20} {r['params'] / GIB:7.2f} GiB {r['peak'] / GIB:7.2f} GiB {r['over'] / GIB:4.2f} GiB "
                  f"{r['limit'] / GIB:4.2f} GiB {r['seconds']:5.1f} s", flush=True)  # fmt: skip


def make(path: Path, layers: int, hidden: int, vocab: int) -> None:
    """A model folder of random bfloat16 weights, streamed to disk."""
    import ml_dtypes
    import numpy as np

    from jsparse.config import LlamaConfig
    from jsparse.hf.folder import write_model
    from jsparse.hf.names import in_order, leaves
    from jsparse.hf.tensors import Outgoing, pieces

    config = LlamaConfig(vocab, hidden, hidden * 11 // 4, layers, hidden // 64, max(1, hidden // 512), 64, 2048)
    dtype = np.dtype(ml_dtypes.bfloat16)
    random = np.random.default_rng(0)

    def outgoing(shape: tuple[int, ...]) -> Outgoing:
        def rows() -> Any:
            for cut in pieces(slice(0, shape[0]), int(np.prod(shape[1:])) * 4):
                yield random.standard_normal((cut.stop - cut.start, *shape[1:]), np.float32).astype(dtype)

        return Outgoing(shape, dtype, rows)

    tensors = {name: outgoing(leaf.layout.shape(leaf.shape)) for leaf in leaves(config) for name in leaf.names}
    write_model(path, config, in_order(tensors), "llama", None, 1e9, False, {})


def measure(folder: Path, fsdp: int = 1, dtype: str | None = None, save: bool = False) -> dict[str, float]:
    """Bytes of the parameters, of the peak above what was held before, and of what exceeds the parameters."""
    import jax

    from jsparse import hf
    from jsparse.config import MeshConfig
    from jsparse.parallel import make_mesh

    jax.config.update("jax_num_cpu_devices", fsdp)
    mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp)) if fsdp > 1 else None
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    before = memory("VmRSS")
    start = time.perf_counter()
    config, params = hf.load(folder / "model", mesh=mesh, dtype=dtype)
    jax.block_until_ready(params)
    if save:
        reset_peak()
        start = time.perf_counter()
        hf.save(folder / "out", config, params, overwrite=True)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    peak = memory("VmHWM") - before
    return {
        "params": size,
        "peak": peak,
        "over": peak - size,
        "limit": (2 if save else 1) * GIB,
        "seconds": time.perf_counter() - start,
    }


def memory(field: str) -> int:
    """VmRSS, resident memory now, or VmHWM, its peak, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
