"""Features against kaldi_native_fbank and float64 numpy written from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.audio import features, mel_filters


def speechlike(length, seed=0, rate=16000):
    """A gliding harmonic tone with pauses and a little noise, 16-bit quantised."""
    rng = np.random.default_rng(seed)
    time = np.arange(length) / rate
    pitch = 120 + 40 * np.sin(2 * np.pi * 0.9 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    x = sum(np.sin(k * phase + k) / k for k in range(1, 30)) * (
        np.sin(2 * np.pi * 1.5 * time) > -0.4
    )
    x = 0.2 * x + 0.003 * rng.standard_normal(length)
    return (np.round(x * 32768) / 32768).astype(np.float32)


def reference_power(x, n_fft, hop, win):
    """STFT by its definition: a DFT sum in float64."""
    window = np.zeros(n_fft)
    start = (n_fft - win) // 2
    window[start : start + win] = 0.5 * (1 - np.cos(2 * np.pi * np.arange(win) / win))
    count = (len(x) - n_fft) // hop + 1
    basis = np.exp(-2j * np.pi * np.outer(np.arange(n_fft), np.arange(n_fft // 2 + 1)) / n_fft)
    return (
        np.abs(np.stack([x[i * hop : i * hop + n_fft] * window for i in range(count)]) @ basis) ** 2
    )


def reference_filters(rate, n_fft, num_mels, fmin, fmax):
    """Slaney's Auditory Toolbox scale, one filter and bin at a time."""

    def to_hz(mel):
        return 200 / 3 * mel if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    def to_mel(hz):
        return 3 * hz / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)

    low, high = to_mel(fmin), to_mel(fmax)
    edges = [to_hz(low + (high - low) * i / (num_mels + 1)) for i in range(num_mels + 2)]
    filters = np.zeros((n_fft // 2 + 1, num_mels))
    for m in range(num_mels):
        left, centre, right = edges[m : m + 3]
        for k in range(n_fft // 2 + 1):
            hz = k * rate / n_fft
            height = (
                (hz - left) / (centre - left) if hz < centre else (right - hz) / (right - centre)
            )
            filters[k, m] = max(0.0, height) * 2 / (right - left)
    return filters


def test_kaldi_fbank_matches_kaldi():
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "hamming"
    options.frame_opts.samp_freq = 16000
    options.mel_opts.num_bins = 80
    options.energy_floor = 0.0
    reference = knf.OnlineFbank(options)
    x = speechlike(16000) + np.float32(0.01)  # with a DC offset
    reference.accept_waveform(16000, (x * 32768).tolist())
    reference.input_finished()
    expected = np.stack([reference.get_frame(i) for i in range(reference.num_frames_ready)])
    actual = features.kaldi_fbank(jnp.asarray(x))
    assert actual.shape == expected.shape == (98, 80)
    np.testing.assert_allclose(actual, expected, atol=2e-3)
    assert np.abs(actual - expected).mean() < 2e-5


def test_low_frame_rate_by_its_definition():
    x = np.arange(13 * 2, dtype=np.float32).reshape(13, 2)
    padded = np.concatenate([x[:1]] * 3 + [x] + [x[-1:]] * 10)
    expected = np.stack([padded[6 * i : 6 * i + 7].reshape(-1) for i in range(3)])
    np.testing.assert_array_equal(features.low_frame_rate(jnp.asarray(x)), expected)


@pytest.mark.parametrize("num_mels", [80, 128])
def test_whisper_log_mel_matches_the_definition(num_mels):
    x = speechlike(12345)
    padded = np.pad(x.astype(np.float64), 200, mode="reflect")
    power = reference_power(padded, 400, 160, 400)[:-1]
    mel = power @ reference_filters(16000, 400, num_mels, 0, 8000)
    log_mel = np.log10(np.maximum(mel, 1e-10))
    expected = (np.maximum(log_mel, log_mel.max() - 8) + 4) / 4
    config = features.WhisperMelConfig(num_mels=num_mels)
    actual = features.whisper_log_mel(jnp.asarray(x), config=config)
    assert actual.shape == (12345 // 160, num_mels)
    np.testing.assert_allclose(actual, expected, atol=1e-3)
    assert np.abs(actual - expected).mean() < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        features.MelConfig(),
        features.MelConfig(16000, n_fft=512, hop=128, win=400, num_mels=40, fmin=50.0, fmax=7600.0),
        features.MelConfig(16000, n_fft=512, hop=128, win=512, num_mels=None),
    ],
)
def test_mel_spectrogram_matches_the_definition(config):
    x = speechlike(9000, rate=config.sample_rate)
    padded = np.pad(x.astype(np.float64), (config.n_fft - config.hop) // 2, mode="reflect")
    magnitude = np.sqrt(reference_power(padded, config.n_fft, config.hop, config.win) + 1e-9)
    if config.num_mels is not None:
        magnitude = magnitude @ reference_filters(
            config.sample_rate, config.n_fft, config.num_mels, config.fmin, config.fmax
        )
    expected = np.log(np.maximum(magnitude, 1e-5))[: 9000 // config.hop]
    actual = features.mel_spectrogram(jnp.asarray(x), config)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=2e-3)
    assert np.abs(actual - expected).mean() < 2e-5


EXTRACTORS = {
    "fbank": (features.kaldi_fbank, features.KaldiFbankConfig()),
    "whisper": (features.whisper_log_mel, features.WhisperMelConfig()),
    "vocoder": (
        lambda x, lengths=None: features.mel_spectrogram(x, features.MelConfig(), lengths),
        features.MelConfig(),
    ),
}
JITTED = {name: jax.jit(extract) for name, (extract, _) in EXTRACTORS.items()}


@pytest.mark.parametrize("name", EXTRACTORS)
@settings(deadline=None, max_examples=10)
@given(length=st.integers(1200, 6000), seed=st.integers(0, 99))
def test_features_do_not_depend_on_padding_or_neighbours(name, length, seed):
    _, config = EXTRACTORS[name]
    batch = np.stack([speechlike(8000, seed), 3.0 * speechlike(8000, seed + 1)])
    batched = np.asarray(JITTED[name](batch, np.array([length, 8000], np.int32)))
    cut = np.zeros((2, 6000), np.float32)
    cut[0, :length] = batch[0, :length]
    alone = np.asarray(JITTED[name](cut, np.array([length, 0], np.int32)))
    count = config.num_frames(length)
    assert batched.shape[1] == config.num_frames(8000)
    np.testing.assert_allclose(batched[0, :count], alone[0, :count], atol=1e-3)
    assert batched[0, count - 1].any()
    assert not batched[0, count:].any() and not alone[0, count:].any()


@pytest.mark.parametrize("name", EXTRACTORS)
def test_lengths_of_a_padded_row_mean_the_same_as_cutting_it(name):
    extract, config = EXTRACTORS[name]
    x = speechlike(8000)
    alone = extract(jnp.asarray(x[:5001]))
    assert alone.shape[0] == config.num_frames(5001) == config.num_frames(np.array([5001]))[0]
    padded = JITTED[name](np.stack([x, x]), np.array([5001, 8000], np.int32))
    np.testing.assert_allclose(padded[0, : len(alone)], alone, atol=1e-3)


@pytest.mark.parametrize("length", [1, 2, 6, 7, 13, 29, 30])
def test_low_frame_rate_does_not_depend_on_padding(length):
    x = np.random.default_rng(length).standard_normal((2, 30, 3)).astype(np.float32)
    batched = features.low_frame_rate(jnp.asarray(x), jnp.asarray([length, 30]))
    alone = features.low_frame_rate(jnp.asarray(x[0, :length]))
    count = features.low_frame_rate_length(length)
    assert alone.shape == (count, 21) and batched.shape == (2, 5, 21)
    np.testing.assert_array_equal(batched[0, :count], alone)
    assert not np.asarray(batched[0, count:]).any()


def test_too_short_for_one_window_gives_no_frames():
    assert features.kaldi_fbank(jnp.zeros(399)).shape == (0, 80)
    assert features.low_frame_rate(jnp.zeros((0, 80))).shape == (0, 560)
    empty_row = features.whisper_log_mel(jnp.zeros((2, 1600)), jnp.asarray([0, 1600]))
    assert np.isfinite(empty_row).all()


def test_silence_is_finite_with_finite_gradients():
    for extract, _ in EXTRACTORS.values():
        gradient = jax.jit(jax.grad(lambda x, extract=extract: extract(x).sum()))(jnp.zeros(4000))
        assert np.isfinite(gradient).all()


def test_mel_scales_invert():
    hz = np.linspace(0, 12000, 50)
    for scale in ("slaney", "htk"):
        np.testing.assert_allclose(
            mel_filters.mel_to_hz(mel_filters.hz_to_mel(hz, scale), scale), hz, atol=1e-6
        )
    assert abs(mel_filters.hz_to_mel(1000.0, "htk") - 1000.0) < 0.1
