"""Image convolutions and their gradients against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.images.convolution import ImageConvolution


@pytest.mark.parametrize(("size", "stride", "side"), [(3, 1, 6), (3, 2, 6), (1, 1, 4), (1, 2, 6)])
def test_values_and_gradients_are_those_of_xla(size, stride, side):
    layer = ImageConvolution(3, 5, size, stride=stride, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (2, side, side, 3))
    weights = jax.random.normal(jax.random.key(2), (2, side // stride, side // stride, 5))

    def ours(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x) * weights)

    def plain(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["kernel"][...], (stride, stride), [(size // 2, size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return jnp.sum(y * weights)

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, x) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
