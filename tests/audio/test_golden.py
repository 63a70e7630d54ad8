"""Features as FunASR's and S3Tokenizer's: vectors of tests/parity/make_tokenizer_golden.py."""

import pathlib

import jax.numpy as jnp
import numpy as np

from t5x_audio.audio import features
from t5x_audio.interop import paraformer

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "tokenizers.npz")
SAMPLES = GOLDEN["samples"].astype(np.float32) / 32768


def test_stacked_and_normalised_filter_banks(tmp_path):
    path = tmp_path / "am.mvn"
    path.write_bytes(GOLDEN["linguistic/am.mvn"].tobytes())
    shift, scale = paraformer.read_cmvn(path, 560)
    got = (features.low_frame_rate(features.kaldi_fbank(jnp.asarray(SAMPLES))) + shift) * scale
    want = GOLDEN["linguistic/features"]
    assert got.shape == want.shape
    difference = np.abs(np.asarray(got) - want)
    assert difference.mean() < 2e-5 and difference.max() < 2e-3


def test_whisper_log_mel():
    got = np.asarray(features.whisper_log_mel(jnp.asarray(SAMPLES)))
    want = GOLDEN["semantic/features"]
    assert got.shape == want.shape
    difference = np.abs(got - want)
    assert difference.mean() < 1e-5 and difference.max() < 5e-4
