"""Spoken questions, spoken answers: what is measured, and on which recordings.

The same judges listen to three kinds of speech, so that every number has its anchors beside it:
the model's *answers*, the true answers *resynthesised* from their codes (what tokenizer and vocoder
leave of them), and the *recordings* themselves (what the judges make of flawless speech).

- text accuracy: the text channel ends in the words that make the answer right
- heard accuracy: what an independent recogniser hears ends in those words
- word error rate: between what was written and what is heard, pooled over all words; words of one
  sound count as one word, for no recogniser can hear the difference
- DNSMOS P.835 (arXiv 2110.01763) and the cosine of GE2E embeddings (arXiv 1710.10467) to the
  reference voice

After Step-Audio's "AQTA" and resynthesis tables (arXiv 2502.11946, tables 4 and 6), with closed
questions in place of a language model's judgement.
"""

import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from t5x_audio.audio import io
from t5x_audio.data import corpus, records
from t5x_audio.data.text_normalization import sounds_like
from t5x_audio.errors import UserError
from t5x_audio.evaluation import wer
from t5x_audio.evaluation.answers import ends_in_short_answer
from t5x_audio.evaluation.similarity import cosine
from t5x_audio.tokenizers import dual_codebook

JUDGE_RATE = 16000
KINDS = ("answers", "resynthesis", "recordings")


@dataclasses.dataclass(frozen=True)
class SpokenQuestion:
    """One held-out question with its true answer.

    Attributes:
      id, category: as in the corpus.
      novelty: in what way it is new to the model; '' where the corpus does not say.
      question, answer: what is said.
      short_answer: the words in which a right answer ends.
      audio: float32 [T] at 16 kHz, the question in the voice that only tests hear.
      recording: float32 [U] at 16 kHz, the true answer.
      codes: int32 [5 g], flat local codes of the true answer.
    """

    id: str
    category: str
    novelty: str
    question: str
    answer: str
    short_answer: str
    audio: np.ndarray
    recording: np.ndarray
    codes: np.ndarray


def load_questions(
    corpus_dir, tokens_dir, linguistic_size: int, *, split: str = "test", limit: int | None = None
) -> list[SpokenQuestion]:
    """The spoken questions of a split in an order that is random but always the same.

    Args:
      corpus_dir: clips and questions.jsonl.
      tokens_dir: the same clips as codes.
      linguistic_size: rows of the linguistic codebook.
      split: "test" or "validation".
      limit: at most so many; None = all.

    Raises:
      UserError: the corpus, its tokens or a question's answer is missing.
    """
    rows = {row["id"]: row for row in corpus.read_questions(corpus_dir)}
    asked, answered = {}, {}
    for clip in corpus.iterate_clips(corpus_dir, split):
        if clip.role == "question":
            asked.setdefault(clip.question_id, clip)
        elif clip.role == "answer":
            answered.setdefault(clip.question_id, clip)
    order = sorted(asked, key=lambda name: hashlib.sha256(name.encode()).digest())[:limit]
    if not order:
        raise UserError(f"{corpus_dir}: split '{split}' holds no spoken question; make it again")
    codes = _read_codes(tokens_dir, split, linguistic_size)
    questions = []
    for name in order:
        answer = answered.get(name)
        if name not in rows or answer is None or answer.id not in codes:
            raise UserError(f"question {name} of {corpus_dir} lacks its row, answer or codes")
        row = rows[name]
        questions.append(
            SpokenQuestion(
                id=name,
                category=row["category"],
                novelty=row.get("novelty", ""),
                question=row["question"],
                answer=row["answer"],
                short_answer=row["short_answer"],
                audio=asked[name].samples,
                recording=answer.samples,
                codes=codes[answer.id],
            )
        )
    return questions


def _read_codes(tokens_dir, split: str, linguistic_size: int) -> dict[str, np.ndarray]:
    return {
        record["id"]: dual_codebook.merge(record["linguistic"], record["semantic"], linguistic_size)
        for record in records.open_records(tokens_dir, split)
        if record["role"] == "answer"
    }


