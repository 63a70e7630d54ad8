"""Augmentation of waveforms and features inside the training step (jax.numpy, jittable).

SpecAugment (Park et al. 2019, section 2): bands of mel channels and spans of frames are blanked.
Time warping is left out, as in most later recipes: it costs most and helps least (their table 5).

Noise: coloured noise or another utterance of the batch at a random signal-to-noise ratio, as in
WavLM (Chen et al. 2022, section III-B). The other utterance is the row before: batches are in a
random order anyway, and on a mesh only one row a device moves.
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


def add_noise(
    rng,
    audio,
    lengths,
    *,
    probability: float = 0.5,
    speech_share: float = 0.3,
    min_snr_db: float = 5.0,
    max_snr_db: float = 25.0,
    max_exponent: float = 1.0,
):
    """Adds noise to some utterances, drawn anew for each.

    Args:
      rng: a JAX random key.
      audio: float [B, T].
      lengths: int [B] true samples; what lies behind them comes back as zeros.
      probability: that an utterance gets noise.
      speech_share: of those, how many get the utterance in the row before, from its start on,
        instead of noise; the first row gets the last (a single row itself, so only a gain).
      min_snr_db, max_snr_db: the ratio of the powers over the utterance is drawn evenly between.
      max_exponent: the power of the noise falls with frequency to an exponent drawn evenly from 0
        to this: 0 is white, 1 pink.

    Returns:
      float [B, T].
    """
    batch, samples = audio.shape
    noise_rng, *rngs = jax.random.split(rng, 5)
    exponent, kind, snr, chance = (jax.random.uniform(key, (batch, 1)) for key in rngs)
    inside = np.arange(samples) < lengths[:, None]
    clean = jnp.where(inside, audio, 0)
    noise = coloured_noise(noise_rng, audio.shape, max_exponent * exponent)
    noise = jnp.where(kind < speech_share, jnp.roll(clean, 1, axis=0), noise)
    noise = jnp.where(inside, noise, 0)
    ratio = 10.0 ** ((min_snr_db + (max_snr_db - min_snr_db) * snr) / 10)
    wanted = jnp.sum(jnp.square(clean), axis=1, keepdims=True) / ratio
    present = jnp.sum(jnp.square(noise), axis=1, keepdims=True)
    gain = jnp.sqrt(wanted / jnp.maximum(present, 1e-20))
    return clean + jnp.where(chance < probability, gain * noise, 0)


def coloured_noise(rng, shape, exponent):
    """Gaussian noise [..., T] whose power falls as frequency to the `exponent` [..., 1]; no DC."""
    white = jnp.fft.rfft(jax.random.normal(rng, shape))
    frequency = np.arange(white.shape[-1], dtype=np.float32)
    # Over the mean frequency, so that the sums of squares stay small numbers.
    relative = np.maximum(frequency, 1.0) / max(frequency.mean(), 1.0)
    shaped = white * jnp.where(frequency > 0, relative ** (-0.5 * exponent), 0.0)
    return jnp.fft.irfft(shaped, shape[-1])


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
