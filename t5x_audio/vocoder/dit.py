"""The velocity estimator of the successor's flow: a diffusion transformer that can stream.

Step-Audio 2's and EditX's: blocks of attention, causal convolution and feed-forward, each modulated
by the time (adaLN-zero: Peebles & Xie, arXiv 2212.09748). There is no positional encoding: the
convolutions tell where a frame is. Source: stepaudio2's cosyvoice2/flow/decoder_dit.py.

Choices:
- Whole utterances see all of their frames, as published, or only as much as a stream would: its
  chunk, the frames before it within `look_back_frames`, and the prompt (`ring.Chunks`). With
  that the stream gives what the whole gives.
- Keys and values of a stream stand in a `ring`; a prompt is never overwritten. The reference cuts
  its cache to the same frames.
- Layers are stacked and scanned; modulations and the last projection start at zero.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.cpu_weights import unstacked
from t5x_audio.encoder_attention import attend
from t5x_audio.vocoder.convolution import Convolution
from t5x_audio.vocoder.layers import (
    layer_norm,
    linear,
    mish,
    run_stack,
    scan_stack,
    stack,
)
from t5x_audio.vocoder.ring import RingSize, ring

TIME_WIDTH = 256
TIME_SCALE = 1000.0
_MODULATIONS = ("attention", "mlp", "convolution")  # shift, scale and gate of each, in this order


@dataclasses.dataclass(frozen=True)
class DitConfig:
    """Sizes; defaults are Step-Audio 2 mini's.

    Attributes:
      width: of the residual stream.
      num_layers: blocks.
      num_heads, head_dim: of the attention.
      mlp_dim: of the feed-forward.
      kernel_size: of both causal convolutions of a block.
      look_back_frames: before a chunk that a stream can see, beside the prompt.
      dtype: compute dtype.
    """

    width: int = 512
    num_layers: int = 16
    num_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 2048
    kernel_size: int = 3
    look_back_frames: int = 100
    dtype: str = "float32"


@flax.struct.dataclass
class DitState:
    """Of a stream of B rows, L layers: what the next chunk needs of the frames before it.

    Attributes:
      position: int32 [], frames seen, prompt included.
      prompt_frames: int32 [], the first of them, which stay visible.
      before: [L, B, K - 1, width], inputs of the first convolution; of the second `between`.
      keys, values: [L, B, P + look_back_frames, H, D]: P places of the prompt, then the ring.
    """

    position: jax.Array
    prompt_frames: jax.Array
    before: jax.Array
    between: jax.Array
    keys: jax.Array
    values: jax.Array


def time_features(time: jax.Array) -> jax.Array:
    """Cosines, then sines, of 1000 times float32 [B] -> [B, TIME_WIDTH]."""
    half = TIME_WIDTH // 2
    rates = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / half)
    angles = TIME_SCALE * time[:, None] * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _plain_norm(x: jax.Array) -> jax.Array:
    """Layer norm without weights, float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)


class CausalConvolutions(nnx.Module):
    """Causal convolution, layer norm, Mish, causal convolution."""

    def __init__(self, config: DitConfig, rngs: nnx.Rngs):
        width, size = config.width, config.kernel_size
        kind = {"padding": 0, "nested": True, "dtype": config.dtype, "rngs": rngs}
        self.first = Convolution(width, width, size, **kind)
        self.norm = layer_norm(width, 1e-5, rngs)
        self.second = Convolution(width, width, size, **kind)

    def __call__(self, x, before, between):
        """x [B, T, width] and both convolutions' last K - 1 inputs -> (y, their new ones)."""
        joined = jnp.concatenate([before, x], axis=1)
        y = mish(self.norm(self.first(joined))).astype(x.dtype)
        joined_again = jnp.concatenate([between, y], axis=1)
        kept = before.shape[1]
        last = slice(joined.shape[1] - kept, None)
        return self.second(joined_again), joined[:, last], joined_again[:, last]


class DitBlock(nnx.Module):
    """Attention, convolutions and feed-forward, each modulated and gated by the time."""

    def __init__(self, config: DitConfig, rngs: nnx.Rngs):
        self.config = config
        width, inner = config.width, config.num_heads * config.head_dim
        kind = {"dtype": config.dtype, "rngs": rngs, "stacked": 1}
        self.query, self.key, self.value = (
            linear(width, inner, ("embed", "heads"), **kind) for _ in range(3)
        )
        self.query_norm, self.key_norm = (layer_norm(config.head_dim, 1e-5, rngs) for _ in range(2))
        self.out = linear(inner, width, ("heads", "embed"), **kind)
        self.convolutions = CausalConvolutions(config, rngs)
        self.up = linear(width, config.mlp_dim, ("embed", "mlp"), **kind)
        self.down = linear(config.mlp_dim, width, ("mlp", "embed"), **kind)
        zeros = nnx.initializers.zeros_init()
        self.modulation = linear(width, 9 * width, ("embed", "mlp"), init=zeros, **kind)

    def __call__(self, x, time, see, before, between):
        """One block.

        Args:
          x: [B, T, width].
          time: [B, width].
          see: keys and values of these frames [B, T, H, D] -> (keys, values [B, S, H, D], mask
            float32 [B, S, 1], scores to add or None) that they attend to.
          before, between: [B, K - 1, width], see `DitState`.

        Returns:
          (x, keys and values of these frames, the new `before` and `between`)
        """
        dtype = jnp.dtype(self.config.dtype)
        parts = jnp.split(self.modulation(jax.nn.silu(time))[:, None], 9, axis=-1)
        shift, scale, gate = (
            dict(zip(_MODULATIONS, parts[part::3], strict=True)) for part in range(3)
        )

        def modulated(x, name):
            return (_plain_norm(x) * (1.0 + scale[name]) + shift[name]).astype(dtype)

        attended, keys, values = self._attend(modulated(x, "attention"), see)
        x = x + gate["attention"] * attended
        made, before, between = self.convolutions(modulated(x, "convolution"), before, between)
        x = x + gate["convolution"] * made
        y = self.down(jax.nn.gelu(self.up(modulated(x, "mlp")), approximate=True))
        return x + gate["mlp"] * y, (keys, values), before, between

    def _attend(self, x, see):
        def heads(y):
            return y.reshape(*y.shape[:2], self.config.num_heads, -1)

        query = self.query_norm(heads(self.query(x))).astype(x.dtype)
        key = self.key_norm(heads(self.key(x))).astype(x.dtype)
        value = heads(self.value(x))
        keys, values, mask, bias = see(key, value)
        mixed = attend(query, keys, values, mask[..., 0] > 0, bias)
        return self.out(mixed.reshape(*x.shape[:2], -1)), key, value


