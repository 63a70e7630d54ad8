"""BEST-RQ: the encoder of a tokenizer learns, without text, to predict what is hidden from it.

Spans of the features are replaced by noise; at these places the model says which label a random
projection gives to what was there. Source: Chiu et al., "Self-supervised Learning with
Random-projection Quantizer for Speech Recognition" (arXiv 2202.01855): any frame of 10 ms starts a
span of 400 ms with a chance of 0.01, noise of standard deviation 0.1, cross-entropy at hidden
places only.

Choices:
- A span is made of whole codes (40 or 60 ms), so that no label is half hidden; the chance that a
  code starts one is that of its frames. The stacks of the linguistic front end overlap by one frame
  in seven, which stays visible at the ends of a span.
- Labels are of the recording as it is; added noise and SpecAugment reach the encoder's input only,
  which makes it a denoising task too, as in WavLM (arXiv 2110.13900).
- `prepare` says what is to be predicted from what, `predict` is one forward with its loss; both are
  pure but for the tokenizer's feature statistics. An objective that predicts the same labels by
  several versions of the encoder, such as a quantised one, calls `predict` for each.
- Draws are made place by place, so that more padding changes none.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError
from t5x_audio.objectives.augmentation import Noise, SpecAugment, encoder_features, energy_normalize
from t5x_audio.objectives.cross_entropy import cross_entropy
from t5x_audio.objectives.ctc import codebook_metrics
from t5x_audio.tokenizers.semantic import valid_frames

FRAME_SECONDS = 0.01  # of which `start_probability` is


@flax.struct.dataclass
class MaskedBatch:
    """What is to be predicted, and from what.

    Attributes:
      features: [B, N, D], the encoder's input, hidden spans replaced by noise.
      lengths: int32 [B], true frames of it.
      labels: int32 [B, M].
      valid: bool [B, M], labels that are there.
      hidden: bool [B, M], those to be predicted.
    """

    features: jax.Array
    lengths: jax.Array
    labels: jax.Array
    valid: jax.Array
    hidden: jax.Array


@dataclasses.dataclass(frozen=True)
class BestRq:
    """Masked prediction of random-projection labels; see the module docstring.

    Attributes:
      start_probability: that a frame of 10 ms starts a span.
      span_seconds: of a span, rounded to whole codes.
      noise_std: of the noise in place of what is hidden, in units of the encoder's features.
      spec_augment, noise: augmentation of the input for training; None = off.
    """

    start_probability: float = 0.01
    span_seconds: float = 0.4
    noise_std: float = 0.1
    spec_augment: SpecAugment | None = None
    noise: Noise | None = None

    def __post_init__(self):
        if not 0.0 < self.start_probability <= 1.0:
            raise UserError(
                f"BestRq.start_probability={self.start_probability}: give above 0 and up to 1"
            )

    def __call__(self, model, batch, rng: jax.Array, train: bool):
        """Loss and metrics of an audio batch.

        Args:
          model: a `MaskedPrediction`.
          batch: audio f32 [B, T], audio_lengths int32 [B].
          rng: of the spans, their noise and the augmentation.
          train: gather feature statistics and augment.

        Returns:
          (mean cross-entropy at the hidden places, metrics).
        """
        return self.predict(model, self.prepare(model, batch, rng, train), train)[:2]

    def prepare(self, model, batch, rng: jax.Array, train: bool) -> MaskedBatch:
        """What is to be predicted from what; arguments as of a call."""
        tokenizer = model.tokenizer
        augment_rng, span_rng, noise_rng = jax.random.split(rng, 3)
        clean = tokenizer.features(energy_normalize(batch["audio"]), batch["audio_lengths"])
        labels, label_lengths = model.labels(*clean)
        features, lengths = encoder_features(
            tokenizer, batch, augment_rng, train, self.noise, self.spec_augment
        )
        start, span = self.of_codes(tokenizer.frame_rate)
        hidden = span_mask(span_rng, label_lengths, labels.shape[1], start, span)
        stack = tokenizer.frames_per_code
        features = fill_with_noise(noise_rng, features, hidden, stack, self.noise_std)
        valid = valid_frames(label_lengths, labels.shape[1])
        return MaskedBatch(features, lengths, labels, valid, hidden)

    def of_codes(self, frame_rate: float) -> tuple[float, int]:
        """(chance that a code starts a span, codes of a span) at so many codes a second."""
        frames = 1.0 / (frame_rate * FRAME_SECONDS)
        start = 1.0 - (1.0 - self.start_probability) ** frames
        return start, max(1, math.floor(self.span_seconds * frame_rate + 0.5))

    def predict(self, model, prepared: MaskedBatch, train: bool, first: bool = True):
        """One forward: the loss of the hidden labels.

        Args:
          model: a `MaskedPrediction`, or any with its `hidden` and `head_kernel`.
          prepared: see `prepare`.
          train: without effect.
          first: False = another forward of the same batch, whose own metrics are known.

        Returns:
          (mean cross-entropy [] over hidden places, metrics 'masked_loss' and 'masked_accuracy',
          the features [B, M, width] that the head took, which of them count, bool [B, M]).
        """
        del train
        hidden = model.hidden(prepared.features, prepared.lengths)
        weights = prepared.hidden.astype(jnp.float32)
        count = jnp.sum(weights)
        share = weights / jnp.maximum(count, 1.0)
        kernel = model.head_kernel[...].astype(hidden.dtype)
        loss, (losses, correct) = cross_entropy(hidden, kernel, prepared.labels, share)
        metrics = {
            "masked_loss": (jnp.sum(losses * weights), count),
            "masked_accuracy": (jnp.sum(correct * weights), count),
        }
        if first:
            metrics |= label_metrics(prepared, model.config.num_labels)
        return loss, metrics, hidden, prepared.valid


def span_mask(rng, lengths, size: int, start: float, span: int) -> jax.Array:
    """Bool [B, size]: spans of `span` places, each started by a place with the chance `start`.

    They may overlap, and end where an utterance of `lengths` [B] ends.
    """
    starts = (jax.random.uniform(rng, (size, len(lengths))) < start).T
    begun = jnp.cumsum(starts, axis=1)
    before = jnp.pad(begun, ((0, 0), (span, 0)))[:, :size]
    return (begun > before) & valid_frames(lengths, size)


def fill_with_noise(rng, features, hidden, stack: int, std: float) -> jax.Array:
    """Features [B, N, D] with noise N(0, std^2) wherever `hidden` [B, M] covers, `stack` each."""
    batch, length, width = features.shape
    places = jnp.repeat(hidden, stack, axis=1)[:, :length, None]
    noise = std * jax.random.normal(rng, (length, batch, width)).swapaxes(0, 1)
    return jnp.where(places, noise.astype(features.dtype), features)


def label_metrics(prepared: MaskedBatch, num_labels: int) -> dict:
    """Whether the targets are worth learning.

    'masked_share' of the labels; 'codebook_usage' and 'codebook_perplexity' of the labels of the
    batch, which are low when the random quantiser has collapsed; 'commonest_label', what one would
    get right by always naming the most frequent label of the batch.
    """
    labels, valid = prepared.labels, prepared.valid
    total = jnp.sum(valid).astype(jnp.float32)
    counts = jax.ops.segment_sum(
        prepared.hidden.astype(jnp.float32).reshape(-1), labels.reshape(-1), num_labels
    )
    return codebook_metrics(labels, valid, num_labels) | {
        "masked_share": (jnp.sum(prepared.hidden).astype(jnp.float32), total),
        "commonest_label": (jnp.max(counts), jnp.sum(counts)),
    }
