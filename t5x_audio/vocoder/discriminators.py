"""Discriminators of the vocoder's adversarial training: multi-period and multi-resolution.

Multi-period (HiFi-GAN, Kong et al. 2020): the waveform folded at prime periods, judged by strided
convolutions along each phase. Multi-resolution (UnivNet, Jang et al. 2021, as CosyVoice-1 trains
HiFT): magnitude spectrograms at several resolutions, judged by 2-D convolutions.

Choices: folded phases become the batch of a 1-D channels-last convolution. All sub-discriminators
return their score map and every hidden layer, for feature matching.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.audio import features
from t5x_audio.vocoder.convolution import Convolution

_SLOPE = 0.1
Judgement = tuple[jax.Array, list[jax.Array]]
"""Score map [B, ...] and hidden layers, first to last, the score map included."""


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes; defaults are the published ones.

    Attributes:
      periods: one multi-period discriminator each; () = none.
      period_channels: width of its convolutions (kernel 5); all but the last have stride 3.
      resolutions: (n_fft, hop, window) of each spectrogram discriminator; () = none.
      resolution_channels: width of its five 2-D convolutions.
      dtype: compute dtype.
    """

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    resolutions: tuple[tuple[int, int, int], ...] = (
        (1024, 120, 600),
        (2048, 240, 1200),
        (512, 50, 240),
    )
    resolution_channels: int = 32
    dtype: str = "float32"

    def make(self, rngs: nnx.Rngs) -> "Discriminators":
        """The discriminators with fresh weights."""
        return Discriminators(self, rngs)


class PeriodDiscriminator(nnx.Module):
    """Judges a waveform folded at one period."""

    def __init__(self, period: int, config: DiscriminatorConfig, rngs: nnx.Rngs):
        self.period = period
        widths = (1, *config.period_channels)
        last = len(config.period_channels) - 1
        self.layers = nnx.List(
            [
                Convolution(
                    widths[i],
                    widths[i + 1],
                    5,
                    strides=1 if i == last else 3,
                    weight_norm=True,
                    nested=True,
                    dtype=config.dtype,
                    rngs=rngs,
                )
                for i in range(last + 1)
            ]
        )
        self.post = Convolution(widths[-1], 1, 3, weight_norm=True, dtype=config.dtype, rngs=rngs)

    def __call__(self, samples: jax.Array) -> Judgement:
        """Samples [B, T] -> score [B * period, T'] and hidden layers."""
        batch, length = samples.shape
        extra = -length % self.period
        x = jnp.pad(samples, ((0, 0), (0, extra)), mode="reflect")
        x = x.reshape(batch, -1, self.period).swapaxes(1, 2).reshape(batch * self.period, -1, 1)
        return _judge(x, self.layers, self.post)


class ResolutionDiscriminator(nnx.Module):
    """Judges a magnitude spectrogram of one resolution."""

    def __init__(self, resolution, config: DiscriminatorConfig, rngs: nnx.Rngs):
        self.resolution = tuple(resolution)
        width = config.resolution_channels

        def conv(n_in, n_out, kernel, stride):
            return Convolution(
                n_in,
                n_out,
                kernel,
                strides=(1, stride),
                weight_norm=True,
                nested=True,
                dtype=config.dtype,
                rngs=rngs,
            )

        self.layers = nnx.List(
            [
                conv(1, width, (3, 9), 1),
                *(conv(width, width, (3, 9), 2) for _ in range(3)),
                conv(width, width, (3, 3), 1),
            ]
        )
        self.post = conv(width, 1, (3, 3), 1)

    def __call__(self, samples: jax.Array) -> Judgement:
        """Samples [B, T] -> score [B, frames, bins'] and hidden layers."""
        n_fft, hop, window = self.resolution
        padded = features.reflect_pad(samples, n_fft // 2)
        power = features.power_spectrogram(padded, n_fft, hop, window)
        x = jnp.sqrt(power + 1e-9)[..., None]
        return _judge(x, self.layers, self.post)


def _judge(x: jax.Array, layers, post) -> Judgement:
    hidden = []
    for layer in layers:
        x = jax.nn.leaky_relu(layer(x), _SLOPE)
        hidden.append(x)
    score = post(x)
    return score[..., 0], [*hidden, score]


class Discriminators(nnx.Module):
    """All sub-discriminators of a configuration."""

    def __init__(self, config: DiscriminatorConfig, rngs: nnx.Rngs):
        self.config = config
        self.parts = nnx.List(
            [PeriodDiscriminator(p, config, rngs) for p in config.periods]
            + [ResolutionDiscriminator(r, config, rngs) for r in config.resolutions]
        )

    def __call__(self, samples: jax.Array) -> list[Judgement]:
        """Samples [B, T] in [-1, 1] -> one judgement for each sub-discriminator."""
        return [part(samples) for part in self.parts]
