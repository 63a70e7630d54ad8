"""Augmentation of features inside the training step (jax.numpy, jittable).

SpecAugment (Park et al. 2019, section 2): bands of mel channels and spans of frames are blanked.
Time warping is left out, as in most later recipes: it costs most and helps least (their table 5).
"""

import jax
import jax.numpy as jnp
import numpy as np


def spec_augment(
    rng,
    features,
    lengths,
    *,
    num_time_masks: int = 2,
    max_time_frames: int = 40,
    max_time_fraction: float = 0.2,
    num_frequency_masks: int = 2,
    max_frequency_bins: int = 27,
):
    """Blanks random spans of frames and bands of channels, drawn anew for every utterance.

    Args:
      rng: a JAX random key.
      features: float [B, F, D], zero-mean (blanked values become 0).
      lengths: int [B] true frames; spans fall inside them.
      num_time_masks: spans for an utterance; their widths are uniform from 0 to
        min(max_time_frames, max_time_fraction * length), both ends included.
      max_time_frames: see num_time_masks.
      max_time_fraction: see num_time_masks.
      num_frequency_masks: bands for an utterance, widths uniform in 0..max_frequency_bins.
      max_frequency_bins: see num_frequency_masks.

    Returns:
      float [B, F, D].
    """
    batch, num_frames, num_bins = features.shape
    time_rng, frequency_rng = jax.random.split(rng)
    widest = jnp.minimum(max_time_frames, (max_time_fraction * lengths).astype(jnp.int32))
    blank_time = _spans(time_rng, num_time_masks, num_frames, lengths, widest)
    sizes = jnp.full((batch,), num_bins)
    widest = jnp.full((batch,), min(max_frequency_bins, num_bins))
    blank_bins = _spans(frequency_rng, num_frequency_masks, num_bins, sizes, widest)
    blank = blank_time[:, :, None] | blank_bins[:, None, :]
    return jnp.where(blank, jnp.zeros((), features.dtype), features)


def _spans(rng, count: int, size: int, sizes, widest):
    """Bool [B, size]: the union of `count` spans of width 0..widest[b] inside [0, sizes[b])."""
    width_rng, start_rng = jax.random.split(rng)
    shape = (sizes.shape[0], count)
    width = jax.random.uniform(width_rng, shape) * (widest[:, None] + 1)
    width = jnp.minimum(jnp.floor(width), widest[:, None]).astype(jnp.int32)
    start = jax.random.uniform(start_rng, shape) * (sizes[:, None] - width + 1)
    start = jnp.minimum(jnp.floor(start), sizes[:, None] - width).astype(jnp.int32)
    place = np.arange(size)
    inside = (place >= start[..., None]) & (place < (start + width)[..., None])
    return inside.any(axis=1)
