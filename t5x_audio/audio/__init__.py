"""Waveforms in and out, resampling, acoustic features and augmentation."""
