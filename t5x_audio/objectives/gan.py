"""What HiFT minimises: adversarial, feature-matching, mel and F0 terms (HiFi-GAN, CosyVoice).

Choices:
- Least-squares GAN (Mao et al. 2017), and for both players its truncated pointwise relativistic
  term (Wang et al. 2021, arXiv 2103.14245) as CosyVoice has it; feature matching is the mean
  absolute difference of hidden layers; the reconstruction term is an L1 of log-mels at several
  resolutions, the first of which is the generator's own input mel; F0 is an L1 in Hz on frames the
  estimator calls voiced, in units of `f0_scale`, plus the same on unvoiced frames towards 0, so
  that voicing is learnt too.
- While training, the source is driven by the estimator's F0 (`source_f0 = 'target'`): the filter
  learns from the first step with the right pitch. With 'predicted' it is the published behaviour.
- Batch: `audio` float32 [B, T] in [-1, 1], segments without padding, T a multiple of the hop.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_audio.audio.features import MelConfig, mel_spectrogram
from t5x_audio.errors import UserError
from t5x_audio.vocoder.f0 import F0Config, estimate_f0


@dataclasses.dataclass(frozen=True)
class GanObjective:
    """The terms of both players and their weights.

    Attributes:
      mel: the generator's input.
      loss_mels: resolutions of the reconstruction term.
      f0: estimator of the F0 targets; same hop and rate as `mel`.
      source_f0: 'target' or 'predicted': what drives the source in training.
      mel_weight: of the reconstruction term.
      feature_weight: of feature matching. CosyVoice: 4, which its code says as 2 times 2.
      adversarial_weight: of the adversarial term.
      relativistic_weight: of the relativistic term. CosyVoice: 1; 0 = without.
      relativistic_limit: what it can cost at most, of each discriminator.
      f0_weight: of the F0 term.
      f0_scale: Hz that count as an F0 error of 1.
    """

    mel: MelConfig = MelConfig()
    loss_mels: tuple[MelConfig, ...] = (MelConfig(fmax=None),)
    f0: F0Config = F0Config()
    source_f0: str = "target"
    mel_weight: float = 45.0
    feature_weight: float = 2.0
    adversarial_weight: float = 1.0
    relativistic_weight: float = 0.0
    relativistic_limit: float = 0.04
    f0_weight: float = 1.0
    f0_scale: float = 1.0

    def __post_init__(self):
        if (self.f0.hop, self.f0.sample_rate) != (self.mel.hop, self.mel.sample_rate):
            raise UserError("GanObjective: f0 and mel must have the same hop and sample_rate")
        if self.source_f0 not in ("target", "predicted"):
            raise UserError("GanObjective.source_f0 must be 'target' or 'predicted'")

    def inputs(self, batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(audio [B, T], mel [B, F, M], f0 [B, F]) of a batch; no gradient flows through them."""
        audio = batch["audio"].astype(jnp.float32)
        return audio, mel_spectrogram(audio, self.mel), estimate_f0(audio, self.f0)

    def generate(self, generator, mel, f0, rng):
        """(fake samples [B, T], predicted F0 [B, F])."""
        predicted = generator.f0_predictor(mel)
        drive = f0 if self.source_f0 == "target" else predicted
        return generator(mel, rng, f0=drive), predicted

    def reconstruction(self, fake, real):
        """Mean absolute log-mel difference over the resolutions, natural log units."""
        terms = [
            jnp.mean(jnp.abs(mel_spectrogram(fake, m) - mel_spectrogram(real, m)))
            for m in self.loss_mels
        ]
        return sum(terms) / len(terms)

    def f0_error(self, predicted, target):
        """Mean absolute F0 error over all frames, in units of f0_scale Hz."""
        return jnp.mean(jnp.abs(predicted - target)) / self.f0_scale

    def signal_loss(self, fake, real, predicted_f0, f0):
        """The generator's terms that need no discriminator -> (loss, {name: value})."""
        mel, pitch = self.reconstruction(fake, real), self.f0_error(predicted_f0, f0)
        loss = self.mel_weight * mel + self.f0_weight * pitch
        return loss, {"mel_l1": mel, "f0_l1_hz": pitch * self.f0_scale}

    def adversarial_loss(self, discriminator, fake, real):
        """The generator's terms through the discriminators -> (loss, {name: value})."""
        fakes = discriminator(fake)
        reals = jax.lax.stop_gradient(discriminator(real))
        adversarial = sum(jnp.mean(jnp.square(score - 1.0)) for score, _ in fakes)
        matching = feature_matching(fakes, reals)
        loss = self.adversarial_weight * adversarial + self.feature_weight * matching
        loss = loss + self._relativistic(fakes, reals)
        return loss, {"generator_adversarial": adversarial, "feature_matching": matching}

    def discriminator_loss(self, discriminator, fake, real):
        """Least-squares loss of the discriminators; `fake` must carry no gradient."""
        reals, fakes = discriminator(real), discriminator(fake)
        losses = [
            jnp.mean(jnp.square(score_real - 1.0)) + jnp.mean(jnp.square(score_fake))
            for (score_real, _), (score_fake, _) in zip(reals, fakes, strict=True)
        ]
        return sum(losses) + self._relativistic(reals, fakes)

    def _relativistic(self, better, worse):
        """The weighted relativistic term of the player who wants `better` judged above `worse`."""
        if not self.relativistic_weight:
            return 0.0
        terms = [
            jnp.minimum(relativistic(a, b), self.relativistic_limit)
            for (a, _), (b, _) in zip(better, worse, strict=True)
        ]
        return self.relativistic_weight * sum(terms)


def relativistic(better: jax.Array, worse: jax.Array) -> jax.Array:
    """How far scores of `better` fall behind those of `worse` more than most do; same shapes.

    The mean square of difference less median, over the places where it is negative; 0 if nowhere.
    """
    difference = (better - worse).ravel()
    behind = difference - jnp.sort(difference)[(difference.size - 1) // 2]
    count = jnp.sum(behind < 0.0)
    return jnp.sum(jnp.square(jnp.minimum(behind, 0.0))) / jnp.maximum(count, 1)


def feature_matching(fakes, reals) -> jax.Array:
    """Sum over hidden layers of the mean absolute difference between fake and real."""
    return sum(
        jnp.mean(jnp.abs(a - b))
        for (_, fake), (_, real) in zip(fakes, reals, strict=True)
        for a, b in zip(fake, real, strict=True)
    )
