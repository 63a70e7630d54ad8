"""The SAN-M encoder of Paraformer: self-attention with a convolutional memory on the values.

Per layer, pre-norm: x + attention(norm(x)) + memory(values), then x + ReLU feed-forward, where the
memory (FSMN) is a depth-wise convolution of 11 frames over the value vectors plus the values
themselves. The first layer maps the stacked filter banks to the width and so has no residual.
Source: Gao et al., "SAN-M: Memory Equipped Self-Attention for End-to-End Speech Recognition"
(arXiv 2006.01713); layout and constants as in FunASR's `sanm` modules and Step-Audio's use of them.

Choices:
- `context="full"`: every frame sees the whole utterance. `context="chunk"`: the streaming encoder
  with chunks [0, 4, 5]: each call takes 4 new frames, sees them together with the 5 before (which
  are computed again) and with keys and values of at most 16 earlier frames per layer, and emits 4.
- In chunk context a stream calls `step`, a pure function of (chunk, state). Whole utterances go
  layer by layer through all chunks at once: what a chunk sees of those before it in a layer depends
  on no later layer, so this is the same encoding without a loop over time.
- The layers are one piece of code for both contexts; `past` is all that differs.
- The depth-wise convolution is a sum of shifted products: XLA fuses it to one loop, where a grouped
  convolution is several times slower on a CPU, above all its gradient.
"""

import dataclasses
import functools

import flax.nnx as nnx
import flax.struct
import jax
import jax.numpy as jnp

from t5x_audio import cpu_weights
from t5x_audio.encoder_attention import attend


@dataclasses.dataclass(frozen=True)
class SanmConfig:
    """Sizes of the encoder; the defaults are Paraformer-large's.

    Attributes:
      input_dim: of the stacked filter banks (80 mel x 7 frames).
      num_layers: with the first, which maps input_dim to width.
      width, num_heads, mlp_dim: of every layer.
      kernel_size: frames of the FSMN memory, odd.
      context: 'full' or 'chunk'.
      chunk_frames: new frames a step.
      overlap_frames: frames before them that are computed again.
      look_back_chunks: chunks whose keys and values stay visible.
      norm_epsilon: of the layer norms.
      dtype: compute type of the matrix products.
      scan_unroll: layers unrolled in the compiled scan; all of them is fastest for a small model.
    """

    input_dim: int = 560
    num_layers: int = 50
    width: int = 512
    num_heads: int = 4
    mlp_dim: int = 2048
    kernel_size: int = 11
    context: str = "full"
    chunk_frames: int = 4
    overlap_frames: int = 5
    look_back_chunks: int = 4
    norm_epsilon: float = 1e-12
    dtype: str = "float32"
    scan_unroll: int = 1

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of {self.num_heads} heads")
        if self.context not in ("full", "chunk"):
            raise ValueError(f"context is 'full' or 'chunk', not {self.context!r}")

    def make(self, rngs: nnx.Rngs) -> "SanmEncoder":
        """Builds the encoder."""
        return SanmEncoder(self, rngs)


@flax.struct.dataclass
class SanmState:
    """Streaming state of B utterances, L layers, C = 16 cached frames, H heads of D.

    Attributes:
      position: int32 [], frames seen; the next frame is position + 1 in the positional encoding.
      overlap: [B, overlap_frames, input_dim], the last inputs, after positional encoding.
      keys, values: [L, B, C, H, D].
      filled: int32 [], how many of the C cached frames are real; they are the last ones.
    """

    position: jax.Array
    overlap: jax.Array
    keys: jax.Array
    values: jax.Array
    filled: jax.Array


