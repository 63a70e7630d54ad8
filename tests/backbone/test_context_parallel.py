"""Tokens go into the balanced order and back, and a device sees whole sequences when it asks."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from t5x_audio.backbone import context_parallel
from t5x_audio.errors import UserError


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def run_on_6_devices():
    for axes in ({"data": 2, "sequence": 3}, {"data": 3, "sequence": 2}, {"sequence": 6}):
        with jax.set_mesh(mesh_of(**axes)):
            check_orders(axes["sequence"], chunk=5)


def check_orders(devices, chunk):
    """Under the mesh in force."""
    length = devices * 2 * chunk
    x = np.random.default_rng(0).normal(size=(6, length, 2)).astype(np.float32)
    chunks = [c for d in range(devices) for c in (d, 2 * devices - 1 - d)]
    order = np.concatenate([np.arange(c * chunk, (c + 1) * chunk) for c in chunks])
    spec = P(None, "sequence")

    @functools.partial(jax.shard_map, in_specs=spec, out_specs=spec, check_vma=False)
    def summed(share):
        whole = context_parallel.gather(share, 1)
        assert whole.shape == x.shape
        return context_parallel.sum_and_scatter(whole * whole, 1)

    @functools.partial(jax.shard_map, in_specs=(), out_specs=P("sequence"), check_vma=False)
    def starts():
        return context_parallel.starts(2 * chunk)

    balanced = jax.jit(context_parallel.balance)(x)
    np.testing.assert_array_equal(balanced, x[:, order])
    np.testing.assert_array_equal(jax.jit(context_parallel.restore)(balanced), x)
    # Each device asked for all tokens and gave them to the sum.
    np.testing.assert_allclose(jax.jit(summed)(balanced), devices * (x * x)[:, order], rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(starts)(), np.array(chunks) * chunk)


def test_orders(on_devices):
    on_devices(6, "run_on_6_devices")


def test_without_the_axis_nothing_moves():
    x = np.arange(6).reshape(1, 6)
    assert context_parallel.balance(x) is x and context_parallel.restore(x) is x


def run_on_2_devices():
    with jax.set_mesh(mesh_of(sequence=2)), pytest.raises(UserError, match="6 tokens .* 4 chunks"):
        context_parallel.balance(np.zeros((1, 6)))


def test_uneven_sequences_are_refused(on_devices):
    on_devices(2, "run_on_2_devices")
