"""Deterministic changes to a waveform (numpy): level, silence, speed, pitch, vocal tract, noise.

`trim_silence` and `normalize_energy` are the tokenizer's pre-processing (Step-Audio, tokenizer
front end). Speed, pitch and vocal tract make further speakers out of one voice:
- `change_speed` alters the tempo and keeps the pitch (WSOLA: Verhelst and Roelands 1993), because
  plain resampling would move pitch and formants with it;
- `change_pitch` stretches, resamples back and then undoes the shift of the formants;
- `change_vocal_tract` moves the formants only: every short-time spectrum is multiplied by the
  ratio of its warped to its own spectral envelope, the envelope being a cepstrally smoothed one
  that follows the harmonics' peaks (true envelope: Roebel and Rodet 2005).

Within SPEED_RANGE, PITCH_RANGE and FORMANT_RANGE whisper tiny.en transcribes read English almost
as it does untouched (words changed: 3 to 7 % by speed, 4 to 6 % by pitch, 2 to 3 % by formants),
and DNSMOS falls by less than 0.1 (0.2 at +4 semitones).
All functions take and return float32 [T] and raise ValueError on settings outside their meaning.
"""

import numpy as np

from t5x_audio.audio import io

SPEED_RANGE = (0.8, 1.25)
PITCH_RANGE = (-4.0, 4.0)  # semitones
FORMANT_RANGE = (0.85, 1.18)

_SEARCH_SECONDS = 0.010  # reaches a whole period of a 50 Hz voice: +-10 ms
_ENVELOPE_SECONDS = 0.003  # cepstral detail: below the pitch period of most voices
_MAX_GAIN = 4.6  # nepers, 40 dB: bound on what the envelope ratio may amplify or damp


def energy_gain(samples: np.ndarray) -> float:
    """What [T] is multiplied with for a peak of 0.999; below a peak of 0.01, as if it were 0.01."""
    return 0.999 / max(float(np.abs(samples).max(initial=0.0)), 0.01)


def normalize_energy(samples: np.ndarray) -> np.ndarray:
    """Scales float [T] by its `energy_gain`; float32."""
    return np.asarray(samples, np.float32) * np.float32(energy_gain(samples))


