"""The spoken question-and-answer corpus, from the seed to the record files.

The plan is a list of clips: every training question in some of the training voices, every held-out
question in one training voice (split 'validation') and in the test voice (split 'test'), every
distinct answer and every reading (readings.py) once in the base voice. It is worked off in batches:
speak, vary the voice, let the recogniser check, store. A batch is one file in the work directory,
so an interruption costs at most one batch; a clip that fails is spoken again, and what fails every
time is dropped. A question stays when its answer and at least one of its clips (held out: the one
in the test voice) stay.

Questions with the same answer share its recording. The voice is a GPL program that is only run,
the data of the voice is CC0 (see speak.py).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from t5x_audio.audio import io
from t5x_audio.data import corpus, records
from t5x_audio.data.engine import check, readings, variants, world
from t5x_audio.errors import UserError

_VALIDATION_SHARE = 0.05  # of the readings
LICENCE = "generated; voice en_US-joe-medium (data CC0, package MIT) spoken by piper"


@dataclasses.dataclass(frozen=True)
class PlannedClip:
    """A clip to be made. `text` is what the check compares, `spoken` what the voice is given."""

    question_id: str
    role: str
    split: str
    speaker: str
    category: str
    text: str
    spoken: str
    take: int = 0

    @property
    def id(self) -> str:
        """Unique in its split."""
        return f"{self.question_id}-{self.role}-{self.speaker}"


@dataclasses.dataclass(frozen=True)
class SpokenQuestions:
    """The dials of the corpus.

    Attributes:
      num_questions, num_test_questions, fact_share, seed: see `world.make_questions`.
      num_readings: sentences that the base voice reads besides; see `readings.make_readings`.
      num_voices: training voices, the base voice included.
      voices_per_question: training voices a training question is spoken in; 1.5 = one or two.
      length_scale: duration of the voice's sounds in questions; below 1 is faster.
      answer_length_scale: the same in answers and readings, which a model learns to say: unhurried,
        so that a short sound has a code or two of its own.
      question_noise, answer_noise: how much takes differ (piper's noise scale and duration noise).
        Answers vary less: the codes of equal sounds should be equal.
      retakes: how often a clip that fails the check is spoken again.
      batch_size: texts spoken by one start of the voice; also what an interruption may cost.
      num_shards: files a split.
    """

    num_questions: int = 1600
    num_test_questions: int = 120
    fact_share: float = 0.17
    seed: int = 0
    num_readings: int = 0
    num_voices: int = 6
    voices_per_question: float = 3.5
    length_scale: float = 0.9
    answer_length_scale: float = 1.1
    question_noise: tuple[float, float] = (0.667, 0.8)
    answer_noise: tuple[float, float] = (0.2, 0.2)
    retakes: int = 2
    batch_size: int = 48
    num_shards: int = 1

    def build(self, directory: str, work_dir: str, voice, recognizer) -> dict:
        """Makes the corpus, or returns the summary of a finished one.

        Args:
          directory: of the corpus.
          work_dir: of the batches; removed at the end.
          voice: `speak.Piper`, or anything with its `speak`.
          recognizer: `recognizer.Recognizer`, or anything with its `transcribe`.

        Returns:
          The summary of `corpus.write_corpus` with `made`, `kept` and `dropped` clips a category.

        Raises:
          UserError: the voice fails, the disk is full, or (almost) nothing passes the check.
        """
        if finished := corpus.read_summary(directory):
            return finished
        questions = world.make_questions(
            self.num_questions, self.num_test_questions, self.fact_share, self.seed
        )
        planned = plan_clips(questions, self.num_voices, self.voices_per_question)
        planned += plan_readings(readings.make_readings(questions, self.num_readings, self.seed))
        os.makedirs(work_dir, exist_ok=True)
        files = self._make(planned, work_dir, voice, recognizer)
        summary = self._write(directory, questions, planned, files)
        shutil.rmtree(work_dir)
        return summary

    def _make(self, planned: list[PlannedClip], work_dir: str, voice, recognizer) -> list[str]:
        """Works off the plan and its retakes; returns the batch files."""
        files, todo = [], planned
        with tqdm(total=len(planned), unit="clip", desc="speak and check") as progress:
            for take in range(self.retakes + 1):
                todo = [dataclasses.replace(clip, take=take) for clip in todo]
                failed = []
                for batch in batches(todo, self.batch_size):
                    path = os.path.join(work_dir, f"{self._digest(batch)}.npz")
                    if not os.path.exists(path):
                        self._make_batch(batch, path, voice, recognizer)
                    kept = set(_stored_ids(path))
                    files.append(path)
                    failed += [clip for clip in batch if _key(clip) not in kept]
                    progress.update(len(kept))
                todo = failed
            progress.set_postfix_str(f"{len(todo)} dropped")
        return files

    def _digest(self, batch: list[PlannedClip]) -> str:
        settings = self._manner(batch)
        voices = {clip.speaker: dataclasses.asdict(variants.VOICES[clip.speaker]) for clip in batch}
        content = [settings, voices, [dataclasses.astuple(clip) for clip in batch]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]

    def _manner(self, batch: list[PlannedClip]) -> dict:
        """How the voice speaks a batch, which is of one role."""
        asks = batch[0].role == "question"
        noise_scale, duration_noise = self.question_noise if asks else self.answer_noise
        return {
            "length_scale": self.length_scale if asks else self.answer_length_scale,
            "noise_scale": noise_scale,
            "duration_noise": duration_noise,
        }

    def _make_batch(self, batch: list[PlannedClip], path: str, voice, recognizer) -> None:
        """Speaks, varies, checks and stores what passes."""
        lines = list(dict.fromkeys(clip.spoken for clip in batch))
        takes = voice.speak(lines, work_dir=os.path.dirname(path), **self._manner(batch))
        said = dict(zip(lines, takes, strict=True))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # Fourier transforms mostly
            audio = list(pool.map(lambda c: variants.VOICES[c.speaker](said[c.spoken]), batch))
        right = check.confirm(audio, [clip.text for clip in batch], recognizer)
        kept = {
            _key(clip): io.to_int16(samples)
            for clip, samples, passed in zip(batch, audio, right, strict=True)
            if passed
        }
        try:
            with open(f"{path}.writing", "wb") as file:
                np.savez(file, **kept)
            os.replace(f"{path}.writing", path)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); free some disk"
            ) from error

    def _write(self, directory, questions, planned, files) -> dict:
        stored = {key: path for path in files for key in _stored_ids(path)}
        passed = [clip for clip in planned if _key(clip) in stored]
        asked = {(c.question_id, c.split) for c in passed if c.role == "question"}
        questions = [
            q for q in questions if f"answer {q.answer}" in stored and (q.id, q.split) in asked
        ]
        if not any(q.split == "train" for q in questions):
            raise UserError("the recogniser confirmed no training clip; is the voice broken?")
        rows = {question.id: question for question in questions}
        clips = {s: _clips(s, rows, passed, stored) for s in records.SPLITS}
        info = {
            "licence": LICENCE,
            "questions": len(questions),
            "test_questions": sum(q.split == "test" for q in questions),
            "dropped_questions": self.num_questions - len(questions),
            "checked": _tally(planned, stored),
            "settings": dataclasses.asdict(self),
        }
        return corpus.write_corpus(
            directory,
            clips,
            num_shards=self.num_shards,
            questions=[question.to_row() for question in questions],
            info=info,
        )


def plan_clips(
    questions: list[world.Question], num_voices: int, voices_per_question: float
) -> list[PlannedClip]:
    """Every clip to be made: the questions' in their order, then one an answer text."""
    voices = variants.training_voices(num_voices)
    if not 1 <= voices_per_question <= num_voices:
        raise UserError(
            f"voices_per_question={voices_per_question} must be within 1..num_voices={num_voices}"
        )
    planned, turn, train_index = [], 0, 0
    for question in questions:
        if question.split == "train":
            due = int((train_index + 1) * voices_per_question)
            count = due - int(train_index * voices_per_question)
            train_index += 1
        else:
            count = 1
            planned.append(_ask(question, "test", variants.TEST_VOICE))
        split = "train" if question.split == "train" else "validation"
        for _ in range(count):
            planned.append(_ask(question, split, voices[turn % num_voices]))
            turn += 1
    for question in {q.answer: q for q in reversed(questions)}.values():
        planned.append(
            PlannedClip(
                question_id=question.id,
                role="answer",
                split=question.split,
                speaker=variants.BASE_VOICE,
                category=question.category,
                text=question.answer,
                spoken=question.spoken_answer,
            )
        )
    return planned


def plan_readings(sentences: list[readings.Reading]) -> list[PlannedClip]:
    """One clip a sentence in the base voice; a few of them are for validation."""
    return [
        PlannedClip(
            question_id=reading.id,
            role="utterance",
            split=corpus.split_of(reading.id, _VALIDATION_SHARE, 0.0),
            speaker=variants.BASE_VOICE,
            category=readings.CATEGORY,
            text=reading.text,
            spoken=reading.spoken,
        )
        for reading in sentences
    ]


def _ask(question: world.Question, split: str, speaker: str) -> PlannedClip:
    return PlannedClip(
        question_id=question.id,
        role="question",
        split=split,
        speaker=speaker,
        category=question.category,
        text=question.question,
        spoken=question.spoken_question,
    )


def batches(planned: list[PlannedClip], size: int) -> Iterator[list[PlannedClip]]:
    """Groups of `size` distinct texts of one role with all their clips, one voice after another."""
    for role in corpus.ROLES:
        texts = {}
        for clip in planned:
            if clip.role == role:
                texts.setdefault(clip.spoken, []).append(clip)
        groups = list(texts.values())
        for start in range(0, len(groups), size):
            batch = [clip for group in groups[start : start + size] for clip in group]
            # Equal texts are kept apart, as `check.confirm` asks for.
            yield sorted(batch, key=lambda clip: list(variants.VOICES).index(clip.speaker))


def _key(clip: PlannedClip) -> str:
    """Name of a finished clip; questions with one answer text share a key."""
    if clip.role == "answer":
        return f"answer {clip.text}"
    return f"{clip.split} {clip.id}"


def _stored_ids(path: str) -> list[str]:
    try:
        with np.load(path) as archive:
            return archive.files
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged; delete it and start again") from error


def _tally(planned: list[PlannedClip], stored: dict[str, str]) -> dict[str, dict[str, int]]:
    """Clips made, kept and dropped a category."""
    tally = {}
    for clip in planned:
        counts = tally.setdefault(clip.category, {"made": 0, "kept": 0, "dropped": 0})
        counts["made"] += 1
        counts["kept" if _key(clip) in stored else "dropped"] += 1
    return tally


def _clips(split, rows, passed, stored) -> Iterator[corpus.Clip]:
    """The clips of one split, read from the batch files one at a time."""
    answered = set()
    with contextlib.ExitStack() as stack:
        paths = sorted(set(stored.values()))
        archives = {path: stack.enter_context(np.load(path)) for path in paths}
        for planned in passed:
            key = _key(planned)
            if planned.role == "utterance" and planned.split == split:
                yield _reading(planned, archives[stored[key]][key])
            question = rows.get(planned.question_id)
            if planned.role != "question" or planned.split != split or question is None:
                continue
            audio = archives[stored[key]][key]
            yield _clip(planned.id, audio, planned.speaker, "question", question)
            if question.id not in answered:
                answered.add(question.id)
                key = f"answer {question.answer}"
                audio = archives[stored[key]][key]
                yield _clip(f"{question.id}-answer", audio, variants.BASE_VOICE, "answer", question)


def _reading(planned: PlannedClip, audio) -> corpus.Clip:
    return corpus.Clip(
        id=planned.question_id,
        audio=audio,
        text=planned.text,
        speaker=planned.speaker,
        category=planned.category,
    )


def _clip(name: str, audio, speaker: str, role: str, question: world.Question) -> corpus.Clip:
    return corpus.Clip(
        id=name,
        audio=audio,
        text=question.question if role == "question" else question.answer,
        speaker=speaker,
        role=role,
        question_id=question.id,
        category=question.category,
    )
