"""Filters that start from the mel's own envelope.

A log-mel is a spectral envelope already: put on the bins of a small STFT, it filters a flat source
to speech that is understood before anything is learnt. Networks that filter a source add to it what
they learn: sharper formants, phases, breath. (Source-filter vocoders; ours, no published form.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.audio.mel_filters import hz_to_mel

SOURCE_LEVEL, NOISE_LEVEL = 1.0, -1.0
"""Where log gains start above the mel. Sines of 0.1 each, 120 Hz apart, have a log-mel of -0.9;
noise starts well below, since most of what is voiced has little of it."""


class Envelope(nnx.Module):
    """Log-mel to log gains at the frames of an STFT: a linear map that starts as interpolation."""

    def __init__(self, num_mels: int, bins: int, sample_rate: int, fmax: float, levels):
        """Builds the map.

        Args:
          num_mels: channels of the mel, from 0 Hz to `fmax` on Slaney's scale.
          bins: of the STFT, from 0 Hz to half of `sample_rate`; the top channel holds above `fmax`.
          sample_rate: Hz.
          fmax: Hz.
          levels: log gain above the mel of each filter; the outputs are [len(levels) * bins].
        """
        matrix = interpolation(num_mels, np.linspace(0.0, sample_rate / 2.0, bins), fmax)
        self.kernel = nnx.Param(jnp.asarray(np.tile(matrix, (1, len(levels)))))
        self.bias = nnx.Param(jnp.repeat(jnp.array(levels, jnp.float32), bins))

    def __call__(self, mel: jax.Array, factor: int, lengths: jax.Array | None = None) -> jax.Array:
        """float [B, F, num_mels] -> [B, factor F + 1, outputs]; `lengths` int32 [B] frames count.

        The first frame of the STFT stands at the first sample, half a frame of the mel before its
        first.
        """
        gains = mel.astype(jnp.float32) @ self.kernel[...] + self.bias[...]
        last = jnp.array([mel.shape[1]]) - 1 if lengths is None else lengths - 1
        places = jnp.arange(factor * mel.shape[1] + 1) / factor - 0.5
        places = jnp.clip(places, 0.0, jnp.maximum(last, 0)[:, None])
        places = jnp.broadcast_to(places, (mel.shape[0], places.shape[1]))
        before = jnp.floor(places).astype(jnp.int32)
        after = jnp.minimum(before + 1, jnp.maximum(last, 0)[:, None])
        share = (places - before)[..., None]
        low, high = (jnp.take_along_axis(gains, at[..., None], axis=1) for at in (before, after))
        return low + share * (high - low)


def minimum_phase(gains: jax.Array) -> jax.Array:
    """Phases float32 [..., bins] in radians of the minimum-phase filter with log gains [..., bins].

    A pulse then rings after it is struck, as it does in a mouth; with phases of zero the same sound
    stands around it on both sides and buzzes. By the folded cepstrum (Oppenheim and Schafer).
    """
    return gains @ jnp.asarray(_phase_matrix(gains.shape[-1]))


@functools.cache
def _phase_matrix(bins: int) -> np.ndarray:
    size = 2 * (bins - 1)
    cepstra = np.fft.irfft(np.eye(bins), size)
    cepstra[:, 1 : bins - 1] *= 2.0
    cepstra[:, bins:] = 0.0
    return np.fft.rfft(cepstra).imag.astype(np.float32)


def interpolation(num_mels: int, hz: np.ndarray, fmax: float) -> np.ndarray:
    """float32 [num_mels, len(hz)]: channels at their centres, linear in mel in between."""
    centres = np.linspace(0.0, hz_to_mel(fmax), num_mels + 2)[1:-1]
    places = np.interp(hz_to_mel(hz), centres, np.arange(num_mels))
    return np.maximum(0.0, 1.0 - np.abs(places - np.arange(num_mels)[:, None])).astype(np.float32)
