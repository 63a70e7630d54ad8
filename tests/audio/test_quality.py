"""The quality fields measure what they say, on sound whose figures are known."""

import numpy as np
import pytest

from t5x_audio.audio import io, quality

RATE = 16000


def noise(seconds, seed=0):
    return np.random.default_rng(seed).normal(size=int(seconds * RATE))


def speechlike(gap_level):
    """Half a second of sound at -20 dBFS, half of a hum at `gap_level` dBFS, three times."""
    loud, quiet = 0.1 * noise(3.0), 10 ** (gap_level / 20) * noise(3.0, 1)
    on = (np.arange(3 * RATE) // (RATE // 2)) % 2 == 0
    return np.where(on, loud, quiet)


@pytest.mark.parametrize("gap_level", [-60, -70, -80])
def test_levels_and_shares(gap_level):
    found = quality.measure(speechlike(gap_level), RATE)
    assert set(found) == set(quality.FIELDS)
    assert found["level_db"] == pytest.approx(-20, abs=0.5)
    assert found["snr_db"] == pytest.approx(-20 - gap_level, abs=1.0)
    assert found["speech_share"] == pytest.approx(0.5, abs=0.05)
    assert found["bandwidth_hz"] >= 7750 and found["clipped_share"] == 0.0


def test_telephone_speech_is_told_by_its_bandwidth():
    narrow = io.resample(io.resample(0.1 * noise(2.0), RATE, 8000), 8000, RATE)
    assert (
        3500 <= quality.measure(narrow, RATE)["bandwidth_hz"] <= 4500
    )  # resampling leaves some above 4000


@pytest.mark.parametrize("level", [0.05, 0.2])
def test_clipping_is_found_at_any_level(level):
    tone = np.sin(2 * np.pi * 200 * np.arange(RATE) / RATE)
    assert quality.clipped_share(0.3 * tone) == 0.0
    assert quality.clipped_share(np.clip(tone, -0.9, 0.9) * level) == pytest.approx(0.287, abs=0.02)
    whole = io.to_float32(io.to_int16(1.5 * 0.9 * tone))
    assert quality.measure(whole, RATE)["clipped_share"] > 0.4  # both sides


def test_short_and_silent_sound_has_figures_too():
    for samples in (np.zeros(RATE), np.full(3, 0.5), np.zeros(1)):
        found = quality.measure(samples, RATE)
        assert np.isfinite(list(found.values())).all()
