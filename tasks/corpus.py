"""The tokenised corpora of a run as clips, questions and their answers. No TensorFlow here.

Reads `<run_dir>/tokens/<corpus>/` (clips as two code streams),
`<run_dir>/corpus/<corpus>/questions.jsonl` and `<run_dir>/texts/` (documents). An answer belongs to
the question of the same question_id, whichever voice asked it; the split is that of the question
clip. Whole corpora are never held in memory: clips are streamed, only the answers of a split are
joined by an index.
"""

import functools
import logging
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from t5x_audio.data import corpus as corpora
from t5x_audio.data import documents, images, records
from t5x_audio.errors import UserError
from t5x_audio.sequences.vocabulary import Vocabulary
from t5x_audio.tokenizers import dual_codebook

BASE_VOICE = "joe"
_log = logging.getLogger(__name__)


class Clip(NamedTuple):
    """A tokenised recording; codes are flat local codes int32[5 g]."""

    id: str
    text: str
    codes: np.ndarray
    speaker: str
    role: str
    question_id: str
    category: str


class SpokenQuestion(NamedTuple):
    """A question as one speaker asked it, and its answer in the base voice.

    `question` is the row of questions.jsonl: id, category, question, answer, short_answer.
    """

    question: dict
    asked: Clip
    answered: Clip


class TokenCorpus:
    """What the tasks read. Everything comes in stored order, so it is the same every time."""

    def __init__(self, run_dir: str, vocabulary: Vocabulary):
        """UserError when nothing has been tokenised under `run_dir`."""
        self.run_dir, self.vocabulary = run_dir, vocabulary
        root = os.path.join(run_dir, "tokens")
        names = sorted(os.listdir(root)) if os.path.isdir(root) else []
        self._directories = [os.path.join(root, name) for name in names if name[0] != "."]
        if not any(self._files(split) for split in records.SPLITS):
            raise UserError(f"no tokens under {root}: run t5x_audio.tokenize_corpus")

    def _files(self, split: str) -> list[str]:
        return [d for d in self._directories if os.path.isdir(d) and records.has_split(d, split)]

    def source_files(self) -> list[str]:
        """Every file that the tasks are made of, for telling whether a cache is up to date."""
        files = [p for d in self._directories for s in records.SPLITS for p in _shards(d, s)]
        files += [
            p
            for d in documents.finished(self.run_dir)
            for s in records.SPLITS
            for p in _shards(d, s)
        ]
        files += [os.path.join(d, corpora.QUESTIONS_FILE) for d in self._question_dirs()]
        return files + images.source_files(self.run_dir)

    def clips(self, split: str) -> Iterator[Clip]:
        """All clips of a split, corpus by corpus."""
        for directory in self._files(split):
            for record in records.open_records(directory, split):
                yield self._clip(record, directory)

    def _clip(self, record: dict, directory: str) -> Clip:
        try:
            codes = dual_codebook.merge(
                record["linguistic"], record["semantic"], self.vocabulary.linguistic_size
            )
            others = [record[name] for name in Clip._fields if name != "codes"]
        except KeyError as error:
            raise UserError(
                f"{directory}: record {record.get('id', '?')} lacks {error}; "
                "run t5x_audio.tokenize_corpus again"
            ) from None
        return Clip(*others[:2], codes, *others[2:])

    def _question_dirs(self) -> list[str]:
        root = os.path.join(self.run_dir, "corpus")
        dirs = [os.path.join(root, os.path.basename(d)) for d in self._directories]
        return [d for d in dirs if os.path.exists(os.path.join(d, corpora.QUESTIONS_FILE))]

    @functools.cached_property
    def questions(self) -> dict[str, dict]:
        """Rows of every questions.jsonl by id."""
        rows = [row for d in self._question_dirs() for row in corpora.read_questions(d)]
        return {row["id"]: row for row in rows}

    def typed_questions(self, split: str) -> Iterator[dict]:
        """Each question once; the held-out ones serve validation and test alike."""
        train = split == "train"
        return (row for row in self.questions.values() if (row["split"] == "train") == train)

    def documents(self, split: str) -> Iterator[dict]:
        """{id, text} of every document that was imported, collection by collection."""
        for directory in documents.finished(self.run_dir):
            if records.has_split(directory, split):
                yield from records.open_records(directory, split)

    def spoken_questions(self, split: str) -> Iterator[SpokenQuestion]:
        """Each (question, speaker) of the split once, with its answer clip.

        Questions whose answer clip is missing are left out, with a notice that counts them.
        """
        answers = self._answers
        seen, unanswered = set(), 0
        for clip in self.clips(split):
            key = (clip.question_id, clip.speaker)
            if clip.role != "question" or key in seen:
                continue
            seen.add(key)
            if clip.question_id in answers and clip.question_id in self.questions:
                answered = answers[clip.question_id]
                yield SpokenQuestion(self.questions[clip.question_id], clip, answered)
            else:
                unanswered += 1
        if unanswered:
            _log.warning("%d questions of split %s have no answer clip", unanswered, split)

    @functools.cached_property
    def _answers(self) -> dict[str, Clip]:
        """Answer clips by question id, over all splits; the base voice before any other."""
        found = {}
        for split in records.SPLITS:
            for clip in self.clips(split):
                if clip.role == "answer":
                    known = found.get(clip.question_id)
                    if known is None or (clip.speaker == BASE_VOICE != known.speaker):
                        found[clip.question_id] = clip
        return found


def _shards(directory: str, split: str) -> list[str]:
    return records.shard_paths(directory, split) if os.path.isdir(directory) else []
