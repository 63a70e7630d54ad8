"""Clicks where pieces of sound meet, by spectral flux."""

import numpy as np


def clicks(samples: np.ndarray, seams: np.ndarray, hop: int = 160) -> bool:
    """Whether the spectrum of samples [T] changes more around the seams than between them.

    By its largest change, or on average. `seams`: sample numbers [N]; `hop`: between spectra of
    three times as many samples, a multiple of the period of what should be steady.
    """
    frames = np.lib.stride_tricks.sliding_window_view(samples, 3 * hop)[::hop]
    spectra = np.abs(np.fft.rfft(frames * np.hanning(3 * hop)))
    rise = np.maximum(np.diff(spectra, axis=0), 0.0).sum(1)
    near = np.zeros(len(rise), bool)
    near[np.concatenate([seams // hop + i for i in range(-4, 1)])] = True
    inside = rise[10:-10][~near[10:-10]]  # not how it begins and ends
    return rise[near].max() > 1.1 * inside.max() or rise[near].mean() > 1.5 * inside.mean()
