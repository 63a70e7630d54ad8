import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.vocoder.conformer import (
    ConformerConfig,
    ConvolutionModule,
    relative_positions,
    relative_shift,
)
from t5x_audio.vocoder.convolution import length_mask

SMALL = ConformerConfig(width=16, num_layers=2, num_heads=2, mlp_dim=24, dropout=0.1)


def test_relative_shift_picks_the_distance():
    length = 5
    distances = jnp.arange(length - 1, -length, -1.0)
    scores = jnp.broadcast_to(distances, (1, 2, length, 2 * length - 1))
    wanted = np.arange(length)[:, None] - np.arange(length)[None]
    np.testing.assert_array_equal(relative_shift(scores)[0, 1], wanted)


def test_positions_are_sinusoids_of_the_distance():
    table = relative_positions(4, 6)
    assert table.shape == (7, 6)
    np.testing.assert_allclose(table[3], [0, 1, 0, 1, 0, 1], atol=1e-7)
    np.testing.assert_allclose(table[:, 0], np.sin(np.arange(3, -4, -1)), rtol=1e-6)


_run = nnx.jit(lambda model, *args: model(*args))


@pytest.mark.parametrize("kernel", [None, 3])
def test_padding_and_shape(build, kernel):
    model = build(dataclasses.replace(SMALL, convolution_kernel=kernel))
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    mask = length_mask(jnp.array([5, 9]), 9)
    y = _run(model, x * mask, mask)
    alone = _run(model, x[:1, :5], jnp.ones((1, 5, 1)))
    np.testing.assert_allclose(y[:1, :5], alone, rtol=1e-4, atol=1e-5)
    assert not y[0, 5:].any()


def test_order_matters_and_dropout_only_with_a_key(build):
    model = build(SMALL)
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    mask = jnp.ones((1, 6, 1))
    y = _run(model, x, mask)
    assert jnp.abs(_run(model, x[:, ::-1], mask)[:, ::-1] - y).max() > 1e-3
    np.testing.assert_array_equal(_run(model, x, mask), y)
    assert jnp.abs(_run(model, x, mask, jax.random.key(1)) - y).max() > 1e-3


def test_bfloat16_stays_close(build):
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    mask = jnp.ones((1, 6, 1))
    full = _run(build(SMALL), x, mask)
    half = _run(build(dataclasses.replace(SMALL, dtype="bfloat16")), x, mask)
    assert half.dtype == jnp.float32
    assert jnp.abs(full - half).mean() < 0.05


def test_convolution_module_is_gulatis_formula_over_the_neighbours():
    config = dataclasses.replace(SMALL, convolution_kernel=3)
    module = ConvolutionModule(config, nnx.Rngs(0))
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 7, 16)), np.float64)
    up = x[0] @ np.asarray(module.up.kernel[...]) + np.asarray(module.up.bias[...])
    gated = np.pad(up[:, :16] / (1.0 + np.exp(-up[:, 16:])), ((1, 1), (0, 0)))
    kernel = np.asarray(module.depthwise[...], np.float64)
    y = np.stack([(gated[t : t + 3] * kernel).sum(0) for t in range(7)])
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    y = y / (1.0 + np.exp(-y)) @ np.asarray(module.down.kernel[...])
    np.testing.assert_allclose(module(jnp.asarray(x), jnp.ones((1, 7, 1)))[0], y, atol=1e-4)


@pytest.mark.parametrize("kernel", [0, 4])
def test_even_kernel_is_refused(kernel):
    with pytest.raises(UserError, match=f"convolution_kernel={kernel}"):
        ConformerConfig(convolution_kernel=kernel)
