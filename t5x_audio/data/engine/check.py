"""Does a clip say its text? A recogniser listens; what it does not confirm is dropped.

A recogniser's call costs the same for 1 s as for 30 s, so clips are joined, with pauses, into
pieces of up to 28 s and the words heard are aligned with the words expected. Only clips that touch
a difference are heard again alone; a clip is right when either hearing agrees by sound
(`text_normalization.same_sound`).
"""

import difflib
from collections.abc import Sequence

import numpy as np

from t5x_audio.data.text_normalization import same_sound, sounds_like

RATE = 16000
MAX_PIECE_SECONDS = 28.0
PAUSE_SECONDS = 0.5


def confirm(waveforms: Sequence[np.ndarray], texts: Sequence[str], recognizer) -> list[bool]:
    """Which clips say their texts.

    Args:
      waveforms: float [T] at 16 kHz each.
      texts: what each should say. Put equal texts far apart: of two equal neighbours of which one
        is silent, the wrong one could be blamed.
      recognizer: has `transcribe(list of waveforms) -> list of texts`.
    """
    pieces = pack([len(samples) / RATE for samples in waveforms])
    heard = recognizer.transcribe([_join([waveforms[i] for i in piece]) for piece in pieces])
    right = [False] * len(waveforms)
    for piece, words in zip(pieces, heard, strict=True):
        for i, agrees in zip(piece, agreement([texts[i] for i in piece], words), strict=True):
            right[i] = agrees
    doubtful = [i for i, agrees in enumerate(right) if not agrees]
    alone = recognizer.transcribe([waveforms[i] for i in doubtful])
    for i, words in zip(doubtful, alone, strict=True):
        right[i] = same_sound(texts[i], words)
    return right


def pack(durations: Sequence[float]) -> list[list[int]]:
    """Groups clips, in order, into pieces of at most MAX_PIECE_SECONDS with their pauses.

    A longer clip is a piece of its own.
    """
    pieces, used = [], float("inf")
    for i, seconds in enumerate(durations):
        seconds += PAUSE_SECONDS
        if used + seconds > MAX_PIECE_SECONDS:
            pieces.append([])
            used = 0.0
        pieces[-1].append(i)
        used += seconds
    return pieces


def agreement(expected: Sequence[str], heard: str) -> list[bool]:
    """For each expected text, whether its words were heard in their place with nothing added."""
    texts = [sounds_like(text).split() for text in expected]
    ends = np.cumsum([len(words) for words in texts])
    starts = ends - [len(words) for words in texts]
    wanted = [word for words in texts for word in words]
    right = np.ones(len(texts), bool)
    matcher = difflib.SequenceMatcher(None, wanted, sounds_like(heard).split(), autojunk=False)
    for kind, first, last, heard_first, heard_last in matcher.get_opcodes():
        if kind == "equal":
            continue
        if heard_last - heard_first > last - first:
            # A word too many at a border belongs to either neighbour.
            right &= (ends < first) | (starts > last)
        else:
            right &= (ends <= first) | (starts >= last)
    return [bool(agrees) and bool(words) for agrees, words in zip(right, texts, strict=True)]


def _join(waveforms: Sequence[np.ndarray]) -> np.ndarray:
    pause = np.zeros(int(PAUSE_SECONDS * RATE), np.float32)
    return np.concatenate([part for samples in waveforms for part in (samples, pause)])
