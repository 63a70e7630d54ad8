"""Audio continuation: a clip as a document, for learning what speech sounds like.

Each stream alone is a task too, so that what their interleaving is worth can be measured
(benchmarks/merged_streams.py; Step-Audio, arXiv 2502.11946, section 4.4).
"""

from t5x_audio.sequences.layouts import Layouts
from t5x_audio.tokenizers import dual_codebook
from tasks.corpus import TokenCorpus


def register(corpus: TokenCorpus, layouts: Layouts) -> list[str]:
    """Registers `continuation`, `linguistic_alone`, `semantic_alone`: every clip once."""
    from tasks.registration import CODES, TEXT, add_task

    def streams(codes):
        groups = codes.reshape(-1, dual_codebook.GROUP_SIZE)
        at = dual_codebook.LINGUISTIC_PER_GROUP
        return groups[:, :at].reshape(-1), groups[:, at:].reshape(-1)

    for name, chosen in (
        ("continuation", lambda codes: codes),
        ("linguistic_alone", lambda codes: streams(codes)[0]),
        ("semantic_alone", lambda codes: streams(codes)[1]),
    ):
        add_task(
            name,
            vocabulary=layouts.vocabulary,
            source=lambda split: (clip._asdict() for clip in corpus.clips(split)),
            spec={"id": TEXT, "text": TEXT, "codes": CODES},
            layout=lambda example, chosen=chosen: layouts.continuation(chosen(example["codes"])),
        )
    return ["continuation", "linguistic_alone", "semantic_alone"]
