"""Codes to mel as they come, for both forms of the flow.

The flow of CosyVoice-1's form was made for whole utterances. Each chunk of codes is sampled in a
window (`WindowStream`): the prompt of the voice, some codes before the chunk with the mel that they
became, the chunk, and some codes after it. The mel of the codes before is given to the flow as its
prompt, which is what it learnt to continue, so that chunks fit together; CosyVoice's streaming
likewise gives each chunk overlapping codes, and fades between the two mels. The successor's flow
has caches (`CacheStream`, `PairedFlow.step`).

Choices:
- Chunks have one size, the last is padded and masked: one compiled step, or two with a prompt, and
  the same memory after an hour.
- Noise belongs to frames (`noise.frame_noise`): where nothing is before or after a window, the
  stream gives what the whole gives; elsewhere it differs by what the window does not see.
- Which codes make a chunk depends on their numbers alone, so that any pushing of the same codes
  gives the same mel.
- A cached prompt waits for the first codes after it, which it sees as it does in the whole; the
  reference puts codes of silence there.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from t5x_audio.errors import UserError
from t5x_audio.vocoder.flow import CODES_PER_GROUP, FlowConfig
from t5x_audio.vocoder.paired_flow import PairedFlowConfig, PairedFlowState


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How much of the codes a window holds, in codes: multiples of 5.

    Attributes:
      chunk_codes: become mel at once; 15 are an audio block of Step-Audio-AQAA, 0.36 s.
      left_codes: before the chunk; a flow with caches has its own measure.
      right_codes: after the chunk, for which the stream waits; as above.
    """

    chunk_codes: int = 15
    left_codes: int = 60
    right_codes: int = 10

    def __post_init__(self):
        for name, least in (
            ("chunk_codes", CODES_PER_GROUP),
            ("left_codes", 0),
            ("right_codes", 0),
        ):
            value = getattr(self, name)
            if value < least or value % CODES_PER_GROUP:
                raise UserError(
                    f"StreamConfig.{name}={value}: give a multiple of {CODES_PER_GROUP}, "
                    f"{least} or more"
                )


@dataclasses.dataclass(frozen=True)
class Window:
    """What a chunk is sampled from; arrays without a batch axis, padded to one size.

    Attributes:
      codes: int32 [N], of which the first `num_codes` count; `prompt_codes` of them are done.
      mel: float32 [F, num_mels], of which `prompt_frames` are known and `num_frames` count.
      noise_frames: int32 [F], the number of each frame's noise.
    """

    codes: np.ndarray
    num_codes: int
    prompt_codes: int
    mel: np.ndarray
    prompt_frames: int
    num_frames: int
    noise_frames: np.ndarray


