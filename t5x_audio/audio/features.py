"""Spectral features in pure jax.numpy: Kaldi fbank, low frame rate, Whisper log-mel, vocoder mel.

Choices:
- Every function works on [..., T], can be jitted (the config is a static, hashable dataclass) and
  has one output shape per input shape. Given `lengths`, the result for an utterance depends on
  its own samples only: edges are reflected at its true end and frames beyond it are 0.
- The spectrum is a real FFT of framed samples. On 2 CPU cores that is five to six times faster
  than a matrix product with a DFT basis (12 ms against 75 ms for 80 s of speech, 512 points).
- float32 throughout; mel projections are asked for in full float32, also on TPU.

Sources: Kaldi feat/feature-fbank.cc; FunASR wav_frontend (low frame rate); Whisper audio.py;
HiFi-GAN meldataset.py as used by CosyVoice.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from t5x_audio.audio import mel_filters

_FLOAT32_EPSILON = np.finfo(np.float32).eps


@dataclasses.dataclass(frozen=True)
class KaldiFbankConfig:
    """Kaldi log-mel energies as Paraformer uses them (dither 0: tokens must be deterministic).

    `window_shape` is "hamming" or Kaldi's own "povey", a Hann window to the power of 0.85.
    """

    sample_rate: int = 16000
    num_mels: int = 80
    window: int = 400  # samples
    hop: int = 160
    n_fft: int = 512
    preemphasis: float = 0.97
    fmin: float = 20.0
    fmax: float | None = None  # None = half the sample rate
    scale: float = 32768.0  # Kaldi expects 16-bit integer amplitudes
    window_shape: str = "hamming"

    def num_frames(self, samples):
        """Frames of so many samples (int or array): only whole windows ("snip edges")."""
        whole = (samples - self.window) // self.hop + 1
        return max(whole, 0) if isinstance(samples, int) else jnp.maximum(whole, 0)


@dataclasses.dataclass(frozen=True)
class WhisperMelConfig:
    """Whisper's log10 mel: 100 frames a second."""

    sample_rate: int = 16000
    num_mels: int = 128
    n_fft: int = 400
    hop: int = 160

    def num_frames(self, samples):
        """Frames of so many samples (int or array)."""
        return samples // self.hop


@dataclasses.dataclass(frozen=True)
class MelConfig:
    """The vocoder's natural-log mel magnitude spectrum; defaults are CosyVoice-1's.

    num_mels None keeps every bin of the spectrum (fmin and fmax are then not used).
    """

    sample_rate: int = 22050
    n_fft: int = 1024
    hop: int = 256
    win: int = 1024
    num_mels: int | None = 80
    fmin: float = 0.0
    fmax: float | None = 8000.0
    floor: float = 1e-5

    def num_frames(self, samples):
        """Frames of so many samples (int or array)."""
        return samples // self.hop


def mel_configs(sample_rate: int, sizes) -> tuple[MelConfig, ...]:
    """One `MelConfig` for each row (n_fft, hop, win, num_mels or None, fmax or None)."""
    return tuple(
        MelConfig(sample_rate, n_fft, hop, win, num_mels, fmax=fmax)
        for n_fft, hop, win, num_mels, fmax in sizes
    )


def kaldi_fbank(samples, lengths=None, config: KaldiFbankConfig = KaldiFbankConfig()):
    """Kaldi filterbank energies.

    Args:
      samples: float [..., T] in [-1, 1] at config.sample_rate.
      lengths: int [...] true samples of each row; None = all T.
      config: static settings.

    Returns:
      float32 [..., config.num_frames(T), num_mels]; frames past the length are 0.
    """
    num_frames = config.num_frames(samples.shape[-1])
    frames = frame(samples.astype(jnp.float32) * config.scale, config.window, config.hop)
    frames = frames - frames.mean(-1, keepdims=True)
    before = jnp.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    frames = (frames - config.preemphasis * before) * _WINDOWS[config.window_shape](config.window)
    filters = mel_filters.kaldi_mel_filters(
        config.sample_rate,
        config.n_fft,
        config.num_mels,
        config.fmin,
        config.fmax or config.sample_rate / 2,
    )
    energies = _project(_power(frames, config.n_fft), filters)
    log_energies = jnp.log(jnp.maximum(energies, _FLOAT32_EPSILON))
    return _mask(log_energies, num_frames, None if lengths is None else config.num_frames(lengths))


