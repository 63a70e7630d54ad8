import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.audio import transforms

RATE = 16000


def resonance(hz, formants, bandwidth=120.0):
    """Magnitude at `hz` of two-pole resonators in series."""
    radius = np.exp(-np.pi * bandwidth / RATE)
    z = np.exp(-2j * np.pi * np.asarray(hz) / RATE)
    return np.prod(
        [
            1 / np.abs(1 - 2 * radius * np.cos(2 * np.pi * f / RATE) * z + radius**2 * z**2)
            for f in formants
        ],
        axis=0,
    )


def vowel(seconds=1.0, pitch=120.0, formants=(600.0, 1500.0, 2600.0)):
    """Harmonics of `pitch` under resonances at `formants`."""
    frequencies = np.arange(pitch, 7000.0, pitch)
    time = np.arange(int(seconds * RATE)) / RATE
    gains = resonance(frequencies, formants)
    x = (gains[:, None] * np.cos(2 * np.pi * frequencies[:, None] * time)).sum(0)
    return (0.3 * x / np.abs(x).max()).astype(np.float32)


def envelope_error(samples, pitch, formants):
    """Standard deviation in dB of harmonic levels around the resonances expected."""
    harmonics = np.arange(pitch, 4500.0, pitch)
    spectrum = np.abs(np.fft.rfft(samples[4000:12000] * np.hanning(8000)))  # 2 Hz a bin
    measured = np.array([spectrum[int(h / 2) - 10 : int(h / 2) + 11].max() for h in harmonics])
    return np.std(20 * np.log10(measured / resonance(harmonics, formants)))


