"""Clicks where pieces of sound meet, by spectral flux."""

import numpy as np

HOP, WINDOW = 160, 512


def clicks(samples: np.ndarray, seams: np.ndarray) -> bool:
    """Whether the spectrum of samples [T] changes more around the seams (sample numbers [N]) than
    between them: by its largest change, or on average."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]
    spectra = np.abs(np.fft.rfft(frames * np.hanning(WINDOW)))
    rise = np.maximum(np.diff(spectra, axis=0), 0.0).sum(1)
    near = np.zeros(len(rise), bool)
    near[np.concatenate([seams // HOP + i for i in range(-5, 1)])] = True
    inside = rise[10:-10][~near[10:-10]]
    return rise[near].max() > 1.1 * inside.max() or rise[near].mean() > 1.5 * inside.mean()