def low_frame_rate_length(frames, n: int = 6):
    """Stacked frames that `low_frame_rate` makes of so many frames (int or array)."""
    return -(-frames // n)


def low_frame_rate(features, lengths=None, m: int = 7, n: int = 6):
    """Stacks m neighbouring frames at every n-th frame, repeating the first and last frame.

    Args:
      features: float [..., F, D].
      lengths: int [...] true frames of each row; None = all F.
      m: frames in a stack: (m - 1) // 2 before the centre, the rest after.
      n: stride in frames.

    Returns:
      float [..., ceil(F / n), m * D]: 560 wide, every 60 ms, with the defaults on 80-mel fbank.
      Stacks whose centre lies past the length are 0.
    """
    num_frames, width = features.shape[-2:]
    num_stacks = low_frame_rate_length(num_frames, n)
    batch = features.shape[:-2]
    if num_frames == 0:
        return jnp.zeros((*batch, 0, m * width), features.dtype)
    true = jnp.full(batch, num_frames) if lengths is None else jnp.asarray(lengths)
    wanted = np.arange(num_stacks)[:, None] * n + np.arange(m) - (m - 1) // 2
    index = jnp.clip(wanted.reshape(-1), 0, jnp.maximum(true - 1, 0)[..., None])
    stacked = jnp.take_along_axis(features, index[..., None], axis=-2)
    stacked = stacked.reshape(*batch, num_stacks, m * width)
    return _mask(stacked, num_stacks, low_frame_rate_length(true, n))


def whisper_log_mel(samples, lengths=None, config: WhisperMelConfig = WhisperMelConfig()):
    """Whisper's features: log10 mel power, clamped 8 below the utterance's maximum, (x + 4) / 4.

    Args:
      samples: float [..., T] at config.sample_rate.
      lengths: int [...] true samples of each row; None = all T.
      config: static settings.

    Returns:
      float32 [..., T // hop, num_mels]; the clamp looks at true frames only, later frames are 0.
    """
    total = samples.shape[-1]
    num_frames = config.num_frames(total)
    true = jnp.full(samples.shape[:-1], total) if lengths is None else jnp.asarray(lengths)
    padded = reflect_pad(samples.astype(jnp.float32), config.n_fft // 2, true)
    power = power_spectrogram(padded, config.n_fft, config.hop)[..., :num_frames, :]
    filters = mel_filters.mel_filters(config.sample_rate, config.n_fft, config.num_mels)
    log_mel = jnp.log10(jnp.maximum(_project(power, filters), 1e-10))
    valid = (np.arange(num_frames) < config.num_frames(true)[..., None])[..., None]
    loudest = jnp.max(log_mel, axis=(-2, -1), keepdims=True, where=valid, initial=-10.0)
    return jnp.where(valid, (jnp.maximum(log_mel, loudest - 8.0) + 4.0) / 4.0, 0.0)


def mel_spectrogram(samples, config: MelConfig = MelConfig(), lengths=None):
    """The vocoder's log-mel magnitudes: ln(max(mel @ sqrt(power + 1e-9), floor)).

    Args:
      samples: float [..., T] at config.sample_rate.
      config: static settings.
      lengths: int [...] true samples of each row; None = all T.

    Returns:
      float32 [..., T // hop, num_mels or bins]; frames past lengths // hop are 0.
    """
    total = samples.shape[-1]
    padded = reflect_pad(samples.astype(jnp.float32), (config.n_fft - config.hop) // 2, lengths)
    power = power_spectrogram(padded, config.n_fft, config.hop, config.win)
    mel = jnp.sqrt(power + 1e-9)
    if config.num_mels is not None:
        filters = mel_filters.mel_filters(
            config.sample_rate, config.n_fft, config.num_mels, config.fmin, config.fmax
        )
        mel = _project(mel, filters)
    log_mel = jnp.log(jnp.maximum(mel, config.floor))[..., : config.num_frames(total), :]
    return _mask(
        log_mel, log_mel.shape[-2], None if lengths is None else config.num_frames(lengths)
    )


def frame(samples, size: int, hop: int):
    """Overlapping windows without padding: [..., T] -> [..., 1 + (T - size) // hop, size]."""
    count = max((samples.shape[-1] - size) // hop + 1, 0)
    return samples[..., np.arange(count)[:, None] * hop + np.arange(size)]


def power_spectrogram(samples, n_fft: int, hop: int, win: int | None = None):
    """Squared magnitudes under a periodic Hann window, without padding.

    Args:
      samples: float32 [..., T], already padded as the feature asks.
      n_fft: FFT size and frame length.
      hop: samples from frame to frame.
      win: window length, centred in the frame; None = n_fft.

    Returns:
      float32 [..., 1 + (T - n_fft) // hop, n_fft // 2 + 1].
    """
    return _power(frame(samples, n_fft, hop) * _hann(win or n_fft, n_fft), n_fft)


def reflect_pad(samples, amount: int, lengths=None):
    """Mirrors `amount` samples at both ends of each row, at its own end when lengths are given.

    Args:
      samples: float [..., T].
      amount: samples added on each side.
      lengths: int [...]; None = all T. Utterances of `amount` samples or fewer repeat their
        outermost sample where the mirror runs out.

    Returns:
      float [..., T + 2 * amount]: mirror, utterance, mirror, then zeros up to the full width.
    """
    total = samples.shape[-1]
    batch = samples.shape[:-1]
    true = jnp.full(batch, total) if lengths is None else jnp.asarray(lengths)
    last = jnp.maximum(true - 1, 0)[..., None]
    steps = np.arange(1, amount + 1)
    left = jnp.take_along_axis(samples, jnp.minimum(steps[::-1], last), axis=-1)
    right = jnp.take_along_axis(samples, jnp.maximum(last - steps, 0), axis=-1)
    if lengths is None:
        return jnp.concatenate([left, samples, right], axis=-1)
    inside = np.arange(total) < true[..., None]
    body = jnp.where(inside, samples, 0.0)
    tail = jnp.zeros((*batch, amount), samples.dtype)
    padded = jnp.concatenate([left, body, tail], axis=-1).reshape(-1, total + 2 * amount)
    place = jax.vmap(lambda row, mirror, at: jax.lax.dynamic_update_slice(row, mirror, (at,)))
    padded = place(padded, right.reshape(-1, amount), amount + true.reshape(-1))
    return padded.reshape(*batch, total + 2 * amount)


def _power(frames, n_fft: int):
    spectrum = jnp.fft.rfft(frames, n_fft)
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def _project(spectrum, filters):
    return jnp.matmul(spectrum, filters, precision=jax.lax.Precision.HIGHEST)


def _mask(features, num_frames: int, true_frames):
    if true_frames is None:
        return features
    inside = np.arange(num_frames) < jnp.asarray(true_frames)[..., None]
    return jnp.where(inside[..., None], features, 0.0)


def _hamming(size: int) -> np.ndarray:
    return np.hamming(size).astype(np.float32)


def _povey(size: int) -> np.ndarray:
    return (np.hanning(size) ** 0.85).astype(np.float32)


_WINDOWS = {"hamming": _hamming, "povey": _povey}


def _hann(size: int, n_fft: int) -> np.ndarray:
    window = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(size) / size)
    left = (n_fft - size) // 2
    return np.pad(window, (left, n_fft - size - left)).astype(np.float32)
