import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.vocoder.f0 import F0Config, estimate_f0

RATE, HOP = 16000, 240
CONFIG = F0Config(sample_rate=RATE, hop=HOP)
_estimate = jax.jit(lambda samples: estimate_f0(samples, CONFIG))


def _tone(f0, seconds=0.6, overtones=5):
    """A harmonic tone; f0 a number or an array of one value a sample."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(f0, round(seconds * RATE)) / RATE)
    return sum(np.sin(k * phase) / k for k in range(1, overtones + 1)) * 0.2


@pytest.mark.parametrize("f0", [70.0, 101.3, 220.0, 387.0])
def test_steady_tones(f0):
    found = np.asarray(_estimate(np.tile(_tone(f0), (2, 1))))[0]
    assert found.shape == (40,)
    np.testing.assert_allclose(found[3:-5], f0, rtol=0.004)


def test_follows_a_glide_at_frame_centres():
    wanted = np.linspace(100.0, 200.0, 9600)
    found = np.asarray(_estimate(np.tile(_tone(wanted), (2, 1))))[0]
    centres = wanted[np.arange(40) * HOP + HOP // 2]
    np.testing.assert_allclose(found[3:-6], centres[3:-6], rtol=0.06)


def test_noise_and_silence_are_unvoiced():
    noise = np.random.default_rng(0).standard_normal(9600) * 0.1
    quiet = np.zeros(9600)
    found = np.asarray(_estimate(np.stack([noise, quiet])))
    assert (found[0] > 0).mean() < 0.1
    assert not found[1].any()


def test_tone_then_noise_switches_voicing():
    noise = np.random.default_rng(1).standard_normal(4800) * 0.1
    signal = np.concatenate([_tone(150.0, 0.3), noise])
    voiced = np.asarray(_estimate(np.tile(signal, (2, 1))))[0] > 0
    assert voiced[3:16].all()
    assert voiced[24:37].mean() < 0.2


def test_median_mends_single_frames():
    import t5x_audio.vocoder.f0 as f0

    track = jnp.array([[100.0, 100.0, 50.0, 100.0, 0.0, 0.0, 90.0, 0.0]])
    smooth = f0._median(track, 3)
    np.testing.assert_array_equal(smooth[0], [100, 100, 100, 50, 0, 0, 0, 0])
