"""The linguistic tokenizer: filter banks, a SAN-M encoder, nearest k-means centre; 16.67 Hz.

Step-Audio (arXiv 2502.11946, section 3.1) takes the encoder of a trained Paraformer recogniser and
clusters its output into 1,024 codes. Here the encoder can also be trained from scratch: layers of
supervision and a CTC head sit on top of it, are trained with it, and are no part of the codes. The
supervision layers take the peaky alignment of CTC off the encoder output, which so stays closer to
phones. The codebook is fitted afterwards (`t5x_audio.fit_codebook`).

Feature mean and variance (CMVN, after the stacking of frames) are module state, gathered during
training.
"""

import dataclasses

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from t5x_audio.audio import features as audio_features
from t5x_audio.tokenizers import batching, kmeans
from t5x_audio.tokenizers.sanm import SanmConfig
from t5x_audio.tokenizers.vector_quantizer import Codebook

FBANK = audio_features.KaldiFbankConfig()
STACKED_FRAMES = 7
FRAME_STRIDE = 6
MAX_COUNT = 1e6  # frames after which the statistics become a moving average
VARIANCE_FLOOR = 1e-5  # added to every variance


class Statistics(nnx.Variable):
    """Variable type of running feature statistics."""


@dataclasses.dataclass(frozen=True)
class LinguisticTokenizerConfig:
    """Sizes; the defaults are the published ones.

    Attributes:
      encoder: the SAN-M encoder.
      codebook_size: k-means centres.
      text_size: outputs of the CTC head (0 is the blank); 0 = no head.
      num_supervision_layers: SAN-M layers between the encoder output and the head, training only.
    """

    encoder: SanmConfig = SanmConfig()
    codebook_size: int = 1024
    text_size: int = 8501
    num_supervision_layers: int = 0

    def make(self, rngs: nnx.Rngs) -> "LinguisticTokenizer":
        """Builds the tokenizer."""
        return LinguisticTokenizer(self, rngs)


