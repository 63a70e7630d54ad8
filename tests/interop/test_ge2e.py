"""Published weights: embeddings equal PyTorch's (tests/parity/make_ge2e_golden.py)."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

from t5x_audio.errors import UserError
from t5x_audio.interop import ge2e
from t5x_audio.vocoder.speaker_encoder import SpeakerEncoderConfig

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "ge2e.npz")
needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("resemblyzer") is None, reason="resemblyzer wheel not installed"
)


@needs_wheel
def test_embeddings_equal_torch():
    encoder = ge2e.load_speaker_encoder()
    assert "resemblyzer" not in sys.modules and "torch" not in sys.modules
    waveforms = [GOLDEN[f"samples_{i}"].astype(np.float32) / 32768 for i in range(4)]
    expected = np.stack([GOLDEN[f"embedding_{i}"] for i in range(4)])
    np.testing.assert_allclose(encoder.embed_batch(waveforms), expected, atol=1e-4)
    np.testing.assert_allclose(encoder.embed(waveforms[2]), expected[2], atol=1e-4)
    # The four voices differ, so that the comparison above means something.
    assert (expected @ expected.T)[np.triu_indices(4, 1)].max() < 0.97


def small_state():
    return {k.removeprefix("small."): GOLDEN[k] for k in GOLDEN.files if k.startswith("small.")}


SMALL = SpeakerEncoderConfig(num_mels=5, hidden=8, num_layers=2, embedding=6)


def test_from_torch_places_every_weight():
    encoder = ge2e.from_torch(small_state(), SMALL)
    embeddings = encoder.embed_mels(GOLDEN["small_mels"])
    np.testing.assert_allclose(embeddings, GOLDEN["small_embeddings"], atol=1e-5)


def test_wrong_checkpoints_are_refused():
    state = small_state()
    with pytest.raises(UserError, match=r"layer 0 input has shape \(5, 32\)"):
        ge2e.from_torch(state, SpeakerEncoderConfig())
    del state["linear.bias"]
    with pytest.raises(UserError, match=r"linear\.bias is missing"):
        ge2e.from_torch(state, SMALL)


def test_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps resemblyzer==0.1.4"):
        ge2e.load_speaker_encoder()
