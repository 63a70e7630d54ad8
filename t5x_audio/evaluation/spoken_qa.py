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
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from t5x_audio.data import corpus, records
from t5x_audio.errors import UserError
from t5x_audio.evaluation.answers import ends_in_short_answer
from t5x_audio.evaluation.judges import Judges, mean, ratio, word_errors
from t5x_audio.tokenizers import dual_codebook

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


def judge(
    judges: Judges, recordings: Sequence[np.ndarray], texts: Sequence[str], short: Sequence[str]
) -> list[dict[str, Any]]:
    """Judges each recording by what it should say.

    Args:
      judges: who listens; their `voice` is the reference.
      recordings: float32 [T_i] at 16 kHz; one without a sample is heard as nothing.
      texts: what each should say.
      short: the words that must be heard.

    Returns:
      Rows of `Judges.listen` with heard_right, word_errors and words.
    """
    rows = judges.listen(recordings)
    return [
        row
        | {"heard_right": ends_in_short_answer(row["heard"], words, by_sound=True)}
        | word_errors(row["heard"], text)
        for row, text, words in zip(rows, texts, short, strict=True)
    ]


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
        for row, judged in zip(rows, judge(judges, speech[kind], said, short), strict=True):
            row[kind] = judged
    return rows


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of all `assess` rows: the answers' by name, and for anchors `<kind>_<name>`."""
    figures: dict[str, Any] = {"questions": len(rows)}
    figures["text_accuracy"] = mean(row["written_right"] for row in rows)
    for kind in KINDS:
        prefix = "" if kind == "answers" else f"{kind}_"
        judged = [row[kind] for row in rows]
        figures[f"{prefix}heard_accuracy"] = mean(one["heard_right"] for one in judged)
        figures[f"{prefix}wer"] = ratio(
            sum(one["word_errors"] for one in judged), sum(one["words"] for one in judged)
        )
        figures[f"{prefix}audible"] = mean(one["audible"] for one in judged)
        figures[f"{prefix}dnsmos"] = mean(one["mos"] for one in judged)
        figures[f"{prefix}speaker_similarity"] = mean(one["similarity"] for one in judged)
    return figures


def by_group(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Number of questions and both accuracies by category or novelty, the largest group first."""
    groups = defaultdict(list)
    for row in rows:
        groups[row[key] or "all"].append(row)
    return {
        name: {
            "questions": len(members),
            "text_accuracy": mean(row["written_right"] for row in members),
            "heard_accuracy": mean(row["answers"]["heard_right"] for row in members),
        }
        for name, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    }


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