class LinguisticTokenizer(nnx.Module):
    """See the module docstring. All methods are pure but for `normalize(train=True)`."""

    frame_rate = 100 / FRAME_STRIDE
    num_mels = FBANK.num_mels
    frames_per_code = 1  # of `features`

    def __init__(self, config: LinguisticTokenizerConfig, rngs: nnx.Rngs):
        """Builds an untrained tokenizer with an empty (all zero) codebook."""
        encoder = config.encoder
        if encoder.input_dim != FBANK.num_mels * STACKED_FRAMES:
            raise ValueError(f"the front end gives 560 features, not {encoder.input_dim}")
        self.config = config
        self.count = Statistics(jnp.zeros(()))
        self.mean = Statistics(jnp.zeros(encoder.input_dim))
        self.variance = Statistics(jnp.ones(encoder.input_dim))
        self.encoder = encoder.make(rngs)
        self.codebook = Codebook(jnp.zeros((config.codebook_size, encoder.width)))
        if config.num_supervision_layers:
            self.supervision = dataclasses.replace(
                encoder, input_dim=encoder.width, num_layers=config.num_supervision_layers
            ).make(rngs)
        if config.text_size:
            init = nnx.with_metadata(
                nnx.initializers.lecun_normal(), logical_axes=("embed", "vocab")
            )
            self.head = nnx.Linear(
                encoder.width,
                config.text_size,
                kernel_init=init,
                dtype=jnp.dtype(encoder.dtype),
                rngs=rngs,
            )

    @property
    def piece_samples(self) -> int | None:
        """Longest piece the encoder takes at once; chunk context has no limit."""
        if self.config.encoder.context == "chunk":
            return None
        return batching.PIECE_SECONDS * batching.SAMPLE_RATE

    def features(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Audio [B, T] in [-1, 1], sample counts [B] -> stacked fbank [B, N, 560], counts."""
        frames = audio_features.kaldi_fbank(audio, lengths, FBANK)
        counts = FBANK.num_frames(jnp.asarray(lengths))
        stacked = audio_features.low_frame_rate(frames, counts, STACKED_FRAMES, FRAME_STRIDE)
        chunked = self.config.encoder.context == "chunk"
        chunk_frames = self.config.encoder.chunk_frames if chunked else None
        return stacked, num_stacks(counts, chunk_frames)

    def normalize(self, features, lengths, train: bool = False) -> jax.Array:
        """CMVN of features [B, N, 560]; `train` first adds them to the statistics."""
        if train:
            self._gather(features, lengths)
        return (features - self.mean[...]) * jax.lax.rsqrt(self.variance[...] + VARIANCE_FLOOR)

    def _gather(self, features, lengths):
        """Merges the moments of a batch into the running ones (Chan et al., 1979)."""
        weight = (jnp.arange(features.shape[1]) < lengths[:, None]).astype(jnp.float32)[..., None]
        new = jnp.sum(weight)
        mean = jnp.sum(features * weight, axis=(0, 1)) / jnp.maximum(new, 1.0)
        squares = jnp.sum(jnp.square(features - mean) * weight, axis=(0, 1))
        total = jnp.maximum(self.count[...] + new, 1.0)
        shift = mean - self.mean[...]
        moment = self.variance[...] * self.count[...] + squares
        moment = moment + jnp.square(shift) * self.count[...] * new / total
        self.mean[...] = self.mean[...] + shift * new / total
        self.variance[...] = moment / total
        self.count[...] = jnp.minimum(total, MAX_COUNT)

    def hidden(self, features: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Normalised features [B, N, 560] -> encoder outputs [B, N, width], counts."""
        return self.encoder(features, lengths), lengths

    def logits(self, hidden: jax.Array, lengths: jax.Array) -> jax.Array:
        """CTC logits float32 [B, N, text_size] of encoder outputs [B, N, width]."""
        if self.config.num_supervision_layers:
            hidden = self.supervision(hidden, lengths)
        return self.head(hidden).astype(jnp.float32)

    def encode_frames(self, audio, lengths) -> tuple[jax.Array, jax.Array]:
        """Audio [B, T], sample counts [B] -> encoder outputs [B, N, width], frame counts [B]."""
        features, counts = self.features(audio, lengths)
        return self.hidden(self.normalize(features, counts), counts)

    def encode(self, audio, lengths) -> tuple[jax.Array, jax.Array]:
        """Audio [B, T], sample counts [B] -> codes int32 [B, N], code counts int32 [B]."""
        hidden, counts = self.encode_frames(audio, lengths)
        return kmeans.nearest(hidden, self.codebook[...]), counts

    def encode_chunk(self, audio, frames, stacks, state):
        """One step of a stream, in chunk context.

        Args:
          audio: [B, T] samples of a chunk, with those of the 3 frames before it that its first
            stack reaches back to; before the first chunk they are anything.
          frames: int32 [], filter bank frames of `audio` that there are, these 3 among them.
          stacks: int32 [], stacked frames of the chunk that there are.
          state: `SanmState`.

        Returns:
          (codes int32 [B, chunk_frames], the next state); codes beyond `stacks` are undefined.
        """
        encoder, reach = self.config.encoder, (STACKED_FRAMES - 1) // 2
        fbank = audio_features.kaldi_fbank(audio, None, FBANK)
        wanted = jnp.arange(encoder.chunk_frames)[:, None] * FRAME_STRIDE + jnp.arange(
            STACKED_FRAMES
        )
        first = jnp.where(state.position == 0, reach, 0)
        stacked = fbank[:, jnp.clip(wanted.reshape(-1), first, frames - 1)]
        stacked = stacked.reshape(len(audio), encoder.chunk_frames, -1)
        lengths = jnp.broadcast_to(stacks, len(audio))
        hidden, state = self.encoder.step(self.normalize(stacked, lengths), lengths, state)
        return kmeans.nearest(hidden, self.codebook[...]), state


def num_stacks(frames, chunk_frames: int | None):
    """Stacked frames of so many filter bank frames (int or array); `chunk_frames` in chunk context.

    There, FunASR's streaming front end fills a stack's missing frames with the last one, but makes
    no stack of 3 frames or fewer that come after the last whole chunk.
    """
    stacks = audio_features.low_frame_rate_length(frames, FRAME_STRIDE)
    if chunk_frames is None:
        return stacks
    beyond = frames % (chunk_frames * FRAME_STRIDE)
    return stacks - ((beyond > 0) & (beyond <= (STACKED_FRAMES - 1) // 2))
