"""Text: typed questions with written answers, as documents (pretraining) and as chats (TQTA)."""

from t5x_audio.sequences.layouts import Layouts
from tasks.corpus import TokenCorpus


def register(corpus: TokenCorpus, layouts: Layouts) -> list[str]:
    """Registers `text` (every token is a target) and `tqta` (the answer is)."""
    from tasks.registration import TEXT, add_task

    for name, layout in (("text", layouts.text), ("tqta", layouts.tqta)):
        add_task(
            name,
            vocabulary=layouts.vocabulary,
            source=corpus.typed_questions,
            spec=dict.fromkeys(("id", "question", "answer", "short_answer"), TEXT),
            layout=lambda example, lay=layout: lay(example["question"], example["answer"]),
        )
    return ["text", "tqta"]
