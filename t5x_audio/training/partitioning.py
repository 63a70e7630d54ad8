"""From logical axes to a mesh: where every array of a training run lives.

Models name the axes of their parameters (`logical_axes=('embed', 'mlp')`) and know nothing of
devices. `MeshShape` lays out the devices on five axes: `replica` (over DCN: plain data
parallelism between slices), `data`, `fsdp` (data parallelism that shards the parameters too),
`tensor` and `sequence`. `ShardingRules` is the one table between the two; it refuses a collision
or a size that doesn't divide before anything is compiled. XLA's partitioner does the rest
(AxisType.Auto), so a model computes the same on any mesh.
"""

import contextlib
import dataclasses
import math

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_audio.backbone.mesh import BATCH_AXES, MESH_AXES
from t5x_audio.errors import UserError

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; one of them may be -1: whatever remains.

    `simulated_devices` > 0 makes that many of a CPU, to try a mesh without an accelerator; it
    works only before JAX has computed anything in the process.
    """

    replica: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    simulated_devices: int = 0

    def make(self, devices=None) -> Mesh:
        """The mesh over `devices` (default all). UserError if the product isn't their number."""
        if self.simulated_devices:
            with contextlib.suppress(RuntimeError):  # Too late: the count below decides.
                jax.config.update("jax_num_cpu_devices", self.simulated_devices)
        devices = jax.devices() if devices is None else devices
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        free = [name for name, size in sizes.items() if size == -1]
        product = math.prod(size for size in sizes.values() if size != -1)
        if len(free) > 1 or product < 1 or (free and len(devices) % product):
            raise UserError(f"mesh {_describe(sizes)} does not divide {len(devices)} devices")
        if free:
            sizes[free[0]] = len(devices) // product
        elif product != len(devices):
            raise UserError(
                f"mesh {_describe(sizes)} needs {product} devices but there are {len(devices)}"
            )
        types = (AxisType.Auto,) * len(sizes)
        try:
            return jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=devices)
        except NotImplementedError:  # An axis that is no product of whole sides of the torus.
            return Mesh(_split_sides(sizes, devices), tuple(sizes), axis_types=types)


def _split_sides(sizes: dict[str, int], devices):
    """Devices laid out where a mesh axis is a part of a side of the torus: slower, but possible."""
    try:
        return mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"mesh {_describe(sizes)} cannot be laid on this torus; take axes that are products of "
            "its sides"
        ) from error


def _describe(sizes) -> str:
    return " x ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "of 1"


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis, several, or None (replicated)."""

    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    mlp: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    layers: MeshAxes = None

    def spec(self, logical_axes, shape, mesh: Mesh, name: str = "parameter") -> P:
        """The PartitionSpec of one array.

        UserError in one line if two of its axes would use the same mesh axis, or a size doesn't
        divide; ValueError if the model names an axis this table doesn't have.
        """
        if len(logical_axes) != len(shape):
            raise ValueError(f"{name}: axes {logical_axes} don't fit shape {tuple(shape)}")
        used: dict[str, str] = {}
        entries = []
        for logical, size in zip(logical_axes, shape, strict=True):
            axes = self._mesh_axes(logical, name)
            for axis in axes:
                if axis not in mesh.shape:
                    raise UserError(f"rule {logical} -> {axis}: the mesh has no such axis")
                if axis in used:
                    raise UserError(
                        f"{name}: its axes {used[axis]} and {logical} both map to mesh axis "
                        f"{axis}; change ShardingRules.{logical}"
                    )
                used[axis] = logical
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                raise UserError(
                    f"{name}: axis {logical} of size {size} does not divide over "
                    f"{' x '.join(axes)} = {parts}; change the size, the mesh or "
                    f"ShardingRules.{logical}"
                )
            entries.append(axes[0] if len(axes) == 1 else (axes or None))
        return P(*entries)

    def _mesh_axes(self, logical: str | None, name: str) -> tuple[str, ...]:
        if logical is None:
            return ()
        if not hasattr(self, logical):
            raise ValueError(f"{name}: ShardingRules has no logical axis {logical!r}")
        axes = getattr(self, logical)
        return (axes,) if isinstance(axes, str) else tuple(axes or ())

    def shardings(self, state, mesh: Mesh):
        """A tree like `state` (a TrainState or any part of it) of NamedShardings.

        Optimiser moments are Variables with the axes of their parameters and shard like them;
        arrays without logical axes, and factored moments of another rank or of one element, are
        replicated.
        """

        def of(path, node):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            axes = getattr(node, "logical_axes", None)

            def one(leaf):
                factored = axes is not None and (len(axes) != leaf.ndim or leaf.size == 1)
                if axes is None or (factored and "opt_state" in name):
                    return NamedSharding(mesh, P())
                return NamedSharding(mesh, self.spec(axes, leaf.shape, mesh, name))

            return jax.tree.map(one, node)

        is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
        return jax.tree_util.tree_map_with_path(of, state, is_leaf=is_variable)


def with_shardings(abstract, shardings):
    """ShapeDtypeStructs of `abstract` that carry `shardings`: a template to restore."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        abstract,
        shardings,
    )


def batch_sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Of a field of the global batch: its first axis over replica, data and fsdp.

    UserError if that doesn't divide over those axes.
    """
    if not shape:
        return NamedSharding(mesh, P())
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if shape[0] % parts:
        raise UserError(
            f"batch field {name}: {shape[0]} examples do not divide over the {parts} devices of "
            "data parallelism; change the batch size or the mesh"
        )
    return NamedSharding(mesh, P(BATCH_AXES))


def rows_of_process(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of the global batch that the devices of this process hold."""
    sharding = batch_sharding(mesh, "rows", (batch_size,))
    places = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (place,) in places for row in range(*place.indices(batch_size))})


def place_batch(batch, mesh: Mesh, rows=None, batch_size: int | None = None):
    """Numpy batches as global arrays, sharded as `batch_sharding` says.

    Args:
      batch: the global batch, or those of its rows that this process needs, and maybe others.
      mesh: of the arrays.
      rows: int[n], rising: which rows of the global batch `batch` has; None if all.
      batch_size: rows of the global batch, with `rows`.
    """

    def place(path, array):
        array = np.asarray(array)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = array.shape
        if rows is not None and shape:
            shape = (batch_size, *shape[1:])
        sharding = batch_sharding(mesh, name, shape)
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)

        def part(index):
            if rows is None or not shape:
                return array[index]
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return array[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree_util.tree_map_with_path(place, batch)
