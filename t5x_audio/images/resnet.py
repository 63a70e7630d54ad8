"""ResNets for small images: 3 x 3 stem without pooling, then stages of residual blocks.

Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), with the stem
that CIFAR takes; the defaults are ResNet-18. The last norm of a block starts at zero (arXiv
1706.02677, section 5.1), so a block starts as the identity.

Choices: what is quantised as one (convolution, norm, ReLU) is one module, a `Unit`, so that its
output can be named: `stem`, `stages/0/1/inner/0`. The output of a block is quantised behind the
sum, its last unit and its shortcut before the sum are not. Every forward in training normalises by
its own batch and updates the running statistics; under sharding the batch is the global one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.images.convolution import ImageConvolution

EXPANSION = 4  # of a bottleneck block
WEIGHTS = (("stem/conv/kernel", 8), ("stages/.*/conv/kernel", None))
ACTIVATIONS = (("stem", 8), (r"stages/\d+/\d+(/inner/\d+)?", None))
"""Rules of `quantization.rules`: the stem at 8 bits, the rest as asked for."""


@dataclasses.dataclass(frozen=True)
class ResnetConfig:
    """Sizes; the defaults are those of ResNet-18.

    Attributes:
      blocks: of each stage; every stage but the first halves the image.
      channels: of each stage, before the expansion of a bottleneck.
      bottleneck: blocks of 1 x 1, 3 x 3 and 1 x 1 instead of two 3 x 3.
      stem_stride: 1 as CIFAR takes it; with 2 a step costs a quarter.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck: bool = False
    stem_stride: int = 1

    def __post_init__(self):
        if len(self.blocks) != len(self.channels) or min(self.blocks, default=0) < 1:
            raise UserError(
                f"ResnetConfig: blocks={self.blocks} and channels={self.channels}: give as many "
                "of each, a block or more a stage"
            )

    @property
    def width(self) -> int:
        """Of the features."""
        return self.channels[-1] * (EXPANSION if self.bottleneck else 1)

    def make(self, rngs: nnx.Rngs) -> "Resnet":
        """Builds the network with fresh weights."""
        return Resnet(self, rngs)


def resnet18() -> ResnetConfig:
    """11 M weights."""
    return ResnetConfig()


def resnet34() -> ResnetConfig:
    """21 M weights."""
    return ResnetConfig(blocks=(3, 4, 6, 3))


def resnet50() -> ResnetConfig:
    """23 M weights."""
    return ResnetConfig(blocks=(3, 4, 6, 3), bottleneck=True)


def batch_norm(channels: int, rngs: nnx.Rngs, *, scale: bool = True, zero: bool = False):
    """Batch norm with PyTorch's constants, which the published recipes assume."""
    ones = nnx.initializers.zeros_init() if zero else nnx.initializers.ones_init()
    return nnx.BatchNorm(
        channels,
        momentum=0.9,
        epsilon=1e-5,
        use_fast_variance=False,
        use_scale=scale,
        use_bias=scale,
        scale_init=ones,
        rngs=rngs,
    )


class Unit(nnx.Module):
    """Convolution, batch norm and, unless `linear`, ReLU."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        size: int,
        stride: int = 1,
        *,
        linear: bool = False,
        zero: bool = False,
        rngs: nnx.Rngs,
    ):
        self.conv = ImageConvolution(n_in, n_out, size, stride=stride, rngs=rngs)
        self.norm = batch_norm(n_out, rngs, zero=zero)
        self.linear = linear

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, H', W', out]."""
        x = self.norm(self.conv(x))
        return x if self.linear else jax.nn.relu(x)


class Block(nnx.Module):
    """ReLU(shortcut(x) + outer(inner(x)))."""

    def __init__(self, n_in: int, channels: int, stride: int, bottleneck: bool, rngs: nnx.Rngs):
        if bottleneck:
            n_out = channels * EXPANSION
            inner = (
                Unit(n_in, channels, 1, rngs=rngs),
                Unit(channels, channels, 3, stride, rngs=rngs),
            )
        else:
            n_out = channels
            inner = (Unit(n_in, channels, 3, stride, rngs=rngs),)
        self.inner = nnx.List(inner)
        size = 1 if bottleneck else 3
        self.outer = Unit(channels, n_out, size, linear=True, zero=True, rngs=rngs)
        same = stride == 1 and n_in == n_out
        self.shortcut = None if same else Unit(n_in, n_out, 1, stride, linear=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, in] -> [B, H / stride, W / stride, out]."""
        y = x
        for unit in self.inner:
            y = unit(y)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return jax.nn.relu(shortcut + self.outer(y))


class Resnet(nnx.Module):
    """Images in, features out."""

    def __init__(self, config: ResnetConfig, rngs: nnx.Rngs):
        """Builds the network of `config`."""
        self.config = config
        n_in = config.channels[0]
        self.stem = Unit(3, n_in, 3, config.stem_stride, rngs=rngs)
        stages = []
        for stage, (count, channels) in enumerate(zip(config.blocks, config.channels, strict=True)):
            blocks = []
            for index in range(count):
                stride = 2 if stage and not index else 1
                blocks.append(Block(n_in, channels, stride, config.bottleneck, rngs))
                n_in = channels * (EXPANSION if config.bottleneck else 1)
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalised float32 [B, H, W, 3] -> [B, width], the mean over places."""
        x = self.stem(images)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return jnp.mean(x, axis=(1, 2))
