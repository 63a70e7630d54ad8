"""Nearest-neighbour quantiser inside a network, its codebook an exponential moving average.

Features and codes are L2-normalised and compared by Euclidean distance. Training: the codebook
follows the features it wins (van den Oord et al., arXiv 1711.00937, appendix A), gradients pass
straight through, a commitment loss holds the features near their codes, and a code that wins far
less than an even share is moved onto a random feature of the batch (as in Jukebox, arXiv
2005.00341, section 3.2). A fresh codebook therefore settles on the data in its first batch.

Quantisation can set in gradually: during the warm-up an utterance passes quantised with a chance
that grows from 0 to 1, so that the features learn what to say before they are forced into codes.
CosyVoice has the same effect from inserting its quantiser into a trained recogniser.
"""

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from t5x_audio.tokenizers import kmeans


class Codebook(nnx.Variable):
    """Variable type of codes and their running statistics: state, not trained by gradients."""


class VectorQuantizer(nnx.Module):
    """Quantises [..., D] features to one of K codes.

    Attributes:
      codes: [K, D], of unit length.
      counts, sums: moving averages of how many features a code wins [K], and of their sum [K, D].
      steps: training calls so far, float32 [].
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        rngs: nnx.Rngs,
        *,
        decay: float = 0.99,
        revival_share: float = 0.05,
        warmup_steps: int = 0,
    ):
        """Starts from random codes; `revival_share` is of an even share of the wins."""
        self.decay, self.revival_share, self.warmup_steps = decay, revival_share, warmup_steps
        self.steps = Codebook(jnp.zeros(()))
        codes = normalize(jax.random.normal(rngs.params(), (num_codes, dim)))
        self.codes = Codebook(codes)
        self.counts = Codebook(jnp.zeros(num_codes))
        self.sums = Codebook(jnp.zeros((num_codes, dim)))

    def encode(self, features: jax.Array) -> jax.Array:
        """Features [..., D] -> codes int32 [...]."""
        return kmeans.nearest(normalize(features), self.codes[...])

    def __call__(self, features, valid, rng=None, train: bool = False, learn: bool = True):
        """Quantises with a straight-through gradient, and learns when `train` and `learn`.

        Args:
          features: [B, T, D].
          valid: bool [B, T].
          rng: for the revival of dead codes and the warm-up; needed when `train`.
          train: update the codebook from this batch; during the warm-up leave some utterances
            as they are.
          learn: False = even so the codebook stays, such as in a further forward of one batch.

        Returns:
          (quantised float32 [B, T, D] of unit length, codes int32 [B, T], commitment []: the mean
          squared distance of the normalised features to their codes).
        """
        features = normalize(features)
        if train:
            rng, mask_rng = jax.random.split(rng)
        if train and learn:
            # First revive, then quantise: even the first batch meets codes that fit it.
            self._revive(features, valid, rng)
        codes = kmeans.nearest(jax.lax.stop_gradient(features), self.codes[...])
        chosen = jnp.take(self.codes[...], codes, axis=0)
        if train and learn:
            self._follow(jax.lax.stop_gradient(features), codes, valid)
        distance = jnp.sum(jnp.square(features - jax.lax.stop_gradient(chosen)), axis=-1)
        weight = valid.astype(jnp.float32)
        commitment = jnp.sum(distance * weight) / jnp.maximum(jnp.sum(weight), 1.0)
        quantised = features + jax.lax.stop_gradient(chosen - features)
        if train:
            passed = jax.random.uniform(mask_rng, (len(features), 1, 1)) >= self.share_quantised()
            quantised = jnp.where(passed, features, quantised)
        if train and learn:
            self.steps[...] = self.steps[...] + 1
        return quantised, codes, commitment

    def standardize(self, quantised: jax.Array) -> jax.Array:
        """Quantised [..., D] -> zero mean and unit variance by the codes in use, float32.

        Unit vectors share a large common part; what tells them apart should not be the small rest.
        """
        weight = self.counts[...] / jnp.maximum(jnp.sum(self.counts[...]), 1e-12)
        mean = weight @ self.codes[...]
        variance = weight @ jnp.mean(jnp.square(self.codes[...] - mean), axis=-1)
        return (quantised - mean) * jax.lax.rsqrt(variance + 1e-6)

    def share_quantised(self) -> jax.Array:
        """Chance [] that a training utterance is quantised at this step: 0 to 1 in the warm-up."""
        if not self.warmup_steps:
            return jnp.ones(())
        return jnp.minimum(self.steps[...] / self.warmup_steps, 1.0)

    def _follow(self, features, codes, valid):
        """Moves the statistics and codes towards the batch."""
        size, dim = self.codes.shape
        weight = valid.astype(jnp.float32).reshape(-1)
        flat, index = features.reshape(-1, dim), codes.reshape(-1)
        counts = jax.ops.segment_sum(weight, index, size)
        sums = jax.ops.segment_sum(flat * weight[:, None], index, size)
        self.counts[...] = self.decay * self.counts[...] + (1 - self.decay) * counts
        self.sums[...] = self.decay * self.sums[...] + (1 - self.decay) * sums
        moved = normalize(self.sums[...])
        self.codes[...] = jnp.where(self.counts[...][:, None] > 0, moved, self.codes[...])

    def _revive(self, features, valid, rng):
        """Puts codes that hardly ever win onto random valid features."""
        features = jax.lax.stop_gradient(features)
        share = jnp.mean(self.counts[...])
        fresh = share == 0  # nothing has been counted yet: every code is a candidate
        dead = (self.counts[...] < self.revival_share * share) | fresh
        logits = jnp.where(valid.reshape(-1), 0.0, -jnp.inf)
        drawn = jax.random.categorical(rng, logits, shape=dead.shape)
        points = jnp.take(features.reshape(-1, features.shape[-1]), drawn, axis=0)
        # A revived code gets the credit of a code on trial, not of a popular one.
        credit = jnp.where(fresh, 1e-3, self.revival_share * 4 * share)
        self.codes[...] = jnp.where(dead[:, None], points, self.codes[...])
        self.counts[...] = jnp.where(dead, credit, self.counts[...])
        self.sums[...] = jnp.where(dead[:, None], points * credit, self.sums[...])


def normalize(x: jax.Array) -> jax.Array:
    """Float32 [..., D] scaled to unit length; zero stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))
