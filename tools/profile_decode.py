"""Where a step of decoding spends its time on a GPU, kernel by kernel.

    python tools/profile_decode.py llama2-7b --variant dense "LTE 50 %"

Decodes as `jsparse bench decode` does, with random weights, first without the profiler, whose time is printed, then a
few steps under it. Each line of the table is a kernel: microseconds a step, launches a step, the median of a launch.
`body`, `kernel` and `_kernel`, numbered by XLA, are Pallas kernels: their order in a layer is that of docs/decoding.md.
"""

import argparse
import collections
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax

from jsparse.bench import decode
from jsparse.bench.shapes import SHAPES
from jsparse.inference.generate import State, bucket

CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--variant", nargs="+", choices=decode.VARIANTS, default=["dense", "LTE 50 %"])
    parser.add_argument("--rank", type=int, default=256, help="of the predictors")
    parser.add_argument("--steps", type=int, default=4, help="under the profiler")
    parser.add_argument("--timed-steps", type=int, default=64, help="without it")
    parser.add_argument("--kernels", type=int, default=12, help="lines a variant")
    args = parser.parse_args()

    shape = SHAPES[args.shape]
    dense = decode._random_decoder(shape, "bfloat16")
    slots = bucket(CONTEXT + 1 + max(args.steps, args.timed_steps))

    def start() -> State:
        return jax.block_until_ready(decode._random_state(dense, jax.random.key(5), shape, 1, CONTEXT, slots))

    for name in args.variant:
        run, decoder, _ = decode._build(dense, shape, decode.VARIANTS[name], args.rank, "sparse", start())

        def seconds(steps: int) -> float:
            return decode._timed(run, decoder, start(), CONTEXT + 1 + steps)  # noqa: B023

        ms = statistics.median([seconds(args.timed_steps) for _ in range(4)][1:]) / args.timed_steps * 1e3
        print(f"{name}: {ms:.3f} ms a step", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                seconds(args.steps)
            found = kernels(Path(folder))
        busy = sum(map(sum, found.values())) / args.steps
        print(f"    {busy:9.1f} us a step in kernels")
        for kernel, us in sorted(found.items(), key=lambda item: -sum(item[1]))[: args.kernels]:
            total, launches = sum(us) / args.steps, len(us) / args.steps
            print(f"    {total:9.1f} us  {launches:6.1f} x {statistics.median(us):7.2f} us  {kernel}")


def kernels(folder: Path) -> dict[str, list[float]]:
    """Microseconds of every launch, by kernel, in the trace that a folder holds."""
    [trace] = folder.rglob("*.xplane.pb")
    found: dict[str, Any] = collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            if "GPU" in plane.name and line.name.startswith("Stream") and "Compute" in line.name:
                for event in line.events:
                    found[event.name].append(event.duration_ns / 1e3)
    return found


if __name__ == "__main__":
    main()
