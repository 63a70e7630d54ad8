"""Linear probes of frozen features: how much a quantised encoder still knows.

The encoder is calibrated on a batch of training images, quantised, and frozen; a linear classifier
learns from its features of the training images and is judged on those of the test images. Source:
the linear evaluation of megvii-research/SSQL-ECCV2022 for CIFAR (100 epochs, SGD, rate 30, times
0.1 after 60 and 80, no decay, batches of 512).

Choices: features are of the images as they are, computed once for each pair of bits, so that the
classifier costs seconds; the reference crops and mirrors the training images anew in every epoch.
One compiled encoder serves all pairs of bits, one compiled classifier all of them too.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.quantization import fake_quant
from t5x_audio.quantization.rules import Rules
from t5x_audio.quantization.simulate import calibrate, quantized

FULL = (0, 0)
BIT_PAIRS = (FULL, (8, 8), (6, 6), (5, 5), (4, 4), (3, 3), (2, 4))
"""Bits of (weights, activations) at which SSQL is judged; (0, 0) is unquantised."""


def bit_name(pair: tuple[int, int]) -> str:
    """'FP' or 'W4A4'."""
    return "FP" if tuple(pair) == FULL else f"W{pair[0]}A{pair[1]}"


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """How the classifier learns; see the module docstring.

    Attributes:
      epochs, batch_size, learning_rate, momentum: of SGD.
      drops: shares of the epochs after which the rate falls to a tenth.
      seed: of the start and the order.
    """

    epochs: int = 100
    batch_size: int = 512
    learning_rate: float = 30.0
    momentum: float = 0.9
    drops: tuple[float, ...] = (0.6, 0.8)
    seed: int = 0

    def accuracy(self, train, test, num_classes: int) -> float:
        """Share of test rows that are told rightly.

        Args:
          train, test: (features float32 [N, D], labels int [N]).
          num_classes: labels are below it.
        """
        features, labels = (jnp.asarray(part) for part in train)
        batch = min(self.batch_size, len(labels))
        weights = self._fit(features, labels, num_classes, batch)
        logits = jnp.asarray(test[0]) @ weights["kernel"] + weights["bias"]
        return float(jnp.mean(jnp.argmax(logits, axis=-1) == jnp.asarray(test[1])))

    @functools.partial(jax.jit, static_argnums=(0, 3, 4))
    def _fit(self, features, labels, num_classes: int, batch: int):
        per_epoch = len(labels) // batch
        drops = {int(share * self.epochs) * per_epoch: 0.1 for share in self.drops}
        schedule = optax.piecewise_constant_schedule(self.learning_rate, drops)
        tx = optax.sgd(schedule, momentum=self.momentum)
        start, rng = jax.random.split(jax.random.key(self.seed))
        kernel = 0.01 * jax.random.normal(start, (features.shape[-1], num_classes))
        weights = {"kernel": kernel, "bias": jnp.zeros(num_classes)}

        def loss(weights, chosen):
            logits = features[chosen] @ weights["kernel"] + weights["bias"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()

        def step(carry, chosen):
            weights, state = carry
            updates, state = tx.update(jax.grad(loss)(weights, chosen), state)
            return (optax.apply_updates(weights, updates), state), None

        def epoch(carry, rng):
            order = jax.random.permutation(rng, len(labels))[: per_epoch * batch]
            return jax.lax.scan(step, carry, order.reshape(per_epoch, batch))

        carry = weights, tx.init(weights)
        return jax.lax.scan(epoch, carry, jax.random.split(rng, self.epochs))[0][0]


class QuantizedFeatures:
    """Features of images by an encoder, at any bits.

    Args:
      encoder: normalised images -> features, set to evaluate.
      rules: what is quantised.
      normalize: uint8 [B, H, W, 3] -> what the encoder takes.
      calibration: uint8 [B, H, W, 3], training images the ranges are taken from.
      batch_size: images at a time.
    """

    def __init__(self, encoder: nnx.Module, rules: Rules, normalize, calibration, batch_size: int):
        """Calibrates. UserError where that cannot be, see `simulate.calibrate`."""
        self._batch_size = batch_size
        pieces = [normalize(jnp.asarray(calibration))] if len(calibration) else []
        self._ranges = calibrate(encoder, rules, pieces)
        graphdef, self._state = nnx.split(encoder)

        @functools.partial(jax.jit, static_argnums=2)
        def run(state, images, whole, ranges, bits):
            live, x = nnx.merge(graphdef, state), normalize(images)
            if whole:
                return live(x)
            with quantized(live, rules, ranges, bits):
                return live(x)

        self._run = run

    def __call__(self, images: np.ndarray, pair: tuple[int, int]) -> np.ndarray:
        """uint8 [N, H, W, 3] -> float32 [N, D] at bits of (weights, activations)."""
        require_pair(pair)
        bits = tuple(jnp.float32(b) for b in pair)
        parts = []
        for start in range(0, len(images), self._batch_size):
            part = images[start : start + self._batch_size]
            missing = self._batch_size - len(part)  # one shape, one compilation
            padded = np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0)))
            made = self._run(self._state, padded, tuple(pair) == FULL, self._ranges, bits)
            parts.append(np.asarray(made)[: len(part)])
        return np.concatenate(parts)


def require_pair(pair: Sequence[int]) -> None:
    """UserError unless (0, 0) or two numbers of bits from 2 to 8."""
    if tuple(pair) == FULL:
        return
    if len(pair) != 2:
        raise UserError(f"bits {pair}: give pairs (weights, activations)")
    for bits, what in zip(pair, ("weights", "activations"), strict=True):
        fake_quant.require_bits(bits, f"bits {tuple(pair)}, {what}")
