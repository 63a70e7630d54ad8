import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.tokenizers import batching


class Blocks(nnx.Module):
    """One frame, the sum, for every 1000 samples of a piece."""

    def __init__(self, piece_samples=None):
        self.piece_samples = piece_samples
        self.scale = nnx.Param(jnp.ones(()))

    def encode(self, audio, lengths):
        frames = audio.reshape(audio.shape[0], -1, 1000).sum(-1, keepdims=True)
        return frames * self.scale[...], lengths // 1000


def test_frames_come_back_in_order_whatever_the_lengths():
    waves = [np.full(n, i + 1.0) for i, n in enumerate((16000, 40000, 300, 16001, 2000, 90000))]
    frames = batching.BucketedEncoder(Blocks(), batch_seconds=3)(waves)
    assert [f.shape for f in frames] == [(n, 1) for n in (16, 40, 0, 16, 2, 90)]
    for i, f in enumerate(frames):
        np.testing.assert_array_equal(f, (i + 1) * 1000.0)


def test_long_waveforms_are_cut_and_short_tails_dropped():
    wave = np.concatenate([np.full(8000, k + 1.0) for k in range(3)] + [np.ones(479)])
    frames = batching.BucketedEncoder(Blocks(piece_samples=8000))([wave])[0]
    np.testing.assert_array_equal(frames[:, 0], np.repeat([1000.0, 2000.0, 3000.0], 8))


def test_buckets_hold_what_they_are_for():
    assert batching.bucket_samples(1) == 16000
    assert batching.bucket_samples(16000) == 16000
    assert batching.bucket_samples(16001) == 32000
    assert batching.bucket_samples(30 * 16000) == 30 * 16000
    assert batching.bucket_samples(30 * 16000 + 1) == 60 * 16000
