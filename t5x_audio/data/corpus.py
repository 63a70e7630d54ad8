"""A corpus on disk: clips of speech with their texts, in splits.

`<dir>/<split>-*.array_record` holds one clip a record; `<dir>/questions.jsonl`, for a
question-and-answer corpus, one question a line; `<dir>/corpus.json`, written last, says that the
corpus is whole and gives its figures. A clip is audio int16[T] at 16 kHz mono with id, text,
speaker, role, question_id, category and duration in seconds.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from t5x_audio.audio import io
from t5x_audio.data import records
from t5x_audio.errors import UserError

RATE = 16000
ROLES = ("question", "answer", "utterance")
QUESTIONS_FILE = "questions.jsonl"
SUMMARY_FILE = "corpus.json"
QUARANTINE_FILE = "quarantine.jsonl"


@dataclasses.dataclass(frozen=True)
class Clip:
    """One recording.

    Attributes:
      id: unique within a split; joins a clip with its tokens.
      audio: int16[T] at 16 kHz.
      text: what is said, normalised.
      speaker: name of the voice.
      role: 'question', 'answer' or 'utterance'.
      question_id: the question it asks or answers; '' for none.
      category: kind of question, or 'reading'; '' for none.
    """

    id: str
    audio: np.ndarray
    text: str
    speaker: str
    role: str = "utterance"
    question_id: str = ""
    category: str = ""

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"clip {self.id}: role '{self.role}' is none of {ROLES}")
        if self.audio.dtype != np.int16 or self.audio.ndim != 1 or not self.audio.size:
            raise ValueError(f"clip {self.id}: audio must be int16[T], not {self.audio.dtype}")

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.audio.size / RATE

    @property
    def samples(self) -> np.ndarray:
        """The audio as float32[T] in [-1, 1)."""
        return io.to_float32(self.audio)

    def to_record(self) -> dict:
        """The flat dict that is stored."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {"duration": self.duration}

    @classmethod
    def from_record(cls, record: Mapping) -> "Clip":
        """Inverse of `to_record`. UserError when a field is missing."""
        try:
            return cls(**{f.name: record[f.name] for f in dataclasses.fields(cls)})
        except KeyError as error:
            raise UserError(f"record {record.get('id', '?')}: is no clip, lacks {error}") from error


def split_of(clip_id: str, validation: float, test: float) -> str:
    """Split by a hash of the id: the same whatever else the corpus holds.

    Args:
      clip_id: any text.
      validation, test: shares in [0, 1); the rest is train.
    """
    place = int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:8], "big") / 2**64
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def iterate_clips(directory: str, split: str) -> Iterator[Clip]:
    """The clips of a split in stored order. UserError when it is missing or damaged."""
    return (Clip.from_record(record) for record in records.open_records(directory, split))


def read_questions(directory: str) -> list[dict]:
    """The rows of questions.jsonl. UserError, naming the row, when it is missing or damaged."""
    path = os.path.join(str(directory), QUESTIONS_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run prepare_data") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON; make the corpus again") from error
    return rows


def read_summary(directory: str) -> dict | None:
    """The figures of a whole corpus, or None when it is absent or unfinished."""
    path = os.path.join(str(directory), SUMMARY_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def finished_corpora(root: str) -> list[str]:
    """Directories of the whole corpora under `root`, sorted. UserError when there is none."""
    try:
        names = sorted(os.listdir(root))
    except OSError:
        names = []
    found = [os.path.join(root, name) for name in names]
    found = [directory for directory in found if read_summary(directory) is not None]
    if not found:
        raise UserError(f"{root}: holds no finished corpus; run prepare_data first")
    return found


def write_corpus(
    directory: str,
    clips: Mapping[str, Iterable[Clip]],
    *,
    num_shards: int = 1,
    questions: list[dict] | None = None,
    info: Mapping | None = None,
) -> dict:
    """Writes a whole corpus; the summary comes last, so that a cut-off one is seen as unfinished.

    Args:
      directory: made when missing.
      clips: split -> clips in a reproducible order; read once, one clip at a time.
      num_shards: files a split.
      questions: rows for questions.jsonl.
      info: further facts for the summary: source, licence, what was dropped.

    Returns:
      The summary: clips and hours per split and in all, and `info`.
    """
    directory, counts = str(directory), {}
    for split, stream in clips.items():
        count, seconds = 0, 0.0
        with records.RecordWriter(directory, split, num_shards) as writer:
            for clip in stream:
                writer.write(clip.to_record())
                count, seconds = count + 1, seconds + clip.duration
        counts[split] = (count, seconds)
    if questions is not None:
        lines = "".join(json.dumps(row) + "\n" for row in questions)
        write_text(os.path.join(directory, QUESTIONS_FILE), lines)
    return write_summary(directory, counts, info)


def write_summary(
    directory: str, counts: Mapping[str, tuple[int, float]], info: Mapping | None = None
) -> dict:
    """Writes corpus.json, which makes a corpus whole; returns what `read_summary` will.

    Args:
      directory: of the corpus.
      counts: split -> (clips, seconds).
      info: further facts.
    """
    splits = {
        split: {"clips": number, "hours": round(seconds / 3600, 4)}
        for split, (number, seconds) in counts.items()
    }
    summary = {
        "clips": sum(number for number, _ in counts.values()),
        "hours": round(sum(seconds for _, seconds in counts.values()) / 3600, 4),
        "splits": splits,
    }
    text = json.dumps(summary | dict(info or {}), indent=1)
    write_text(os.path.join(directory, SUMMARY_FILE), text + "\n")
    return json.loads(text)


def write_quarantine(directory: str, rows: Iterable[Mapping]) -> None:
    """Writes quarantine.jsonl: {split, id, reason} of every recording that was left out."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_text(os.path.join(str(directory), QUARANTINE_FILE), lines)


def write_text(path: str, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    temporary = f"{path}.writing"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)
