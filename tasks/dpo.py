"""Preference pairs for audio-masked DPO: the right spoken answer against a wrong one.

The wrong answer is that of another question of the same category with other deciding words, so
both are fluent and well spoken and only the content differs. Which one is a fixed function of the
question clip's id.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterator

from t5x_audio.sequences.layouts import Layouts, SpokenText
from tasks.aqaa import METADATA, flat
from tasks.corpus import TokenCorpus


def register(corpus: TokenCorpus, layouts: Layouts) -> list[str]:
    """Registers `aqaa_preference`; its features have the prefixes chosen_ and rejected_."""
    from tasks.registration import CODES, TEXT, add_task

    texts = (*METADATA, "rejected", "rejected_short_answer")
    codes = ("question_codes", "answer_codes", "rejected_codes")

    def layout(example):
        return layouts.aqaa_preference(
            example["question_codes"],
            SpokenText(example["answer"], example["answer_codes"]),
            SpokenText(example["rejected"], example["rejected_codes"]),
        )

    add_task(
        "aqaa_preference",
        vocabulary=layouts.vocabulary,
        source=lambda split: pairs(corpus, split),
        spec=dict.fromkeys(texts, TEXT) | dict.fromkeys(codes, CODES),
        layout=layout,
        prefixes=("chosen_", "rejected_"),
    )
    return ["aqaa_preference"]


def pairs(corpus: TokenCorpus, split: str) -> Iterator[dict]:
    """The examples of a split with a rejected answer each; none where no other answer exists."""
    examples = [flat(spoken) for spoken in corpus.spoken_questions(split)]
    # One answer a question: the pool is small, and free of the number of speakers.
    unique = {example["question_id"]: example for example in examples}
    by_category = defaultdict(list)
    for question_id in sorted(unique):
        by_category[unique[question_id]["category"]].append(unique[question_id])
    for example in examples:
        pool = by_category[example["category"]]
        start = zlib.crc32(example["id"].encode()) % len(pool)
        others = (pool[(start + i) % len(pool)] for i in range(len(pool)))
        wrong = next((o for o in others if o["short_answer"] != example["short_answer"]), None)
        if wrong is not None:
            yield example | {
                "rejected": wrong["answer"],
                "rejected_short_answer": wrong["short_answer"],
                "rejected_codes": wrong["answer_codes"],
            }
