"""Layers of a Whisper-type encoder: strided convolutions and pre-norm attention blocks.

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (arXiv
2212.04356) and its public implementation: keys have no bias, queries and keys are each scaled by
head_dim^-0.25, layer norms have epsilon 1e-5, positions are a table that starts as sinusoids.

Choices: the convolution of kernel 3 and stride 2 is a matrix product over gathered frames (three
inputs per output): its gradient is then a matrix product too, fast on any device. Blocks are
stacked and scanned. Training from scratch starts with the frames themselves dominating the
residual stream (strong convolutions, weak block outputs): a quantiser of normalised features at its
end would otherwise see one common direction and little else.
"""

import dataclasses

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from t5x_audio import cpu_weights
from t5x_audio.encoder_attention import attend

KERNEL = 3
STRIDE = 2
CONVOLUTION_GAIN = 2.0  # of the initial weights, over the variance-preserving ones
BLOCK_OUTPUT_GAIN = 0.3
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Sizes of the blocks; see `SemanticTokenizerConfig`. `activation`: a key of ACTIVATIONS."""

    width: int
    num_heads: int
    mlp_dim: int
    dtype: str = "float32"
    scan_unroll: int = 1
    activation: str = "gelu"


def sinusoids(length: int, width: int) -> jax.Array:
    """Whisper's positional table float32 [length, width]: sines, then cosines."""
    half = width // 2
    rates = jnp.exp(-jnp.log(10000.0) / (half - 1) * jnp.arange(half))
    angles = jnp.arange(length)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def strided_length(length):
    """Frames after a convolution of kernel 3, stride 2, padding 1."""
    return (length + 1) // STRIDE


class StridedConvolution(nnx.Module):
    """Kernel 3, stride 2, padding 1 over time, then GELU: [B, T, in] -> [B, (T + 1) // 2, out]."""

    def __init__(self, n_in: int, n_out: int, dtype: str, rngs: nnx.Rngs):
        """Kernel [3, in, out] and bias [out]."""
        self.dtype = dtype
        init = nnx.initializers.variance_scaling(
            CONVOLUTION_GAIN**2, "fan_in", "truncated_normal", in_axis=(0, 1)
        )
        self.kernel = nnx.Param(
            init(rngs.params(), (KERNEL, n_in, n_out)), logical_axes=(None, None, "embed")
        )
        self.bias = nnx.Param(jnp.zeros(n_out), logical_axes=("embed",))

    def __call__(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Frames [B, T, in] of which `lengths` int32 [B] count -> (frames, their lengths)."""
        dtype = jnp.dtype(self.dtype)
        batch, length, _ = x.shape
        x = jnp.where((jnp.arange(length) < lengths[:, None])[..., None], x, 0).astype(dtype)
        count = strided_length(length)
        padded = jnp.pad(x, ((0, 0), (1, 2 * count - length), (0, 0)))
        windows = jnp.concatenate(
            [padded[:, k : k + 2 * count - 1 : STRIDE] for k in range(KERNEL)], axis=-1
        )
        kernel = self.kernel[...].astype(dtype)
        y = windows @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...].astype(dtype)
        return jax.nn.gelu(y, approximate=False), strided_length(lengths)


class Block(nnx.Module):
    """Pre-norm self-attention and feed-forward; stacked, hence 'layers' first in the axes."""

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs):
        """Builds one block."""
        self.config = config
        dtype, width = jnp.dtype(config.dtype), config.width

        def linear(n_in, n_out, axes, use_bias=True, gain=1.0):
            init = nnx.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal")
            kernel = nnx.with_metadata(init, logical_axes=("layers", *axes))
            bias = nnx.with_metadata(
                nnx.initializers.zeros_init(), logical_axes=("layers", axes[-1])
            )
            return nnx.Linear(
                n_in,
                n_out,
                use_bias=use_bias,
                kernel_init=kernel,
                bias_init=bias,
                dtype=dtype,
                rngs=rngs,
            )

        def norm():
            return nnx.LayerNorm(
                width, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
            )

        self.attention_norm, self.mlp_norm = norm(), norm()
        self.query = linear(width, width, ("embed", "heads"))
        self.key = linear(width, width, ("embed", "heads"), use_bias=False)
        self.value = linear(width, width, ("embed", "heads"))
        self.out = linear(width, width, ("heads", "embed"), gain=BLOCK_OUTPUT_GAIN)
        self.up = linear(width, config.mlp_dim, ("embed", "mlp"))
        self.down = linear(config.mlp_dim, width, ("mlp", "embed"), gain=BLOCK_OUTPUT_GAIN)

    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """Frames [B, T, width], valid bool [B, T] -> [B, T, width]."""
        dtype = jnp.dtype(self.config.dtype)
        x = x + self._attend(self.attention_norm(x).astype(dtype), valid)
        hidden = self.up(self.mlp_norm(x).astype(dtype))
        return x + self.down(ACTIVATIONS[self.config.activation](hidden))

    def _attend(self, x, valid):
        batch, length, width = x.shape
        heads = self.config.num_heads
        query, key, value = (
            f(x).reshape(batch, length, heads, -1) for f in (self.query, self.key, self.value)
        )
        return self.out(attend(query, key, value, valid).reshape(batch, length, width))


class Blocks(nnx.Module):
    """A stack of blocks, scanned."""

    def __init__(self, num_layers: int, config: BlockConfig, rngs: nnx.Rngs):
        """Builds `num_layers` >= 1 blocks with stacked parameters."""
        self.num_layers, self.config = num_layers, config

        @nnx.split_rngs(splits=num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return Block(config, rngs)

        self.stack = make(rngs)

    def take_apart(self, max_layers: int | None) -> None:
        """See `cpu_weights.arranged`."""
        if max_layers is None or self.num_layers <= max_layers:
            self.stack = cpu_weights.unstacked(self.stack, self.num_layers)

    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """Frames [B, T, width], valid bool [B, T] -> [B, T, width]."""
        if isinstance(self.stack, nnx.List):
            for block in self.stack:
                x = block(x, valid)
            return x
        graph, parameters = nnx.split(self.stack)

        def body(x, layer):
            block = nnx.merge(graph, layer)
            return block(x, valid), nnx.state(block, nnx.Intermediate)

        unroll = min(self.config.scan_unroll, self.num_layers)
        x, seen = jax.lax.scan(body, x, parameters, unroll=unroll)
        nnx.update(self.stack, seen)
        return x
