import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.tokenizers import sanm

SMALL = sanm.SanmConfig(input_dim=12, num_layers=3, width=16, num_heads=2, mlp_dim=24)
CHUNKED = dataclasses.replace(SMALL, context="chunk")


def features(length, seed=0, batch=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, length, 12)), jnp.float32)


def run(model, x, lengths=None):
    lengths = jnp.full(len(x), x.shape[1]) if lengths is None else jnp.asarray(lengths)
    return np.asarray(jax.jit(lambda x, n: model(x, n))(x, lengths))


def layer_by_hand(layer, x):
    """One layer on [T, D] in plain numpy, loop by loop."""

    def norm(x, norm):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-12)
        return scaled * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])

    def linear(x, module):
        return x @ np.asarray(module.kernel[...]) + np.asarray(module.bias[...])

    query, key, value = np.split(linear(norm(x, layer.attention_norm), layer.qkv), 3, axis=-1)
    mixed = np.zeros_like(value)
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        scores = query[:, part] @ key[:, part].T / np.sqrt(8)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        mixed[:, part] = weights @ value[:, part]
    kernel = np.asarray(layer.memory[...])
    memory = value.copy()
    for t in range(len(x)):
        for k in range(11):
            if 0 <= t + k - 5 < len(x):
                memory[t] += kernel[k] * value[t + k - 5]
    attended = linear(mixed, layer.out) + memory
    x = x + attended if layer.residual else attended
    hidden = np.maximum(linear(norm(x, layer.mlp_norm), layer.up), 0)
    return x + linear(hidden, layer.down)


@pytest.mark.parametrize("input_dim", [12, 16])
def test_layer_agrees_with_plain_numpy(input_dim):
    layer = sanm.SanmLayer(SMALL, input_dim, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 9, input_dim)).astype(np.float32)
    got, keys, values = layer(jnp.asarray(x), jnp.ones((1, 9), bool))
    np.testing.assert_allclose(got[0], layer_by_hand(layer, x[0]), atol=2e-5)
    assert keys.shape == values.shape == (1, 9, 2, 8)


def test_positions_count_from_one_and_are_sines_then_cosines():
    encoding = np.asarray(sanm.positional_encoding(jnp.arange(1, 4), 6))
    rates = np.array([1.0, 0.01, 0.0001])
    want = np.concatenate([np.sin(2 * rates), np.cos(2 * rates)])
    np.testing.assert_allclose(encoding[1], want, atol=1e-6)


@pytest.mark.parametrize("config", [SMALL, CHUNKED])
def test_padding_changes_nothing(config):
    model = config.make(nnx.Rngs(0))
    x = features(13, batch=2)
    alone = run(model, x[:, :7])
    padded = run(model, x, lengths=[7, 7])
    np.testing.assert_allclose(padded[:, :7], alone, atol=1e-5)
    noisy = run(model, x.at[:, 7:].set(50.0), lengths=[7, 7])
    np.testing.assert_allclose(noisy[:, :7], alone, atol=1e-5)


def test_an_empty_row_is_finite():
    assert np.isfinite(run(SMALL.make(nnx.Rngs(0)), features(6, batch=2), lengths=[0, 6])).all()


def test_every_layer_of_the_stack_is_different_and_used():
    model = SMALL.make(nnx.Rngs(0))
    kernels = np.asarray(model.rest.qkv.kernel[...])
    assert kernels.shape == (2, 16, 48) and np.abs(kernels[0] - kernels[1]).max() > 0.1
    before = run(model, features(6))
    model.rest.qkv.kernel[...] = model.rest.qkv.kernel[...].at[1].multiply(0.5)
    assert np.abs(run(model, features(6)) - before).max() > 1e-3


def test_stacked_parameters_name_their_axes():
    model = SMALL.make(nnx.Rngs(0))
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        axes = param.get_metadata().get("logical_axes")
        if "kernel" in path or "memory" in path:
            assert len(axes) == param.ndim, path
            assert (axes[0] == "layers") == (path[0] == "rest"), path


def stream(model, x):
    """Pushes [B, T, D] chunk by chunk through the compiled step."""
    step = jax.jit(lambda chunk, n, state: model.step(chunk, n, state))
    state, outputs = model.initial_state(len(x)), []
    for start in range(0, x.shape[1], 4):
        chunk = x[:, start : start + 4]
        count = chunk.shape[1]
        chunk = jnp.pad(chunk, ((0, 0), (0, 4 - count), (0, 0)))
        output, state = step(chunk, jnp.full(len(x), count), state)
        outputs.append(output[:, :count])
    return np.concatenate(outputs, axis=1), state


def test_streaming_equals_offline_chunks():
    model = CHUNKED.make(nnx.Rngs(0))
    x = features(31, batch=2)
    streamed, state = stream(model, x)
    np.testing.assert_allclose(streamed, run(model, x), atol=1e-5)
    assert int(state.position) == 32 and int(state.filled) == 16


def test_a_chunk_sees_no_future_and_only_the_stated_past():
    model = CHUNKED.make(nnx.Rngs(0))
    x = features(48)
    base, _ = stream(model, x)
    future, _ = stream(model, x.at[:, 24:].multiply(-1.0))
    np.testing.assert_array_equal(future[:, :24], base[:, :24])
    assert np.abs(future[:, 24:28] - base[:, 24:28]).max() > 1e-3
    # One layer reaches its 9 frames and 16 cached ones: frame 0 is out of sight from frame 24 on.
    single = dataclasses.replace(CHUNKED, num_layers=1).make(nnx.Rngs(0))
    base, _ = stream(single, x)
    past, _ = stream(single, x.at[:, 0].multiply(-1.0))
    assert np.abs(past[:, 20:24] - base[:, 20:24]).max() > 1e-5
    np.testing.assert_array_equal(past[:, 24:], base[:, 24:])


def test_the_first_chunk_is_nine_frames_with_five_zeros_in_front():
    single = dataclasses.replace(CHUNKED, num_layers=1).make(nnx.Rngs(0))
    x = features(4)
    embedded = x * 4.0 + sanm.positional_encoding(jnp.arange(1, 5), 12)
    nine = np.concatenate([np.zeros((5, 12)), embedded[0]])
    want = layer_by_hand(single.first, nine)[5:]
    want = (want - want.mean(-1, keepdims=True)) / want.std(-1, keepdims=True)
    np.testing.assert_allclose(stream(single, x)[0][0], want, atol=2e-5)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="heads"):
        sanm.SanmConfig(width=10, num_heads=4)
    with pytest.raises(ValueError, match="context"):
        sanm.SanmConfig(context="both")