class WindowStream:
    """`push` codes, get the mel frames that are ready; `finish` gives the rest.

    Attributes:
      delay_codes: after a chunk, for which it waits.
    """

    def __init__(
        self,
        config: FlowConfig,
        sample: Callable[[Window], np.ndarray],
        prompt_codes: np.ndarray,
        prompt_mel: np.ndarray,
        stream: StreamConfig,
    ):
        """Begins an utterance.

        Args:
          config: of the flow.
          sample: a window -> float32 [F, num_mels], all its frames.
          prompt_codes: int32 [P], whole groups of the voice's prompt, or none.
          prompt_mel: float32 [mel_lengths(P), num_mels].
          stream: sizes of a window.
        """
        self.config, self._sample, self._sizes = config, sample, stream
        self._prompt_codes, self._prompt_mel = prompt_codes, prompt_mel
        self._codes = np.zeros(0, np.int32)  # before the chunk, then what waits
        self._mel = np.zeros((0, config.num_mels), np.float32)  # of the codes before
        self._first = self._done = 0  # numbers of the first code kept, and of the first that waits
        self.delay_codes = stream.right_codes
        most = stream.left_codes + stream.chunk_codes + stream.right_codes
        self._num_codes = len(prompt_codes) + most
        self._num_frames = len(prompt_mel) + config.mel_lengths(most) + 1

    def push(self, codes: np.ndarray) -> np.ndarray:
        """Mel float32 [F, num_mels] that is ready after codes int32 [N]; F may be 0."""
        self._codes = np.concatenate([self._codes, codes])
        chunk, right = self._sizes.chunk_codes, self._sizes.right_codes
        made = [self._mel[:0]]
        while self._waiting >= chunk + right:
            made.append(self._next(chunk, right))
        return np.concatenate(made)

    def finish(self) -> np.ndarray:
        """The mel of what waits."""
        made = [self._mel[:0]]
        while waiting := self._waiting:
            chunk = min(waiting, self._sizes.chunk_codes)
            made.append(self._next(chunk, min(waiting - chunk, self._sizes.right_codes)))
        return np.concatenate(made)

    @property
    def _waiting(self) -> int:
        return self._first + len(self._codes) - self._done

    def _next(self, chunk: int, right: int) -> np.ndarray:
        frames = self.config.mel_lengths
        window = self._window(chunk, right)
        end = self._done + chunk
        new = frames(end) - frames(self._done)
        mel = self._sample(window)[window.prompt_frames : window.prompt_frames + new]
        first = max(0, end - self._sizes.left_codes)
        self._codes = self._codes[first - self._first :]
        kept = frames(end) - frames(first)
        joined = np.concatenate([self._mel, mel])
        self._mel = joined[len(joined) - kept :]
        self._first, self._done = first, end
        return mel

    def _window(self, chunk: int, right: int) -> Window:
        frames = self.config.mel_lengths
        before = self._done - self._first
        codes = np.concatenate([self._prompt_codes, self._codes[: before + chunk + right]])
        mel = np.concatenate([self._prompt_mel, self._mel])
        rest = frames(self._done + chunk + right) - frames(self._done)
        index = np.arange(self._num_frames, dtype=np.int32)
        known = len(self._prompt_mel)
        skipped = frames(self._first)  # frames of the utterance that are no longer in the window
        return Window(
            codes=np.pad(codes, (0, self._num_codes - len(codes))),
            num_codes=len(codes),
            prompt_codes=len(self._prompt_codes) + before,
            mel=np.pad(mel, ((0, self._num_frames - len(mel)), (0, 0))),
            prompt_frames=len(mel),
            num_frames=len(mel) + rest,
            noise_frames=np.where(index < known, index, index + skipped),
        )


class CacheStream:
    """As `WindowStream`, of a flow with caches."""

    def __init__(
        self,
        config: PairedFlowConfig,
        step: Callable,
        state: PairedFlowState,
        prompt_codes: np.ndarray,
        prompt_mel: np.ndarray,
        chunk_codes: int,
    ):
        """Begins an utterance.

        Args:
          config: of the flow.
          step: (codes int32 [N + look_ahead_codes], numbers of the frames int32 [F], state,
            prompt_mel or None, valid codes) -> (mel float32 [F, num_mels], next state).
          state: before the first code.
          prompt_codes, prompt_mel: as of `WindowStream`.
          chunk_codes: become mel at once.
        """
        self.config, self._step, self._state = config, step, state
        self._prompt = (prompt_codes, prompt_mel)
        self._chunk = chunk_codes
        self._codes = np.zeros(0, np.int32)  # that wait
        self._frames = 0
        self.delay_codes = config.look_ahead_codes

    def push(self, codes: np.ndarray) -> np.ndarray:
        """As of `WindowStream`."""
        self._codes = np.concatenate([self._codes, codes])
        made = [self._nothing]
        while len(self._codes) >= self._chunk + self.config.look_ahead_codes:
            made.append(self._next())
        return np.concatenate(made)

    def finish(self) -> np.ndarray:
        """As of `WindowStream`."""
        self._codes = self.config.completed(self._codes)
        made = [self._nothing]
        while len(self._codes):
            made.append(self._next())
        return np.concatenate(made)

    @property
    def _nothing(self) -> np.ndarray:
        return np.zeros((0, self.config.num_mels), np.float32)

    def _next(self) -> np.ndarray:
        ahead = self.config.look_ahead_codes
        codes, mel = self._prompt
        if len(codes):
            self._prompt = (codes[:0], mel[:0])
            joined = np.concatenate([codes, self._codes[:ahead]])
            self._call(joined, len(codes), mel)
        new = min(len(self._codes), self._chunk)
        made = self._call(self._codes[: self._chunk + ahead], self._chunk, None)
        self._codes = self._codes[new:]
        return made[: self.config.mel_lengths(new)]

    def _call(self, codes, count: int, prompt_mel):
        """The mel of `count` codes, of which as many are valid as there are."""
        frames = self.config.mel_lengths(count)
        size = count + self.config.look_ahead_codes
        padded = np.pad(codes, (0, size - len(codes)))
        numbers = np.arange(self._frames, self._frames + frames, dtype=np.int32)
        made, self._state = self._step(padded, numbers, self._state, prompt_mel, len(codes))
        self._frames += frames
        return np.asarray(made)
