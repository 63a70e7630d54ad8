"""Mel filterbanks as float32 matrices [n_fft // 2 + 1, num_mels], computed once in numpy.

Two families exist in the field and their filters differ, so each feature names its own:
- `mel_filters`: triangles linear in Hz between mel-spaced centres, each of unit area ("Slaney"
  norm); the scale is Slaney's (linear below 1 kHz; librosa's default, used by Whisper, HiFi-GAN
  and GE2E) or HTK's.
- `kaldi_mel_filters`: triangles linear in mel, of unit height, the Nyquist bin unused (Kaldi,
  feat/mel-computations.cc).
"""

import functools

import numpy as np

_LINEAR_HZ_PER_MEL = 200.0 / 3
_BREAK_HZ = 1000.0
_LOG_STEP = np.log(6.4) / 27.0


def hz_to_mel(hz, scale: str = "slaney") -> np.ndarray:
    """Frequency in Hz -> mel on the 'slaney' or 'htk' scale; any shape, float64."""
    hz = np.asarray(hz, np.float64)
    if scale == "htk":
        return 2595.0 * np.log10(1.0 + hz / 700.0)
    linear = hz / _LINEAR_HZ_PER_MEL
    above = _BREAK_HZ / _LINEAR_HZ_PER_MEL + np.log(np.maximum(hz, 1e-9) / _BREAK_HZ) / _LOG_STEP
    return np.where(hz < _BREAK_HZ, linear, above)


def mel_to_hz(mel, scale: str = "slaney") -> np.ndarray:
    """Inverse of `hz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    if scale == "htk":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    break_mel = _BREAK_HZ / _LINEAR_HZ_PER_MEL
    above = _BREAK_HZ * np.exp(_LOG_STEP * (mel - break_mel))
    return np.where(mel < break_mel, mel * _LINEAR_HZ_PER_MEL, above)


@functools.cache
def mel_filters(
    sample_rate: int,
    n_fft: int,
    num_mels: int,
    fmin: float = 0.0,
    fmax: float | None = None,
    scale: str = "slaney",
) -> np.ndarray:
    """Area-normalised triangles, linear in Hz.

    Args:
      sample_rate: Hz.
      n_fft: FFT size; the filters cover bins 0..n_fft // 2.
      num_mels: number of filters.
      fmin: lower edge of the first filter in Hz.
      fmax: upper edge of the last filter in Hz; None = half the sample rate.
      scale: 'slaney' or 'htk'.

    Returns:
      float32 [n_fft // 2 + 1, num_mels].
    """
    fmax = sample_rate / 2 if fmax is None else fmax
    mels = np.linspace(hz_to_mel(fmin, scale), hz_to_mel(fmax, scale), num_mels + 2)
    edges = mel_to_hz(mels, scale)
    bins = np.arange(n_fft // 2 + 1)[:, None] * sample_rate / n_fft
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return _frozen(triangles * 2.0 / (edges[2:] - edges[:-2]))


@functools.cache
def kaldi_mel_filters(
    sample_rate: int, n_fft: int, num_mels: int, fmin: float, fmax: float
) -> np.ndarray:
    """Unit-height triangles, linear in mel = 1127 ln(1 + f / 700); arguments as `mel_filters`."""

    def to_mel(hz):
        return 1127.0 * np.log(1.0 + np.asarray(hz, np.float64) / 700.0)

    edges = np.linspace(to_mel(fmin), to_mel(fmax), num_mels + 2)
    bins = to_mel(np.arange(n_fft // 2 + 1) * sample_rate / n_fft)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    triangles[-1] = 0.0
    return _frozen(triangles)


def _frozen(matrix: np.ndarray) -> np.ndarray:
    matrix = matrix.astype(np.float32)
    matrix.setflags(write=False)
    return matrix
