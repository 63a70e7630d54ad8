"""TTS: text in, speech out.

A clip of the base voice is asked for plainly; for any other voice an in-context pair (text and
audio of another clip of the speaker) comes first and says whose voice is wanted, as in the
published TTS-3B (tts.py of Step-Audio).
"""

from collections.abc import Iterator

from t5x_audio.sequences.layouts import Layouts, SpokenText
from tasks.corpus import BASE_VOICE, Clip, TokenCorpus


def register(corpus: TokenCorpus, layouts: Layouts) -> list[str]:
    """Registers `tts`: every clip with a text once, but the first of each other voice."""
    from tasks.registration import CODES, TEXT, add_task

    texts = ("id", "text", "voice_text")
    add_task(
        "tts",
        vocabulary=layouts.vocabulary,
        source=lambda split: examples(corpus.clips(split)),
        spec=dict.fromkeys(texts, TEXT) | {"codes": CODES, "voice_codes": CODES},
        layout=lambda example: lay_out(example, layouts),
    )
    return ["tts"]


def examples(clips: Iterator[Clip]) -> Iterator[dict]:
    """Clips with the pair that gives the voice: the speaker's clip before; empty for the base."""
    before: dict[str, Clip] = {}
    for clip in clips:
        if not clip.text:
            continue
        voice = None if clip.speaker == BASE_VOICE else before.get(clip.speaker)
        before[clip.speaker] = clip
        if voice is None and clip.speaker != BASE_VOICE:
            continue  # Nothing tells whose voice it is.
        yield clip._asdict() | {
            "voice_text": voice.text if voice else "",
            "voice_codes": voice.codes if voice else clip.codes[:0],
        }


def lay_out(example: dict, layouts: Layouts):
    """The TTS layout with or without an in-context pair."""
    pair = SpokenText(example["voice_text"], example["voice_codes"])
    return layouts.tts(example["text"], example["codes"], pair if pair.text else None)
