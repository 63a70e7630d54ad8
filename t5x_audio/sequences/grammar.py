"""Which token may come next in an answer, as tables that a compiled decoding loop can index.

A grammar is a finite automaton over token classes. The loop keeps one state a row and needs no
more than `allowed[state][token_class]` (a mask over the vocabulary) and
`next_state[state, token_class[token]]`. So a sampled answer always decodes: blocks of text and
audio at the layout's ratio, whole groups of 2 linguistic and 3 semantic codes, every channel
ended once, then <|EOT|>. The rules are those of `layouts.py`; the group is that of the published
dual-codebook tokenizer (Step-Audio, arXiv 2502.11946).
"""

import dataclasses

import numpy as np

from t5x_audio.errors import UserError
from t5x_audio.sequences.layouts import Layouts
from t5x_audio.sequences.vocabulary import LINGUISTIC as LINGUISTIC_IDS
from t5x_audio.sequences.vocabulary import SEMANTIC as SEMANTIC_IDS
from t5x_audio.sequences.vocabulary import TEXT as TEXT_IDS
from t5x_audio.sequences.vocabulary import Vocabulary

TEXT, LINGUISTIC, SEMANTIC, TEXT_END, AUDIO_START, AUDIO_END, EOT, FORBIDDEN = range(8)
NUM_CLASSES = 8
GROUP = (LINGUISTIC, LINGUISTIC, SEMANTIC, SEMANTIC, SEMANTIC)


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The automaton. State ids are rows; `done` allows only <|EOT|> and stays.

    Attributes:
      token_class: int32[vocabulary size], class of every token.
      allowed: bool[n_states, n_classes].
      next_state: int32[n_states, n_classes]; where a class is not allowed, the state itself.
      start_state: state before the first token of the answer.
      done: state behind <|EOT|>.
    """

    token_class: np.ndarray
    allowed: np.ndarray
    next_state: np.ndarray
    start_state: int
    done: int

    def mask(self, state) -> np.ndarray:
        """bool[..., vocabulary size]: the tokens allowed in `state` int32[...]."""
        return self.allowed[state][..., self.token_class]

    def accepts(self, tokens) -> bool:
        """Whether `tokens` is one whole answer, <|EOT|> included."""
        state = self.start_state
        for token_class in self.token_class[np.asarray(tokens, np.int64)]:
            if state == self.done or not self.allowed[state, token_class]:
                return False
            state = self.next_state[state, token_class]
        return state == self.done


class _Builder:
    """Names of states and the arrows between them; state ids in order of first mention."""

    def __init__(self):
        self.ids, self.arrows = {}, []

    def arrow(self, state, token_class: int, target) -> None:
        for name in (state, target):
            self.ids.setdefault(name, len(self.ids))
        self.arrows.append((self.ids[state], token_class, self.ids[target]))

    def build(self, vocabulary: Vocabulary, start) -> Grammar:
        self.arrow("end", EOT, "done")
        self.arrow("done", EOT, "done")
        count = len(self.ids)
        allowed = np.zeros((count, NUM_CLASSES), bool)
        next_state = np.tile(np.arange(count, dtype=np.int32)[:, None], (1, NUM_CLASSES))
        for state, token_class, target in self.arrows:
            allowed[state, token_class] = True
            next_state[state, token_class] = target
        classes = token_classes(vocabulary)
        return Grammar(classes, allowed, next_state, self.ids[start], self.ids["done"])


def token_classes(vocabulary: Vocabulary) -> np.ndarray:
    """int32[size]: the class of every id. Rows without a meaning are FORBIDDEN."""
    modality = vocabulary.modality_table
    classes = np.full(vocabulary.size, FORBIDDEN, np.int32)
    classes[modality == TEXT_IDS] = TEXT
    classes[modality == LINGUISTIC_IDS] = LINGUISTIC
    classes[modality == SEMANTIC_IDS] = SEMANTIC
    if vocabulary.sentencepiece:
        classes[vocabulary.num_pieces : vocabulary.text_size] = FORBIDDEN
    classes[vocabulary.text_end] = TEXT_END
    classes[vocabulary.audio_start] = AUDIO_START
    classes[vocabulary.audio_end] = AUDIO_END
    classes[vocabulary.eot] = EOT
    return classes


def spoken_answer(layouts: Layouts) -> Grammar:
    """The AQAA answer: exactly the sequences of `Layouts.encode_aqaa_answer` on whole groups.

    UserError when the audio block does not hold whole groups.
    """
    if layouts.audio_block % len(GROUP) or layouts.text_block < 1 or layouts.audio_block < 1:
        raise UserError(
            f"blocks of {layouts.text_block} text and {layouts.audio_block} audio tokens: "
            f"text needs at least 1, audio a multiple of {len(GROUP)}"
        )
    b = _Builder()
    for i in range(layouts.text_block):
        last = i + 1 == layouts.text_block
        b.arrow(("text", i), TEXT, ("audio", 0) if last else ("text", i + 1))
        b.arrow(("text", i), TEXT_END, ("only audio", 0))
    for i in range(layouts.audio_block):
        last = i + 1 == layouts.audio_block
        b.arrow(("audio", i), GROUP[i % len(GROUP)], ("text", 0) if last else ("audio", i + 1))
        if i % len(GROUP) == 0:
            b.arrow(("audio", i), AUDIO_END, "only text")
    _audio_until_end(b, "only audio")
    b.arrow("only text", TEXT, "only text")
    b.arrow("only text", TEXT_END, "end")
    return b.build(layouts.vocabulary, ("text", 0))


def written_answer(vocabulary: Vocabulary) -> Grammar:
    """A text answer (ASR, TQTA, AQTA, TAQTA): any text, then <|EOT|>."""
    b = _Builder()
    b.arrow("text", TEXT, "text")
    b.arrow("text", EOT, "done")
    return b.build(vocabulary, "text")


def audio_answer(vocabulary: Vocabulary) -> Grammar:
    """A TTS answer: <audio_start>, whole groups, <audio_end>, <|EOT|>."""
    b = _Builder()
    b.arrow("start", AUDIO_START, ("audio", 0))
    _audio_until_end(b, "audio")
    return b.build(vocabulary, "start")


def _audio_until_end(b: _Builder, name: str) -> None:
    for i, token_class in enumerate(GROUP):
        b.arrow((name, i), token_class, (name, (i + 1) % len(GROUP)))
    b.arrow((name, 0), AUDIO_END, "end")
