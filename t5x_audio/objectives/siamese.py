"""Siamese self-supervision of images: SimSiam, BYOL and MoCo-v2, each plain.

Two augmented views of every image; the prediction from one is to agree with the target from the
other. SimSiam (arXiv 2011.10566): the target is the projection itself, without gradient. BYOL
(arXiv 2006.07733): that of the moving copy. MoCo-v2 (arXiv 2003.04297): as BYOL, and other than
those in a queue of past keys; one direction only.

Choices: what a method is stands in three steps, `online`, `targets` and `loss`, of which
`objectives/ssql.py` calls the first once more with the network quantised.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError
from t5x_audio.images.augmentation import ImageAugmentation
from t5x_audio.tokenizers.vector_quantizer import normalize

METHODS = ("simsiam", "byol", "moco")


@flax.struct.dataclass
class Online:
    """Of each view that is predicted from: projections z and predictions p, [B, D] each."""

    z: tuple[jax.Array, ...]
    p: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Siamese:
    """(model, batch, rng, train) -> (loss, Metrics).

    Batch: images uint8 [B, H, W, 3]; whatever else it has is not looked at.

    Attributes:
      method: 'simsiam', 'byol' or 'moco'; the model must have what it needs.
      temperature: of MoCo.
      augmentation: of both views.
    """

    method: str = "simsiam"
    temperature: float = 0.2
    augmentation: ImageAugmentation = ImageAugmentation()

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"Siamese.method={self.method!r}: there are {', '.join(METHODS)}")

    def __call__(self, model, batch, rng: jax.Array, train: bool):
        """See the class; `rng` draws the views."""
        views = self.views(model, batch, rng, train)
        online = self.online(model, views)
        targets = self.targets(model, online, views)
        loss = self.loss(model, online, targets)
        self.learnt(model, targets, train)
        metrics = {"ssl_loss": (loss, jnp.float32(1.0)), "z_std": spread(online.z[0])}
        return loss, metrics

    def views(self, model, batch, rng: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Two views of each image, [B, H, W, 3]; the moving copy follows first, in training."""
        self._check(model)
        if train and model.config.momentum is not None:
            model.follow()
        first, second = jax.random.split(rng)
        images = batch["images"]
        return self.augmentation(first, images), self.augmentation(second, images)

    def _check(self, model):
        config = model.config
        needs = {
            "simsiam": (bool(config.predictor), "a predictor"),
            "byol": (bool(config.predictor) and config.momentum is not None,
                     "a predictor and a momentum"),
            "moco": (config.queue > 0, "a queue"),
        }  # fmt: skip
        there, what = needs[self.method]
        if not there:
            raise UserError(f"Siamese.method={self.method!r} needs {what} in SiameseConfig")

    def online(self, model, views) -> Online:
        """Projections and predictions, one forward for each view that is predicted from."""
        chosen = views[:1] if self.method == "moco" else views
        z = tuple(model.project(view) for view in chosen)
        return Online(z, tuple(model.predict(one) for one in z))

    def targets(self, model, online: Online, views) -> tuple[jax.Array, ...]:
        """[B, D] for each prediction, from the other view; no gradient."""
        if self.method == "simsiam":
            return tuple(jax.lax.stop_gradient(z) for z in reversed(online.z))
        return tuple(model.target(view) for view in reversed(views))[: len(online.p)]

    def loss(self, model, online: Online, targets) -> jax.Array:
        """How far predictions are from their targets, float32 []."""
        if self.method == "moco":
            (p,), (target,) = online.p, targets
            return contrast(p, target, model.queue[...], self.temperature)
        pairs = zip(online.p, targets, strict=True)
        return sum(negative_cosine(p, target) for p, target in pairs) / len(targets)

    def learnt(self, model, targets, train: bool) -> None:
        """What follows the loss: MoCo's keys go into the queue."""
        if train and self.method == "moco":
            model.enqueue(normalize(targets[0]))


def negative_cosine(p: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over rows of -cos(p, target), [B, D] each; no gradient reaches the target."""
    return -jnp.mean(jnp.sum(normalize(p) * normalize(jax.lax.stop_gradient(target)), axis=-1))


def contrast(query: jax.Array, key: jax.Array, queue: jax.Array, temperature: float) -> jax.Array:
    """InfoNCE: mean cross-entropy of the key [B, D] among it and the queue [K, D]."""
    query, key = normalize(query), normalize(jax.lax.stop_gradient(key))
    positive = jnp.sum(query * key, axis=-1, keepdims=True)
    logits = jnp.concatenate([positive, query @ queue.T], axis=-1) / temperature
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])


def spread(z: jax.Array):
    """A metric that is 0 when all projections are alike and 1 when they fill the sphere.

    The standard deviation of unit projections [B, D] over the batch, times sqrt(D) (SimSiam,
    section 4.1).
    """
    directions = normalize(jax.lax.stop_gradient(z))
    value = jnp.mean(jnp.std(directions, axis=0)) * z.shape[-1] ** 0.5
    return value, jnp.float32(1.0)
