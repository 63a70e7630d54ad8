"""The image encoder by itself; tests/interop/test_clip.py compares it with transformers."""

import numpy as np
import pytest

from t5x_audio.errors import UserError
from t5x_audio.tokenizers.image_encoder import ImageEncoderConfig, random_image_encoder

CONFIG = ImageEncoderConfig(
    image_size=12, patch_size=4, width=8, num_layers=2, num_heads=2, mlp_dim=16
)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), np.uint8)


def test_random_images_give_their_own_embeddings():
    encoder = random_image_encoder(CONFIG, seed=1)
    embeddings = encoder(IMAGES)
    assert embeddings.shape == (4, CONFIG.tokens, 8) and embeddings.dtype == np.float32
    # An image's embeddings do not depend on its batch, and every patch tells the images apart.
    np.testing.assert_allclose(encoder(IMAGES[2:3])[0], embeddings[2], atol=1e-5)
    assert np.abs(embeddings[0] - embeddings[1]).max(-1).min() > 0.1


def test_the_seed_decides():
    one, again, other = (random_image_encoder(CONFIG, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one(IMAGES), again(IMAGES))
    assert one.name == again.name != other.name
    assert np.abs(one(IMAGES) - other(IMAGES)).max() > 0.1


def test_patches_come_row_by_row():
    encoder = random_image_encoder(CONFIG)
    changed = IMAGES[:1].copy()
    changed[0, :4, 8:] ^= 255  # the third patch of the first row
    change = np.abs(encoder(changed) - encoder(IMAGES[:1]))[0].max(-1)
    assert change.argmax() == 2


def test_sizes_that_do_not_divide():
    with pytest.raises(UserError, match="image_size=12 must be a multiple of patch_size=5"):
        ImageEncoderConfig(image_size=12, patch_size=5)
    with pytest.raises(UserError, match="activation='relu'"):
        ImageEncoderConfig(activation="relu")
