"""Audio-text interleaved documents: consecutive clips of one speaker, as text and as audio.

Every utterance gives a text span and an audio span, text first in even documents, audio first in
odd ones, so that each modality is predicted from the other. Step-Omni's own alternation is not
published in detail (arXiv 2502.11946, section 4.1).
"""

from collections.abc import Iterator

import numpy as np

from t5x_audio.sequences.layouts import Layouts
from tasks.corpus import Clip, TokenCorpus

MAX_CLIPS = 3
MAX_AUDIO_TOKENS = 320  # about 7.7 s; with its text it fits a context of 512


def register(corpus: TokenCorpus, layouts: Layouts) -> list[str]:
    """Registers `interleaved`: every clip in one document."""
    from tasks.registration import CODES, NUMBER, TEXT, TEXTS, add_task

    spec = {"id": TEXT, "texts": TEXTS, "lengths": CODES, "codes": CODES, "audio_first": NUMBER}
    add_task(
        "interleaved",
        vocabulary=layouts.vocabulary,
        source=lambda split: documents(corpus.clips(split)),
        spec=spec,
        layout=lambda example: layouts.interleaved(spans(example)),
    )
    return ["interleaved"]


def documents(clips: Iterator[Clip]) -> Iterator[dict]:
    """Up to `MAX_CLIPS` consecutive clips of one speaker, and of bounded length, a document."""
    pending: dict[str, list[Clip]] = {}
    count = 0
    for clip in clips:
        group = pending.setdefault(clip.speaker, [])
        total = sum(len(c.codes) for c in group) + len(clip.codes)
        if group and (len(group) == MAX_CLIPS or total > MAX_AUDIO_TOKENS):
            yield _document(group, count)
            count += 1
            pending[clip.speaker] = group = []
        group.append(clip)
    for group in pending.values():
        yield _document(group, count)
        count += 1


def _document(group: list[Clip], number: int) -> dict:
    return {
        "id": group[0].id,
        "texts": [clip.text for clip in group],
        "lengths": np.asarray([len(clip.codes) for clip in group], np.int32),
        "codes": np.concatenate([clip.codes for clip in group]),
        "audio_first": number % 2,
    }


def spans(document: dict) -> list:
    """The spans of a document, in order: str or codes."""
    audio = np.split(document["codes"], np.cumsum(document["lengths"])[:-1])
    pairs = zip(document["texts"], audio, strict=True)
    order = -1 if document["audio_first"] else 1
    return [span for pair in pairs for span in pair[::order]]
