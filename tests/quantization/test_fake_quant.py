"""The quantisers against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.quantization import fake_quant

# 2 bits: scale 1.5 / 1.5 = 1, integers -2 to 1. 4 bits: 1.5 / 7.5 = 0.2, -8 to 7.
# 8 bits: 2.55 / 127.5 = 0.02, -128 to 127.
WEIGHTS = {
    2: ([1.5, -1.5, 0.4, -0.6, 1.2], [1.0, -2.0, 0.0, -1.0, 1.0]),
    4: ([1.5, -1.48, 0.41, -0.29, 0.09], [1.4, -1.4, 0.4, -0.2, 0.0]),
    8: ([2.55, -2.549, 0.031, -0.011, 1.0], [2.54, -2.54, 0.04, -0.02, 1.0]),
}
# 2 bits of [-1, 2]: step 1, zero at 1. 4 bits of [-0.5, 2.5]: step 0.2, zero at 2 (2.5 rounds to
# even), so 15 is 2.6. 8 bits of [0, 5.1]: step 0.02.
ACTIVATIONS = {
    2: ((-1.0, 2.0), [-3.0, -0.6, 0.4, 1.6, 9.0], [-1.0, -1.0, 0.0, 2.0, 2.0]),
    4: ((-0.5, 2.5), [-0.5, 0.09, 0.11, 2.5, 4.0], [-0.4, 0.0, 0.2, 2.4, 2.6]),
    8: ((0.0, 5.1), [0.0, 0.011, 5.1, 6.0, -1.0], [0.0, 0.02, 5.1, 5.1, 0.0]),
}


@pytest.mark.parametrize("bits", WEIGHTS)
def test_weights_by_hand(bits):
    values, expected = WEIGHTS[bits]
    weight = jnp.array([values, [0.5 * v for v in values]]).T
    got = fake_quant.quantize_weight(weight, bits)
    np.testing.assert_allclose(got[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(got[:, 1], 0.5 * np.array(expected), atol=1e-6)


@pytest.mark.parametrize("bits", ACTIVATIONS)
def test_activations_by_hand(bits):
    bounds, values, expected = ACTIVATIONS[bits]
    got = fake_quant.quantize_activation(jnp.array(values), jnp.array(bounds), bits)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_channel_of_zeros_passes_and_leaves_the_others_quantised():
    weight = jnp.array([[0.0, 1.5], [0.0, 0.4]])
    got = fake_quant.quantize_weight(weight, 2)
    np.testing.assert_array_equal(got, [[0.0, 1.0], [0.0, 0.0]])
    gradient = jax.grad(lambda w: jnp.sum(fake_quant.quantize_weight(w, 2)))(weight)
    np.testing.assert_array_equal(gradient[:, 0], 1.0)


def test_a_range_without_width_passes():
    x = jnp.array([1.0, 2.0])
    for bounds in ([0.7, 0.7], [np.nan, np.nan], [np.inf, -np.inf]):
        np.testing.assert_array_equal(fake_quant.quantize_activation(x, jnp.array(bounds), 4), x)


def test_gradients_stop_at_the_clamp_and_nowhere_else():
    values = jnp.array([-1.6, -1.4, 0.0, 1.9, 2.4, 2.6])
    bounds = jnp.array([-1.0, 2.0])
    grad = jax.grad(
        lambda x, b: jnp.sum(fake_quant.quantize_activation(x, b, 2) * jnp.arange(1.0, 7.0)), (0, 1)
    )
    by_value, by_bounds = grad(values, bounds)
    np.testing.assert_array_equal(by_value, [0, 2, 3, 4, 5, 0])
    np.testing.assert_array_equal(by_bounds, 0.0)
    # The largest positive weight is beyond the last integer, the most negative is not.
    weight = jnp.array([1.5001, 1.4, -1.5, 0.2])[:, None]
    gradient = jax.grad(lambda w: jnp.sum(fake_quant.quantize_weight(w, 2)))(weight)
    np.testing.assert_array_equal(gradient[:, 0], [0, 1, 1, 1])


def test_scales_of_stacked_layers_and_of_heads_are_their_own():
    weight = jax.random.normal(jax.random.key(0), (3, 4, 2, 5))  # layers, in, heads, head_dim
    got = fake_quant.quantize_weight(weight, 4, channel_axes=(0, -2, -1))
    for layer in range(3):
        for head in range(2):
            alone = fake_quant.quantize_weight(weight[layer, :, head], 4)
            np.testing.assert_allclose(got[layer, :, head], alone, atol=1e-6)


def test_one_compiled_function_serves_all_bits():
    weight = jax.random.normal(jax.random.key(0), (6, 3))
    jitted = jax.jit(fake_quant.quantize_weight)
    for bits in range(2, 9):
        by_number = fake_quant.quantize_weight(weight, bits)
        np.testing.assert_allclose(jitted(weight, bits), by_number, atol=1e-6)
    assert jitted._cache_size() == 1


@settings(max_examples=10)
@given(st.integers(0, 999), st.integers(2, 8), st.floats(-3, 3), st.floats(0.01, 10))
def test_no_more_levels_than_the_bits_allow_and_half_a_step_of_error(seed, bits, low, width):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.uniform(low, low + width, 2000), jnp.float32)
    bounds = jnp.stack([x.min(), x.max()])
    got = np.asarray(fake_quant.quantize_activation(x, bounds, bits))
    step = float(bounds[1] - bounds[0]) / (2**bits - 1)
    assert len(np.unique(got)) <= 2**bits
    # Half a step by rounding, half a step where the rounded zero moves the range.
    assert np.abs(got - np.asarray(x)).max() <= 1.001 * step


def test_other_bits_are_refused():
    for bits in (1, 9, 0, 4.0, True):
        with pytest.raises(UserError, match="encoder/stem: .* bits"):
            fake_quant.require_bits(bits, "encoder/stem")
    fake_quant.require_bits(16, "reverse", most=16)
