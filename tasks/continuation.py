"""Audio continuation: a clip as a document, for learning what speech sounds like."""

from t5x_audio.sequences.layouts import Layouts
from tasks.corpus import TokenCorpus


def register(corpus: TokenCorpus, layouts: Layouts) -> list[str]:
    """Registers `continuation`: every clip of every corpus once."""
    from tasks.registration import CODES, TEXT, add_task

    add_task(
        "continuation",
        vocabulary=layouts.vocabulary,
        source=lambda split: (clip._asdict() for clip in corpus.clips(split)),
        spec={"id": TEXT, "text": TEXT, "codes": CODES},
        layout=lambda example: layouts.continuation(example["codes"]),
    )
    return ["continuation"]
