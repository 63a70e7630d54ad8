"""The names of the mesh axes, for what cannot be left to XLA's partitioner.

`training.partitioning` lays the devices out on them; a kernel is a black box to the partitioner, so
the backbone says itself how its operands lie.
"""

from jax.sharding import AbstractMesh

MESH_AXES = ("replica", "data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("replica", "data", "fsdp")
HEAD_AXIS = "tensor"


def present(mesh: AbstractMesh, *names: str) -> tuple[str, ...]:
    """Those of the axes that the mesh has and that hold more than one device."""
    return tuple(name for name in names if dict(mesh.shape).get(name, 1) > 1)
