"""How good a recording is, in a few figures that need no model: for choosing among many.

All are of float [T] samples in [-1, 1] and rounded, so that they do not depend on the machine.
"""

import numpy as np

FIELDS = ("peak_db", "level_db", "snr_db", "speech_share", "clipped_share", "bandwidth_hz")

_FLOOR = 1e-12  # power: -120 dBFS
_SPEECH_DB = 30.0  # frames this far below the loud ones are pauses
_BAND_HZ = 250
_BAND_DB = 60.0  # bands this far below the loudest hold nothing


def measure(samples: np.ndarray, rate: int) -> dict[str, float]:
    """The quality fields of a recording.

    Args:
      samples: float [T] in [-1, 1], T > 0.
      rate: Hz.

    Returns:
      peak_db and level_db (mean power of speech), in dBFS; snr_db, speech beside the quietest tenth
      of the frames of 25 ms; speech_share, of frames within 30 dB of the loud ones; clipped_share,
      see `clipped_share`; bandwidth_hz, the end of the highest band of 250 Hz that is within 60 dB
      of the strongest: about 4,250 for what was once telephone speech.
    """
    samples = np.asarray(samples, np.float64)
    power = _frame_power(samples, rate)
    decibels = 10 * np.log10(np.maximum(power, _FLOOR))
    speech = decibels > np.percentile(decibels, 95) - _SPEECH_DB
    quiet = np.sort(power)[: max(1, len(power) // 10)]
    level = _decibels(power[speech].mean())
    values = {
        "peak_db": _decibels(np.square(samples).max()),
        "level_db": level,
        "snr_db": level - _decibels(quiet.mean()),
        "speech_share": float(speech.mean()),
        "clipped_share": clipped_share(samples),
        "bandwidth_hz": _bandwidth(samples, rate),
    }
    return {name: round(float(values[name]), 3) for name in FIELDS}


def clipped_share(samples: np.ndarray) -> float:
    """Share of float [T] samples in runs of three or more at the same peak, plus or minus.

    Of a recording that was cut off at any level, not at full scale alone; a lone peak is none.
    """
    size = np.abs(samples)
    # 32767 and -32768 are both full scale.
    top = size >= size.max(initial=0.0) * (1 - 4e-5)
    inner = top[:-2] & top[1:-1] & top[2:]
    in_run = np.zeros(len(top), bool)
    for shift in range(3):
        in_run[shift : shift + len(inner)] |= inner
    return float(in_run.mean()) if len(top) > 2 and size.max() > 0 else 0.0


def _frame_power(samples: np.ndarray, rate: int) -> np.ndarray:
    """Mean power [N] of frames of 25 ms, every 10 ms; one frame for less than that."""
    size, hop = min(len(samples), rate // 40), rate // 100
    total = np.concatenate([[0.0], np.cumsum(np.square(samples))])
    starts = np.arange(0, len(samples) - size + 1, hop)
    return (total[starts + size] - total[starts]) / size


def _bandwidth(samples: np.ndarray, rate: int) -> float:
    size = 2 * (rate // _BAND_HZ)  # bins of 125 Hz
    count = max(1, len(samples) // size)
    frames = np.resize(samples, (1, size)) if len(samples) < size else samples[: count * size]
    windowed = frames.reshape(-1, size) * np.hanning(size)
    power = np.square(np.abs(np.fft.rfft(windowed))).mean(axis=0)[1:-1]
    bands = power[: len(power) // 2 * 2].reshape(-1, 2).sum(axis=1)
    held = np.flatnonzero(bands > bands.max() * 10 ** (-_BAND_DB / 10))
    return float(_BAND_HZ * (held[-1] + 1)) if bands.max() > 0 else 0.0


def _decibels(power: float) -> float:
    return 10 * float(np.log10(max(power, _FLOOR)))
