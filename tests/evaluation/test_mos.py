import importlib.util

import numpy as np
import pytest

from t5x_audio.audio import transforms
from t5x_audio.errors import UserError
from t5x_audio.evaluation import mos

needs_networks = pytest.mark.skipif(
    importlib.util.find_spec("speechmos") is None, reason="speechmos wheel not installed"
)


def voice(seconds=3.0, rate=16000):
    """Vowels that glide, with a syllable rhythm: enough of a voice for DNSMOS to rank."""
    time = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 25 * np.sin(2.2 * time)) / rate
    formants = (500 + 250 * np.sin(7 * time), 1500 + 500 * np.sin(5 * time), 2500)
    x = sum(
        np.sin(k * phase) * sum(1 / (1 + ((120 * k - f) / 120) ** 2) for f in formants)
        for k in range(1, 40)
    )
    x = x * np.clip(np.sin(2 * np.pi * 3 * time) + 0.3, 0, 1)
    return (0.3 * x / np.abs(x).max()).astype(np.float32)


@needs_networks
def test_scores_fall_as_noise_rises():
    # Never without noise: digital silence between synthetic vowels is out of DNSMOS's world.
    scores = [mos.dnsmos(transforms.add_noise(voice(), snr, seed=1)) for snr in (20, 10, 0)]
    for name in ("ovrl", "bak", "p808"):
        values = [score[name] for score in scores]
        assert values == sorted(values, reverse=True), (name, values)
        assert all(0.9 < value < 5.1 for value in values)
    assert scores[0]["ovrl"] - scores[-1]["ovrl"] > 0.5


@needs_networks
def test_other_rates_are_resampled():
    high = mos.overall(voice(9.1, rate=48000), 48000)
    assert high == pytest.approx(mos.overall(voice(9.1)), abs=0.2)


@pytest.mark.parametrize(
    ("samples", "starts"),
    [(16000, range(7)), (144160, range(1)), (144159, range(9)), (16000 * 12, range(3))],
)
def test_windows_follow_the_published_procedure(samples, starts):
    x = np.arange(samples, dtype=np.float32)
    repeated = np.tile(x, 16)
    windows = mos._windows(x)
    assert len(windows) == len(starts)
    for window, start in zip(windows, starts, strict=True):
        np.testing.assert_array_equal(window, repeated[start * 16000 :][:144160])


def test_p808_features_match_their_definition():
    x = voice(9.0)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(321) / 321)
    padded = np.pad(x.astype(np.float64), 160)
    frames = np.stack([padded[i : i + 321] * window for i in range(0, len(padded) - 320, 160)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    top = 15 + 27 * np.log(8) / np.log(6.4)
    mels = np.linspace(0, top, 122)
    edges = np.where(mels < 15, 200 / 3 * mels, 1000 * 6.4 ** ((mels - 15) / 27))
    filters = np.zeros((161, 120))
    for m in range(120):
        hz = np.arange(161) * 16000 / 321
        rise = (hz - edges[m]) / (edges[m + 1] - edges[m])
        fall = (edges[m + 2] - hz) / (edges[m + 2] - edges[m + 1])
        filters[:, m] = np.clip(np.minimum(rise, fall), 0, None) * 2 / (edges[m + 2] - edges[m])
    decibels = 10 * np.log10(np.maximum(power @ filters, 1e-10))
    expected = (np.maximum(decibels - decibels.max(), -80) + 40) / 40
    actual = mos._p808_features(x)
    assert actual.shape == (900, 120)
    np.testing.assert_allclose(actual, expected, atol=2e-3)


def test_nothing_to_hear_is_refused():
    for samples in (np.zeros(0), np.full(100, np.nan)):
        with pytest.raises(UserError, match="DNSMOS"):
            mos.dnsmos(samples)
