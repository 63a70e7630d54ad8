"""From code rate to mel rate: linear interpolation of each utterance, then a small conv stack.

CosyVoice-1's interpolate regulator: `torch.nn.functional.interpolate(mode='linear')` (half-pixel
centres, clamped ends), four times (conv 3, group norm 1, Mish), conv 1. Prompt and target are
interpolated apart so that the prompt's mel frames line up with the prompt's codes; and so are, when
speech is sampled, some codes at both ends of the target, so that pieces of it fit together.

Choices:
- Interpolation is a product with a hat-function matrix built from the row's own lengths: no gather
  forwards and no scatter backwards.
- `residual` adds each convolution's output to its input, so that what the encoder knows reaches mu
  past the norms over whole utterances; a short training learns mu sooner. Published: False.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.vocoder.convolution import Convolution
from t5x_audio.vocoder.layers import MaskedGroupNorm, mish


def interpolation_weights(
    lengths: jax.Array, new_lengths: jax.Array, size: int, new_size: int, prompts=None, edges=(0, 0)
) -> jax.Array:
    """Linear interpolation of each row from its `lengths` to its `new_lengths` positions.

    Args:
      lengths: int32 [B] valid input positions.
      new_lengths: int32 [B] valid output positions.
      size: input positions with padding.
      new_size: output positions with padding.
      prompts: (input, output) positions int32 [B] of the prompt, included in the lengths; None = 0.
      edges: (input, output) positions of an end that is interpolated apart; of both ends, where
        there are more than twice as many behind the prompt.

    Returns:
      float32 [B, new_size, size]; rows beyond `new_lengths` are 0.
    """
    zero = jnp.zeros_like(lengths)
    prompt_in, prompt_out = (zero, zero) if prompts is None else prompts
    index = jnp.arange(new_size)[None]
    in_prompt = index < prompt_out[:, None]
    first = _source(index, zero, prompt_in, prompt_out)
    rest = _target_source(
        index - prompt_out[:, None], prompt_in, lengths - prompt_in, new_lengths - prompt_out, edges
    )
    position = jnp.where(in_prompt, first, rest)
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(position[..., None] - jnp.arange(size)))
    return jnp.where((index < new_lengths[:, None])[..., None], weights, 0.0)


def _target_source(index, start, count, new_count, edges):
    """`_source` of what follows the prompt, its ends apart where it is long enough."""
    whole = _source(index, start, count, new_count)
    if not edges[0]:
        return whole
    edge, new_edge = (jnp.full_like(start, size) for size in edges)
    head = _source(index, start, edge, new_edge)
    middle_index = index - new_edge[:, None]
    middle = _source(middle_index, start + edge, count - 2 * edge, new_count - 2 * new_edge)
    tail_index = index - (new_count - new_edge)[:, None]
    tail = _source(tail_index, start + count - edge, edge, new_edge)
    apart = jnp.where(middle_index < 0, head, jnp.where(tail_index < 0, middle, tail))
    return jnp.where((count > 2 * edge)[:, None], apart, whole)


def _source(index, start, count, new_count):
    """Input position of each output index: `count` positions from `start` spread on `new_count`."""
    start, count, new_count = start[:, None], count[:, None], jnp.maximum(new_count, 1)[:, None]
    position = (index + 0.5) * count / new_count - 0.5
    return start + jnp.clip(position, 0.0, jnp.maximum(count - 1, 0).astype(jnp.float32))


class LengthRegulator(nnx.Module):
    """Interpolation and convolutions: [B, N, channels] -> [B, F, channels]."""

    def __init__(self, channels: int, num_layers: int, residual: bool, dtype: str, rngs: nnx.Rngs):
        """`num_layers` convolutions of kernel 3 and one of kernel 1; see the module docstring."""
        self.residual = residual
        self.convolutions = nnx.List(
            [Convolution(channels, channels, 3, dtype=dtype, rngs=rngs) for _ in range(num_layers)]
        )
        self.norms = nnx.List([MaskedGroupNorm(1, channels) for _ in range(num_layers)])
        self.out = Convolution(channels, channels, 1, dtype=dtype, rngs=rngs)

    def __call__(
        self, x, lengths, new_lengths, new_size, new_mask, prompts=None, edges=(0, 0)
    ) -> jax.Array:
        """See the class and `interpolation_weights`; new_mask float32 [B, F, 1]."""
        weights = interpolation_weights(lengths, new_lengths, x.shape[1], new_size, prompts, edges)
        x = jnp.einsum("bfn,bnc->bfc", weights, x.astype(jnp.float32))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = mish(norm(convolution(x), new_mask)) * new_mask
            x = x + y if self.residual else y
        return self.out(x) * new_mask
