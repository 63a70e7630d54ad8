"""Views of images: what each change does, by hand and against the standard library."""

import colorsys
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.errors import UserError
from t5x_audio.images import augmentation
from t5x_audio.images.augmentation import ImageAugmentation

OFF = ImageAugmentation(
    min_area=1.0, max_ratio=1.0, colour_probability=0.0, grey_probability=0.0,
    mean=(0.0,) * 3, std=(1.0,) * 3,
)  # fmt: skip


def pixels(count=4, side=8):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def test_with_everything_off_only_the_mirror_is_left():
    images = pixels(32)
    got = np.asarray(jax.jit(OFF)(jax.random.key(0), images)) * 255
    mirrored = [np.allclose(g, i[:, ::-1], atol=1e-2) for g, i in zip(got, images, strict=True)]
    same = [np.allclose(g, i, atol=1e-2) for g, i in zip(got, images, strict=True)]
    assert all(a or b for a, b in zip(mirrored, same, strict=True)) and 5 < sum(mirrored) < 27


def test_a_crop_is_resized_bilinearly_and_reads_nothing_outside():
    got = augmentation.resize_matrix(
        jnp.array([2.0, 2.0]), jnp.array([4.0, 4.0]), 8, jnp.array([False, True])
    )
    row = np.arange(8.0)
    # Pixels 2 to 5 on to 8 places: centres at 1.75, 2.25 ..., held at the edges.
    want = np.clip(np.arange(1.75, 5.5, 0.5), 2.0, 5.0)
    np.testing.assert_allclose(got[0] @ row, want, atol=1e-6)
    np.testing.assert_allclose(got[1] @ row, want[::-1], atol=1e-6)


def test_hue_is_turned_as_colorsys_does():
    x = np.random.default_rng(1).random((50, 3)).astype(np.float32)
    x[0] = 0.3  # grey has no hue
    got = augmentation.turn_hue(x, 0.15)
    for before, after in zip(x, got, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before.tolist())
        want = colorsys.hsv_to_rgb((hue + 0.15) % 1.0, saturation, value)
        np.testing.assert_allclose(after, want, atol=1e-5)


def test_views_differ_and_stay_in_range():
    everything = dataclasses.replace(
        OFF, min_area=0.2, max_ratio=4 / 3, colour_probability=0.8, grey_probability=0.5,
        blur_probability=0.5,
    )  # fmt: skip
    run = jax.jit(everything)
    images = pixels(64)
    first, second = (np.asarray(run(jax.random.key(seed), images)) for seed in (0, 1))
    assert first.min() > -1e-5 and first.max() < 1 + 1e-5
    assert (np.abs(first - second).max(axis=(1, 2, 3)) > 0.01).all()
    colourless = np.abs(first - first[..., :1]).max(axis=(1, 2, 3)) < 1e-5
    assert 16 < colourless.sum() < 48


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="ImageAugmentation.min_area"):
        ImageAugmentation(min_area=0.0)
    with pytest.raises(UserError, match="ImageAugmentation.grey_probability"):
        ImageAugmentation(grey_probability=1.5)
