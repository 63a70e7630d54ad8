"""Fundamental frequency of speech by YIN: the targets of HiFT's F0 predictor.

De Cheveigné & Kawahara 2002: cumulative-mean-normalised difference function, absolute threshold,
parabolic interpolation; unvoiced (0 Hz) where no lag is periodic enough or the frame is silent. A
median over neighbouring frames removes single octave errors. The published recipe uses WORLD's
harvest; YIN has the same meaning, runs inside the compiled training step and needs no package.
Frames are centred as the vocoder's mel frames are: frame n at sample (n + 1/2) * hop.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class F0Config:
    """Settings of `estimate_f0`.

    Attributes:
      sample_rate: Hz.
      hop: samples from frame to frame; equal to the mel's.
      window: samples compared at each lag.
      fmin: lowest F0 in Hz (sets the longest lag).
      fmax: highest F0 in Hz.
      threshold: a dip of the normalised difference below it is taken at once.
      voicing: frames whose best dip is above it are unvoiced.
      silence: root mean square below which a frame is unvoiced.
      median: frames of the smoothing median (odd); 1 = none.
    """

    sample_rate: int = 22050
    hop: int = 256
    window: int = 768
    fmin: float = 60.0
    fmax: float = 400.0
    threshold: float = 0.15
    voicing: float = 0.5
    silence: float = 1e-3
    median: int = 5


def estimate_f0(samples: jax.Array, config: F0Config = F0Config()) -> jax.Array:
    """F0 in Hz, 0 where unvoiced: float [B, T] -> float32 [B, T // hop]. Jittable."""
    shortest = int(config.sample_rate / config.fmax)
    longest = int(np.ceil(config.sample_rate / config.fmin))
    difference, level = _normalised_difference(samples, config, longest + 1)
    lags = jnp.arange(longest + 2)
    in_range = (lags >= max(shortest, 2)) & (lags <= longest)
    before, after = jnp.roll(difference, 1, -1), jnp.roll(difference, -1, -1)
    dips = in_range & (difference <= before) & (difference < after)
    below = dips & (difference < config.threshold)
    deepest = jnp.argmin(jnp.where(in_range, difference, jnp.inf), axis=-1)
    lag = jnp.where(below.any(-1), jnp.argmax(below, axis=-1), deepest)

    def at(values):
        return jnp.take_along_axis(values, lag[..., None], axis=-1)[..., 0]

    left, centre, right = at(before), at(difference), at(after)
    curvature = left - 2.0 * centre + right
    offset = 0.5 * (left - right) / jnp.where(jnp.abs(curvature) < 1e-9, 1.0, curvature)
    period = lag + jnp.clip(offset, -1.0, 1.0)
    voiced = (centre < config.voicing) & (level > config.silence)
    return _median(jnp.where(voiced, config.sample_rate / period, 0.0), config.median)


def _normalised_difference(samples, config, max_lag):
    """(YIN's d' [B, F, max_lag + 1], root mean square [B, F])."""
    size = config.window + max_lag
    half = size // 2
    frames = _frames(samples.astype(jnp.float32), half - config.hop // 2, size, config.hop)
    n_fft = 1 << (size + config.window - 1).bit_length()
    spectrum = jnp.fft.rfft(frames, n_fft)
    head = jnp.fft.rfft(frames[..., : config.window], n_fft)
    correlation = jnp.fft.irfft(jnp.conj(head) * spectrum, n_fft)[..., : max_lag + 1]
    energy = jnp.cumsum(jnp.square(frames), axis=-1)
    energy = jnp.pad(energy, ((0, 0), (0, 0), (1, 0)))
    energies = energy[..., config.window :][..., : max_lag + 1] - energy[..., : max_lag + 1]
    difference = jnp.maximum(energies[..., :1] + energies - 2.0 * correlation, 0.0)
    mean = jnp.cumsum(difference[..., 1:], axis=-1) / jnp.arange(1, max_lag + 1)
    normalised = difference[..., 1:] / jnp.maximum(mean, 1e-8)
    level = jnp.sqrt(energies[..., 0] / config.window)
    return jnp.pad(normalised, ((0, 0), (0, 0), (1, 0)), constant_values=1.0), level


def _frames(samples, before: int, size: int, hop: int):
    count = samples.shape[1] // hop
    padded = jnp.pad(samples, ((0, 0), (before, size)))
    return padded[:, np.arange(count)[:, None] * hop + np.arange(size)]


def _median(f0, width: int):
    if width == 1:
        return f0
    half = width // 2
    padded = jnp.pad(f0, ((0, 0), (half, half)), mode="edge")
    count = f0.shape[1]
    return jnp.median(jnp.stack([padded[:, k : k + count] for k in range(width)]), axis=0)