def trim_silence(samples: np.ndarray, top_db: float = 20.0) -> np.ndarray:
    """Cuts [T] at 16 kHz to its speech plus 0.05 s before it and 0.22 s after.

    Speech is what lies between the first and last 512-sample frame (hop 128) that is within
    `top_db` of the loudest. Its length is rounded up to 240 samples; missing margin is zeros.
    """
    samples = np.asarray(samples, np.float32)
    start, stop = _nonsilent_span(samples, top_db, size=512, hop=128)
    lead, hop = 800, 240
    num_hops = -(-(stop - start) // hop)
    length = int(num_hops * hop + 0.27 * 16000)
    begin = start - lead
    piece = samples[max(begin, 0) : begin + length]
    left = max(-begin, 0)
    return np.pad(piece, (left, length - left - len(piece)))


def _nonsilent_span(samples: np.ndarray, top_db: float, size: int, hop: int) -> tuple[int, int]:
    """[start, stop) of the frames above -top_db relative to the loudest; frames are centred."""
    padded = np.pad(samples.astype(np.float64), size // 2)
    energy = np.concatenate([[0.0], np.cumsum(padded**2)])
    starts = np.arange(0, len(padded) - size + 1, hop)
    power = (energy[starts + size] - energy[starts]) / size
    level = 10 * np.log10(np.maximum(power, 1e-10))
    loud = np.flatnonzero(level - level.max() > -top_db)
    return int(loud[0]) * hop, min(len(samples), (int(loud[-1]) + 1) * hop)


def change_speed(samples: np.ndarray, speed: float, rate: int = 16000) -> np.ndarray:
    """Plays [T] `speed` times as fast with unchanged pitch; float32 [round(T / speed)].

    Words stay intelligible within SPEED_RANGE.
    """
    if not 0.25 <= speed <= 4.0:
        raise ValueError(f"speed must be within 0.25..4, got {speed}")
    samples = np.asarray(samples, np.float32)
    return samples if speed == 1.0 else _overlap_add(samples, speed, rate)


def _overlap_add(samples: np.ndarray, speed: float, rate: int) -> np.ndarray:
    """WSOLA: each new frame is the one near its due place most like the last one's continuation."""
    half = int(0.015 * rate)
    size, search = 2 * half, int(_SEARCH_SECONDS * rate)
    length = round(len(samples) / speed)
    margin = size + search
    padded = np.pad(samples.astype(np.float64), (margin, margin + size + half))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    count = length // half + 2
    output = np.zeros((count + 2) * half)
    place = margin - half
    for i in range(count):
        output[i * half : i * half + size] += window * padded[place : place + size]
        due = min(round(i * half * speed) + margin, len(padded) - size - search)
        wanted = padded[min(place + half, len(padded) - size) :][:size]
        place = due + _best_offset(padded[due - search : due + search + size], wanted) - search
    return output[half : half + length].astype(np.float32)


def _best_offset(region: np.ndarray, wanted: np.ndarray) -> int:
    """Offset at which `region` correlates best (normalised) with `wanted`."""
    likeness = np.correlate(region, wanted, mode="valid")
    energy = np.concatenate([[0.0], np.cumsum(region**2)])
    size = len(wanted)
    return int(np.argmax(likeness / np.sqrt(energy[size:] - energy[:-size] + 1e-6)))


def change_pitch(samples: np.ndarray, semitones: float, rate: int = 16000) -> np.ndarray:
    """Shifts the pitch of [T], keeping tempo, length and formants.

    Natural within PITCH_RANGE.
    """
    if not -12.0 <= semitones <= 12.0:
        raise ValueError(f"semitones must be within -12..12, got {semitones}")
    samples = np.asarray(samples, np.float32)
    if semitones == 0:
        return samples
    ratio = 2.0 ** (semitones / 12.0)
    shifted = io.resample(_overlap_add(samples, 1.0 / ratio, rate), ratio, 1.0)[: len(samples)]
    shifted = np.pad(shifted, (0, len(samples) - len(shifted)))
    return _match_level(change_vocal_tract(shifted, 1.0 / ratio, rate), samples)


def change_vocal_tract(samples: np.ndarray, ratio: float, rate: int = 16000) -> np.ndarray:
    """Multiplies the formant frequencies of [T] by `ratio`, keeping pitch and tempo.

    Above 1 the speaker's vocal tract is shorter (a smaller person), below 1 longer. Natural
    within FORMANT_RANGE.
    """
    if not 0.5 <= ratio <= 2.0:
        raise ValueError(f"ratio must be within 0.5..2, got {ratio}")
    samples = np.asarray(samples, np.float32)
    if ratio == 1.0 or len(samples) == 0:
        return samples
    n_fft = 1 << round(np.log2(0.032 * rate))
    spectra = _stft(samples, n_fft)
    envelope = _true_envelope(np.log(np.abs(spectra) + 1e-6), order=int(_ENVELOPE_SECONDS * rate))
    bins = np.arange(n_fft // 2 + 1)
    source = np.minimum(bins / ratio, n_fft // 2)
    low = np.minimum(source.astype(int), n_fft // 2 - 1)
    part = source - low
    warped = envelope[:, low] * (1 - part) + envelope[:, low + 1] * part
    gain = np.exp(np.clip(warped - envelope, -_MAX_GAIN, _MAX_GAIN))
    return _match_level(_inverse_stft(spectra * gain, n_fft, len(samples)), samples)


def add_noise(
    samples: np.ndarray, snr_db: float, seed: int = 0, noise: np.ndarray | None = None
) -> np.ndarray:
    """Adds noise to [T] at a signal-to-noise ratio over the whole clip.

    Args:
      samples: float [T].
      snr_db: 10 log10(signal power / noise power).
      seed: of the white noise, or of the cut out of `noise`.
      noise: recorded noise [N], repeated as needed from a random place; None = white.

    Returns:
      float32 [T], not clipped.
    """
    samples = np.asarray(samples, np.float32)
    rng = np.random.default_rng(seed)
    if noise is None:
        noise = rng.standard_normal(len(samples))
    else:
        noise = np.take(noise, rng.integers(len(noise)) + np.arange(len(samples)), mode="wrap")
    power = np.mean(np.square(noise, dtype=np.float64))
    wanted = np.mean(np.square(samples, dtype=np.float64)) / 10 ** (snr_db / 10)
    scale = np.sqrt(wanted / power) if power > 0 else 0.0
    return (samples + scale * noise).astype(np.float32)


def _stft(samples: np.ndarray, n_fft: int) -> np.ndarray:
    """Hann-windowed spectra [frames, n_fft // 2 + 1], hop n_fft // 4, covering every sample."""
    hop = n_fft // 4
    tail = n_fft + (-len(samples)) % hop
    padded = np.pad(samples.astype(np.float64), (n_fft, tail))
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    return np.fft.rfft(frames * _periodic_hann(n_fft), axis=-1)


def _inverse_stft(spectra: np.ndarray, n_fft: int, length: int) -> np.ndarray:
    """Least-squares overlap-add of `_stft` spectra; float32 [length]."""
    hop = n_fft // 4
    frames = np.fft.irfft(spectra, n_fft, axis=-1) * _periodic_hann(n_fft)
    output = np.zeros((len(frames) + 3) * hop)
    for quarter in range(4):
        piece = frames[:, quarter * hop : (quarter + 1) * hop].reshape(-1)
        output[quarter * hop : quarter * hop + len(piece)] += piece
    # Four squared Hann windows a quarter apart sum to 1.5.
    return (output[n_fft : n_fft + length] / 1.5).astype(np.float32)


def _true_envelope(log_magnitude: np.ndarray, order: int, iterations: int = 20) -> np.ndarray:
    """Smooth log spectra [frames, bins] through the harmonics' peaks, `order` cepstral terms.

    The lifter is a plain cut: on synthetic vowels a tapered one leaves three times the error (5 dB
    against 1.6 dB over the harmonics) because it flattens the formants.
    """
    keep = np.zeros(2 * (log_magnitude.shape[-1] - 1))
    keep[:order] = keep[-order + 1 :] = 1.0
    target = log_magnitude
    for _ in range(iterations):
        cepstrum = np.fft.irfft(target, axis=-1)
        envelope = np.fft.rfft(cepstrum * keep, axis=-1).real
        target = np.maximum(log_magnitude, envelope)
    return envelope


def _match_level(samples: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Scales [T] to the RMS of `reference`."""
    energy = np.sum(np.square(samples, dtype=np.float64))
    wanted = np.sum(np.square(reference, dtype=np.float64))
    return (samples * np.sqrt(wanted / energy) if energy > 0 else samples).astype(np.float32)


def _periodic_hann(size: int) -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
