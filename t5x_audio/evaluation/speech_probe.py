"""Probes of what the features of a speech encoder know: text, speaker, sounds, words read aloud.

- text, speaker: a linear classifier of the mean of a recording's features; of short recordings of
  few texts, such as spoken digits.
- unit: a linear classifier of single features; the classes are clusters of cepstra, the phone-like
  units that HuBERT starts from (Hsu et al., arXiv 2106.07447: 39 coefficients, k-means).

Features are standardised by the training recordings, since encoders differ in scale.
"""

from collections.abc import Sequence

import numpy as np
import scipy.fft

from t5x_audio.audio import features as audio_features
from t5x_audio.errors import UserError
from t5x_audio.evaluation.linear_probe import LinearProbe
from t5x_audio.tokenizers import kmeans

PROBE = LinearProbe(epochs=60, batch_size=256, learning_rate=0.3)
CEPSTRA = 13


def of_recordings(
    train: Sequence[np.ndarray],
    train_labels: Sequence[str],
    test: Sequence[np.ndarray],
    test_labels: Sequence[str],
    probe: LinearProbe = PROBE,
) -> float:
    """Share of test recordings whose label a linear classifier of their mean feature tells.

    Args:
      train, test: features [N_i, D] of each recording.
      train_labels, test_labels: one a recording.
      probe: how the classifier learns.

    Raises:
      UserError: fewer than two labels, or a test label that no training recording has.
    """
    names = sorted(set(train_labels))
    if len(names) < 2:
        raise UserError(f"all {len(train_labels)} recordings have the label {names[:1]}")
    if strange := set(test_labels) - set(names):
        raise UserError(f"no training recording has the label {min(strange)!r}")
    numbers = {name: number for number, name in enumerate(names)}
    sets = [
        (np.stack([x.mean(0) for x in some]), np.array([numbers[name] for name in labels]))
        for some, labels in ((train, train_labels), (test, test_labels))
    ]
    return _accuracy(*sets, len(names), probe)


def of_frames(train, train_labels, test, test_labels, count: int, probe: LinearProbe = PROBE):
    """Share of test frames whose label a linear classifier tells.

    Args:
      train, test: features [N_i, D] of each recording.
      train_labels, test_labels: ints [N_i] of each, below `count`; where one side has more frames,
        the rest is left out.
      count: of labels.
      probe: how the classifier learns.
    """
    sets = []
    for some, labels in ((train, train_labels), (test, test_labels)):
        pairs = [(x[: len(y)], y[: len(x)]) for x, y in zip(some, labels, strict=True)]
        sets.append(tuple(np.concatenate(part) for part in zip(*pairs, strict=True)))
    return _accuracy(*sets, count, probe)


def _accuracy(train, test, count: int, probe: LinearProbe) -> float:
    mean, deviation = train[0].mean(0), train[0].std(0) + 1e-5
    standard = [((x - mean) / deviation, labels) for x, labels in (train, test)]
    return probe.accuracy(*standard, count)


def units(
    train: Sequence[np.ndarray],
    test: Sequence[np.ndarray],
    frames_per_unit: int,
    count: int = 50,
    seed: int = 0,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Phone-like units of recordings, see the module docstring.

    Args:
      train: float [T_i] at 16 kHz, which the clusters are of.
      test: more recordings.
      frames_per_unit: frames of 10 ms, whose cepstra are averaged.
      count: of clusters.
      seed: of k-means.

    Returns:
      Ints [N_i] for each recording of both.

    Raises:
      UserError: fewer units than clusters.
    """
    found = [[_cepstra(x, frames_per_unit) for x in some] for some in (train, test)]
    everything = np.concatenate(found[0])
    mean, deviation = everything.mean(0), everything.std(0) + 1e-5
    points = (everything - mean) / deviation
    order = np.random.default_rng(seed).permutation(len(points))
    centres, _ = kmeans.fit([points[order]], count, seed=seed)
    return tuple(
        [np.asarray(kmeans.nearest((x - mean) / deviation, centres)) for x in some]
        for some in found
    )


def _cepstra(samples: np.ndarray, frames_per_unit: int) -> np.ndarray:
    """Float32 [N, 39]: cepstra of 10 ms frames with first and second differences, averaged."""
    padded = np.pad(samples, (0, -len(samples) % 16000)).astype(np.float32)  # few shapes
    length = np.array([len(samples)])
    mel = np.asarray(audio_features.whisper_log_mel(padded[None], length))[0]
    cepstra = scipy.fft.dct(mel[: len(samples) // 160], norm="ortho")[:, :CEPSTRA]
    first = np.gradient(cepstra, axis=0)
    whole = np.concatenate([cepstra, first, np.gradient(first, axis=0)], axis=1)
    rest = -len(whole) % frames_per_unit
    whole = np.pad(whole, ((0, rest), (0, 0)), mode="edge")
    return whole.reshape(-1, frames_per_unit, whole.shape[1]).mean(1)
