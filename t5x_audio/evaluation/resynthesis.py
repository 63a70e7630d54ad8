"""Resynthesis: what is left of a recording when it has been codes, or a mel, and is sound again.

Each clip is heard in six versions:

- recording: as it is; what the judges make of flawless speech
- copy: its own mel through HiFT; what HiFT alone loses
- both: its codes of both codebooks through flow matching and HiFT
- stream: the same codes as they would come, block after block of an answer
- semantic, linguistic: with the codes of one codebook only

Beside what judges say, versions are compared with the recording frame by frame, since their lengths
agree: distance of log-mels, and F0 by YIN. After Step-Audio's resynthesis table (arXiv 2502.11946,
table 4: error rates and speaker similarity beside ground truth and a single codebook).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from t5x_audio.audio.features import MelConfig, mel_spectrogram
from t5x_audio.evaluation.judges import mean, ratio
from t5x_audio.vocoder.f0 import F0Config, estimate_f0

VERSIONS = ("recording", "copy", "both", "stream", "semantic", "linguistic")
DECIBELS = 20.0 / np.log(10.0)  # of a natural-log magnitude
_PADDED_SECONDS = 2.0
MIN_VOICED = 10  # frames that both must be voiced in, else nothing is said of F0


def mel_distance(a: np.ndarray, b: np.ndarray) -> float | None:
    """Mean absolute difference of two log-mels in dB, over the frames that both have.

    Args:
      a, b: float [F, M] and [G, M], natural logarithms of magnitudes, aligned at their start.

    Returns:
      dB, level included; None without a frame.
    """
    frames = min(len(a), len(b))
    return float(DECIBELS * np.mean(np.abs(a[:frames] - b[:frames]))) if frames else None


def pitch_agreement(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    """How alike two courses of F0 are.

    Args:
      a, b: Hz [F] and [G], 0 where unvoiced, aligned at their start.

    Returns:
      voicing_agreement: share of frames where both are voiced or both are not.
      f0_correlation: Pearson's, of Hz, over frames where both are voiced; None where these are
        fewer than MIN_VOICED or one of the two never moves.
      f0_semitones: median distance over the same frames, in semitones; None likewise.
    """
    frames = min(len(a), len(b))
    a, b = np.asarray(a[:frames], np.float64), np.asarray(b[:frames], np.float64)
    both = (a > 0) & (b > 0)
    voicing = float(np.mean((a > 0) == (b > 0))) if frames else None
    found = {"voicing_agreement": voicing, "f0_correlation": None, "f0_semitones": None}
    if both.sum() < MIN_VOICED:
        return found
    a, b = a[both], b[both]
    found["f0_semitones"] = float(np.median(np.abs(12.0 * np.log2(a / b))))
    if min(np.ptp(a), np.ptp(b)) > 0:
        found["f0_correlation"] = float(np.corrcoef(a, b)[0, 1])
    return found


def compare(
    recording: np.ndarray, versions: Mapping[str, np.ndarray], mel: MelConfig
) -> dict[str, dict[str, float | None]]:
    """Each version beside the recording.

    Args:
      recording: float [T] at `mel.sample_rate`.
      versions: name -> float [T_i] at that rate, aligned with it at the start.
      mel: of the distance; its rate and hop are also those of F0.

    Returns:
      Name -> mel_distance and the figures of `pitch_agreement`; of 'stream' also
      mel_distance_from_whole, that from 'both'.
    """
    padded, lengths = _padded([recording, *versions.values()], mel)
    mels, pitches = map(np.asarray, _mel_and_f0(padded, lengths, mel))
    frames = lengths // mel.hop
    spectra, courses = (
        [row[:n] for row, n in zip(found, frames, strict=True)] for found in (mels, pitches)
    )
    spectrum_of = dict(zip(versions, spectra[1:], strict=True))
    found = {
        name: {"mel_distance": mel_distance(spectra[0], spectrum)}
        | pitch_agreement(courses[0], course)
        for (name, spectrum), course in zip(spectrum_of.items(), courses[1:], strict=True)
    }
    if {"both", "stream"} <= set(versions):
        distance = mel_distance(spectrum_of["both"], spectrum_of["stream"])
        found["stream"]["mel_distance_from_whole"] = distance
    return found


def log_mel(samples: np.ndarray, mel: MelConfig) -> np.ndarray:
    """`features.mel_spectrogram` of float [T], compiled for few lengths: float32 [T // hop, M]."""
    return np.asarray(_mel(*_padded([samples], mel), mel))[0, : len(samples) // mel.hop]


def _padded(rows: Sequence[np.ndarray], mel: MelConfig):
    """(float32 [B, T], lengths int32 [B]), T a multiple of _PADDED_SECONDS."""
    step = round(_PADDED_SECONDS * mel.sample_rate)
    size = -(-max(map(len, rows)) // step) * step
    padded = np.stack([np.pad(np.asarray(row, np.float32), (0, size - len(row))) for row in rows])
    return padded, np.array([len(row) for row in rows], np.int32)


@functools.partial(jax.jit, static_argnames="mel")
def _mel(samples, lengths, mel: MelConfig):
    return mel_spectrogram(samples, mel, lengths)


@functools.partial(jax.jit, static_argnames="mel")
def _mel_and_f0(samples, lengths, mel: MelConfig):
    f0 = F0Config(sample_rate=mel.sample_rate, hop=mel.hop)
    return mel_spectrogram(samples, mel, lengths), estimate_f0(samples, f0)


def without_codebook(flow: nnx.Module, first: int, counts: np.ndarray) -> nnx.Module:
    """A copy of a flow that cannot tell the codes of one codebook from each other.

    Their vectors are replaced by the mean vector: nothing of that stream reaches the mel, and the
    network still sees what it saw in training on average.

    Args:
      flow: `FlowMatching` or `PairedFlow`.
      first: row of the codebook's first code in the flow's table.
      counts: [codes], how often each code occurs; the weights of the mean.
    """
    copy = nnx.clone(flow)
    rows = slice(first, first + len(counts))
    weights = np.asarray(counts, np.float32) / np.sum(counts)
    table = copy.embedding.embedding
    table[...] = table[...].at[rows].set(weights @ table[...][rows])
    return copy


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | int | None]:
    """Figures of all clips, `<version>_<figure>`.

    Error rates are pooled over all words or characters; all else is the mean over the clips that
    have it.

    Args:
      rows: one a clip: version -> what `Judges.listen`, `word_errors`, `character_errors` (both
        missing where there is no text) and `compare` gave.
    """
    figures: dict[str, float | int | None] = {"clips": len(rows)}
    for version in VERSIONS:
        judged = [row[version] for row in rows]
        for name, errors, whole in (
            ("wer", "word_errors", "words"), ("cer", "character_errors", "characters"),
        ):  # fmt: skip
            known = [one for one in judged if errors in one]
            rate = ratio(sum(one[errors] for one in known), sum(one[whole] for one in known))
            figures[f"{version}_{name}"] = rate
        figures[f"{version}_dnsmos"] = mean(one["mos"] for one in judged)
        if version == "recording":
            continue
        figures[f"{version}_speaker_similarity"] = mean(one["similarity"] for one in judged)
        for name in ("mel_distance", "f0_correlation", "f0_semitones", "voicing_agreement"):
            figures[f"{version}_{name}"] = mean(one[name] for one in judged)
    distances = (row["stream"]["mel_distance_from_whole"] for row in rows)
    return figures | {"stream_mel_distance_from_whole": mean(distances)}
