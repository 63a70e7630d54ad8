"""Word and character error rates: edits of a whole set over its reference words.

Counts come from jiwer's alignment. Texts must already be normalised (case, punctuation, numbers):
how is a choice of the task, not of the measure.
"""

import dataclasses
from collections.abc import Sequence

import jiwer

from t5x_audio.errors import UserError


@dataclasses.dataclass(frozen=True)
class ErrorCounts:
    """Edits that turn a reference into a hypothesis, in words (or characters)."""

    substitutions: int
    deletions: int
    insertions: int
    words: int  # in the reference

    @property
    def errors(self) -> int:
        """All edits."""
        return self.substitutions + self.deletions + self.insertions


def count_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Edits between two normalised texts, in words; either may be empty."""
    return _count([reference], [hypothesis], jiwer.process_words)


def count_character_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """As `count_errors`, in characters (spaces count)."""
    return _count([reference], [hypothesis], jiwer.process_characters)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """All word edits over all reference words, so that long utterances weigh more.

    Args:
      references: normalised texts; some may be empty (all their hypothesis words are insertions).
      hypotheses: as many, in the same order.

    Raises:
      UserError: the lists differ in length, or no reference holds a word.
    """
    return _rate(references, hypotheses, jiwer.process_words)


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """As `word_error_rate`, in characters (spaces count)."""
    return _rate(references, hypotheses, jiwer.process_characters)


def _rate(references, hypotheses, process) -> float:
    if len(references) != len(hypotheses):
        raise UserError(
            f"{len(references)} references but {len(hypotheses)} hypotheses; give one for each"
        )
    counts = _count(list(references), list(hypotheses), process)
    if counts.words == 0:
        raise UserError("no reference holds a word; an error rate needs reference transcripts")
    return counts.errors / counts.words


def _count(references, hypotheses, process) -> ErrorCounts:
    if not references:
        return ErrorCounts(0, 0, 0, 0)
    result = process(references, hypotheses)
    return ErrorCounts(
        result.substitutions,
        result.deletions,
        result.insertions,
        result.hits + result.substitutions + result.deletions,
    )
