"""Many waveforms of any length through a compiled encoder of few static shapes.

Waveforms are cut into pieces where the model asks for it, pieces are sorted into length buckets,
padded, and encoded in batches of about the same number of samples. Models mask their padding, so
neither the bucket nor the neighbours in a batch change a result.
"""

import bisect
from collections.abc import Sequence

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

from t5x_audio import cpu_weights

SAMPLE_RATE = 16000
PIECE_SECONDS = 30
MIN_PIECE_SAMPLES = 480  # what is shorter carries no frame and is dropped
MAX_LAYERS_APART = 12  # of a stack: each is compiled for each bucket
BUCKET_SECONDS = (1, 2, 3, 4, 6, 8, 12, 20, 30)


class BucketedEncoder:
    """Calls `module.<method>(audio [B, T], lengths [B]) -> (frames [B, N, ...], lengths [B])`.

    The module's `piece_samples` (None = no limit) says how long a piece it takes at a time; pieces
    are encoded alone and their frames are concatenated.
    """

    def __init__(
        self,
        module: nnx.Module,
        method: str = "encode",
        batch_seconds: float = 64.0,
        piece_samples: int | None = None,
    ):
        """Compiles on first use.

        Args:
          module: see the class.
          method: of the module.
          batch_seconds: padded audio of a full batch; a single waveform is a batch of one.
          piece_samples: shorter pieces than the module's; none where it has no limit.
        """
        graph, self._state = nnx.split(cpu_weights.arranged(module, MAX_LAYERS_APART))
        longest = module.piece_samples
        self._piece_samples = longest and min(longest, piece_samples or longest)
        self._batch_samples = int(batch_seconds * SAMPLE_RATE)

        @jax.jit
        def run(state, audio, lengths):
            return getattr(nnx.merge(graph, state), method)(audio, lengths)

        self._run = run

    def __call__(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Float [T_i] waveforms in [-1, 1] at 16 kHz -> frames [N_i, ...] of each.

        A waveform below 30 ms gives no frame.
        """
        pieces = [self._cut(np.asarray(waveform, np.float32)) for waveform in waveforms]
        flat = [(i, j) for i, cut in enumerate(pieces) for j in range(len(cut))]
        buckets: dict[int, list[tuple[int, int]]] = {}
        for i, j in flat:
            buckets.setdefault(bucket_samples(len(pieces[i][j])), []).append((i, j))
        results = {}
        for length in sorted(buckets):
            members = buckets[length]
            full = max(1, self._batch_samples // length)
            size = 1 if len(members) == 1 else full
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                frames = self._encode([pieces[i][j] for i, j in batch], size, length)
                results.update(zip(batch, frames, strict=True))
        return [
            self._join([results[i, j] for j in range(len(cut))]) for i, cut in enumerate(pieces)
        ]

    def _cut(self, waveform):
        step = self._piece_samples or max(len(waveform), 1)
        cut = [waveform[i : i + step] for i in range(0, len(waveform), step)]
        return [piece for piece in cut if len(piece) >= MIN_PIECE_SAMPLES]

    def _encode(self, pieces, size, length):
        audio = np.zeros((size, length), np.float32)
        lengths = np.zeros(size, np.int32)
        for row, piece in enumerate(pieces):
            audio[row, : len(piece)] = piece
            lengths[row] = len(piece)
        frames, counts = jax.device_get(self._run(self._state, jnp.asarray(audio), lengths))
        return [frames[row, : counts[row]] for row in range(len(pieces))]

    def _join(self, frames):
        if frames:
            return np.concatenate(frames)
        minimal = jnp.zeros((1, SAMPLE_RATE)), jnp.zeros(1, jnp.int32)
        shape, _ = jax.eval_shape(self._run, self._state, *minimal)
        return np.zeros((0, *shape.shape[2:]), shape.dtype)


def bucket_samples(length: int) -> int:
    """Samples of the smallest bucket for `length` samples; beyond the last, its multiples."""
    seconds = -(-length // SAMPLE_RATE)
    if seconds > BUCKET_SECONDS[-1]:
        return -(-length // (BUCKET_SECONDS[-1] * SAMPLE_RATE)) * BUCKET_SECONDS[-1] * SAMPLE_RATE
    return BUCKET_SECONDS[bisect.bisect_left(BUCKET_SECONDS, seconds)] * SAMPLE_RATE