@dataclasses.dataclass(frozen=True)
class Judges:
    """Those who listen, all to float32 [T] at 16 kHz.

    Attributes:
      transcribe: recordings -> what is heard in each.
      mos: recording -> DNSMOS overall quality, 1 to 5. Costs seconds a recording.
      embed: recordings -> speaker embeddings [N, D] of unit length.
      voice: [D], embedding of the reference voice.
      num_rated: only the first so many recordings of a kind get a DNSMOS; None = all.
    """

    transcribe: Callable[[Sequence[np.ndarray]], Sequence[str]]
    mos: Callable[[np.ndarray], float]
    embed: Callable[[Sequence[np.ndarray]], np.ndarray]
    voice: np.ndarray
    num_rated: int | None = None

    def listen(
        self, recordings: Sequence[np.ndarray], texts: Sequence[str], short: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Judges each recording by what it should say.

        Args:
          recordings: float32 [T_i] at 16 kHz; one without a sample is heard as nothing.
          texts: what each should say.
          short: the words that must be heard.

        Returns:
          Rows of heard, heard_right, word_errors, words, audible, and mos and similarity, which
          are None where there is no sound or no rating.
        """
        audible = [i for i, samples in enumerate(recordings) if _audible(samples)]
        silence = {"heard": "", "audible": False, "mos": None, "similarity": None}
        rows = [silence] * len(recordings)
        rated = len(recordings) if self.num_rated is None else self.num_rated
        if audible:
            sound = [recordings[i] for i in audible]
            transcripts, embeddings = self.transcribe(sound), self.embed(sound)
            for i, heard, embedding in zip(audible, transcripts, embeddings, strict=True):
                rows[i] = {
                    "heard": heard,
                    "audible": True,
                    "mos": float(self.mos(recordings[i])) if i < rated else None,
                    "similarity": cosine(embedding, self.voice),
                }
        return [
            row | _judge(row["heard"], *pair) for row, *pair in zip(rows, texts, short, strict=True)
        ]


def _judge(heard: str, text: str, short: str) -> dict[str, Any]:
    """What is made of a transcript: `text` should have been said, ending in `short`."""
    counts = wer.count_errors(sounds_like(text), sounds_like(heard))
    return {
        "heard_right": ends_in_short_answer(heard, short, by_sound=True),
        "word_errors": counts.errors,
        "words": counts.words,
    }


def _audible(samples: np.ndarray) -> bool:
    """Whether there is anything to judge: a tenth of a second that is not silence."""
    return len(samples) >= JUDGE_RATE // 10 and float(np.abs(samples).max()) > io.SILENCE_PEAK


def reference_voice(embed, recordings: Sequence[np.ndarray]) -> np.ndarray:
    """Embedding [D] of a voice from its recordings: the mean of theirs, of unit length."""
    mean = np.mean(embed([samples for samples in recordings if _audible(samples)]), axis=0)
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


def assess(
    questions: Sequence[SpokenQuestion],
    written: Sequence[str],
    speech: Mapping[str, Sequence[np.ndarray]],
    judges: Judges,
) -> list[dict[str, Any]]:
    """One row a question: what was written, and how each kind of speech was judged.

    Args:
      questions: the questions asked.
      written: the text channel of each answer.
      speech: kind (of KINDS) -> recordings at 16 kHz in the order of the questions.
      judges: who listens.
    """
    short = [one.short_answer for one in questions]
    truth = [one.answer for one in questions]
    rows = [
        {name: getattr(one, name) for name in ("id", "category", "novelty", "question", "answer")}
        | {"short_answer": one.short_answer, "written": text}
        | {"written_right": ends_in_short_answer(text, one.short_answer)}
        for one, text in zip(questions, written, strict=True)
    ]
    for kind in tqdm.tqdm(KINDS, desc="judging", unit="set"):
        said = written if kind == "answers" else truth
        for row, judged in zip(rows, judges.listen(speech[kind], said, short), strict=True):
            row[kind] = judged
    return rows


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of all `assess` rows: the answers' by name, and for anchors `<kind>_<name>`."""
    figures: dict[str, Any] = {"questions": len(rows)}
    figures["text_accuracy"] = _mean(row["written_right"] for row in rows)
    for kind in KINDS:
        prefix = "" if kind == "answers" else f"{kind}_"
        judged = [row[kind] for row in rows]
        figures[f"{prefix}heard_accuracy"] = _mean(one["heard_right"] for one in judged)
        figures[f"{prefix}wer"] = _ratio(
            sum(one["word_errors"] for one in judged), sum(one["words"] for one in judged)
        )
        figures[f"{prefix}audible"] = _mean(one["audible"] for one in judged)
        figures[f"{prefix}dnsmos"] = _mean(one["mos"] for one in judged)
        figures[f"{prefix}speaker_similarity"] = _mean(one["similarity"] for one in judged)
    return figures


def by_group(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Number of questions and both accuracies by category or novelty, the largest group first."""
    groups = defaultdict(list)
    for row in rows:
        groups[row[key] or "all"].append(row)
    return {
        name: {
            "questions": len(members),
            "text_accuracy": _mean(row["written_right"] for row in members),
            "heard_accuracy": _mean(row["answers"]["heard_right"] for row in members),
        }
        for name, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def _mean(values) -> float | None:
    known = [float(value) for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def choose_examples(rows: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """Ids of `count` questions to listen to: categories in turn, right and wrong as they come.

    The order of the rows decides, not the results, so that the examples flatter nobody.
    """
    waiting = defaultdict(list)
    for row in rows:
        waiting[row["category"]].append(row["id"])
    chosen: list[str] = []
    while len(chosen) < min(count, len(rows)):
        for names in waiting.values():
            if names and len(chosen) < count:
                chosen.append(names.pop(0))
    return chosen
