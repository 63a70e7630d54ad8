import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.vocoder.convolution import length_mask
from t5x_audio.vocoder.unet import Unet, UnetConfig, time_embedding

SMALL = UnetConfig(
    channels=(8, 8), num_mid_stages=2, num_blocks=1, num_heads=2, head_dim=4, norm_groups=4
)


_run = nnx.jit(lambda model, *args: model(*args))


@pytest.fixture(scope="module")
def unet(build):
    return build(SMALL, make=lambda rngs: Unet(12, 3, SMALL, rngs))


def test_time_embedding():
    table = time_embedding(jnp.array([0.0, 0.001]), 4)
    rates = np.array([1.0, 1e-4])
    np.testing.assert_allclose(table[0], [0, 0, 1, 1], atol=1e-7)
    np.testing.assert_allclose(table[1], [*np.sin(rates), *np.cos(rates)], rtol=1e-5)


def test_padding_and_odd_lengths(unet):
    frames = 7
    x = jax.random.normal(jax.random.key(0), (2, 10, 12))
    time = jnp.array([0.3, 0.8])
    mask = length_mask(jnp.array([frames, 10]), 10)
    both = _run(unet, x, mask, time)
    alone = _run(unet, x[:1, :frames], jnp.ones((1, frames, 1)), time[:1])
    np.testing.assert_allclose(both[:1, :frames], alone, rtol=1e-3, atol=1e-4)
    assert not both[0, frames:].any()


def test_depends_on_time(unet):
    x = jax.random.normal(jax.random.key(0), (1, 6, 12))
    mask = jnp.ones((1, 6, 1))
    early, late = (_run(unet, x, mask, jnp.array([t])) for t in (0.1, 0.9))
    assert jnp.abs(early - late).max() > 1e-3
