import jax
import numpy as np
import pytest
from flax import nnx


def _build(config, edit=None, make=None):
    """A module with random weights drawn by numpy: nothing to compile, unlike `make`."""
    make = make or config.make
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    generator = np.random.default_rng(0)

    def fill(path, leaf):
        name = next(str(k.key) for k in reversed(path) if not str(k).endswith("value"))
        if name in ("scale", "alpha"):
            return jax.numpy.asarray(np.ones(leaf.shape, np.float32))
        if name == "bias":
            return jax.numpy.asarray(np.zeros(leaf.shape, np.float32))
        deviation = float(np.prod(leaf.shape[-3:-1] or (1,))) ** -0.5
        values = generator.standard_normal(leaf.shape) * deviation
        return jax.numpy.asarray(values.astype(np.float32))

    module = nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))
    if edit is not None:
        edit(module)
    return module


@pytest.fixture(scope="session")
def build():
    return _build
