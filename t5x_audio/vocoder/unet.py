"""The flow's velocity estimator: a 1-D U-Net of residual convolutions and transformer blocks.

As in Matcha-TTS (Mehta et al. 2024) with CosyVoice-1's sizes: every stage is a residual block
(conv 3, group norm 8, Mish; the time embedding added in between) and a few pre-norm transformer
blocks; all stages but the last halve the frame rate on the way down and double it on the way up.

Choices: channels last; padding is masked in convolutions, group norm and attention (the published
code drops the attention mask); the middle stages are scanned; the last projection starts at zero.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.cpu_weights import unstacked
from t5x_audio.encoder_attention import attend
from t5x_audio.vocoder.convolution import Convolution, TransposedConvolution
from t5x_audio.vocoder.initialisers import fan_in
from t5x_audio.vocoder.layers import (
    MaskedGroupNorm,
    layer_norm,
    linear,
    mish,
    run_stack,
    stack,
)

_HE = fan_in(2.0)


@dataclasses.dataclass(frozen=True)
class UnetConfig:
    """Sizes; defaults are CosyVoice-1's.

    Attributes:
      channels: width of each stage.
      num_mid_stages: stages at the lowest frame rate.
      num_blocks: transformer blocks in each stage.
      num_heads: attention heads.
      head_dim: width of a head.
      norm_groups: groups of the group norm.
      dtype: compute dtype.
    """

    channels: tuple[int, ...] = (256, 256)
    num_mid_stages: int = 12
    num_blocks: int = 4
    num_heads: int = 8
    head_dim: int = 64
    norm_groups: int = 8
    dtype: str = "float32"


def time_embedding(time: jax.Array, width: int, scale: float = 1000.0) -> jax.Array:
    """Sines, then cosines of scale * time: float32 [B] -> [B, width]."""
    half = width // 2
    rates = jnp.exp(jnp.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = scale * time[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class ConvNormMish(nnx.Module):
    """Convolution of kernel 3, group norm, Mish."""

    def __init__(self, n_in: int, n_out: int, config: UnetConfig, rngs: nnx.Rngs):
        self.conv = Convolution(
            n_in, n_out, 3, kernel_init=_HE, nested=True, dtype=config.dtype, rngs=rngs
        )
        self.norm = MaskedGroupNorm(config.norm_groups, n_out)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, in] -> [B, T, out]."""
        y = mish(self.norm(self.conv(x * mask.astype(x.dtype)), mask)) * mask
        return y.astype(self.conv.dtype)


class ResidualBlock(nnx.Module):
    """Two ConvNormMish with the time embedding in between, around a projection."""

    def __init__(self, n_in: int, n_out: int, time_dim: int, config: UnetConfig, rngs: nnx.Rngs):
        self.first = ConvNormMish(n_in, n_out, config, rngs)
        self.second = ConvNormMish(n_out, n_out, config, rngs)
        self.time = nnx.Linear(time_dim, n_out, kernel_init=_HE, rngs=rngs)
        self.skip = Convolution(n_in, n_out, 1, nested=True, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, time: jax.Array) -> jax.Array:
        """[B, T, in], mask [B, T, 1], time [B, time_dim] -> [B, T, out]."""
        y = self.first(x, mask) + self.time(mish(time))[:, None].astype(x.dtype)
        return self.second(y, mask) + self.skip(x * mask.astype(x.dtype))


