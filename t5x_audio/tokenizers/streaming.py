"""Codes while somebody speaks: `push(samples)` gives the new ones, `finish()` the last.

Choices:
- However the samples are cut, the codes are those of the whole recording encoded at once with the
  same gain and the same segments.
- The linguistic encoder in chunk context is causal: its codes come in fours, every 240 ms. Whatever
  sees its whole input (the semantic encoder, a linguistic one in full context) works on segments of
  a fixed duration, each alone, as in Step-Audio's real-time pipeline (arXiv 2502.11946, section 6);
  30 s segments give the codes of the published offline tokenizer.
- What is kept between two pushes is the encoder's state and less than a segment of samples.
- `emission_samples` says after how many samples a group of codes comes; computing adds to that.
"""

import math

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

from t5x_audio import cpu_weights
from t5x_audio.tokenizers import batching, linguistic

SAMPLES_PER_GROUP = 1920  # 0.12 s
_HOP = linguistic.FBANK.hop
_LEFT = (linguistic.STACKED_FRAMES - 1) // 2  # filter bank frames before the centre of a stack


class ChunkStepper:
    """The compiled step of a linguistic tokenizer in chunk context; shared by all its streams.

    Attributes:
      chunk_samples: from chunk to chunk.
      window_samples: what a chunk looks at, from `lead_samples` before its start on.
    """

    def __init__(self, module: nnx.Module):
        graph, self._state = nnx.split(cpu_weights.arranged(module))
        self.encoder = module.config.encoder
        frames = self.encoder.chunk_frames * linguistic.FRAME_STRIDE
        self.chunk_samples = frames * _HOP
        self.lead_samples = _LEFT * _HOP
        # The last stack of a chunk is centred on its last frame but five, and reaches three beyond.
        self.window_frames = frames - linguistic.FRAME_STRIDE + linguistic.STACKED_FRAMES
        self.window_samples = (self.window_frames - 1) * _HOP + linguistic.FBANK.window

        def step(weights, *arguments):
            return nnx.merge(graph, weights).encode_chunk(*arguments)

        self._step = jax.jit(step)
        self._initial = jax.jit(lambda weights: nnx.merge(graph, weights).encoder.initial_state(1))

    def initial_state(self):
        """Before the first chunk."""
        return self._initial(self._state)

    def __call__(self, window: np.ndarray, frames: int, stacks: int, state):
        """Codes of one chunk; see `LinguisticTokenizer.encode_chunk`."""
        audio = np.zeros((1, self.window_samples), np.float32)
        audio[0, : len(window)] = window
        codes, state = self._step(
            self._state, jnp.asarray(audio), jnp.int32(frames), jnp.int32(stacks), state
        )
        return np.asarray(codes[0, :stacks]), state


class ChunkStream:
    """Linguistic codes of one recording, chunk by chunk."""

    def __init__(self, stepper: ChunkStepper):
        self._step, self._state = stepper, stepper.initial_state()
        # Before the first sample there is nothing; the first frame stands in for frames before it.
        self._samples = np.zeros(stepper.lead_samples, np.float32)
        self._chunks, self._count = 0, 0

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Float [T] -> int32 codes of the chunks that are now complete."""
        self._samples = np.concatenate([self._samples, samples])
        self._count += len(samples)
        codes = []
        while len(self._samples) >= self._step.window_samples:
            codes.append(self._encode(self._step.window_frames, self._step.encoder.chunk_frames))
            self._samples = self._samples[self._step.chunk_samples :]
        return _joined(codes)

    def finish(self) -> np.ndarray:
        """int32 codes of the chunk that the end has cut short."""
        if self._count < batching.MIN_PIECE_SAMPLES:
            return _joined([])
        total = linguistic.FBANK.num_frames(self._count)
        per_chunk = self._step.encoder.chunk_frames
        stacks = linguistic.num_stacks(total, per_chunk) - per_chunk * self._chunks
        if stacks <= 0:
            return _joined([])
        before = self._chunks * per_chunk * linguistic.FRAME_STRIDE
        return self._encode(total - before + _LEFT, stacks)

    def _encode(self, frames: int, stacks: int) -> np.ndarray:
        window = self._samples[: self._step.window_samples]
        codes, self._state = self._step(window, frames, stacks, self._state)
        self._chunks += 1
        return codes


class SegmentStream:
    """Codes of one recording by an encoder that sees a whole segment at a time."""

    def __init__(self, encoder: batching.BucketedEncoder, segment_samples: int):
        self._encoder, self._size = encoder, segment_samples
        self._samples = np.zeros(0, np.float32)

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Float [T] -> int32 codes of the segments that are now complete."""
        self._samples = np.concatenate([self._samples, samples])
        whole = len(self._samples) // self._size * self._size
        segments, self._samples = self._samples[:whole], self._samples[whole:]
        return self._encoder([segments])[0] if whole else _joined([])

    def finish(self) -> np.ndarray:
        """int32 codes of the last segment."""
        return self._encoder([self._samples])[0] if len(self._samples) else _joined([])


class TokenStream:
    """The merged stream of one recording. Made by `DualCodebookTokenizer.stream`."""

    def __init__(self, linguistic_stream, semantic_stream, merge, gain: float):
        self._streams = (linguistic_stream, semantic_stream)
        self._merge, self._gain = merge, np.float32(gain)
        self._waiting = [np.zeros(0, np.int32), np.zeros(0, np.int32)]
        self._finished = False

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Float [T] samples in [-1, 1] at 16 kHz -> the new flat local codes int32 [5 g].

        Raises:
          ValueError: samples of another shape, or after `finish`.
        """
        if self._finished:
            raise ValueError("the stream is finished; start another")
        samples = np.asarray(samples, np.float32)
        if samples.ndim != 1:
            raise ValueError(f"samples are a [T], not of shape {samples.shape}")
        return self._merged([stream.push(samples * self._gain) for stream in self._streams])

    def finish(self) -> np.ndarray:
        """The last flat local codes int32 [5 g]; what is left over fills no group."""
        self._finished = True
        return self._merged([stream.finish() for stream in self._streams])

    def _merged(self, new) -> np.ndarray:
        codes = [np.concatenate(pair) for pair in zip(self._waiting, new, strict=True)]
        groups = min(len(codes[0]) // 2, len(codes[1]) // 3)
        self._waiting = [codes[0][2 * groups :], codes[1][3 * groups :]]
        return self._merge(*codes)


def emission_samples(
    group: int, segment_samples: int, chunk: ChunkStepper | None, length: int | None = None
) -> int:
    """Samples that must have been pushed before a group of codes comes.

    Args:
      group: 0, 1, ...; it covers samples [1920 group, 1920 (group + 1)).
      segment_samples: of the encoders that see a segment at a time.
      chunk: of a linguistic encoder in chunk context; None = it works on segments too.
      length: of the whole recording, which `finish` ends; None = it goes on.

    Returns:
      The number of samples. Less 1920 (group + 1) it is the group's latency, in samples.
    """
    end = (group + 1) * SAMPLES_PER_GROUP
    needed = math.ceil(end / segment_samples) * segment_samples
    if chunk is not None:
        last = (2 * group + 1) // chunk.encoder.chunk_frames
        reach = chunk.window_samples - chunk.lead_samples
        needed = max(needed, last * chunk.chunk_samples + reach)
    return needed if length is None else min(needed, length)


def _joined(codes: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(codes) if codes else np.zeros(0, np.int32)