class Dit(nnx.Module):
    """Velocity of the flow at a time, given the noisy mel and its conditions."""

    def __init__(self, n_in: int, n_out: int, config: DitConfig, rngs: nnx.Rngs):
        """`n_in` = channels of mel, mu, speaker and prompt together; `n_out` = mel channels."""
        self.config = config
        width, kind = config.width, {"dtype": "float32", "rngs": rngs}
        self.time_in = linear(TIME_WIDTH, width, (None, "embed"), **kind)
        self.time_out = linear(width, width, ("embed", None), **kind)
        self.in_project = linear(n_in, width, (None, "embed"), dtype=config.dtype, rngs=rngs)
        self.blocks = stack(lambda r: DitBlock(config, r), config.num_layers, rngs)
        zeros = nnx.initializers.zeros_init()
        self.modulation = linear(width, 2 * width, ("embed", None), init=zeros, **kind)
        self.out_project = linear(width, n_out, ("embed", None), init=zeros, **kind)

    def __call__(self, x: jax.Array, mask: jax.Array, time: jax.Array, bias=None) -> jax.Array:
        """Velocity of whole utterances.

        Args:
          x: [B, T, n_in], the noisy mel and its conditions side by side.
          mask: float32 [B, T, 1].
          time: float32 [B] in [0, 1].
          bias: scores to add, such as those of `ring.Chunks`; None = every frame sees all
            valid ones.

        Returns:
          float32 [B, T, n_out]; padded frames are 0.
        """
        time = self._embed(time)
        empty = jnp.zeros((len(x), self.config.kernel_size - 1, self.config.width))
        empty = empty.astype(self.config.dtype)

        def call(block, x, _):
            return block(x, time, lambda k, v: (k, v, mask, bias), empty, empty)[0]

        return self._finish(run_stack(self.blocks, call, self.in_project(x)), time) * mask

    def take_apart(self, max_layers: int | None) -> None:
        """See `cpu_weights.arranged`."""
        if max_layers is None or self.config.num_layers <= max_layers:
            self.blocks = unstacked(self.blocks, self.config.num_layers)

    def initial_state(self, batch_size: int, prompt_frames: int) -> DitState:
        """The state before the first frame; a prompt has at most `prompt_frames`."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        inputs = jnp.zeros((c.num_layers, batch_size, c.kernel_size - 1, c.width), dtype)
        places = prompt_frames + c.look_back_frames
        cache = jnp.zeros((c.num_layers, batch_size, places, c.num_heads, c.head_dim), dtype)
        zero = jnp.int32(0)
        return DitState(zero, zero, inputs, inputs, cache, cache)

    def step(
        self, x: jax.Array, time: jax.Array, state: DitState, prompt: bool = False, valid=None
    ):
        """Velocity of the next chunk of a stream.

        Args:
          x: [B, T, n_in].
          time: float32 [B].
          state: after the chunks before it.
          prompt: whether it is the prompt, the first chunk, which stays visible.
          valid: int32 [], frames that count in the last chunk of a stream; None = all. Nothing can
            follow a chunk with other frames behind them.

        Returns:
          (float32 [B, T, n_out], the next state)
        """
        length, look_back = x.shape[1], self.config.look_back_frames
        valid = jnp.int32(length) if valid is None else valid
        size = RingSize(state.keys.shape[2] - look_back, look_back)
        places = ring(size, state.position, state.prompt_frames, length, valid, prompt)
        mask = jnp.broadcast_to(places.mask[None, :, None], (len(x), len(places.mask), 1))
        time = self._embed(time)

        def call(block, x, caches):
            before, between, keys, values = caches

            def see(key, value):
                joined = (jnp.concatenate(pair, axis=1) for pair in ((keys, key), (values, value)))
                return *joined, mask, None

            x, new, before, between = block(x, time, see, before, between)
            return x, (before, between, places.keep(keys, new[0]), places.keep(values, new[1]))

        caches = (state.before, state.between, state.keys, state.values)
        x, caches = scan_stack(self.blocks, call, self.in_project(x), caches)
        prompt_frames = valid if prompt else state.prompt_frames
        return self._finish(x, time), DitState(state.position + length, prompt_frames, *caches)

    def _embed(self, time):
        return self.time_out(jax.nn.silu(self.time_in(time_features(time))))

    def _finish(self, x, time):
        shift, scale = jnp.split(self.modulation(jax.nn.silu(time))[:, None], 2, axis=-1)
        return self.out_project(_plain_norm(x) * (1.0 + scale) + shift)
