"""Text: documents, of which every token is a target (pretraining), and typed chats (TQTA).

Documents are what `t5x_audio.import_text` brought, cut into pieces that fit a row, and typed
questions with their written answers.
"""

from collections.abc import Iterator

import numpy as np

from t5x_audio.sequences.layouts import Layouts
from tasks.corpus import TokenCorpus


def register(corpus: TokenCorpus, layouts: Layouts, sequence_length: int = 512) -> list[str]:
    """Registers `text` and `tqta`; a piece of a document fills a row of `sequence_length`."""
    from tasks.registration import CODES, TEXT, add_task

    def text(split):
        for row in corpus.typed_questions(split):
            yield {"id": row["id"], "ids": layouts.text(row["question"], row["answer"]).tokens}
        yield from pieces(corpus.documents(split), layouts, sequence_length)

    add_task(
        "text",
        vocabulary=layouts.vocabulary,
        source=text,
        spec={"id": TEXT, "ids": CODES},
        layout=lambda example: layouts.all_targets(example["ids"]),
    )
    add_task(
        "tqta",
        vocabulary=layouts.vocabulary,
        source=corpus.typed_questions,
        spec=dict.fromkeys(("id", "question", "answer", "short_answer"), TEXT),
        layout=lambda example: layouts.tqta(example["question"], example["answer"]),
    )
    return ["text", "tqta"]


def pieces(documents: Iterator[dict], layouts: Layouts, sequence_length: int) -> Iterator[dict]:
    """Documents {id, text} as {id, ids}: <s> text tokens </s>, cut to length, nothing left out."""
    v, size = layouts.vocabulary, sequence_length - 1  # one more token than a row has positions
    for document in documents:
        ids = v.encode_text(document["text"])
        for number, start in enumerate(range(0, len(ids), size)):
            piece = np.concatenate([[v.bos], ids[start : start + size], [v.eos]])
            yield {"id": f"{document['id']}-{number}", "ids": piece.astype(np.int32)}
