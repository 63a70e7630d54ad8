"""The successor's encoder: code groups at 25 Hz to mel frames at 50 Hz, seeing a little ahead.

As in Step-Audio 2 and EditX: linear and layer norm, a convolution that looks 3 groups ahead and one
that looks back, 6 conformer blocks, every group twice and a causal convolution, linear and layer
norm again, 4 more blocks. Source: stepaudio2's cosyvoice2/transformer/upsample_encoder_v2.py.

Choices:
- Padding is zero for the convolutions, so that an utterance gives the same in any batch.
- A stream keeps the prompt's keys and values and the last ones in a `ring`; it gives what the whole
  gives under `ring.Chunks` as long as nothing between prompt and ring was dropped, and then the
  prompt counts as if it stood right before what is kept, as in the reference. (There the first
  blocks keep the oldest groups in place of the last ones: its cache holds them twice, side by side,
  and is cut as if they were frames.)
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.vocoder.conformer import ConformerConfig, ConformerPart
from t5x_audio.vocoder.convolution import Convolution
from t5x_audio.vocoder.layers import layer_norm
from t5x_audio.vocoder.ring import Chunks, RingSize, ring


@dataclasses.dataclass(frozen=True)
class UpsamplingConformerConfig:
    """Sizes; defaults are Step-Audio 2 mini's.

    Attributes:
      blocks: the conformer before the up-sampling; its sizes hold for the one after it too.
      num_up_layers: blocks after the up-sampling.
      look_ahead: groups that the first convolution sees ahead.
      up_factor: frames of a group.
      look_back: groups before a chunk that a stream can see, beside the prompt.
    """

    blocks: ConformerConfig = ConformerConfig()
    num_up_layers: int = 4
    look_ahead: int = 3
    up_factor: int = 2
    look_back: int = 50

    @property
    def width(self) -> int:
        """Of input and output."""
        return self.blocks.width

    def make(self, rngs: nnx.Rngs) -> "UpsamplingConformer":
        """The encoder with fresh weights."""
        return UpsamplingConformer(self, rngs)


@flax.struct.dataclass
class UpsamplingState:
    """Of a stream of B rows: what the next chunk needs of the groups before it.

    Attributes:
      position: int32 [], groups seen, prompt included.
      prompt_groups: int32 [], the first of them, which stay visible.
      back: [B, 2, width], inputs of the convolution that looks back; of the up-sampling one `up`,
        [B, 2 * up_factor, width].
      low: keys and values [L, B, P + look_back, H, D] of the first blocks.
      high: of the last ones, up_factor times as many.
    """

    position: jax.Array
    prompt_groups: jax.Array
    back: jax.Array
    up: jax.Array
    low: tuple[jax.Array, jax.Array]
    high: tuple[jax.Array, jax.Array]


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

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        rng: jax.Array | None = None,
        chunks: Chunks | None = None,
    ) -> jax.Array:
        """Encodes embedded groups.

        Args:
          x: [B, T, width].
          mask: float32 [B, T, 1], 1 at valid groups.
          rng: key of the dropout; None = no dropout.
          chunks: of groups; each group sees what a stream of such chunks sees. None = all.

        Returns:
          float32 [B, up_factor * T, width]; padded frames are 0.
        """
        factor = self.config.up_factor
        keys = (None,) * 4 if rng is None else jax.random.split(rng, 4)
        x = self.low.start(x, keys[0]) * mask
        ahead = jnp.pad(x, ((0, 0), (0, self.config.look_ahead), (0, 0)))
        back = jnp.zeros_like(x[:, :1], shape=(len(x), 2, x.shape[-1]))
        x, _ = self._look_around(ahead, mask, back)
        x = self.low.run(x, mask, keys[1], self._bias(chunks, 1))
        x, mask = (jnp.repeat(a, factor, axis=1) for a in (x * mask, mask))
        x = self.up(jnp.pad(x, ((0, 0), (2 * factor, 0), (0, 0))))
        x = self.high.run(self.high.start(x, keys[2]), mask, keys[3], self._bias(chunks, factor))
        return self.final_norm(x) * mask

    def _look_around(self, x, mask, back):
        """x [B, T + look_ahead, width] -> (x with what is around it [B, T, width], new `back`)."""
        x_now = x[:, : mask.shape[1]]
        y = jnp.concatenate([back, jax.nn.leaky_relu(self.ahead(x)) * mask], axis=1)
        return x_now + self.back(y), y[:, -2:]

    def _bias(self, chunks, factor: int):
        if chunks is None:
            return None
        return chunks.repeated(factor).bias(self.config.look_back * factor)

    def initial_state(self, batch_size: int, prompt_groups: int) -> UpsamplingState:
        """The state before the first group; a prompt has at most `prompt_groups`."""
        c, blocks = self.config, self.config.blocks
        if blocks.convolution_kernel is not None:
            raise UserError(
                "ConformerConfig.convolution_kernel: a stream cannot see the groups after a "
                "convolution; only an encoder without it streams"
            )
        dtype = jnp.dtype(blocks.dtype)

        def cache(layers, factor):
            places = (prompt_groups + c.look_back) * factor
            heads = (blocks.num_heads, c.width // blocks.num_heads)
            zeros = jnp.zeros((layers, batch_size, places, *heads), dtype)
            return zeros, zeros

        return UpsamplingState(
            position=jnp.int32(0),
            prompt_groups=jnp.int32(0),
            back=jnp.zeros((batch_size, 2, c.width), dtype),
            up=jnp.zeros((batch_size, 2 * c.up_factor, c.width), jnp.float32),
            low=cache(blocks.num_layers, 1),
            high=cache(c.num_up_layers, c.up_factor),
        )

    def step(self, x: jax.Array, state: UpsamplingState, prompt: bool = False, valid=None):
        """Encodes the next chunk of a stream.

        Args:
          x: [B, T + look_ahead, width], embedded groups of the chunk and those after it.
          state: after the chunks before it.
          prompt: whether it is the prompt, the first chunk, which stays visible.
          valid: int32 [], groups that count in the last chunk of a stream, behind which there are
            none; None = all of x. Nothing can follow a chunk with other groups behind them.

        Returns:
          (float32 [B, up_factor * T, width], the next state)
        """
        config, factor = self.config, self.config.up_factor
        length = x.shape[1] - config.look_ahead
        here = jnp.int32(length) if valid is None else jnp.minimum(valid, length)
        x = self.low.start(x, None)
        mask = (jnp.arange(length) < here).astype(jnp.float32)[None, :, None]
        if valid is not None:
            x = x * (jnp.arange(x.shape[1]) < valid)[None, :, None]
        x, back = self._look_around(x, mask, state.back)
        reserved = state.low[0].shape[2] - config.look_back

        def places(scale):
            size = RingSize(reserved * scale, config.look_back * scale)
            seen, prompts = state.position * scale, state.prompt_groups * scale
            return ring(size, seen, prompts, length * scale, here * scale, prompt)

        x, low = self.low.step(x, *state.low, places(1))
        x = jnp.concatenate([state.up, jnp.repeat(x, factor, axis=1)], axis=1)
        up = x[:, -2 * factor :]
        x, high = self.high.step(self.high.start(self.up(x), None), *state.high, places(factor))
        prompt_groups = here if prompt else state.prompt_groups
        position = state.position + length
        return self.final_norm(x), UpsamplingState(position, prompt_groups, back, up, low, high)
