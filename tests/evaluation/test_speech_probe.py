"""Probes of features of speech."""

import numpy as np
import pytest

from t5x_audio.errors import UserError
from t5x_audio.evaluation import speech_probe


def recordings(rng, count):
    """Features that hold the label in their mean, between noise of another scale."""
    labels = [("left", "right", "up")[i % 3] for i in range(count)]
    places = {"left": (1.0, 0.0), "right": (-1.0, 0.0), "up": (0.0, 1.0)}
    made = [
        np.concatenate([50 + rng.normal(size=(9 + i % 4, 2)) * 30, [[0, 0]]]) for i in range(count)
    ]
    signal = [np.tile(places[label], (len(x), 1)) for x, label in zip(made, labels, strict=True)]
    both = zip(made, signal, strict=True)
    return [np.concatenate([x, 0.01 * y], 1).astype(np.float32) for x, y in both], labels


def test_the_mean_of_a_recording_tells_its_label():
    rng = np.random.default_rng(0)
    train, test = recordings(rng, 90), recordings(rng, 30)
    assert speech_probe.of_recordings(*train, *test) == 1.0
    shuffled = list(rng.permutation(train[1]))
    assert speech_probe.of_recordings(train[0], shuffled, *test) < 0.7


def test_labels_that_cannot_be_learnt():
    rng = np.random.default_rng(0)
    made, labels = recordings(rng, 6)
    with pytest.raises(UserError, match="no training recording has the label 'up'"):
        speech_probe.of_recordings(made, ["left", "right"] * 3, made, labels)
    with pytest.raises(UserError, match="have the label"):
        speech_probe.of_recordings(made, ["left"] * 6, made, labels)


def test_units_follow_the_sound():
    """Tones of three heights: frames of one height have one unit, and features tell it."""

    def recording(heights):
        return np.concatenate([np.sin(np.arange(8000) * height) for height in heights])

    heights = [(0.1, 0.4, 0.9), (0.9, 0.1, 0.4), (0.4, 0.9, 0.1)] * 3
    sounds = [recording(one).astype(np.float32) for one in heights]
    train, test = speech_probe.units(sounds[:6], sounds[6:], frames_per_unit=5, count=8)
    assert [len(x) for x in train] == [30] * 6
    inside = [unit[4] for unit in train], [unit[14] for unit in train], [unit[24] for unit in train]
    by_height = {}
    for units, which in zip(inside, range(3), strict=True):
        for unit, one in zip(units, heights, strict=False):
            by_height.setdefault(one[which], set()).add(int(unit))
    assert all(len(units) == 1 for units in by_height.values())
    assert len(set.union(*by_height.values())) == 3
    features = [np.eye(8, dtype=np.float32)[units] for units in train]
    told = [np.eye(8, dtype=np.float32)[units] for units in test]
    assert speech_probe.of_frames(features, train, told, [x[:-1] for x in test], 8) == 1.0
