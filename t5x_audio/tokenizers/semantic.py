"""The semantic tokenizer: a Whisper-type encoder with a quantiser inside; 25 Hz.

Log-mel (128 bins), two strided convolutions, positions, pre-norm blocks, then the L2-normalised
nearest of 4,096 codes: the supervised tokenizer of CosyVoice (arXiv 2407.05407, section 2.1) that
Step-Audio uses. Training from scratch follows it too: the quantiser stands in the middle of a
speech recogniser, further blocks and a CTC head follow, so that the codes keep what recognition
needs.

The published graph ends at the codes; `num_supervision_layers=0, text_size=0` is exactly it. How
many blocks follow in training is our choice.
"""

import dataclasses

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from t5x_audio.audio import features as audio_features
from t5x_audio.tokenizers import batching, whisper
from t5x_audio.tokenizers.vector_quantizer import VectorQuantizer

LOG_MEL = audio_features.WhisperMelConfig()
MAX_FRAMES = 1500  # of 40 ms would be 60 s; the published table is Whisper's


@dataclasses.dataclass(frozen=True)
class SemanticTokenizerConfig:
    """Sizes; the defaults are the published ones where published.

    Attributes:
      width, num_heads, mlp_dim: of every block.
      num_layers: blocks before the quantiser.
      codebook_size: codes.
      num_supervision_layers: blocks after the quantiser, training only.
      text_size: outputs of the CTC head (0 is the blank); 0 = no head.
      codebook_decay: of the moving averages.
      revival_share: a code that wins less than this part of an even share is moved.
      quantizer_warmup_steps: training steps over which quantisation sets in.
      dtype: compute type of the matrix products.
      scan_unroll: blocks unrolled in the compiled scan; all of them is fastest for a small model.
    """

    width: int = 1280
    num_heads: int = 20
    mlp_dim: int = 5120
    num_layers: int = 6
    codebook_size: int = 4096
    num_supervision_layers: int = 6
    text_size: int = 65536
    codebook_decay: float = 0.99
    revival_share: float = 0.05
    quantizer_warmup_steps: int = 0
    dtype: str = "float32"
    scan_unroll: int = 1

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of {self.num_heads} heads")

    def make(self, rngs: nnx.Rngs) -> "SemanticTokenizer":
        """Builds the tokenizer."""
        return SemanticTokenizer(self, rngs)


class SemanticTokenizer(nnx.Module):
    """See the module docstring."""

    frame_rate = 25.0
    num_mels = LOG_MEL.num_mels
    frames_per_code = 4  # of `features`
    piece_samples = batching.PIECE_SECONDS * batching.SAMPLE_RATE

    def __init__(self, config: SemanticTokenizerConfig, rngs: nnx.Rngs):
        """Builds an untrained tokenizer."""
        self.config = config
        c = config
        self.conv1 = whisper.StridedConvolution(LOG_MEL.num_mels, c.width, c.dtype, rngs)
        self.conv2 = whisper.StridedConvolution(c.width, c.width, c.dtype, rngs)
        self.positions = nnx.Param(
            whisper.sinusoids(MAX_FRAMES, c.width), logical_axes=(None, "embed")
        )
        blocks = whisper.BlockConfig(c.width, c.num_heads, c.mlp_dim, c.dtype, c.scan_unroll)
        self.blocks = whisper.Blocks(c.num_layers, blocks, rngs)
        self.quantizer = VectorQuantizer(
            c.codebook_size,
            c.width,
            rngs,
            decay=c.codebook_decay,
            revival_share=c.revival_share,
            warmup_steps=c.quantizer_warmup_steps,
        )
        if c.num_supervision_layers:
            self.supervision = whisper.Blocks(c.num_supervision_layers, blocks, rngs)
        if c.text_size:
            init = nnx.with_metadata(
                nnx.initializers.lecun_normal(), logical_axes=("embed", "vocab")
            )
            self.head_norm = nnx.LayerNorm(
                c.width, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
            )
            self.head = nnx.Linear(
                c.width, c.text_size, kernel_init=init, dtype=jnp.dtype(c.dtype), rngs=rngs
            )

    def features(self, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Audio [B, T] in [-1, 1] with sample counts [B] -> log-mel [B, N, 128], counts [B]."""
        return audio_features.whisper_log_mel(audio, lengths, LOG_MEL), LOG_MEL.num_frames(lengths)

    def normalize(self, features, lengths, train: bool = False) -> jax.Array:
        """The log-mel as it is: Whisper's scaling is fixed."""
        del lengths, train
        return features

    def hidden(self, features: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-mel [B, N, 128] at 100 Hz -> the quantiser's input [B, M, width] at 25 Hz, counts.

        At most 60 s (M <= 1500).
        """
        x, lengths = self.conv1(features, lengths)
        x, lengths = self.conv2(x, lengths)
        length = x.shape[1]
        x = x + self.positions[...][:length].astype(x.dtype)
        return self.blocks(x, valid_frames(lengths, length)), lengths

    def logits(self, quantised: jax.Array, lengths: jax.Array) -> jax.Array:
        """CTC logits float32 [B, M, text_size] of quantised features [B, M, width]."""
        length, width = quantised.shape[1:]
        x = self.quantizer.standardize(quantised)
        x = x + whisper.sinusoids(length, width)
        if self.config.num_supervision_layers:
            x = self.supervision(x, valid_frames(lengths, length))
        return self.head(self.head_norm(x)).astype(jnp.float32)

    def encode_frames(self, audio, lengths) -> tuple[jax.Array, jax.Array]:
        """Audio [B, T], sample counts [B] -> the quantiser's input [B, M, width], counts [B]."""
        return self.hidden(*self.features(audio, lengths))

    def encode(self, audio, lengths) -> tuple[jax.Array, jax.Array]:
        """Audio [B, T], sample counts [B] -> codes int32 [B, M], code counts int32 [B]."""
        hidden, counts = self.encode_frames(audio, lengths)
        return self.quantizer.encode(hidden), counts


def valid_frames(lengths: jax.Array, length: int) -> jax.Array:
    """Bool [B, length]: which frames lie within `lengths` [B]."""
    return jnp.arange(length) < lengths[:, None]
