"""The speaker encoder against PyTorch (golden vectors of tests/parity/make_ge2e_golden.py)."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.vocoder import speaker_encoder

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "ge2e.npz")
SMALL = speaker_encoder.SpeakerEncoderConfig(num_mels=5, hidden=8, num_layers=2, embedding=16)
GOLDEN_SIZES = dataclasses.replace(SMALL, embedding=6)


@pytest.fixture(scope="module")
def small():
    return SMALL.make(nnx.Rngs(0))


@nnx.jit
def jitted(encoder, samples, lengths):
    return encoder(samples, lengths)


def noise(length, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(length)).astype(np.float32)


def test_lstm_matches_torch():
    encoder = GOLDEN_SIZES.make(nnx.Rngs(0))
    for i, layer in enumerate(encoder.layers):
        layer.input.kernel[...] = GOLDEN[f"small.lstm.weight_ih_l{i}"].T
        layer.recurrent[...] = GOLDEN[f"small.lstm.weight_hh_l{i}"].T
        bias = GOLDEN[f"small.lstm.bias_ih_l{i}"] + GOLDEN[f"small.lstm.bias_hh_l{i}"]
        layer.input.bias[...] = bias
    encoder.projection.kernel[...] = GOLDEN["small.linear.weight"].T
    encoder.projection.bias[...] = GOLDEN["small.linear.bias"]
    embeddings = encoder.embed_mels(GOLDEN["small_mels"])
    np.testing.assert_allclose(embeddings, GOLDEN["small_embeddings"], atol=1e-5)


def reference_starts(samples, rate=1.3, min_coverage=0.75):
    """Window starts in frames, as the published procedure lists them."""
    step = round(16000 / rate / 160)
    frames = int(np.ceil((samples + 1) / 160))
    starts = list(range(0, max(1, frames - 160 + step + 1), step))
    if len(starts) > 1 and (samples - starts[-1] * 160) / 25600 < min_coverage:
        starts.pop()
    return starts


@settings(deadline=None)
@given(samples=st.integers(1, 16000 * 60))
def test_windows_are_those_of_the_published_procedure(samples):
    starts = reference_starts(samples)
    assert SMALL.num_windows(samples) == len(starts)
    assert int(SMALL.num_windows(np.array([samples]))[0]) == len(starts)
    padded = SMALL.padded_samples(samples)
    assert padded >= samples and SMALL.num_windows(padded) >= len(starts)


def test_few_shapes_are_compiled():
    lengths = {SMALL.padded_samples(n) for n in range(1000, 16000 * 10, 100)}
    assert len(lengths) == 6


@settings(deadline=None, max_examples=6)
@given(length=st.integers(24000, 60000), seed=st.integers(0, 9))
def test_padding_and_neighbours_have_no_influence(small, length, seed):
    waveform = noise(length, seed)
    alone = small.embed(waveform)
    batch = small.embed_batch([noise(60000, seed + 1), waveform])
    np.testing.assert_allclose(np.linalg.norm(batch, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(batch[1], alone, atol=1e-5)
    junk = np.full((1, 70000), 0.5, np.float32)
    junk[0, :length] = waveform
    np.testing.assert_allclose(jitted(small, junk, np.array([length]))[0], alone, atol=1e-5)


def test_quiet_speech_is_raised_and_silence_is_finite(small):
    x = noise(20000)
    np.testing.assert_allclose(small.embed(0.01 * x), small.embed(0.1 * x), atol=1e-5)
    assert np.isfinite(small.embed(np.zeros(20000))).all()


def test_gradients_flow_to_every_weight(small):
    @nnx.jit
    def gradients(model, x):
        return nnx.grad(lambda model: model(x).sum())(model)

    norms = [float(np.abs(g).max()) for g in jax.tree.leaves(gradients(small, noise(25600)[None]))]
    assert len(norms) == 8 and np.isfinite(norms).all() and min(norms) > 0
