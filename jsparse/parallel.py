"""Devices: the mesh, the rules from logical axis names to mesh axes, and multi-host start-up.

Arrays name their axes logically ("embed", "mlp", "heads", ...). The rules below map a name to a mesh axis; XLA
(`AxisType.Auto`) inserts the collectives. "Under pjit" means `jax.jit` with shardings: they are one since JAX 0.4.
"""

import math
import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jsparse.config import ConfigError, MeshConfig, check

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. "embed" on fsdp shards every large matrix once; "mlp", "heads" and "vocab" on tensor are
# Megatron's split. Names mapped to None stay whole.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "mlp": "tensor",
    "blocks": "tensor",  # of neurons: no block is ever split
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "layers": None,
    "sequence": None,
    "head_dim": None,
    "norm": None,
}


def initialize() -> None:
    """Joins the processes of a multi-host job; call before any other use of jax.

    SLURM, Open MPI and TPU pods are recognised by their variables; JSPARSE_DISTRIBUTED=1 leaves it to jax to find out.
    Elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. A single process does nothing.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
        return
    hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
    tasks = [int(os.environ.get(name, 1)) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    if max(hosts, *tasks) > 1 or os.environ.get("JSPARSE_DISTRIBUTED") == "1":
        jax.distributed.initialize()


def make_mesh(config: MeshConfig = MeshConfig(), devices: Any = None) -> Mesh:
    """A mesh with axes ("data", "fsdp", "tensor"). At most one size may be -1: it takes the devices that are left."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    check(len(free) <= 1, "mesh", "at most one axis of -1", sizes)
    check(all(size > 0 or size == -1 for size in sizes.values()), "mesh", "positive sizes, or -1", sizes)
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(f"mesh: {sizes} does not divide {len(devices)} devices")
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, (AxisType.Auto,) * 3, devices=devices)


def single_device_mesh() -> Mesh:
    return make_mesh(devices=jax.devices()[:1])


def spec(logical: P, shape: tuple[int, ...], mesh: Any, name: str = "array") -> P:
    """Logical axis names to a `PartitionSpec` of mesh axes.

    Raises ConfigError where a dimension is not divisible by its mesh axes. Two exceptions stay whole instead:
    key-value heads (fewer heads than tensor shards is what GQA is for) and everything of size 1.
    """
    check(len(logical) == len(shape), name, f"{len(logical)} axes {tuple(logical)}", shape)
    axes: list[Any] = []
    for axis, size in zip(logical, shape, strict=True):
        if axis is not None and axis not in RULES:
            raise ConfigError(f"{name}: unknown logical axis {axis!r}; known: {', '.join(RULES)}")
        target = RULES[axis] if axis else None
        shards = math.prod(mesh.shape[a] for a in ((target,) if isinstance(target, str) else target or ()))
        if size % shards:
            if axis != "kv_heads" and size != 1:
                raise ConfigError(f"mesh: {name} has {size} {axis}, which {target}={shards} does not divide")
            target = None
        axes.append(target if shards > 1 else None)
    used = [a for axis in axes if axis for a in ((axis,) if isinstance(axis, str) else axis)]
    check(len(used) == len(set(used)), name, "each mesh axis at most once", axes)
    return P(*axes)


def shardings(logical: Any, abstract: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` for a tree of arrays (or shapes) and the matching tree of logical axes."""

    def one(path: Any, axes: P, x: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(axes, x.shape, mesh, jax.tree_util.keystr(path, simple=True, separator=".")))

    return jax.tree_util.tree_map_with_path(one, logical, abstract, is_leaf=lambda x: isinstance(x, P))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, ...]: the batch is split over data and fsdp."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def batch_shards() -> int:
    """Devices that split the batch under the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def round_up(n: int, multiple: int) -> int:
    """The next multiple: of `batch_shards`, the rows that a batch of n is filled up to."""
    return -(-n // multiple) * multiple


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins an activation to its logical sharding under the mesh in context (`jax.set_mesh`); no mesh, no effect."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(P(*logical), x.shape, mesh, f"activation {logical}"))


def replicated_share(abstract: Any, shardings: Any, mesh: Mesh) -> tuple[float, list[str]]:
    """Share of the bytes that neither fsdp nor tensor splits, and the names of those arrays, largest first.

    0 where the mesh has no such axis: pure data parallelism replicates on purpose.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return 0.0, []
    paths = jax.tree_util.tree_leaves_with_path(abstract)
    leaves = zip(paths, jax.tree.leaves(shardings), strict=True)
    sizes = [(math.prod(x.shape) * x.dtype.itemsize, jax.tree_util.keystr(path, simple=True, separator="."), s)
             for (path, x), s in leaves]  # fmt: skip
    whole = sorted(((n, name) for n, name, s in sizes if all(a is None for a in s.spec)), reverse=True)
    return sum(n for n, _ in whole) / max(1, sum(n for n, _, _ in sizes)), [name for _, name in whole]
