"""The names of the mesh axes, for what cannot be left to XLA's partitioner.

`training.partitioning` lays the devices out on them; a kernel is a black box to the partitioner, so
the backbone says itself how its operands lie.
"""

import math

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

MESH_AXES = ("replica", "data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("replica", "data", "fsdp")
STREAM_AXES = ("replica", "data")  # of a decoder: over `fsdp` its weights stay in parts
FSDP_AXIS = "fsdp"
HEAD_AXIS = "tensor"
SEQUENCE_AXIS = "sequence"


def present(mesh: AbstractMesh, *names: str) -> tuple[str, ...]:
    """Those of the axes that the mesh has and that hold more than one device."""
    return tuple(name for name in names if dict(mesh.shape).get(name, 1) > 1)


Axes = str | tuple[str, ...] | None


def constrain(x: jax.Array, *axes: Axes) -> jax.Array:
    """`x` with its first axes laid over those of the mesh in force.

    An entry is a mesh axis, several or None. What the mesh has not, and what an axis of `x` does
    not divide by, stays whole; without a mesh of several devices `x` is returned as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not present(mesh, *MESH_AXES):
        return x
    entries = []
    for size, names in zip(x.shape, axes, strict=False):
        found = present(mesh, *((names,) if isinstance(names, str) else names or ()))
        parts = math.prod(mesh.shape[name] for name in found)
        entries.append(found if found and size % parts == 0 else None)
    return jax.lax.with_sharding_constraint(x, P(*entries))
