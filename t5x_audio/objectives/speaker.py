"""Speaker classification: how the speaker encoder learns, from clips that say who speaks.

Additive angular margin softmax (Deng et al., ArcFace, arXiv 1801.07698), the loss of CAM++ (arXiv
2303.00332): embeddings and classes lie on a sphere, and the angle to the right class has to be
smaller than to any other by a margin. The classes are the model's own and leave with the training.

Choices: where the right angle and the margin exceed half a turn, the cosine goes on as a line, so
that the loss keeps falling with the angle. Evaluation is without the margin.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from t5x_audio.errors import UserError

_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class SpeakerClassification:
    """AAM-softmax on the classes of a `CamPlus`; see `__call__`.

    Attributes:
      margin: of the angle, in radians.
      scale: of the cosines.
    """

    margin: float = 0.2
    scale: float = 32.0

    def __post_init__(self):
        if not 0.0 <= self.margin < math.pi / 2 or self.scale <= 0.0:
            raise UserError(
                f"SpeakerClassification: margin={self.margin} and scale={self.scale}; give a "
                "margin from 0 to below 1.57 and a positive scale"
            )

    def check_dataset(self, config, dataset) -> None:
        """UserError if the model's classes are not the data's speakers."""
        speakers = len(dataset.speakers)
        if config.num_speakers != speakers:
            raise UserError(
                f"{type(config).__name__}.num_speakers={config.num_speakers}, but the clips of "
                f"training have {speakers} speakers; give {speakers}"
            )

    def __call__(self, model, batch, rng: jax.Array, train: bool):
        """Loss and metrics of a batch.

        Args:
          model: a `CamPlus` with classes.
          batch: audio f32 [B, T], audio_lengths int32 [B], speaker int32 [B]; -1 counts for
            nothing.
          rng: not used.
          train: with the margin; without, the loss is that of the plain softmax.

        Returns:
          (mean loss, metrics: accuracy, and the mean cosine to the own class).
        """
        del rng
        vectors = model(batch["audio"], batch["audio_lengths"])
        classes = model.speakers[...]
        norms = jnp.linalg.norm(classes, axis=0, keepdims=True)
        cosines = jnp.matmul(
            vectors, classes / jnp.maximum(norms, _TINY), precision=jax.lax.Precision.HIGHEST
        )
        speaker = batch["speaker"]
        known = (speaker >= 0).astype(jnp.float32)
        own = jax.nn.one_hot(speaker, cosines.shape[-1])
        right = (cosines * own).sum(-1)
        margin = self.margin if train else 0.0
        logits = self.scale * (cosines + own * (with_margin(right, margin) - right)[:, None])
        losses = optax.softmax_cross_entropy(logits, own) * known
        count = known.sum()
        hits = (jnp.argmax(cosines, -1) == speaker).astype(jnp.float32)
        metrics = {"accuracy": (hits.sum(), count), "own_cosine": ((right * known).sum(), count)}
        return losses.sum() / jnp.maximum(count, 1.0), metrics


def with_margin(cosine: jax.Array, margin: float) -> jax.Array:
    """cos(angle + margin), and beyond half a turn a line that goes on falling."""
    sine = jnp.sqrt(jnp.maximum(1.0 - jnp.square(cosine), _TINY))
    added = cosine * math.cos(margin) - sine * math.sin(margin)
    beyond = cosine - margin * math.sin(margin)
    return jnp.where(cosine > math.cos(math.pi - margin), added, beyond)
