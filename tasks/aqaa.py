"""AQAA: a spoken question in, an answer of interleaved text and audio out; typed questions too.

Each question as each speaker asked it, with the answer in the base voice. Judged by whether the
written channel ends in the words that make the answer right.
"""

from collections.abc import Callable

from t5x_audio.evaluation.answers import ends_in_short_answer
from t5x_audio.sequences.layouts import Layouts
from tasks.asr import as_text
from tasks.corpus import SpokenQuestion, TokenCorpus

# Texts that travel with every example: id is that of the question clip.
METADATA = ("id", "question_id", "speaker", "category", "question", "answer", "short_answer")


def register(corpus: TokenCorpus, layouts: Layouts) -> list[str]:
    """Registers `aqaa` (each (question, speaker) once) and `tqaa` (each question once)."""
    from tasks.registration import CODES, TEXT, add_task

    def aqaa(example):
        codes = example["question_codes"], example["answer_codes"]
        return layouts.aqaa(codes[0], example["answer"], codes[1])

    def tqaa(example):
        return layouts.tqaa(example["question"], example["answer"], example["answer_codes"])

    def once(split):
        seen = set()
        for spoken in corpus.spoken_questions(split):
            if spoken.question["id"] not in seen:
                seen.add(spoken.question["id"])
                yield flat(spoken)

    def all_speakers(split):
        return map(flat, corpus.spoken_questions(split))

    for name, layout, source in (("aqaa", aqaa, all_speakers), ("tqaa", tqaa, once)):
        add_task(
            name,
            vocabulary=layouts.vocabulary,
            source=source,
            spec=dict.fromkeys(METADATA, TEXT) | {"question_codes": CODES, "answer_codes": CODES},
            layout=layout,
            postprocess=answer_postprocess(layouts),
            metrics=[text_accuracy],
        )
    return ["aqaa", "tqaa"]


def flat(spoken: SpokenQuestion) -> dict:
    """One example as a flat dict. The answer's text is what its clip says."""
    question, asked, answered = spoken
    return {
        "id": asked.id,
        "question_id": question["id"],
        "speaker": asked.speaker,
        "category": question["category"],
        "question": question["question"],
        "answer": answered.text,
        "short_answer": question["short_answer"],
        "question_codes": asked.codes,
        "answer_codes": answered.codes,
    }


def answer_postprocess(layouts: Layouts) -> Callable:
    """SeqIO postprocess_fn: target -> the short answer, prediction -> its text."""

    def postprocess(output, example=None, is_target=False):
        return example["short_answer"].decode() if is_target else as_text(output, layouts)

    return postprocess


def text_accuracy(targets: list[str], predictions: list[str]) -> dict[str, float]:
    """Percent of written answers that end in the words of the short answer."""
    pairs = list(zip(targets, predictions, strict=True))
    right = sum(ends_in_short_answer(text, short) for short, text in pairs)
    return {"text_accuracy": 100 * right / max(len(pairs), 1)}
