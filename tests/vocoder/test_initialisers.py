import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.vocoder.convolution import TransposedConvolution
from t5x_audio.vocoder.initialisers import fan_in, hashed_uniform, interpolating, spread


def test_moments_and_independence_of_neighbours():
    x = np.asarray(hashed_uniform(jax.random.key(0), (300, 400), 0.5))
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 0.5) < 0.005
    assert np.abs(x).max() <= 0.5 * 3**0.5
    assert np.abs(np.corrcoef(x[:, :-1].ravel(), x[:, 1:].ravel())[0, 1]) < 0.01
    assert np.abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 0.01


def test_keys_give_other_values_also_when_stacked():
    keys = jax.random.split(jax.random.key(1), 3)
    draws = jax.vmap(lambda key: hashed_uniform(key, (1000,), 1.0))(keys)
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.1
    np.testing.assert_array_equal(draws[1], hashed_uniform(keys[1], (1000,), 1.0))


def test_scales():
    assert abs(np.std(fan_in(2.0)(jax.random.key(0), (4, 25, 300))) - 0.02**0.5) < 0.005
    assert abs(np.std(spread(0.01)(jax.random.key(0), (7, 999))) - 0.01) < 5e-4


@pytest.mark.parametrize(("kernel", "stride"), [(11, 5), (7, 3), (8, 4), (16, 8)])
def test_interpolating_kernels_keep_a_ramp_straight(kernel, stride):
    init = interpolating(stride, 0.1)
    module = TransposedConvolution(2, 3, kernel, stride, kernel_init=init, rngs=nnx.Rngs(0))
    ramp = jnp.arange(12.0)[None, :, None] * jnp.array([1.0, -2.0]) + 3.0
    inner = np.asarray(module(ramp))[0, 2 * stride : -2 * stride]
    np.testing.assert_allclose(np.diff(inner, n=2, axis=0), 0.0, atol=1e-5)
    assert np.abs(np.diff(inner, axis=0)).max() > 1e-2
    mixtures = np.asarray(init(jax.random.key(0), (kernel, 80, 90))).max(0)
    assert mixtures.max() <= 0.1 * 3**0.5
