"""From the waveforms of a batch to what a tokenizer's encoder takes, augmented in training.

Shared by all objectives of the tokenizers, supervised or not. Features are computed inside the
compiled step, so that datasets carry waveforms only, and so that noise can be added before them.
SpecAugment by Park et al. (arXiv 1904.08779); noise and other talkers as in WavLM (arXiv
2110.13900).
"""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_audio.audio import augment
from t5x_audio.errors import UserError


@dataclasses.dataclass(frozen=True)
class SpecAugment:
    """Settings of `audio.augment.spec_augment`, on frames of 10 ms; 0 masks of a kind = none."""

    num_time_masks: int = 2
    max_time_frames: int = 40
    max_time_fraction: float = 0.2
    num_frequency_masks: int = 2
    max_frequency_bins: int = 27

    def __call__(self, rng: jax.Array, features: jax.Array, lengths: jax.Array) -> jax.Array:
        """Masks features [B, N, D] of which `lengths` [B] frames count."""
        return augment.spec_augment(rng, features, lengths, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Noise:
    """Settings of `audio.augment.add_noise`; probability 0 = no noise."""

    probability: float = 0.5
    speech_share: float = 0.3
    min_snr_db: float = 5.0
    max_snr_db: float = 25.0
    max_exponent: float = 1.0

    def __post_init__(self):
        for name in ("probability", "speech_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"Noise.{name}={getattr(self, name)}: give 0 to 1")
        if self.min_snr_db > self.max_snr_db:
            raise UserError(
                f"Noise.min_snr_db={self.min_snr_db} is above max_snr_db={self.max_snr_db}"
            )

    def __call__(self, rng: jax.Array, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        """Adds noise to audio [B, T] of which `lengths` [B] samples count."""
        if not self.probability:
            return audio
        return augment.add_noise(rng, audio, lengths, **dataclasses.asdict(self))


def energy_normalize(audio: jax.Array) -> jax.Array:
    """Scales each row of [B, T] to a peak of 0.999, but by no more than 100: as Step-Audio does."""
    peak = jnp.max(jnp.abs(audio), axis=-1, keepdims=True)
    return audio * (0.999 / jnp.maximum(peak, 0.01))


def encoder_features(
    model,
    batch,
    rng: jax.Array,
    train: bool,
    noise: Noise | None = None,
    spec_augment: SpecAugment | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What the encoder of a tokenizer takes.

    Args:
      model: a `LinguisticTokenizer` or a `SemanticTokenizer`.
      batch: audio f32 [B, T] and audio_lengths int32 [B], among others.
      rng: of the augmentation.
      train: gather the feature statistics that the model keeps, and augment.
      noise, spec_augment: None = off.

    Returns:
      (normalised features [B, N, D], their counts int32 [B]).
    """
    noise_rng, mask_rng = jax.random.split(rng)
    audio, lengths = batch["audio"], batch["audio_lengths"]
    if train and noise is not None:
        audio = noise(noise_rng, audio, lengths)
    features, lengths = model.features(energy_normalize(audio), lengths)
    features = model.normalize(features, lengths, train)
    if train and spec_augment is not None:
        # Unstacked, so that a band means the same mel channels in every frame of a stack.
        batch_size, count, width = features.shape
        frames = features.reshape(batch_size, -1, model.num_mels)
        frames = spec_augment(mask_rng, frames, lengths * (width // model.num_mels))
        features = frames.reshape(batch_size, count, width)
    return features, lengths
