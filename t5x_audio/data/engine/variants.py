"""More speakers from one voice: fixed changes of speed, pitch and vocal tract, each with a name.

The parameters are part of the corpus: changing them makes another corpus. The voice for testing
has parameters of its own, inside the range of the training voices in each of the three, so that it
is a new speaker and not a new kind of speaker.
"""

import dataclasses

import numpy as np

from t5x_audio.audio import transforms
from t5x_audio.errors import UserError


@dataclasses.dataclass(frozen=True)
class Variant:
    """A speaker derived from the base voice.

    Attributes:
      speed: tempo relative to the base voice; 1.1 is faster.
      semitones: shift of the pitch.
      tract: shift of the formants; above 1 is a shorter vocal tract.
    """

    speed: float = 1.0
    semitones: float = 0.0
    tract: float = 1.0

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """float32[T] at 16 kHz -> float32[T / speed], peak at most 0.99."""
        changed = transforms.change_speed(samples, self.speed)
        changed = transforms.change_pitch(changed, self.semitones)
        changed = transforms.change_vocal_tract(changed, self.tract)
        return changed / max(1.0, float(np.abs(changed).max(initial=0.0)) / 0.99)


BASE_VOICE = "joe"
# In the order in which they join a growing corpus.
TRAINING_VOICES = {
    "joe": Variant(),
    "kim": Variant(speed=1.08, semitones=3.5, tract=1.15),
    "lee": Variant(speed=0.92, semitones=-3.0, tract=0.90),
    "max": Variant(speed=1.15, semitones=-1.5, tract=0.94),
    "ann": Variant(speed=0.95, semitones=2.5, tract=1.10),
    "sam": Variant(speed=1.00, semitones=1.5, tract=0.96),
}
TEST_VOICE = "eve"
VOICES = TRAINING_VOICES | {TEST_VOICE: Variant(speed=1.03, semitones=2.0, tract=1.07)}


def training_voices(count: int) -> list[str]:
    """The first `count` training voices; the base voice is the first. UserError out of range."""
    if not 1 <= count <= len(TRAINING_VOICES):
        raise UserError(f"num_voices: there are 1 to {len(TRAINING_VOICES)} voices, not {count}")
    return list(TRAINING_VOICES)[:count]
