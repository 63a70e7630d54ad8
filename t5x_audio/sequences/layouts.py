"""How text and audio become one training sequence, and which of its tokens are learned.

A layout takes texts (str) and audio (flat local codes, int32[5 g]) and gives a
`Sequence(tokens, weights)`; the weight of a token is its weight as a *target*. Every sequence
starts with <s>, which is never a target.

- Documents (`continuation`, `interleaved`) end with </s>; all of their tokens are targets.
- Documents with images (`image_text`) are the same, but no token of an image is a target: it is
  `<image_start>`, k placeholders for the embeddings of a frozen encoder, `<image_end>`.
- Chats are turns `<|BOT|> role newline content <|EOT|>`; only the last assistant turn's content
  and its <|EOT|> are targets. A system turn names what is wanted (transcript, written or spoken
  answer), as one model serves all tasks. Audio content is `<audio_start> ids <audio_end>`.
- A spoken (AQAA) answer alternates blocks of 10 text and 15 audio tokens. Text ends with
  <text_end>, audio with <audio_end>; each counts as a token of its channel. When one channel has
  ended the rest of the other follows in one piece; then <|EOT|>. `grammar.py` has the same rules
  as a table for decoding.

Sources: chat format of the published stepaudio.py and tts.py; 10:15 blocks of Step-Audio-AQAA
(arXiv 2506.08967), whose end-of-channel rule is not published: ours follows the contract above.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from t5x_audio.errors import UserError
from t5x_audio.sequences.vocabulary import (
    ANSWER_IN_SPEECH,
    ANSWER_IN_TEXT,
    SPEAK,
    TRANSCRIBE,
    Vocabulary,
)


class Sequence(NamedTuple):
    """tokens int32[L]; weights float32[L], the weight of each token as a target."""

    tokens: np.ndarray
    weights: np.ndarray


class SpokenText(NamedTuple):
    """A clip: what is said, and how (flat local codes int32[5 g])."""

    text: str
    codes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Layouts:
    """All layouts over one vocabulary. `codes` arguments are flat local codes everywhere.

    Attributes:
      vocabulary: the ids.
      text_block, audio_block: tokens of each kind in a block of a spoken answer.
    """

    vocabulary: Vocabulary
    text_block: int = 10
    audio_block: int = 15

    # ---- documents ------------------------------------------------------------------------

    def continuation(self, codes) -> Sequence:
        """<s> audio </s>; everything behind <s> is a target."""
        return self._document([self._audio(codes)])

    def interleaved(self, spans: Iterable) -> Sequence:
        """<s> spans </s>: a str is a text span, an array of codes an audio span, in given order."""
        parts = [
            self.vocabulary.encode_text(span) if isinstance(span, str) else self._audio(span)
            for span in spans
        ]
        return self._document(parts)

    def image_text(self, spans: Iterable) -> Sequence:
        """<s> spans </s>: a str is a text span, an int k an image of k soft tokens, in given order.

        Targets: the text and </s>.
        """
        v, parts = self.vocabulary, []
        for span in spans:
            if isinstance(span, str):
                parts.append(v.encode_text(span))
            else:
                parts.append([v.image_start, *[v.image] * int(span), v.image_end])
        tokens, weights = self._document(parts)
        weights[np.isin(tokens, [v.image_start, v.image, v.image_end])] = 0
        return Sequence(tokens, weights)

    def _document(self, parts) -> Sequence:
        return self.all_targets(_concatenate([self.vocabulary.bos], *parts, [self.vocabulary.eos]))

    @staticmethod
    def all_targets(tokens) -> Sequence:
        """`tokens`, which begin with <s>; everything behind it is a target."""
        weights = np.ones(len(tokens), np.float32)
        weights[0] = 0
        return Sequence(np.asarray(tokens, np.int32), weights)

    # ---- prompts: what a generation continues ---------------------------------------------

    def asr_prompt(self, codes) -> np.ndarray:
        """Speech in; its transcript follows."""
        return self._prompt(TRANSCRIBE, self._audio(codes))

    def tts_prompt(self, text: str, voice: SpokenText | None = None) -> np.ndarray:
        """Text in; its audio follows, in the voice of the in-context pair or the base voice."""
        v = self.vocabulary
        turns = [self._turn("system", v.encode_text(SPEAK))]
        if voice is not None:
            turns += [self._turn("human", v.encode_text(voice.text))]
            turns += [self._turn("assistant", self._audio(voice.codes))]
        turns += [self._turn("human", v.encode_text(text))]
        return _concatenate([v.bos], *turns, self._open_turn("assistant"))

    def tqta_prompt(self, question: str) -> np.ndarray:
        """Typed question in; the written answer follows."""
        return self._prompt(ANSWER_IN_TEXT, self.vocabulary.encode_text(question))

    def aqta_prompt(self, question_codes) -> np.ndarray:
        """Spoken question in; the written answer follows."""
        return self._prompt(ANSWER_IN_TEXT, self._audio(question_codes))

    def taqta_prompt(self, question: str, question_codes) -> np.ndarray:
        """Question typed and spoken; the question again and the written answer follow."""
        both = [self.vocabulary.encode_text(question), self._audio(question_codes)]
        return self._prompt(ANSWER_IN_TEXT, _concatenate(*both))

    def aqaa_prompt(self, question_codes) -> np.ndarray:
        """Spoken question in; the spoken answer (text and audio in blocks) follows."""
        return self._prompt(ANSWER_IN_SPEECH, self._audio(question_codes))

    def tqaa_prompt(self, question: str) -> np.ndarray:
        """Typed question in; the spoken answer (text and audio in blocks) follows."""
        return self._prompt(ANSWER_IN_SPEECH, self.vocabulary.encode_text(question))

    def _prompt(self, system: str, content) -> np.ndarray:
        v = self.vocabulary
        return _concatenate(
            [v.bos],
            self._turn("system", v.encode_text(system)),
            self._turn("human", content),
            self._open_turn("assistant"),
        )

    def _open_turn(self, role: str) -> np.ndarray:
        return _concatenate([self.vocabulary.bot], self.vocabulary.encode_header(role))

    def _turn(self, role: str, content) -> np.ndarray:
        return _concatenate(self._open_turn(role), content, [self.vocabulary.eot])

    def _audio(self, codes) -> np.ndarray:
        v = self.vocabulary
        return _concatenate([v.audio_start], v.from_local(codes), [v.audio_end])

    # ---- chats ----------------------------------------------------------------------------

    def asr(self, codes, text: str) -> Sequence:
        """Speech -> transcript; targets: transcript <|EOT|>."""
        return self._chat(self.asr_prompt(codes), self.vocabulary.encode_text(text))

    def tts(self, text: str, codes, voice: SpokenText | None = None) -> Sequence:
        """Text -> speech; targets: <audio_start> ids <audio_end> <|EOT|> of the last turn."""
        return self._chat(self.tts_prompt(text, voice), self._audio(codes))

    def tqta(self, question: str, answer: str) -> Sequence:
        """Typed question -> written answer; targets: answer <|EOT|>."""
        return self._chat(self.tqta_prompt(question), self.vocabulary.encode_text(answer))

    def text(self, question: str, answer: str) -> Sequence:
        """The same tokens as `tqta`, read as a document: everything behind <s> is a target."""
        return self.all_targets(self.tqta(question, answer).tokens)

    def aqta(self, question_codes, answer: str) -> Sequence:
        """Spoken question -> written answer; targets: answer <|EOT|>."""
        return self._chat(self.aqta_prompt(question_codes), self.vocabulary.encode_text(answer))

    def taqta(self, question: str, question_codes, answer: str) -> Sequence:
        """Question in both forms -> question, newline, answer; targets: these and <|EOT|>.

        The question is input without loss and output with loss, which ties audio to text.
        """
        both = self.vocabulary.encode_text(f"{question}\n{answer}")
        return self._chat(self.taqta_prompt(question, question_codes), both)

    def aqaa(self, question_codes, answer: str, answer_codes) -> Sequence:
        """Spoken question -> spoken answer; targets: the whole answer and <|EOT|>."""
        text_ids = self.vocabulary.encode_text(answer)
        answer_tokens = self.encode_aqaa_answer(text_ids, answer_codes)
        return self._answered(self.aqaa_prompt(question_codes), answer_tokens)

    def tqaa(self, question: str, answer: str, answer_codes) -> Sequence:
        """Typed question -> spoken answer; targets: the whole answer and <|EOT|>."""
        text_ids = self.vocabulary.encode_text(answer)
        answer_tokens = self.encode_aqaa_answer(text_ids, answer_codes)
        return self._answered(self.tqaa_prompt(question), answer_tokens)

    def aqaa_preference(
        self, question_codes, chosen: SpokenText, rejected: SpokenText
    ) -> tuple[Sequence, Sequence]:
        """A chosen and a rejected spoken answer to one question, for audio-masked DPO.

        Targets: text, <text_end> and <|EOT|> of the answer. The audio channel (codes and
        <audio_end>) has weight 0, as preferring audio tokens harms speech (AQAA, Eq. 2).
        """
        pair = []
        for answer in (chosen, rejected):
            tokens, weights = self.aqaa(question_codes, answer.text, answer.codes)
            audio = self.vocabulary.is_audio(tokens) | (tokens == self.vocabulary.audio_end)
            pair.append(Sequence(tokens, np.where(audio, np.float32(0), weights)))
        return pair[0], pair[1]

    def _chat(self, prompt: np.ndarray, content: np.ndarray) -> Sequence:
        return self._answered(prompt, _concatenate(content, [self.vocabulary.eot]))

    def _answered(self, prompt: np.ndarray, answer: np.ndarray) -> Sequence:
        weights = np.zeros(len(prompt) + len(answer), np.float32)
        weights[len(prompt) :] = 1
        return Sequence(_concatenate(prompt, answer), weights)

    # ---- the spoken answer ----------------------------------------------------------------

    def encode_aqaa_answer(self, text_ids, codes) -> np.ndarray:
        """Text ids int32[T] and flat local codes int32[N] -> answer tokens, <|EOT|> included.

        Its length is T + N + 3. UserError when an id is not text or a code is in no codebook.
        """
        v = self.vocabulary
        text_ids = np.asarray(text_ids, np.int32).reshape(-1)
        if not self._is_text(text_ids).all():
            raise UserError("the text of an answer holds ids that are not text")
        text = _concatenate(text_ids, [v.text_end])
        audio = _concatenate(v.from_local(codes), [v.audio_end])
        parts, t, a = [], 0, 0
        while t < len(text) or a < len(audio):
            parts += [text[t : t + self.text_block], audio[a : a + self.audio_block]]
            t, a = t + self.text_block, a + self.audio_block
        return _concatenate(*parts, [v.eot])

    def decode_aqaa_answer(self, tokens) -> tuple[np.ndarray, np.ndarray]:
        """Answer tokens -> (text ids int32[T], flat local codes int32[N]).

        Exact inverse of `encode_aqaa_answer`. Reads up to the first <|EOT|>, or to the end when
        generation was cut short; the last group of five may then be incomplete.
        """
        tokens = np.asarray(tokens, np.int32).reshape(-1)
        ends = np.flatnonzero(tokens == self.vocabulary.eot)
        tokens = tokens[: ends[0]] if len(ends) else tokens
        audio = tokens[self.vocabulary.is_audio(tokens)]
        return tokens[self._is_text(tokens)], self.vocabulary.to_local(audio)

    def _is_text(self, ids: np.ndarray) -> np.ndarray:
        v = self.vocabulary
        in_range = (ids >= 0) & (ids < v.text_size)
        return in_range & ~np.isin(ids, [v.bos, v.eos, v.eot, v.bot])


def _concatenate(*parts) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32).reshape(-1) for part in parts])