def positional_encoding(positions: jax.Array, depth: int) -> jax.Array:
    """Sinusoids float32 [..., depth] of positions [...] (counted from 1): sines, then cosines."""
    half = depth // 2
    rates = jnp.exp(jnp.arange(half) * -(jnp.log(10000.0) / (half - 1)))
    angles = positions[..., None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class SanmLayer(nnx.Module):
    """One layer; `layers` prefixes the logical axes of layers that are stacked for a scan."""

    def __init__(self, config: SanmConfig, input_dim: int, rngs: nnx.Rngs, layers=()):
        """Builds a layer that maps input_dim to config.width."""
        self.config = config
        self.residual = input_dim == config.width
        dtype, width = jnp.dtype(config.dtype), config.width

        def linear(n_in, n_out, axes):
            init = nnx.with_metadata(nnx.initializers.lecun_normal(), logical_axes=(*layers, *axes))
            bias = nnx.with_metadata(
                nnx.initializers.zeros_init(), logical_axes=(*layers, axes[-1])
            )
            return nnx.Linear(n_in, n_out, kernel_init=init, bias_init=bias, dtype=dtype, rngs=rngs)

        def norm(dim):
            return nnx.LayerNorm(
                dim,
                epsilon=config.norm_epsilon,
                dtype=jnp.float32,
                use_fast_variance=False,
                rngs=rngs,
            )

        self.attention_norm, self.mlp_norm = norm(input_dim), norm(width)
        # Stacked filter banks (560) do not divide over as many devices as a width of 512.
        rows = "embed" if self.residual else None
        self.qkv = linear(input_dim, 3 * width, (rows, "heads"))
        self.out = linear(width, width, ("heads", "embed"))
        self.memory = nnx.Param(
            nnx.initializers.normal(config.kernel_size**-0.5)(
                rngs.params(), (config.kernel_size, width)
            ),
            logical_axes=(*layers, None, "heads"),
        )
        self.up = linear(width, config.mlp_dim, ("embed", "mlp"))
        self.down = linear(config.mlp_dim, width, ("mlp", "embed"))

    def __call__(self, x, valid, past=None):
        """One layer on x [B, T, input_dim] with valid bool [B, T].

        `past`: (keys [B, T, H, D], values) of the present frames -> (keys [B, C, H, D], values,
        valid bool [B, C]) of earlier frames, which the present ones see too.

        Returns:
          (y [B, T, width], keys [B, T, H, D], values) of the present frames.
        """
        dtype = jnp.dtype(self.config.dtype)
        attended, keys, values = self._attend(self.attention_norm(x).astype(dtype), valid, past)
        x = x + attended if self.residual else attended
        x = x + self.down(jax.nn.relu(self.up(self.mlp_norm(x).astype(dtype))))
        return x, keys, values

    def _attend(self, x, valid, past):
        heads = self.config.num_heads
        batch, length, _ = x.shape
        query, key, flat_value = jnp.split(self.qkv(x), 3, axis=-1)
        query, key, value = (a.reshape(batch, length, heads, -1) for a in (query, key, flat_value))
        all_keys, all_values, visible = key, value, valid
        if past is not None:
            past_keys, past_values, seen = past(key, value)
            all_keys = jnp.concatenate([past_keys, key], axis=1)
            all_values = jnp.concatenate([past_values, value], axis=1)
            visible = jnp.concatenate([seen, valid], axis=1)
        mixed = attend(query, all_keys, all_values, visible)
        attended = self.out(mixed.reshape(batch, length, -1))
        return attended + self._remember(flat_value, valid), key, value

    def _remember(self, value, valid):
        """FSMN memory of values [B, T, width]: convolution over time plus identity."""
        value = jnp.where(valid[:, :, None], value, 0)
        size, length = self.config.kernel_size, value.shape[1]
        padded = jnp.pad(value, ((0, 0), (size // 2, size // 2), (0, 0)))
        kernel = self.memory[...].astype(value.dtype)
        return value + sum(kernel[k] * padded[:, k : k + length] for k in range(size))


class SanmEncoder(nnx.Module):
    """The encoder; see the module docstring."""

    def __init__(self, config: SanmConfig, rngs: nnx.Rngs):
        """Builds the encoder of `config`."""
        self.config = config
        self.first = SanmLayer(config, config.input_dim, rngs)
        if config.num_layers > 1:

            @nnx.split_rngs(splits=config.num_layers - 1)
            @nnx.vmap(in_axes=0, out_axes=0)
            def make(rngs):
                return SanmLayer(config, config.width, rngs, layers=("layers",))

            self.rest = make(rngs)
        self.final_norm = nnx.LayerNorm(
            config.width,
            epsilon=config.norm_epsilon,
            dtype=jnp.float32,
            use_fast_variance=False,
            rngs=rngs,
        )

    def __call__(self, features: jax.Array, lengths: jax.Array) -> jax.Array:
        """Encodes whole utterances in the configured context.

        Args:
          features: [B, T, input_dim], normalised.
          lengths: int32 [B], valid frames.

        Returns:
          float32 [B, T, width]; frames beyond an utterance's length are undefined.
        """
        if self.config.context == "chunk":
            return self._encode_chunks(features, lengths)
        length = features.shape[1]
        x = self._embed(features, jnp.arange(1, length + 1))
        x, _ = self._run_layers(x, jnp.arange(length) < lengths[:, None])
        return self.final_norm(x)

    def take_apart(self, max_layers: int | None) -> None:
        """See `cpu_weights.arranged`."""
        layers = self.config.num_layers
        if layers > 1 and (max_layers is None or layers <= max_layers):
            self.rest = cpu_weights.unstacked(self.rest, layers - 1)

    def initial_state(self, batch_size: int) -> SanmState:
        """The streaming state of `batch_size` utterances before their first frame."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        cached = c.look_back_chunks * c.chunk_frames
        cache = jnp.zeros(
            (c.num_layers, batch_size, cached, c.num_heads, c.width // c.num_heads), dtype
        )
        return SanmState(
            position=jnp.int32(0),
            overlap=jnp.zeros((batch_size, c.overlap_frames, c.input_dim)),
            keys=cache,
            values=cache,
            filled=jnp.int32(0),
        )

    def step(
        self, chunk: jax.Array, lengths: jax.Array, state: SanmState
    ) -> tuple[jax.Array, SanmState]:
        """Encodes the next chunk of every utterance.

        Args:
          chunk: [B, chunk_frames, input_dim], normalised.
          lengths: int32 [B], valid frames of the chunk; less than all only where the speech ends.
          state: from `initial_state` or the previous step.

        Returns:
          (float32 [B, chunk_frames, width], the next state).
        """
        c = self.config
        frames = self._embed(chunk, state.position + 1 + jnp.arange(c.chunk_frames))
        x = jnp.concatenate([state.overlap, frames], axis=1)
        valid = jnp.arange(x.shape[1]) < (c.overlap_frames + lengths)[:, None]
        cached = state.keys.shape[2]
        seen = jnp.broadcast_to(jnp.arange(cached) >= cached - state.filled, (len(chunk), cached))
        overlap = x[:, c.chunk_frames :]

        def past(cache, *_):
            return (*cache, seen)

        x, (keys, values) = self._run_layers(x, valid, past, (state.keys, state.values))
        state = SanmState(
            position=state.position + c.chunk_frames,
            overlap=overlap,
            keys=self._slide(state.keys, keys),
            values=self._slide(state.values, values),
            filled=jnp.minimum(state.filled + c.chunk_frames, cached),
        )
        return self.final_norm(x[:, c.overlap_frames :]), state

    def _slide(self, cache, new):
        """Adds the frames that leave the overlap to a cache [L, B, C, H, D], drops the oldest."""
        kept = new[:, :, : -self.config.overlap_frames]
        return jnp.concatenate([cache, kept], axis=2)[:, :, -cache.shape[2] :]

    def _embed(self, features, positions):
        scaled = features.astype(jnp.float32) * self.config.width**0.5
        return scaled + positional_encoding(positions, self.config.input_dim)

    def _run_layers(self, x, valid, past=None, caches=None):
        """All layers.

        `past(cache, keys, values)`: see `SanmLayer`; `caches`, what it gets from the caller in each
        layer, is stacked over layers.

        Returns:
          (x, keys and values of the present frames, stacked over layers; None without caches)
        """

        def run(layer, x, cache):
            seen = past and functools.partial(past, cache)
            x, key, value = layer(x, valid, seen)
            return x, None if caches is None else (key, value)

        def cache_of(part):
            return jax.tree.map(lambda cache: cache[part], caches)

        x, first = run(self.first, x, cache_of(0))
        if self.config.num_layers == 1:
            return x, jax.tree.map(lambda a: a[None], first)
        if isinstance(self.rest, nnx.List):
            made = [first]
            for index, layer in enumerate(self.rest, 1):
                x, pair = run(layer, x, cache_of(index))
                made.append(pair)
            return x, None if caches is None else jax.tree.map(lambda *a: jnp.stack(a), *made)
        graph, parameters = nnx.split(self.rest)

        def body(x, layer):
            parameters, cache = layer
            layer = nnx.merge(graph, parameters)
            x, pair = run(layer, x, cache)
            return x, (pair, nnx.state(layer, nnx.Intermediate))

        unroll = min(self.config.scan_unroll, self.config.num_layers - 1)
        inputs = (parameters, cache_of(slice(1, None)))
        x, (rest, seen) = jax.lax.scan(body, x, inputs, unroll=unroll)
        nnx.update(self.rest, seen)
        return x, jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)

    def _encode_chunks(self, features, lengths):
        """Chunk context over whole utterances, all N chunks at once as rows of a batch."""
        c = self.config
        batch, length, _ = features.shape
        count = -(-length // c.chunk_frames)
        window = c.overlap_frames + c.chunk_frames
        frames = self._embed(features, jnp.arange(1, length + 1))
        missing = count * c.chunk_frames - length
        frames = jnp.pad(frames, ((0, 0), (c.overlap_frames, missing), (0, 0)))
        starts = c.chunk_frames * jnp.arange(count)
        x = frames[:, starts[:, None] + jnp.arange(window)].reshape(batch * count, window, -1)
        spoken = jnp.clip(lengths[:, None] - starts, 0, c.chunk_frames)
        valid = jnp.arange(window) < (c.overlap_frames + spoken).reshape(-1, 1)
        ages = jnp.arange(c.look_back_chunks, 0, -1)
        seen = jnp.repeat(jnp.arange(count)[:, None] >= ages, c.chunk_frames, axis=1)
        seen = jnp.tile(seen, (batch, 1))

        def look_back(present):
            """Of the chunks before each: the frames that leave their overlap."""
            kept = present.reshape(batch, count, window, *present.shape[2:])[:, :, : c.chunk_frames]
            padding = ((0, 0), (c.look_back_chunks, 0)) + ((0, 0),) * (kept.ndim - 2)
            padded = jnp.pad(kept, padding)
            parts = [padded[:, k : k + count] for k in range(c.look_back_chunks)]
            return jnp.concatenate(parts, axis=2).reshape(batch * count, -1, *present.shape[2:])

        def past(_, keys, values):
            return look_back(keys), look_back(values), seen

        x, _ = self._run_layers(x, valid, past)
        x = self.final_norm(x[:, c.overlap_frames :])
        return x.reshape(batch, count * c.chunk_frames, -1)[:, :length]
