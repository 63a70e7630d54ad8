"""Those who listen to speech: an independent recogniser, a judge of quality, a judge of voices.

What they are is decided by the job that makes them; here is how a set of recordings is shown to
them, and what is made of their answers. Words are compared by sound: no recogniser can hear the
difference between words of one sound.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from t5x_audio.audio import io
from t5x_audio.data.text_normalization import sounds_like
from t5x_audio.evaluation import wer
from t5x_audio.evaluation.similarity import cosine

JUDGE_RATE = 16000


@dataclasses.dataclass(frozen=True)
class Judges:
    """Those who listen, all to float32 [T] at 16 kHz.

    Attributes:
      transcribe: recordings -> what is heard in each.
      mos: recording -> DNSMOS overall quality, 1 to 5. Costs seconds a recording.
      embed: recordings -> speaker embeddings [N, D] of unit length.
      voice: [D], embedding of the reference voice; None where each recording has its own.
      num_rated: only the first so many recordings of a kind get a DNSMOS; None = all.
    """

    transcribe: Callable[[Sequence[np.ndarray]], Sequence[str]]
    mos: Callable[[np.ndarray], float]
    embed: Callable[[Sequence[np.ndarray]], np.ndarray]
    voice: np.ndarray | None = None
    num_rated: int | None = None

    def listen(
        self, recordings: Sequence[np.ndarray], voices: Sequence[np.ndarray] | None = None
    ) -> list[dict[str, Any]]:
        """Judges each recording.

        Args:
          recordings: float32 [T_i] at 16 kHz; one without a sample is heard as nothing.
          voices: [D] each, whose voice it should be; None = `voice` for all.

        Returns:
          Rows of heard, audible, and mos and similarity, which are None where there is no sound or
          no rating.
        """
        found = [i for i, samples in enumerate(recordings) if audible(samples)]
        silence = {"heard": "", "audible": False, "mos": None, "similarity": None}
        rows = [silence] * len(recordings)
        rated = len(recordings) if self.num_rated is None else self.num_rated
        if found:
            sound = [recordings[i] for i in found]
            transcripts, embeddings = self.transcribe(sound), self.embed(sound)
            for i, heard, embedding in zip(found, transcripts, embeddings, strict=True):
                rows[i] = {
                    "heard": heard,
                    "audible": True,
                    "mos": float(self.mos(recordings[i])) if i < rated else None,
                    "similarity": cosine(embedding, self.voice if voices is None else voices[i]),
                }
        return rows


def audible(samples: np.ndarray) -> bool:
    """Whether there is anything to judge: a tenth of a second that is not silence."""
    return len(samples) >= JUDGE_RATE // 10 and float(np.abs(samples).max()) > io.SILENCE_PEAK


def word_errors(heard: str, text: str) -> dict[str, int]:
    """{word_errors, words} of a transcript where `text` was said."""
    counts = wer.count_errors(sounds_like(text), sounds_like(heard))
    return {"word_errors": counts.errors, "words": counts.words}


def character_errors(heard: str, text: str) -> dict[str, int]:
    """{character_errors, characters} of a transcript where `text` was said; spaces count."""
    counts = wer.count_character_errors(sounds_like(text), sounds_like(heard))
    return {"character_errors": counts.errors, "characters": counts.words}


def reference_voice(embed, recordings: Sequence[np.ndarray]) -> np.ndarray:
    """Embedding [D] of a voice from its recordings: the mean of theirs, of unit length."""
    mean = np.mean(embed([samples for samples in recordings if audible(samples)]), axis=0)
    return mean / np.linalg.norm(mean)


def in_batches(embed, recordings: Sequence[np.ndarray], size: int) -> np.ndarray:
    """embed(recordings) [N, D], called with `size` recordings of like length at a time.

    The last batch is filled up with its own last recording, so that few shapes are compiled.
    """
    order = sorted(range(len(recordings)), key=lambda i: len(recordings[i]))
    found = {}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        filled = batch + [batch[-1]] * (size - len(batch))
        found |= zip(batch, embed([recordings[i] for i in filled]), strict=False)
    return np.stack([found[i] for i in range(len(recordings))])


def mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are known; None when none is."""
    known = [float(value) for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def ratio(part: float, whole: float) -> float | None:
    """part / whole; None of nothing."""
    return part / whole if whole else None
