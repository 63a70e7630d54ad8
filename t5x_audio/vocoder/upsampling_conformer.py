"""The successor's encoder: code groups at 25 Hz to mel frames at 50 Hz, seeing a little ahead.

As in Step-Audio 2 and EditX: linear and layer norm, a convolution that looks 3 groups ahead and one
that looks back, 6 conformer blocks, every group twice and a causal convolution, linear and layer
norm again, 4 more blocks. Source: stepaudio2's cosyvoice2/transformer/upsample_encoder_v2.py.

Choice: padding is zero for the convolutions, so that an utterance gives the same in any batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.vocoder.conformer import ConformerConfig, ConformerPart
from t5x_audio.vocoder.convolution import Convolution
from t5x_audio.vocoder.layers import layer_norm


@dataclasses.dataclass(frozen=True)
class UpsamplingConformerConfig:
    """Sizes; defaults are Step-Audio 2 mini's.

    Attributes:
      blocks: the conformer before the up-sampling; its sizes hold for the one after it too.
      num_up_layers: blocks after the up-sampling.
      look_ahead: groups that the first convolution sees ahead.
      up_factor: frames of a group.
    """

    blocks: ConformerConfig = ConformerConfig()
    num_up_layers: int = 4
    look_ahead: int = 3
    up_factor: int = 2

    @property
    def width(self) -> int:
        """Of input and output."""
        return self.blocks.width

    def make(self, rngs: nnx.Rngs) -> "UpsamplingConformer":
        """The encoder with fresh weights."""
        return UpsamplingConformer(self, rngs)


class UpsamplingConformer(nnx.Module):
    """The encoder: [B, T, width] -> [B, up_factor * T, width]."""

    def __init__(self, config: UpsamplingConformerConfig, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, config.blocks.dtype
        kind = {"padding": 0, "dtype": dtype, "rngs": rngs}
        self.low = ConformerPart(config.blocks, config.blocks.num_layers, rngs)
        self.ahead = Convolution(width, width, config.look_ahead + 1, **kind)
        self.back = Convolution(width, width, 3, **kind)
        self.up = Convolution(width, width, 2 * config.up_factor + 1, **kind)
        self.high = ConformerPart(config.blocks, config.num_up_layers, rngs)
        self.final_norm = layer_norm(width, 1e-5, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Encodes embedded groups.

        Args:
          x: [B, T, width].
          mask: float32 [B, T, 1], 1 at valid groups.
          rng: key of the dropout; None = no dropout.

        Returns:
          float32 [B, up_factor * T, width]; padded frames are 0.
        """
        keys = (None,) * 4 if rng is None else jax.random.split(rng, 4)
        x = self.low.start(x, keys[0]) * mask
        y = jnp.pad(x, ((0, 0), (0, self.config.look_ahead), (0, 0)))
        y = jax.nn.leaky_relu(self.ahead(y)) * mask
        x = x + self.back(jnp.pad(y, ((0, 0), (2, 0), (0, 0))))
        x = self.low.run(x, mask, keys[1])
        factor = self.config.up_factor
        x, mask = (jnp.repeat(a, factor, axis=1) for a in (x, mask))
        x = self.up(jnp.pad(x * mask, ((0, 0), (2 * factor, 0), (0, 0))))
        x = self.high.run(self.high.start(x, keys[2]), mask, keys[3])
        return self.final_norm(x) * mask
