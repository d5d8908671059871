"""Compiles for TPUs and for the H100 on a machine that has neither: the `aot` extra brings the compilers.

A compiled program cannot run here. What it shows is that the code lowers, fits the memory on the chip, and what the
compiler made of it.
"""

import functools
import importlib.util
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

_TPUS = {  # topology: the name that a device of it answers with
    "v4:2x2x1": "TPU v4",
    "v5e:2x2": "TPU v5 lite",
    "v5p:2x2x1": "TPU v5",
    "v6e:2x2": "TPU v6 lite",
    "tpu7x:2x2x1": "TPU7x",
}
H100 = "h100"
TARGETS = (H100, *_TPUS)

_CUDA = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"  # ptxas and libdevice
# Read when libtpu is loaded: it is to look for no machine, and several test processes may load it.
for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}.items():
    os.environ.setdefault(name, value)


@functools.cache
def _target(name: str) -> tuple[SingleDeviceSharding, AbstractMesh, tuple[str, ...], dict[str, Any]]:
    """A device of the target, the mesh under which to lower for it, its platforms and its compiler options."""
    if name == H100:
        described = (Path(__file__).parent / "data" / "h100.txtpb").read_text()
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=described)
        device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
        platforms: tuple[str, ...] = ("cuda",)
        options = {"xla_gpu_cuda_data_dir": str(_CUDA), "xla_gpu_autotune_level": 0}
    else:
        topology = topologies.get_topology_desc(name, platform="tpu")
        device = AbstractDevice(_TPUS[name], 1, "tpu")
        platforms = ("tpu",)
        options = {}
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return SingleDeviceSharding(topology.devices[0]), mesh, platforms, options


def compile_for(target: str, f: Callable[..., Any], *args: Any, **static: Any) -> Any:
    """Compiles f, a function or jitted, for one of TARGETS; the arguments are trees of arrays or shapes, those by name
    static. What is jitted keeps its own compiler options.

    Skips the test where the target's compiler is not installed.
    """
    package = "jax_cuda13_plugin" if target == H100 else "libtpu"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    sharding, mesh, platforms, options = _target(target)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with jax.sharding.use_abstract_mesh(mesh):  # Pallas asks for the device while lowering
        jitted: Any = f if hasattr(f, "trace") else jax.jit(f)
        lowered = jitted.trace(*shapes, **static).lower(lowering_platforms=platforms)
    return lowered.compile(compiler_options=options)
