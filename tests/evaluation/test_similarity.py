import numpy as np
import pytest
from flax import nnx

from t5x_audio.evaluation import similarity
from t5x_audio.vocoder.speaker_encoder import SpeakerEncoderConfig


def test_cosine():
    assert similarity.cosine([1.0, 0.0], [1.0, 1.0]) == pytest.approx(np.sqrt(0.5))
    assert similarity.cosine([0.0, 0.0], [1.0, 1.0]) == 0.0
    assert similarity.cosine([2.0, 1.0], [-2.0, -1.0]) == pytest.approx(-1.0)


def test_similarity_of_recordings():
    config = SpeakerEncoderConfig(num_mels=8, hidden=8, num_layers=1, embedding=32)
    encoder = config.make(nnx.Rngs(0))
    time = np.arange(16000) / 16000
    low, high = (0.1 * np.sin(2 * np.pi * f * time).astype(np.float32) for f in (150, 5000))
    assert similarity.speaker_similarity(encoder, low, low) == pytest.approx(1.0, abs=1e-5)
    assert similarity.speaker_similarity(encoder, low, high) < 0.999
