import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.vocoder.convolution import length_mask
from t5x_audio.vocoder.length_regulator import LengthRegulator, interpolation_weights

_weights = jax.jit(interpolation_weights, static_argnums=(2, 3, 5))


def test_weights_interpolate_with_half_pixel_centres():
    pairs = [(n, m) for n in range(1, 13) for m in range(1, 26)]
    counts, new_counts = (np.array(side) for side in zip(*pairs, strict=True))
    weights = np.asarray(_weights(counts, new_counts, 14, 27))
    for (n, m), rows in zip(pairs, weights, strict=True):
        values = np.random.default_rng(n).standard_normal(n)
        position = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
        wanted = np.interp(position, np.arange(n), values)
        padded = np.pad(values, (0, 14 - n), constant_values=77.0)
        np.testing.assert_allclose((rows @ padded)[:m], wanted, atol=1e-4)
        assert not rows[m:].any()
        np.testing.assert_allclose(rows[:m].sum(1), 1.0, atol=1e-5)


def test_prompt_and_rest_do_not_mix():
    prompts = (jnp.array([5]), jnp.array([8]))
    weights = _weights(jnp.array([15]), jnp.array([24]), 15, 24, prompts)[0]
    assert not weights[:8, 5:].any()
    assert not weights[8:, :5].any()
    rest = _weights(jnp.array([10]), jnp.array([16]), 10, 16)[0]
    np.testing.assert_allclose(weights[8:, 5:], rest, atol=1e-6)


def test_ends_are_interpolated_apart_where_there_is_more_than_both():
    def weights(count, new_count, edges=(0, 0)):
        prompts = (jnp.array([5]), jnp.array([8]))
        total = jnp.array([5 + count]), jnp.array([8 + new_count])
        return _weights(*total, 5 + count, 8 + new_count, prompts, edges)[0]

    apart = weights(9, 25, (4, 7))
    np.testing.assert_allclose(apart[:8], weights(9, 25)[:8])
    for codes, frames in (((5, 9), (8, 15)), ((9, 10), (15, 26)), ((10, 14), (26, 33))):
        size, new_size = codes[1] - codes[0], frames[1] - frames[0]
        alone = _weights(jnp.array([size]), jnp.array([new_size]), size, new_size)[0]
        np.testing.assert_allclose(apart[slice(*frames), slice(*codes)], alone, atol=1e-6)
    np.testing.assert_allclose(apart.sum(1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(weights(8, 25, (4, 7)), weights(8, 25))


@pytest.mark.parametrize("residual", [False, True])
def test_regulator_is_independent_of_padding(residual):
    model = LengthRegulator(6, 2, residual, "float32", nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 10, 6))
    lengths, frames = jnp.array([5, 10]), jnp.array([8, 16])
    run = nnx.jit(lambda m, *args: m(*args), static_argnums=4)
    both = run(model, x, lengths, frames, 16, length_mask(frames, 16))
    alone = run(model, x[:1, :5], lengths[:1], frames[:1], 8, jnp.ones((1, 8, 1)))
    np.testing.assert_allclose(both[:1, :8], alone, rtol=1e-4, atol=1e-5)
    assert not both[0, 8:].any()


def test_residual_passes_the_input_by_the_convolutions():
    model = LengthRegulator(6, 2, True, "float32", nnx.Rngs(0))
    for convolution in model.convolutions:
        convolution.kernel[...] = jnp.zeros_like(convolution.kernel[...])
    x = jax.random.normal(jax.random.key(0), (1, 10, 6))
    weights = _weights(jnp.array([10]), jnp.array([16]), 10, 16)
    y = model(x, jnp.array([10]), jnp.array([16]), 16, jnp.ones((1, 16, 1)))
    np.testing.assert_allclose(y, model.out(weights @ x), rtol=1e-4, atol=1e-5)
