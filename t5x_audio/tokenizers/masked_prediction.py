"""A tokenizer's encoder with what BEST-RQ trains it by: a random-projection quantiser and a head.

The quantiser turns the features of each code into a label: standardised per utterance, projected
by a random matrix, L2-normalised, the nearest of random codes. Projection and codes are never
trained, but saved, so that a continued run has the same labels. The encoder learns to predict the
labels of what is hidden from it (`objectives/best_rq.py`); then its weights, which a checkpoint
holds under `tokenizer/`, start the supervised training. Source: Chiu et al., "Self-supervised
Learning with Random-projection Quantizer for Speech Recognition" (arXiv 2202.01855, section 3).

Choices: features are standardised with the moments of the utterance itself, not of the data so far:
labels are then the same in the first step and the last, and whatever else a batch holds. Without
that a few codes take everything. The tokenizer's own quantiser has no part in this.
"""

import dataclasses

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError
from t5x_audio.tokenizers import kmeans
from t5x_audio.tokenizers.linguistic import LinguisticTokenizerConfig
from t5x_audio.tokenizers.semantic import SemanticTokenizerConfig, valid_frames
from t5x_audio.tokenizers.vector_quantizer import normalize


class Frozen(nnx.Variable):
    """Variable type of what is random once and for all: saved, never changed."""


@dataclasses.dataclass(frozen=True)
class MaskedPredictionConfig:
    """Sizes; the defaults are BEST-RQ's.

    Attributes:
      tokenizer: whose encoder is trained; without the parts that only supervision trains.
      num_labels: random codes.
      label_dim: of the projected features and the codes.
    """

    tokenizer: LinguisticTokenizerConfig | SemanticTokenizerConfig
    num_labels: int = 8192
    label_dim: int = 16

    def __post_init__(self):
        if self.tokenizer.text_size or self.tokenizer.num_supervision_layers:
            raise UserError(
                "MaskedPredictionConfig.tokenizer: nothing would train its text head and "
                "supervision layers; set its text_size and num_supervision_layers to 0"
            )

    def make(self, rngs: nnx.Rngs) -> "MaskedPrediction":
        """Builds the model."""
        return MaskedPrediction(self, rngs)


class MaskedPrediction(nnx.Module):
    """See the module docstring.

    Attributes:
      tokenizer: with `features`, `normalize` and `hidden`.
      projection: [D, label_dim], D features a code.
      codes: [num_labels, label_dim], of unit length.
    """

    def __init__(self, config: MaskedPredictionConfig, rngs: nnx.Rngs):
        """Builds an untrained encoder, a random quantiser and a head."""
        self.config = config
        self.tokenizer = config.tokenizer.make(rngs)
        width, stacked = _widths(self.tokenizer)
        init = nnx.initializers.xavier_uniform()
        self.projection = Frozen(init(rngs.params(), (stacked, config.label_dim)))
        codes = jax.random.normal(rngs.params(), (config.num_labels, config.label_dim))
        self.codes = Frozen(normalize(codes))
        self.norm = nnx.LayerNorm(
            width, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
        )
        kernel = nnx.initializers.lecun_normal()(rngs.params(), (width, config.num_labels))
        self.head_kernel = nnx.Param(kernel, logical_axes=("embed", "vocab"))

    @property
    def dtype(self) -> jnp.dtype:
        """Compute type of the encoder and of the head's product."""
        settings = self.config.tokenizer
        return jnp.dtype(getattr(settings, "encoder", settings).dtype)

    def labels(self, features: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the quantiser says of features: see `random_projection_labels`."""
        stack = self.tokenizer.frames_per_code
        frozen = self.projection[...], self.codes[...]
        return random_projection_labels(features, lengths, *frozen, stack)

    def hidden(self, features: jax.Array, lengths: jax.Array) -> jax.Array:
        """Features [B, N, D] -> what the head takes, [B, M, width], in the compute type."""
        hidden, _ = self.tokenizer.hidden(features, lengths)
        return self.norm(hidden).astype(self.dtype)


def _widths(tokenizer) -> tuple[int, int]:
    """(of the encoder's output, of the features of one code)."""
    minimal = jnp.zeros((1, 16000)), jnp.full((1,), 16000)
    features = nnx.eval_shape(lambda: tokenizer.features(*minimal)[0])
    hidden = nnx.eval_shape(lambda: tokenizer.encode_frames(*minimal)[0])
    return hidden.shape[-1], features.shape[-1] * tokenizer.frames_per_code


def random_projection_labels(
    features: jax.Array,
    lengths: jax.Array,
    projection: jax.Array,
    codes: jax.Array,
    stack: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Labels of features by a random projection and random codes; no gradient passes.

    Args:
      features: [B, N, D].
      lengths: int [B], true frames.
      projection: [stack * D, P].
      codes: [K, P], of unit length.
      stack: frames of one label, one after another; the last stack of an utterance is filled up
        with its mean.

    Returns:
      (labels int32 [B, ceil(N / stack)], label counts int32 [B]).
    """
    features = jax.lax.stop_gradient(standardize(features, lengths))
    batch, length, width = features.shape
    count = -(-length // stack)
    padded = jnp.pad(features, ((0, 0), (0, count * stack - length), (0, 0)))
    stacked = padded.reshape(batch, count, stack * width)
    # In full float32 on every device: labels are data.
    projected = jnp.matmul(stacked, projection, precision=jax.lax.Precision.HIGHEST)
    return kmeans.nearest(normalize(projected), codes), -(-lengths // stack)


def standardize(features: jax.Array, lengths: jax.Array) -> jax.Array:
    """Features [B, N, D] -> mean 0 and variance 1 over an utterance's true frames; 0 behind."""
    inside = valid_frames(lengths, features.shape[1])[..., None]
    count = jnp.maximum(lengths, 1).astype(jnp.float32)[:, None, None]
    features = jnp.where(inside, features.astype(jnp.float32), 0.0)
    centred = features - jnp.sum(features, axis=1, keepdims=True) / count
    centred = jnp.where(inside, centred, 0.0)
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / count
    return centred * jax.lax.rsqrt(variance + 1e-5)
