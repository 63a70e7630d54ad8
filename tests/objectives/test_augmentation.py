"""What the encoders take in training: noise, features, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.audio import transforms
from t5x_audio.errors import UserError
from t5x_audio.objectives import augmentation
from t5x_audio.tokenizers.linguistic import LinguisticTokenizerConfig
from t5x_audio.tokenizers.sanm import SanmConfig
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig

TOKENIZERS = {
    "linguistic": LinguisticTokenizerConfig(
        SanmConfig(num_layers=1, width=8, num_heads=2, mlp_dim=8), codebook_size=4, text_size=0
    ),
    "semantic": SemanticTokenizerConfig(8, 2, 8, 1, 4, 0, text_size=0),
}


def test_energy_is_normalised_as_in_the_front_end():
    audio = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    audio *= np.array([[0.3], [0.001], [0.0]])
    got = augmentation.energy_normalize(jnp.asarray(audio))
    want = np.stack([transforms.normalize_energy(row) for row in audio])
    np.testing.assert_allclose(got, want, rtol=1e-6)


def batch(rows=3, samples=16000):
    audio = 0.1 * np.random.default_rng(0).normal(size=(rows, samples))
    lengths = samples - 3000 * np.arange(rows)
    audio[np.arange(samples) >= lengths[:, None]] = 0.0
    return {"audio": audio.astype(np.float32), "audio_lengths": lengths.astype(np.int32)}


def features(model, seed=0, train=True, **settings):
    return augmentation.encoder_features(model, batch(), jax.random.key(seed), train, **settings)


@pytest.fixture(params=TOKENIZERS)
def model(request):
    return TOKENIZERS[request.param].make(nnx.Rngs(0))


def test_evaluation_takes_the_recording_as_it_is(model):
    audio = jnp.stack([jnp.asarray(transforms.normalize_energy(x)) for x in batch()["audio"]])
    want, lengths = model.features(audio, batch()["audio_lengths"])
    want = model.normalize(want, lengths)
    settings = {"noise": augmentation.Noise(1.0), "spec_augment": augmentation.SpecAugment()}
    got, counts = features(model, train=False, **settings)
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_array_equal(counts, lengths)


def test_noise_follows_the_seed_and_reaches_the_features(model):
    clean, _ = features(model)
    noisy, _ = features(model, noise=augmentation.Noise(1.0))
    again, _ = features(model, noise=augmentation.Noise(1.0))
    off, _ = features(model, noise=augmentation.Noise(0.0))
    other, _ = features(model, seed=1, noise=augmentation.Noise(1.0))
    assert np.abs(noisy - clean).max() > 0.1 and np.abs(noisy - other).max() > 0.1
    if isinstance(model.config, SemanticTokenizerConfig):  # the other gathers as it goes
        np.testing.assert_array_equal(noisy, again)
        np.testing.assert_array_equal(clean, off)


def test_a_band_is_the_same_mel_channels_in_every_frame(model):
    mask = augmentation.SpecAugment(num_time_masks=0, num_frequency_masks=1, max_frequency_bins=9)
    masked, counts = features(model, spec_augment=mask, seed=3)
    frames = np.asarray(masked).reshape(3, -1, model.num_mels)
    blanks = []
    for row, count in zip(frames, counts, strict=True):
        row = row[: int(count) * (masked.shape[2] // model.num_mels)]
        blank = (row == 0).all(axis=0)
        assert ((row == 0) == blank).mean() > 0.999
        blanks.append(blank.sum())
    assert max(blanks) <= 9 and len(set(blanks)) > 1


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"probability": 1.5}, "Noise.probability=1.5: give 0 to 1"),
        ({"min_snr_db": 30.0}, "Noise.min_snr_db=30.0 is above max_snr_db=25.0"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, line):
    with pytest.raises(UserError, match=line):
        augmentation.Noise(**settings)