class TransformerBlock(nnx.Module):
    """Pre-norm self-attention and GELU feed-forward of four times the width."""

    def __init__(self, width: int, config: UnetConfig, stacked: int, rngs: nnx.Rngs):
        self.config = config
        inner = config.num_heads * config.head_dim
        kind = {"dtype": config.dtype, "rngs": rngs, "stacked": stacked}
        self.attention_norm = layer_norm(width, 1e-5, rngs)
        self.mlp_norm = layer_norm(width, 1e-5, rngs)
        self.query, self.key, self.value = (
            linear(width, inner, ("embed", "heads"), use_bias=False, **kind) for _ in range(3)
        )
        self.out = linear(inner, width, ("heads", "embed"), **kind)
        self.up = linear(width, 4 * width, ("embed", "mlp"), init=_HE, **kind)
        self.down = linear(4 * width, width, ("mlp", "embed"), **kind)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, width] -> [B, T, width]."""
        dtype = jnp.dtype(self.config.dtype)
        y = self.attention_norm(x).astype(dtype)
        query, key, value = (
            f(y).reshape(*y.shape[:2], self.config.num_heads, -1)
            for f in (self.query, self.key, self.value)
        )
        mixed = attend(query, key, value, mask[..., 0] > 0)
        x = x + self.out(mixed.reshape(*y.shape[:2], -1))
        y = self.up(self.mlp_norm(x).astype(dtype))
        return x + self.down(jax.nn.gelu(y, approximate=False))


class Stage(nnx.Module):
    """A residual block and `num_blocks` transformer blocks."""

    def __init__(self, n_in, n_out, time_dim, config: UnetConfig, rngs: nnx.Rngs, stacked=0):
        self.residual = ResidualBlock(n_in, n_out, time_dim, config, rngs)
        self.blocks = stack(
            lambda r: TransformerBlock(n_out, config, stacked + 1, r), config.num_blocks, rngs
        )

    def __call__(self, x: jax.Array, mask: jax.Array, time: jax.Array) -> jax.Array:
        """[B, T, in] -> [B, T, out]."""
        x = self.residual(x, mask, time)
        return run_stack(self.blocks, lambda block, x, _: block(x, mask), x)


class Unet(nnx.Module):
    """Velocity of the flow at a time, given the noisy mel and its conditions."""

    def __init__(self, n_in: int, n_out: int, config: UnetConfig, rngs: nnx.Rngs):
        """`n_in` = channels of mel, mu, speaker and prompt together; `n_out` = mel channels."""
        self.config, self.n_in = config, n_in
        channels = config.channels
        time_dim = 4 * channels[0]
        self.time_in = nnx.Linear(n_in, time_dim, kernel_init=_HE, rngs=rngs)
        self.time_out = nnx.Linear(time_dim, time_dim, kernel_init=_HE, rngs=rngs)
        widths = (n_in, *channels)
        last = len(channels) - 1
        kind = {"dtype": config.dtype, "rngs": rngs}
        self.down = nnx.List(
            [Stage(widths[i], widths[i + 1], time_dim, config, rngs) for i in range(last + 1)]
        )
        self.down_convs = nnx.List(
            [Convolution(c, c, 3, strides=2 if i < last else 1, padding=1, **kind)
             for i, c in enumerate(channels)]
        )  # fmt: skip
        mid = channels[-1]
        self.mid = stack(
            lambda r: Stage(mid, mid, time_dim, config, r, stacked=1), config.num_mid_stages, rngs
        )
        up = (*channels[::-1], channels[0])
        self.up = nnx.List(
            [Stage(2 * up[i], up[i + 1], time_dim, config, rngs) for i in range(last + 1)]
        )
        self.up_convs = nnx.List(
            [TransposedConvolution(up[i + 1], up[i + 1], 4, 2, **kind) if i < last
             else Convolution(up[i + 1], up[i + 1], 3, **kind)
             for i in range(last + 1)]
        )  # fmt: skip
        self.final = ConvNormMish(channels[0], channels[0], config, rngs)
        self.project = Convolution(
            channels[0], n_out, 1, kernel_init=nnx.initializers.zeros_init(), **kind
        )

    def take_apart(self, max_layers: int | None) -> None:
        """See `cpu_weights.arranged`."""
        config = self.config
        stages = len(self.down) + config.num_mid_stages + len(self.up)
        if max_layers is not None and config.num_blocks * stages > max_layers:
            return
        self.mid = unstacked(self.mid, config.num_mid_stages)
        for stage in (*self.down, *self.mid, *self.up):
            stage.blocks = unstacked(stage.blocks, config.num_blocks)

    def __call__(self, x: jax.Array, mask: jax.Array, time: jax.Array) -> jax.Array:
        """Velocity.

        Args:
          x: [B, T, n_in], the noisy mel and its conditions side by side.
          mask: float32 [B, T, 1].
          time: float32 [B] in [0, 1].

        Returns:
          float32 [B, T, n_out]; padded frames are 0.
        """
        time = self.time_out(jax.nn.silu(self.time_in(time_embedding(time, self.n_in))))
        masks, hidden = [mask], []
        for stage, conv in zip(self.down, self.down_convs, strict=True):
            x = stage(x, masks[-1], time)
            hidden.append(x)
            x = conv(x * masks[-1].astype(x.dtype))
            masks.append(masks[-1][:, :: conv.strides[0]])
        masks.pop()
        x = run_stack(self.mid, lambda stage, x, _: stage(x, masks[-1], time), x)
        for stage, conv in zip(self.up, self.up_convs, strict=True):
            mask, skip = masks.pop(), hidden.pop()
            x = jnp.concatenate([x[:, : skip.shape[1]], skip], axis=-1)
            x = stage(x, mask, time)
            x = conv(x * mask.astype(x.dtype))
        x = self.final(x, mask)
        return (self.project(x) * mask).astype(jnp.float32)