def pitch_of(samples):
    """Fundamental in Hz by the autocorrelation's peak between 60 and 400 Hz."""
    middle = samples[len(samples) // 4 : -len(samples) // 4].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(middle, 4 * len(middle))) ** 2
    correlation = np.fft.irfft(spectrum)
    lags = np.arange(RATE // 400, RATE // 60)
    return RATE / lags[np.argmax(correlation[lags])]


def speechlike(length, seed=0):
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(length)).astype(np.float32)


@given(level=st.floats(1e-6, 10.0), seed=st.integers(0, 9))
def test_normalize_energy_sets_the_peak(level, seed):
    x = speechlike(500, seed)
    x = (x / np.abs(x).max() * level).astype(np.float32)
    peak = np.abs(transforms.normalize_energy(x)).max()
    assert peak == pytest.approx(0.999 * min(1.0, level / 0.01), rel=1e-4)


def test_normalize_energy_of_silence_is_silence():
    assert not transforms.normalize_energy(np.zeros(100)).any()


def reference_trim(x):
    """The tokenizer's rule, frame by frame."""
    padded = np.pad(x.astype(np.float64), 256)
    rms = [np.sqrt(np.mean(padded[i : i + 512] ** 2)) for i in range(0, len(padded) - 511, 128)]
    level = 20 * np.log10(np.maximum(rms, 1e-5))
    loud = [i for i, value in enumerate(level) if value > level.max() - 20]
    start, stop = loud[0] * 128, min(len(x), (loud[-1] + 1) * 128)
    length = int(np.ceil((stop - start) / 240) * 240 + 0.27 * 16000)
    return np.array(
        [x[i] if 0 <= i < len(x) else 0.0 for i in range(start - 800, start - 800 + length)]
    )


@settings(deadline=None, max_examples=25)
@given(before=st.integers(0, 6000), speech=st.integers(600, 5000), after=st.integers(0, 9000))
def test_trim_silence_follows_the_rule(before, speech, after):
    x = np.concatenate([0.001 * speechlike(before), speechlike(speech, 1), np.zeros(after)])
    x = x.astype(np.float32)
    np.testing.assert_array_equal(transforms.trim_silence(x), reference_trim(x).astype(np.float32))


@pytest.mark.parametrize("speed", [0.8, 1.0, 1.25, 1.7])
def test_speed_changes_the_length_and_not_the_pitch(speed):
    x = vowel()
    faster = transforms.change_speed(x, speed)
    assert len(faster) == round(len(x) / speed) and faster.dtype == np.float32
    assert pitch_of(faster) == pytest.approx(120.0, rel=0.02)
    loudness = np.sqrt(np.mean(faster[2000:-2000] ** 2) / np.mean(x**2))
    assert loudness == pytest.approx(1.0, abs=0.05)


def test_speed_keeps_events_at_their_due_times():
    x = np.concatenate([np.zeros(8000), vowel(0.5), np.zeros(8000)]).astype(np.float32)
    faster = transforms.change_speed(x, 1.25)
    loud = np.flatnonzero(np.abs(faster) > 0.05)
    assert loud[0] == pytest.approx(8000 / 1.25, abs=400)
    assert loud[-1] == pytest.approx(16000 / 1.25, abs=400)


@pytest.mark.parametrize("semitones", [-4.0, -2.0, 2.0, 4.0])
def test_pitch_moves_and_formants_and_length_stay(semitones):
    x = vowel()
    shifted = transforms.change_pitch(x, semitones)
    pitch = 120.0 * 2 ** (semitones / 12)
    assert len(shifted) == len(x)
    assert pitch_of(shifted) == pytest.approx(pitch, rel=0.02)
    kept = envelope_error(shifted, pitch, (600.0, 1500.0, 2600.0))
    moved = envelope_error(shifted, pitch, np.array([600.0, 1500.0, 2600.0]) * pitch / 120)
    assert kept < 3.0 and kept < 0.4 * moved


@pytest.mark.parametrize("ratio", [0.85, 0.93, 1.08, 1.18])
def test_vocal_tract_moves_formants_and_not_the_pitch(ratio):
    formants = np.array([600.0, 1500.0, 2600.0])
    x = vowel(formants=formants)
    warped = transforms.change_vocal_tract(x, ratio)
    assert len(warped) == len(x)
    assert pitch_of(warped) == pytest.approx(120.0, rel=0.01)
    assert envelope_error(warped, 120.0, formants * ratio) < 1.5
    assert envelope_error(warped, 120.0, formants) > 3 * envelope_error(
        warped, 120.0, formants * ratio
    )
    assert np.mean(warped**2) == pytest.approx(np.mean(x**2), rel=1e-3)


def test_tiny_changes_are_nearly_the_identity():
    x = vowel()
    np.testing.assert_allclose(transforms.change_vocal_tract(x, 1.0 + 1e-7), x, atol=1e-4)


@settings(deadline=None, max_examples=15)
@given(length=st.integers(0, 3000))
def test_any_length_is_handled(length):
    x = speechlike(length)
    assert len(transforms.change_speed(x, 1.3)) == round(length / 1.3)
    assert transforms.change_pitch(x, 2.0).shape == x.shape
    assert transforms.change_vocal_tract(x, 0.9).shape == x.shape


@pytest.mark.parametrize(
    "call",
    [
        lambda x: transforms.change_speed(x, 0.0),
        lambda x: transforms.change_pitch(x, 40.0),
        lambda x: transforms.change_vocal_tract(x, -1.0),
    ],
)
def test_meaningless_settings_are_refused(call):
    with pytest.raises(ValueError, match="must be within"):
        call(vowel(0.1))


@pytest.mark.parametrize("noise", [None, np.sin(np.arange(300.0))])
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_noise_has_the_asked_level_and_follows_the_seed(snr_db, noise):
    x = vowel()
    noisy = transforms.add_noise(x, snr_db, seed=3, noise=noise)
    added = noisy - x
    measured = 10 * np.log10(np.mean(x**2) / np.mean(added**2))
    assert measured == pytest.approx(snr_db, abs=0.05)
    np.testing.assert_array_equal(noisy, transforms.add_noise(x, snr_db, seed=3, noise=noise))
    assert not np.array_equal(noisy, transforms.add_noise(x, snr_db, seed=4, noise=noise))
