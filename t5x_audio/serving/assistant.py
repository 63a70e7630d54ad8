"""The assistant: a question as a waveform or as text in, an answer as text and speech out.

One pass through the whole chain: dual-codebook tokenizer, chat prompt, backbone under the grammar
of the 10:15 answer, flow matching and HiFT. Tokens become sound as they come
(`TokenVocoder.stream`), while the rest of the answer is still to be written: `stream` hands over
piece by piece, `answer` all of it. `speak` makes speech of codes that are all there.

Times are in seconds and start when the question is in memory:
  tokenise     a spoken question to codes (0 for a typed one); a duration
  first_block  the prompt through the backbone and the first 10 + 15 tokens; a duration
  first_audio  when the first samples are there: the time to first audio
  total        when the whole answer has become samples
The first question of a kind also compiles; ask once before looking at the clock.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from t5x_audio.backbone import decoding
from t5x_audio.sequences import grammar
from t5x_audio.sequences.layouts import Layouts
from t5x_audio.sequences.vocabulary import Vocabulary
from t5x_audio.serving.model_dir import RunDirectory
from t5x_audio.serving.voice import answer_voice
from t5x_audio.tokenizers.dual_codebook import GROUP_SIZE, DualCodebookTokenizer
from t5x_audio.training import checkpoints
from t5x_audio.vocoder.token_vocoder import TokenVocoder

PUBLISHED_SAMPLING = decoding.Sampling(temperature=0.7, top_p=0.9)  # stepaudio.py
TIMINGS = ("tokenise", "first_block", "first_audio", "total")
# Padded lengths of the vocoder in groups of 0.12 s.
VOCODER_GROUPS = (8, 16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the assistant says.

    Attributes:
      text: the text channel.
      audio: float32 [T] in [-1, 1]; empty when the model wrote no audio.
      rate: of `audio`, Hz.
      codes: int32 [5 g], flat local codes of the audio channel.
      tokens: int32 [L], LM ids of the whole answer as they came, <|EOT|> included.
      timings: see the module docstring; empty where no clock ran.
      decoding_seconds: of `timings`, what was spent in the backbone.
    """

    text: str
    audio: np.ndarray
    rate: int
    codes: np.ndarray
    tokens: np.ndarray
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    decoding_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the answer, text and audio, per second in the backbone, prompt included."""
        return len(self.tokens) / self.decoding_seconds if self.decoding_seconds else 0.0


class SpokenAssistant:
    """A loaded run that answers; keep it, since compiled programs stay with it.

    Attributes:
      vocabulary, layouts: the ids and how prompts and answers are laid out.
      tokenizer: waveforms to codes.
      decoder: prompts to tokens.
      vocoder: codes to samples.
      voice: speaker embedding of the answers, float32 [D].
      rate: of the answers, Hz.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        tokenizer: DualCodebookTokenizer,
        decoder: decoding.Decoder,
        vocoder: TokenVocoder,
        voice: np.ndarray,
        *,
        sampling: decoding.Sampling = PUBLISHED_SAMPLING,
        max_new_tokens: int = 400,
        seed: int = 0,
    ):
        """Joins the trained parts.

        Args:
          vocabulary, tokenizer, decoder, vocoder, voice: see the attributes.
          sampling: how tokens are drawn; temperature 0 takes the likeliest.
          max_new_tokens: longest answer.
          seed: of the draws and of the vocoder's noise: the same question, the same answer.
        """
        self.vocabulary, self.layouts = vocabulary, Layouts(vocabulary)
        self.tokenizer, self.decoder, self.vocoder = tokenizer, decoder, vocoder
        self.voice, self.rate = voice, vocoder.sample_rate
        self.seed = seed
        self._options = {
            "grammar": grammar.spoken_answer(self.layouts),
            "sampling": sampling,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        }

    @classmethod
    def load(
        cls, run_dir, *, weights: str | None = None, cache: str | None = None, **options
    ) -> "SpokenAssistant":
        """Loads a run directory.

        Args:
          run_dir: of a trained run, packed or not.
          weights, cache: how the backbone keeps both, see `decoding.Decoder`.
          **options: those of the constructor.

        Raises:
          UserError: a part is missing, damaged or of another size, or no such weights or cache.
        """
        root = RunDirectory(run_dir)
        vocabulary = root.check()
        tokenizer = DualCodebookTokenizer(
            checkpoints.load_model(root.linguistic_tokenizer),
            checkpoints.load_model(root.semantic_tokenizer),
        )
        backbone = checkpoints.load_model(root.backbone)
        decoder = decoding.Decoder(backbone, [vocabulary.eot], weights, cache)
        vocoder = TokenVocoder(
            checkpoints.load_model(root.flow),
            checkpoints.load_model(root.hift, "generator"),
            VOCODER_GROUPS,
        )
        return cls(vocabulary, tokenizer, decoder, vocoder, answer_voice(root), **options)

    def answer(self, waveform: np.ndarray) -> Answer:
        """Answers a spoken question: float [T] at 16 kHz.

        Raises:
          UserError: the question is too short for a group of codes.
        """
        *_, last = self.stream(waveform)
        return last

    def stream(self, waveform: np.ndarray) -> Iterator[Answer]:
        """The answer to a spoken question as it grows, after each block of tokens; the last is all.

        What was in an answer is in the next one too: new is what is behind it.

        Raises:
          UserError: as `answer`.
        """
        start = time.perf_counter()
        codes = self.tokenizer.encode(waveform)
        tokenised = time.perf_counter() - start
        return self._stream(self.layouts.aqaa_prompt(codes), start, tokenised)

    def answer_text(self, question: str) -> Answer:
        """Answers a typed question."""
        *_, last = self._stream(self.layouts.tqaa_prompt(question), time.perf_counter(), 0.0)
        return last

    def answer_batch(
        self, waveforms: Sequence[np.ndarray], batch_size: int | None = None
    ) -> list[Answer]:
        """Answers several spoken questions at once, without sound (see `speak`) and clock.

        Args:
          waveforms: float [T_i] at 16 kHz.
          batch_size: filled up to this many, so that a smaller last batch compiles nothing new.
        """
        prompts = [self.layouts.aqaa_prompt(self.tokenizer.encode(one)) for one in waveforms]
        padding = [prompts[-1]] * ((batch_size or 0) - len(prompts))
        rows = self.decoder.generate(prompts + padding, **self._options)
        return [self._finished(row) for row in rows[: len(prompts)]]

    def speak(self, codes: np.ndarray) -> np.ndarray:
        """Flat local codes int32 [N] -> float32 [T] at `rate`; empty for less than a group."""
        if len(codes) < GROUP_SIZE:
            return np.zeros(0, np.float32)
        return self.vocoder.synthesize(codes, self.voice, seed=self.seed)

    def _stream(self, prompt: np.ndarray, start: float, tokenised: float) -> Iterator[Answer]:
        block = self.layouts.text_block + self.layouts.audio_block
        produced = self.decoder.stream([prompt], block=block, **self._options)
        speech, spoken = self.vocoder.stream(self.voice, seed=self.seed), 0
        tokens, audio = np.zeros(0, np.int32), np.zeros(0, np.float32)
        decoding_seconds, timings = 0.0, {"tokenise": tokenised}
        while True:
            asked = time.perf_counter()
            new = next(produced, None)
            decoding_seconds += time.perf_counter() - asked
            if new is not None:
                timings.setdefault("first_block", decoding_seconds)
                tokens = np.concatenate([tokens, new[0][new[0] != decoding.PADDING]])
            answer = self._finished(tokens)
            made = speech.push(answer.codes[spoken:])
            spoken = len(answer.codes)
            if new is None and spoken:
                made = np.concatenate([made, speech.finish()])
            audio, now = np.concatenate([audio, made]), time.perf_counter() - start
            if len(audio) or new is None:
                timings.setdefault("first_audio", now)
            yield dataclasses.replace(
                answer,
                audio=audio,
                timings=timings | {"total": now},
                decoding_seconds=decoding_seconds,
            )
            if new is None:
                return

    def _finished(self, tokens: np.ndarray) -> Answer:
        """The answer of whole tokens, without sound; an incomplete last group is dropped."""
        text, codes = self.layouts.decode_aqaa_answer(tokens)
        return Answer(
            text=" ".join(self.vocabulary.decode_text(text).split()),
            audio=np.zeros(0, np.float32),
            rate=self.rate,
            codes=codes[: len(codes) // GROUP_SIZE * GROUP_SIZE],
            tokens=tokens,
        )
