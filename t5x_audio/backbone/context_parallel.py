"""Long sequences over the mesh axis `sequence`: every device works on its share of the tokens.

Only attention looks beyond a token. Its keys and values are gathered, which with grouped queries is
little; queries stay where they are (Llama 3, arXiv 2407.21783, section 3.3.2). Causal attention
gives late tokens more to do, so a device holds two chunks of 2 n: the d-th and the d-th from the
end. The transformer brings its tokens into that order and what it returns back into the plain one;
between the two every array [B, S, ...] is in balanced order, and nobody else needs to know.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from t5x_audio.backbone.mesh import BATCH_AXES, SEQUENCE_AXIS, present
from t5x_audio.errors import UserError


def parts() -> int:
    """Devices along `sequence` of the mesh in force; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[SEQUENCE_AXIS] if present(mesh, SEQUENCE_AXIS) else 1


def balance(x: jax.Array) -> jax.Array:
    """[B, S, ...] in plain order -> in balanced order, laid over batch and sequence.

    UserError where S does not divide into two chunks a device.
    """
    return _reordered(x, _balance)


def restore(x: jax.Array) -> jax.Array:
    """[B, S, ...] in balanced order -> in plain order, laid over batch and sequence."""
    return _reordered(x, _restore)


def _reordered(x, function):
    devices = parts()
    if devices == 1:
        return x
    if x.shape[1] % (2 * devices):
        raise UserError(
            f"sequences of {x.shape[1]} tokens do not divide into {2 * devices} chunks, two for "
            f"each of {devices} devices; change SEQUENCES_LENGTH or MeshShape.sequence"
        )
    mesh = jax.sharding.get_abstract_mesh()
    spec = P(present(mesh, *BATCH_AXES) or None, SEQUENCE_AXIS)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(x)


# ---- on a device, under shard_map ------------------------------------------------------------
#
# Plain chunks 2 d and 2 d + 1 lie on device d. Of the first ones, the even, half go to the front of
# an even device and half to the back of an odd one; of the second ones the other way round. So each
# travels by one permutation of the devices.


def _routes(devices: int) -> tuple[list, list]:
    """(from, to) of every device's first and second chunk."""
    home = lambda chunk: min(chunk, 2 * devices - 1 - chunk)  # noqa: E731
    return tuple([(d, home(2 * d + half)) for d in range(devices)] for half in range(2))


def _balance(x):
    even = jax.lax.axis_index(SEQUENCE_AXIS) % 2 == 0
    halves = jnp.split(x, 2, axis=1)
    first, second = (
        jax.lax.ppermute(half, SEQUENCE_AXIS, route)
        for half, route in zip(halves, _routes(parts()), strict=True)
    )
    return _joined(first, second, even)


def _restore(x):
    even = jax.lax.axis_index(SEQUENCE_AXIS) % 2 == 0
    halves = jnp.split(_joined(*jnp.split(x, 2, axis=1), even), 2, axis=1)
    back = [
        jax.lax.ppermute(half, SEQUENCE_AXIS, [(to, source) for source, to in route])
        for half, route in zip(halves, _routes(parts()), strict=True)
    ]
    return jnp.concatenate(back, 1)


def _joined(first, second, in_order):
    """The two behind one another, in this order or the other."""
    low = jnp.where(in_order, first, second)
    return jnp.concatenate([low, jnp.where(in_order, second, first)], 1)


def _chunks_in_order(devices: int) -> np.ndarray:
    """Numbers of the chunks as they lie, device by device, in balanced order."""
    return np.array([(d, 2 * devices - 1 - d) for d in range(devices)]).reshape(-1)


def _reorder_chunks(x, axis: int, order):
    shape = x.shape
    x = x.reshape(*shape[:axis], len(order), -1, *shape[axis + 1 :])
    return jnp.take(x, order, axis=axis).reshape(shape)


def gather(x: jax.Array, axis: int) -> jax.Array:
    """All tokens in plain order, of a device's tokens along `axis`."""
    gathered = jax.lax.all_gather(x, SEQUENCE_AXIS, axis=axis, tiled=True)
    return _reorder_chunks(gathered, axis, np.argsort(_chunks_in_order(parts())))


def sum_and_scatter(x: jax.Array, axis: int) -> jax.Array:
    """The transpose of `gather`: the sum over all devices, of which each keeps its tokens."""
    balanced = _reorder_chunks(x, axis, _chunks_in_order(parts()))
    return jax.lax.psum_scatter(balanced, SEQUENCE_AXIS, scatter_dimension=axis, tiled=True)


def starts(length: int) -> jax.Array:
    """Int32[2]: where among all tokens the two chunks of a device's `length` tokens begin."""
    device, chunk = jax.lax.axis_index(SEQUENCE_AXIS), length // 2
    return jnp.stack([device, 2 * parts() - 1 - device]).astype(jnp.int32) * chunk
