"""The flow's encoder of audio codes: a conformer with relative positions.

As CosyVoice-1 configures it: linear and layer norm in front, inputs scaled by sqrt(width), pre-norm
self-attention with Transformer-XL relative positions in ESPnet's form (Dai et al. 2019, section
3.3; distances T-1 ... -(T-1)), swish feed-forward, a final layer norm. Padding is masked as keys.

Published: no convolution. `convolution_kernel` adds the conformer's own convolution module (Gulati
et al., arXiv 2005.08100, section 2.2, here with layer norm for batch norm) behind the attention:
neighbouring codes matter most, and a short training learns that sooner from a convolution.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.cpu_weights import unstacked
from t5x_audio.encoder_attention import attend
from t5x_audio.errors import UserError
from t5x_audio.vocoder.initialisers import spread
from t5x_audio.vocoder.layers import dropout, layer_norm, linear, run_stack, scan_stack, stack
from t5x_audio.vocoder.ring import Ring


@dataclasses.dataclass(frozen=True)
class ConformerConfig:
    """Sizes; defaults are CosyVoice-1's.

    Attributes:
      width: model width, of the input too.
      num_layers: blocks.
      num_heads: attention heads.
      mlp_dim: width of the feed-forward.
      convolution_kernel: codes that the convolution module sees, odd; None = no such module.
      dropout: on positions and on the output of each module, in training.
      dtype: compute dtype.
    """

    width: int = 512
    num_layers: int = 6
    num_heads: int = 8
    mlp_dim: int = 2048
    convolution_kernel: int | None = None
    dropout: float = 0.1
    dtype: str = "float32"

    def __post_init__(self):
        kernel = self.convolution_kernel
        if kernel is not None and (kernel < 1 or kernel % 2 == 0):
            raise UserError(f"ConformerConfig.convolution_kernel={kernel}: give an odd number")

    def make(self, rngs: nnx.Rngs) -> "Conformer":
        """The encoder with fresh weights."""
        return Conformer(self, rngs)


def relative_positions(length: int, width: int) -> np.ndarray:
    """Sinusoids of the distances length-1 ... -(length-1): float32 [2 * length - 1, width]."""
    distance = np.arange(length - 1, -length, -1)[:, None]
    rate = np.exp(np.arange(0, width, 2) * -(np.log(10000.0) / width))
    table = np.zeros((2 * length - 1, width), np.float32)
    table[:, 0::2] = np.sin(distance * rate)
    table[:, 1::2] = np.cos(distance * rate)
    return table


def relative_shift(scores: jax.Array) -> jax.Array:
    """[B, H, T, 2T - 1] by distance -> [B, H, T, T] by key, without a gather."""
    batch, heads, length, distances = scores.shape
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0)))
    padded = padded.reshape(batch, heads, distances + 1, length)[:, :, 1:]
    return padded.reshape(scores.shape)[..., :length]


class RelativeAttention(nnx.Module):
    """Multi-head attention with content and position biases u, v."""

    def __init__(self, config: ConformerConfig, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        head_dim = width // config.num_heads

        def project(axes, use_bias=True):
            return linear(
                width, width, axes, use_bias=use_bias, dtype=config.dtype, rngs=rngs, stacked=1
            )

        self.query, self.key, self.value = (project(("embed", "heads")) for _ in range(3))
        self.out = project(("heads", "embed"))
        self.position = project(("embed", "heads"), use_bias=False)
        init = spread(head_dim**-0.5)
        axes = ("layers", "heads", "head_dim")
        shape = (config.num_heads, head_dim)
        self.content_bias = nnx.Param(init(rngs.params(), shape), logical_axes=axes)
        self.position_bias = nnx.Param(init(rngs.params(), shape), logical_axes=axes)

    def __call__(self, x: jax.Array, positions: jax.Array, see):
        """Attention of frames to those that they see.

        Args:
          x: [B, T, width].
          positions: [D, width], sinusoids of distances.
          see: keys and values of these frames [B, T, H, head_dim] -> (keys and values [B, S, H,
            head_dim], mask float32 [B, S, 1], function from scores by distance [B, H, T, D] to
            scores [B, H, T, S]).

        Returns:
          ([B, T, width], keys and values of these frames)
        """

        def heads(y):
            return y.reshape(*y.shape[:-1], self.config.num_heads, -1)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        position = heads(self.position(positions))
        by_distance = jnp.einsum(
            "bthd,phd->bhtp",
            (query + self.position_bias[...].astype(query.dtype)) * query.shape[-1] ** -0.5,
            position,
            preferred_element_type=jnp.float32,
        )
        query = query + self.content_bias[...].astype(query.dtype)
        keys, values, mask, by_key = see(key, value)
        mixed = attend(query, keys, values, mask[..., 0] > 0, by_key(by_distance))
        return self.out(mixed.reshape(x.shape)), (key, value)


class ConvolutionModule(nnx.Module):
    """Pointwise with a gated linear unit, depthwise, layer norm, swish, pointwise.

    The depthwise convolution is a sum of shifted products: XLA fuses it to one loop.
    """

    def __init__(self, config: ConformerConfig, rngs: nnx.Rngs):
        width, kernel = config.width, config.convolution_kernel
        kind = {"dtype": config.dtype, "rngs": rngs, "stacked": 1}
        self.up = linear(width, 2 * width, ("embed", "mlp"), **kind)
        self.depthwise = nnx.Param(
            spread(kernel**-0.5)(rngs.params(), (kernel, width)),
            logical_axes=("layers", None, "embed"),
        )
        self.norm = layer_norm(width, 1e-5, rngs)
        self.down = linear(width, width, ("mlp", "embed"), **kind)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, width] -> [B, T, width]; padding is not seen."""
        value, gate = jnp.split(self.up(x), 2, axis=-1)
        x = value * jax.nn.sigmoid(gate) * mask
        kernel = self.depthwise[...].astype(x.dtype)
        size, length = kernel.shape[0], x.shape[1]
        padded = jnp.pad(x, ((0, 0), (size // 2, size // 2), (0, 0)))
        x = sum(padded[:, i : i + length] * kernel[i] for i in range(size))
        return self.down(jax.nn.silu(self.norm(x)).astype(self.down.dtype))


class ConformerBlock(nnx.Module):
    """Pre-norm attention, convolution if there is one, and swish feed-forward."""

    def __init__(self, config: ConformerConfig, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = layer_norm(config.width, 1e-12, rngs)
        self.mlp_norm = layer_norm(config.width, 1e-12, rngs)
        self.attention = RelativeAttention(config, rngs)
        kind = {"dtype": config.dtype, "rngs": rngs, "stacked": 1}
        self.up = linear(config.width, config.mlp_dim, ("embed", "mlp"), **kind)
        self.down = linear(config.mlp_dim, config.width, ("mlp", "embed"), **kind)
        if config.convolution_kernel is not None:
            self.convolution_norm = layer_norm(config.width, 1e-5, rngs)
            self.convolution = ConvolutionModule(config, rngs)

    def __call__(self, x, positions, mask, see, rng=None):
        """[B, T, width] -> ([B, T, width], keys and values); `see` as of `RelativeAttention`."""
        keys = (None,) * 4 if rng is None else jax.random.split(rng, 4)
        rate, dtype = self.config.dropout, jnp.dtype(self.config.dtype)
        y, seen = self.attention(self.attention_norm(x).astype(dtype), positions, see)
        x = x + dropout(y, rate, keys[0])
        if self.config.convolution_kernel is not None:
            y = self.convolution(self.convolution_norm(x).astype(dtype), mask)
            x = x + dropout(y, rate, keys[3])
        y = dropout(jax.nn.silu(self.up(self.mlp_norm(x).astype(dtype))), rate, keys[1])
        return x + dropout(self.down(y), rate, keys[2]), seen


class ConformerPart(nnx.Module):
    """Linear and layer norm, scaled by sqrt(width), in front of `num_layers` blocks."""

    def __init__(self, config: ConformerConfig, num_layers: int, rngs: nnx.Rngs):
        self.config, self.num_layers = config, num_layers
        self.embed = linear(
            config.width, config.width, (None, "embed"), dtype=config.dtype, rngs=rngs
        )
        self.embed_norm = layer_norm(config.width, 1e-5, rngs)
        self.layers = stack(lambda r: ConformerBlock(config, r), num_layers, rngs)

    def take_apart(self, max_layers: int | None) -> None:
        """See `cpu_weights.arranged`."""
        if max_layers is None or self.num_layers <= max_layers:
            self.layers = unstacked(self.layers, self.num_layers)

    def start(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        """[B, T, width] -> what goes to the blocks, float32; `rng` of dropout or None."""
        x = self.embed_norm(self.embed(x)) * self.config.width**0.5
        return dropout(x, self.config.dropout, rng)

    def run(self, x: jax.Array, mask: jax.Array, rng: jax.Array | None, bias=None) -> jax.Array:
        """The blocks on whole utterances.

        Args:
          x: [B, T, width].
          mask: float32 [B, T, 1].
          rng: of dropout or None.
          bias: scores to add, such as those of `ring.Chunks`; None = every position sees all
            valid ones.
        """
        config, keys = self.config, None
        positions = jnp.asarray(relative_positions(x.shape[1], config.width), config.dtype)
        if rng is not None:
            rng, position_rng = jax.random.split(rng)
            positions = dropout(positions, config.dropout, position_rng)
            keys = jax.random.split(rng, self.num_layers)

        def by_key(scores):
            shifted = relative_shift(scores)
            return shifted if bias is None else shifted + bias

        def call(block, x, key):
            return block(x, positions, mask, lambda k, v: (k, v, mask, by_key), key)[0]

        return run_stack(self.layers, call, x, keys)

    def step(self, x: jax.Array, keys: jax.Array, values: jax.Array, places: Ring):
        """The blocks on the next chunk of a stream.

        Args:
          x: [B, T, width].
          keys, values: [L, B, P, H, head_dim], caches of the layers.
          places: of the chunk in the caches.

        Returns:
          ([B, T, width], (keys, values))
        """
        config, count = self.config, len(places.mask)
        positions = jnp.asarray(relative_positions(count, config.width), config.dtype)
        mask = jnp.broadcast_to(places.mask[None, :, None], (len(x), count, 1))
        index = jnp.clip(count - 1 - places.distances, 0, 2 * count - 2)[None, None]

        def call(block, x, caches):
            def see(key, value):
                joined = (
                    jnp.concatenate(pair, axis=1) for pair in zip(caches, (key, value), strict=True)
                )
                return *joined, mask, lambda scores: jnp.take_along_axis(scores, index, axis=-1)

            x, new = block(x, positions, mask[:, -x.shape[1] :], see)
            return x, tuple(places.keep(*pair) for pair in zip(caches, new, strict=True))

        return scan_stack(self.layers, call, x, (keys, values))


class Conformer(ConformerPart):
    """The encoder: [B, T, width] -> [B, T, width], one output for each code."""

    def __init__(self, config: ConformerConfig, rngs: nnx.Rngs):
        super().__init__(config, config.num_layers, rngs)
        self.final_norm = layer_norm(config.width, 1e-5, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Encodes embedded codes.

        Args:
          x: [B, T, width].
          mask: float32 [B, T, 1], 1 at valid positions.
          rng: key of the dropout; None = no dropout.

        Returns:
          float32 [B, T, width]; padded positions are 0.
        """
        keys = (None, None) if rng is None else jax.random.split(rng)
        return self.final_norm(self.run(self.start(x, keys[0]), mask, keys[1])) * mask
