import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.vocoder.convolution import length_mask
from t5x_audio.vocoder.layers import (
    MaskedGroupNorm,
    dropout,
    linear,
    mish,
    run_stack,
    stack,
)


def test_group_norm_counts_valid_frames_only():
    norm = MaskedGroupNorm(2, 4)
    x = jax.random.normal(jax.random.key(0), (1, 6, 4)) * 3.0 + 1.0
    apply = nnx.jit(lambda n, *a: n(*a))
    y = apply(norm, x, jnp.ones((1, 6, 1)))
    groups = np.asarray(y).reshape(6, 2, 2)
    np.testing.assert_allclose(groups.mean((0, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(groups.std((0, 2)), 1.0, atol=1e-3)
    padded = jnp.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=99.0)
    masked = apply(norm, padded, length_mask(jnp.array([6]), 9))
    np.testing.assert_allclose(masked[:, :6], y, atol=1e-5)


def test_mish_equals_its_formula_and_is_safe():
    x = jnp.linspace(-30.0, 30.0, 601)
    np.testing.assert_allclose(mish(x), x * jnp.tanh(jax.nn.softplus(x)), atol=1e-5)
    grad = jax.jit(jax.vmap(jax.grad(mish)))(jnp.array([-1e4, -100.0, 0.0, 100.0, 1e4]))
    np.testing.assert_allclose(grad, [0.0, 0.0, 0.6, 1.0, 1.0], atol=1e-4)


def test_dropout_keeps_the_mean():
    x = jnp.ones(20_000)
    dropped = dropout(x, 0.3, jax.random.key(0))
    assert abs(float(dropped.mean()) - 1.0) < 0.02
    assert dropout(x, 0.3, None) is x


def test_stack_runs_each_layer_once_in_order():
    def make(rngs):
        return linear(3, 3, ("embed", "mlp"), dtype="float32", rngs=rngs, stacked=1)

    layers = stack(make, 4, nnx.Rngs(0))
    assert layers.kernel.shape == (4, 3, 3)
    assert layers.kernel.get_metadata()["logical_axes"] == ("layers", "embed", "mlp")
    x = jax.random.normal(jax.random.key(1), (2, 3))
    wanted = x
    for i in range(4):
        wanted = wanted @ layers.kernel[i] + i
    got = run_stack(layers, lambda layer, x, i: layer(x) + i, x, jnp.arange(4.0))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
