"""Mel to samples as it comes: the same samples that the whole utterance gives.

A sample depends on the mel a few frames to either side and, through the phase of the source, on all
F0 before it. So each piece is made in a window that reaches as far as the generator sees, from a
running phase; what the window's edges disturb is not kept, and nothing has to be faded. CosyVoice's
streaming has a shorter overlap and fades, which waits less and differs from the whole at the seams.

Choices:
- `context` adds up the reach of all layers of a configuration, in frames.
- Phases are summed in float64, one number: an hour of speech is as exact as a second.
- Windows have one size, padded and masked: one compiled step, the same memory after an hour.
"""

import math
from collections.abc import Callable

import numpy as np

from t5x_audio.vocoder.hift import HiftConfig


def context(config: HiftConfig) -> tuple[int, int]:
    """(frames to either side that F0 sees, frames to either side of mel and F0 that samples see)"""
    stages = range(len(config.upsample_rates))
    last = (3 + 1) / math.prod(config.upsample_rates) + config.istft_n_fft / config.hop
    reach = last  # of what is after a stage, from the end to the start
    source = 0.0
    for i in reversed(stages):
        rate = math.prod(config.upsample_rates[: i + 1])
        blocks = max(_reach(kernel, config) for kernel in config.resblock_kernels)
        reach += blocks / rate
        # The spectrum of the source: its window, the convolution down to this stage, its block.
        down = math.prod(config.upsample_rates[i + 1 :]) * config.istft_hop
        own = (config.istft_n_fft + 2 * down) / config.hop
        source = max(source, reach + own + _reach(config.source_kernels[i], config) / rate)
        reach += config.upsample_kernels[i] / rate
    frames = max(reach + 3, source + (config.source_phase == "frames"))
    return config.f0_layers, math.ceil(frames)


def _reach(kernel: int, config: HiftConfig) -> int:
    """Positions to either side that a residual block sees."""
    return (kernel - 1) // 2 * sum(d + 1 for d in config.resblock_dilations)


class HiftStream:
    """`push` mel frames, get the samples that are ready; `finish` gives the rest."""

    def __init__(self, config: HiftConfig, vocode: Callable, piece_frames: int):
        """Begins an utterance.

        Args:
          config: of the generator.
          vocode: (mel float32 [F, num_mels], valid frames, F0 float32 [F], how many of its frames
            are known, phase in cycles and number of the first frame) -> (samples float32 [F * hop],
            F0 float32 [F]).
          piece_frames: that become samples at once at the most.
        """
        self.config, self._vocode, self._piece = config, vocode, piece_frames
        self._f0_context, self._context = context(config)
        self._size = 2 * self._context + self._f0_context + piece_frames
        self._mel = np.zeros((0, config.num_mels), np.float32)  # from frame `_first` on
        self._f0 = np.zeros(0, np.float32)  # known, from frame `_first` on
        self._phase = 0.0  # at the start of frame `_first`
        self._first = self._done = 0  # numbers of frames: the first kept, the next to be heard

    @property
    def delay_frames(self) -> int:
        """Frames after a sample's own that a stream waits for."""
        return self._context + self._f0_context

    def push(self, mel: np.ndarray) -> np.ndarray:
        """Samples float32 [T] that are ready after mel float32 [F, num_mels]; T may be 0."""
        self._mel = np.concatenate([self._mel, mel])
        made = []
        while (ready := self._waiting - self.delay_frames) > 0:
            made.append(self._next(min(ready, self._piece)))
        return _joined(made)

    def finish(self) -> np.ndarray:
        """The samples of what waits."""
        made = []
        while self._waiting:
            made.append(self._next(min(self._waiting, self._piece)))
        return _joined(made)

    @property
    def _waiting(self) -> int:
        return self._first + len(self._mel) - self._done

    def _next(self, frames: int) -> np.ndarray:
        """Samples of the next frames."""
        before, hop = self._done - self._first, self.config.hop
        mel = self._mel[: before + frames + self.delay_frames]
        padding = self._size - len(mel)
        known = len(self._f0)
        samples, f0 = self._vocode(
            np.pad(mel, ((0, padding), (0, 0))),
            len(mel),
            np.pad(self._f0, (0, self._size - known)),
            known,
            self._phase,
            self._first,
        )
        # F0 is known where the window saw all that F0 sees, or the end of the utterance.
        ends = len(mel) == len(self._mel) and len(mel) < before + frames + self.delay_frames
        until = len(mel) if ends else len(mel) - self._f0_context
        self._f0 = np.concatenate([self._f0, f0[known:until]])
        piece = samples[before * hop : (before + frames) * hop]
        self._done += frames
        self._forget(max(0, self._done - self._context) - self._first)
        return piece

    def _forget(self, frames: int) -> None:
        """Lets the first frames go; the phase runs on over them."""
        cycles = np.minimum(self._f0[:frames].astype(np.float64) / self.config.sample_rate, 0.5)
        self._phase = float((self._phase + (cycles * self.config.hop).sum()) % 1.0)
        self._mel, self._f0 = self._mel[frames:], self._f0[frames:]
        self._first += frames


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
