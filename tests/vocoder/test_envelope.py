import numpy as np
import pytest

from t5x_audio.audio.mel_filters import hz_to_mel, mel_to_hz
from t5x_audio.vocoder.envelope import Envelope, interpolation, minimum_phase


def test_channels_are_found_at_their_centres_and_halfway_between():
    centres = np.linspace(0.0, hz_to_mel(8000.0), 82)[1:-1]
    halfway = mel_to_hz((centres[:-1] + centres[1:]) / 2)
    np.testing.assert_allclose(interpolation(80, mel_to_hz(centres), 8000.0), np.eye(80), atol=1e-4)
    between = interpolation(80, halfway, 8000.0)
    np.testing.assert_allclose(between, (np.eye(80)[:, :-1] + np.eye(80)[:, 1:]) / 2, atol=1e-4)
    # Below the first centre and above the last those two hold.
    ends = interpolation(80, np.array([0.0, 9000.0]), 8000.0)
    np.testing.assert_array_equal(ends, np.eye(80)[:, [0, -1]])


@pytest.mark.parametrize("poles", [(0.5,), (0.9 * np.exp(0.7j), 0.9 * np.exp(-0.7j))])
def test_phases_are_those_of_the_filter_with_these_gains(poles):
    """All poles inside of the unit circle: such a filter is of minimum phase."""
    z = np.exp(2j * np.pi * np.arange(121) / 240)
    response = 1 / np.prod([1 - pole / z for pole in poles], axis=0)
    phases = minimum_phase(np.log(np.abs(response)).astype(np.float32))
    np.testing.assert_allclose(phases, np.angle(response), atol=1e-4)
    # A level has no phase.
    np.testing.assert_allclose(minimum_phase(np.full(121, 3.0, np.float32)), 0.0, atol=1e-4)


def test_gains_between_frames_are_interpolated_and_end_with_the_row():
    envelope = Envelope(num_mels=20, bins=9, sample_rate=16000, fmax=8000.0, levels=(1.0, -1.0))
    ramp = np.arange(6.0)[:, None] * np.ones(20)
    mel = np.stack([ramp, np.where(ramp > 2, 99.0, ramp)]).astype(np.float32)
    gains = np.asarray(envelope(mel, 4, np.array([6, 3])))
    assert gains.shape == (2, 25, 18)
    # The STFT's frames stand at the edges of quarter frames, the mel's at its frames' middles.
    course = np.clip(np.arange(25) / 4 - 0.5, 0.0, 5.0)
    np.testing.assert_allclose(gains[0, :, 0], course + 1.0, atol=1e-5)
    np.testing.assert_allclose(gains[0, :, 17], course - 1.0, atol=1e-5)
    np.testing.assert_allclose(gains[1, :, 0], np.minimum(course, 2.0) + 1.0, atol=1e-5)
