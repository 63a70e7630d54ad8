"""The dual-codebook tokenizer: one waveform -> two code streams -> one merged stream.

The linguistic stream runs at 16.67 Hz, the semantic at 25 Hz, so 2 linguistic and 3 semantic
codes cover the same 0.12 s: such groups of five, linguistic first, are the merged stream
(Step-Audio, arXiv 2502.11946, section 3.1; grouping and dropped remainder as in its published
tokenizer). A flat local code is a linguistic code c, or linguistic_size + semantic code c.
"""

import functools
from collections.abc import Sequence

import flax.nnx as nnx
import numpy as np

from t5x_audio.audio import transforms
from t5x_audio.errors import UserError
from t5x_audio.tokenizers import batching, streaming

LINGUISTIC_PER_GROUP = 2
SEMANTIC_PER_GROUP = 3
GROUP_SIZE = LINGUISTIC_PER_GROUP + SEMANTIC_PER_GROUP
GROUP_SECONDS = 0.12


def merge(linguistic: np.ndarray, semantic: np.ndarray, linguistic_size: int) -> np.ndarray:
    """Interleaves linguistic [N] and semantic [M] local codes 2:3.

    Returns:
      int32 [5 g] flat local codes with g = min(N // 2, M // 3) groups; the remainder is dropped.
    """
    linguistic, semantic = np.asarray(linguistic, np.int32), np.asarray(semantic, np.int32)
    groups = min(len(linguistic) // LINGUISTIC_PER_GROUP, len(semantic) // SEMANTIC_PER_GROUP)
    first = linguistic[: groups * LINGUISTIC_PER_GROUP].reshape(groups, LINGUISTIC_PER_GROUP)
    second = semantic[: groups * SEMANTIC_PER_GROUP].reshape(groups, SEMANTIC_PER_GROUP)
    return np.concatenate([first, second + linguistic_size], axis=1).reshape(-1)


def split(flat: np.ndarray, linguistic_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `merge`: flat local codes [5 g] -> (linguistic [2 g], semantic [3 g]), int32.

    Raises:
      ValueError: the length is no multiple of 5, or a code is of the wrong codebook for its place.
    """
    flat = np.asarray(flat, np.int32)
    if flat.ndim != 1 or len(flat) % GROUP_SIZE:
        raise ValueError(f"flat codes come in groups of {GROUP_SIZE}, got shape {flat.shape}")
    groups = flat.reshape(-1, GROUP_SIZE)
    linguistic, semantic = groups[:, :LINGUISTIC_PER_GROUP], groups[:, LINGUISTIC_PER_GROUP:]
    if (linguistic < 0).any() or (linguistic >= linguistic_size).any():
        raise ValueError("a linguistic place holds another kind of code")
    if (semantic < linguistic_size).any():
        raise ValueError("a semantic place holds another kind of code")
    return linguistic.reshape(-1), semantic.reshape(-1) - linguistic_size


def only(flat: np.ndarray, linguistic_size: int, codebook: str) -> np.ndarray:
    """Flat local codes of which one codebook is left; in the other's places stands its code 0.

    Args:
      flat: int32 [5 g].
      linguistic_size: rows of the linguistic codebook.
      codebook: the one that is kept, 'linguistic' or 'semantic'.
    """
    streams = dict(zip(("linguistic", "semantic"), split(flat, linguistic_size), strict=True))
    if codebook not in streams:
        raise UserError(f"codebook={codebook!r}: there are 'linguistic' and 'semantic'")
    kept = {name: codes if name == codebook else 0 * codes for name, codes in streams.items()}
    return merge(kept["linguistic"], kept["semantic"], linguistic_size)


class DualCodebookTokenizer:
    """Both tokenizers behind one call.

    Attributes:
      linguistic_size, semantic_size: codebook sizes.
      size: number of flat local codes.
      sample_rate: of the waveforms it takes, Hz.
      linguistic_rate, semantic_rate: codes per second.
    """

    sample_rate = batching.SAMPLE_RATE

    def __init__(
        self,
        linguistic: nnx.Module,
        semantic: nnx.Module,
        segment_seconds: float = batching.PIECE_SECONDS,
    ):
        """Takes a `LinguisticTokenizer` and a `SemanticTokenizer`, trained.

        Args:
          linguistic, semantic: the modules.
          segment_seconds: an encoder that sees its whole input gets at most so much at a time, a
            multiple of 0.12 s. 30 s is the published tokenizer; less lets a stream answer sooner.
        """
        segment = round(segment_seconds * self.sample_rate)
        if (
            segment % streaming.SAMPLES_PER_GROUP
            or not 0 < segment <= batching.PIECE_SECONDS * self.sample_rate
        ):
            raise UserError(
                f"segment_seconds={segment_seconds:g}: give a multiple of {GROUP_SECONDS} s up to "
                f"{batching.PIECE_SECONDS} s"
            )
        self.segment_samples = segment
        self.linguistic, self.semantic = linguistic, semantic
        self.linguistic_size = linguistic.config.codebook_size
        self.semantic_size = semantic.config.codebook_size
        self.linguistic_rate, self.semantic_rate = linguistic.frame_rate, semantic.frame_rate
        self._linguistic_encoder = batching.BucketedEncoder(linguistic, piece_samples=segment)
        self._semantic_encoder = batching.BucketedEncoder(semantic, piece_samples=segment)

    @property
    def size(self) -> int:
        """Number of flat local codes."""
        return self.linguistic_size + self.semantic_size

    def merge(self, linguistic: np.ndarray, semantic: np.ndarray) -> np.ndarray:
        """The module's `merge` for this codebook."""
        return merge(linguistic, semantic, self.linguistic_size)

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """Waveform float [T] in [-1, 1] at 16 kHz -> flat local codes int32 [5 g].

        Raises:
          UserError: the waveform is too short for one group.
        """
        flat = self.merge(*self.encode_batch([waveform])[0])
        if not len(flat):
            seconds = len(waveform) / self.sample_rate
            raise UserError(
                f"recording of {seconds:.3f} s is too short for one group of codes "
                f"({GROUP_SECONDS} s); give a longer one"
            )
        return flat

    def encode_batch(self, waveforms: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Float [T_i] waveforms at 16 kHz -> (linguistic int32 [N_i], semantic int32 [M_i]) each.

        Each is first scaled to a peak of 0.999 (see `audio.transforms.normalize_energy`). They
        are padded to a few static lengths; padding never changes a code.
        """
        waveforms = [transforms.normalize_energy(waveform) for waveform in waveforms]
        linguistic = self._linguistic_encoder(waveforms)
        semantic = self._semantic_encoder(waveforms)
        return list(zip(linguistic, semantic, strict=True))

    def stream(self, gain: float = 1.0) -> streaming.TokenStream:
        """Starts on a recording that is still going on.

        Args:
          gain: what its samples are multiplied with. The codes are those of `encode` with
            `transforms.energy_gain` of the whole recording, which nobody knows before it has ended:
            take that of what was heard before.
        """
        if self._stepper is not None:
            first = streaming.ChunkStream(self._stepper)
        else:
            first = streaming.SegmentStream(self._linguistic_encoder, self.segment_samples)
        second = streaming.SegmentStream(self._semantic_encoder, self.segment_samples)
        return streaming.TokenStream(first, second, self.merge, gain)

    def emission_samples(self, group: int, length: int | None = None) -> int:
        """Samples after which a stream gives a group, see `streaming.emission_samples`."""
        return streaming.emission_samples(group, self.segment_samples, self._stepper, length)

    @functools.cached_property
    def _stepper(self) -> streaming.ChunkStepper | None:
        """Of a linguistic encoder in chunk context."""
        chunked = self.linguistic.config.encoder.context == "chunk"
        return streaming.ChunkStepper(self.linguistic) if chunked else None
