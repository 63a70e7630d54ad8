"""Pictures of sound for the report: the waveform's envelope and a spectrogram.

Both take the colour of the page (a path drawn in the text colour; a picture whose opacity is the
level), so that they read on light and on dark ground alike.
"""

import io
import math

import numpy as np

DYNAMIC_RANGE_DB = 70.0


def envelope_path(samples: np.ndarray, width: int = 600, height: int = 60) -> str:
    """SVG path data of the waveform's envelope.

    Args:
      samples: float [T] in [-1, 1]; any T, also 0.
      width: picture width = number of columns.
      height: picture height; silence is the line at half of it.

    Returns:
      The `d` of a closed path: the maxima from left to right, then the minima back.
    """
    columns = np.array_split(np.asarray(samples, np.float32), width)
    top = [float(column.max()) if column.size else 0.0 for column in columns]
    bottom = [float(column.min()) if column.size else 0.0 for column in columns]
    scale = max(1e-3, *(abs(value) for value in top + bottom))

    def point(x: int, value: float) -> str:
        # At least a hair's breadth, so that silence is still a line.
        return f"{x},{height / 2 * (1 - value / scale):.1f}"

    upper = [point(x, max(value, 0.01 * scale)) for x, value in enumerate(top)]
    lower = [point(x, min(value, -0.01 * scale)) for x, value in enumerate(bottom)]
    return "M" + "L".join([*upper, *reversed(lower)]) + "Z"


def spectrogram(
    samples: np.ndarray, rate: int, *, max_hz: float = 8000.0, max_columns: int = 600
) -> np.ndarray:
    """Level of every frequency over time, for looking at.

    Args:
      samples: float [T].
      rate: Hz.
      max_hz: highest frequency of the picture.
      max_columns: longest picture; neighbouring frames are averaged beyond it.

    Returns:
      float32 [F, N] in [0, 1], low frequencies first: 1 = the loudest, 0 = 70 dB below or less.
    """
    window = 2 ** round(math.log2(0.032 * rate))
    hop = max(window // 4, math.ceil(len(samples) / max_columns))
    padded = np.pad(np.asarray(samples, np.float32), (0, window))
    starts = np.arange(0, max(1, len(samples)), hop)
    frames = padded[starts[:, None] + np.arange(window)] * np.hanning(window)
    power = np.abs(np.fft.rfft(frames)) ** 2
    power = power[:, : max(1, round(max_hz * window / rate))].T
    level = 10 * np.log10(power + 1e-12)
    return np.clip((level - level.max()) / DYNAMIC_RANGE_DB + 1, 0, 1).astype(np.float32)


def spectrogram_png(samples: np.ndarray, rate: int, colour: tuple[int, int, int]) -> bytes:
    """PNG of `spectrogram` in one colour (RGB, 0-255) whose opacity is the level."""
    from matplotlib import image

    level = spectrogram(samples, rate)[::-1]
    picture = np.empty((*level.shape, 4), np.uint8)
    picture[..., :3] = colour
    picture[..., 3] = np.round(255 * level**1.6)  # the floor of 70 dB fades into the page
    out = io.BytesIO()
    image.imsave(out, picture, format="png")
    return out.getvalue()
