"""Uniform fake quantisation: what integers of b bits would keep of an array, in float32 or wider.

Weights are symmetric with a scale for each output channel, activations asymmetric with one range a
tensor. Source: SSQL (Cao et al., "Synergistic Self-supervised and Quantization Learning", arXiv
2207.05432; the quantisers of megvii-research/SSQL-ECCV2022).

Choices:
- Bits are numbers, traced or not: one compiled function serves every bit width.
- Gradients pass straight through rounding and stop where the integer was clamped, whichever way
  XLA rounds. Scales are constants: no gradient reaches them. (The reference differentiates the
  scale of weights, through the largest weight of each channel.)
- The divisor of a weight's scale is (2^b - 1) / 2, as published: the largest positive weight is
  half a step beyond the largest integer.
- A channel of zeros, and a tensor whose range is a point, pass as they are. (The reference leaves
  the whole tensor unquantised when one of its channels is zero: a dead channel would silently turn
  quantisation off.)
"""

import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError

MIN_BITS, MAX_BITS = 2, 8


def require_bits(bits: int, name: str, most: int = MAX_BITS) -> None:
    """UserError naming `name` unless `bits` is a whole number from 2 to `most`."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= most:
        raise UserError(f"{name}: {bits} bits; give a whole number from {MIN_BITS} to {most}")


def quantize_weight(weight: jax.Array, bits, channel_axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """A weight as `bits` bits would hold it.

    Args:
      weight: any shape.
      bits: scalar, a number or traced; integers go from -2^(bits-1) to 2^(bits-1) - 1.
      channel_axes: axes along which scales differ: outputs, and the stacking axis of layers.

    Returns:
      The type and shape of `weight`.
    """
    kept = {axis % weight.ndim for axis in channel_axes}
    others = tuple(axis for axis in range(weight.ndim) if axis not in kept)
    wide = weight.astype(wide_type(weight))
    half = 0.5 * _two_to(bits, wide.dtype)
    size = jnp.abs(jax.lax.stop_gradient(wide))
    largest = jnp.max(size, axis=others, keepdims=True)
    scale = largest / (half - 0.5)
    # The largest weight is a tie of the rounding: exact, however XLA divides.
    steps = jnp.where(size < largest, size / _divisor(scale), half - 0.5)
    steps = jnp.where(jax.lax.stop_gradient(wide) < 0.0, -steps, steps)
    return _rounded(wide, steps, scale, jnp.zeros_like(half), -half, half - 1.0).astype(
        weight.dtype
    )


def quantize_activation(x: jax.Array, bounds: jax.Array, bits) -> jax.Array:
    """An activation as `bits` bits would hold it.

    Args:
      x: any shape.
      bounds: [2], the smallest and the largest value of the range; beyond it values are clamped.
      bits: scalar, a number or traced; integers go from 0 to 2^bits - 1.

    Returns:
      The type and shape of `x`.
    """
    wide = x.astype(wide_type(x))
    levels = _two_to(bits, wide.dtype) - 1.0
    low, high = jax.lax.stop_gradient(bounds.astype(wide.dtype))
    scale = (high - low) / levels
    zero = -jnp.round(low / _divisor(scale))
    steps = jax.lax.stop_gradient(wide) / _divisor(scale)
    return _rounded(wide, steps, scale, zero, jnp.zeros_like(levels), levels).astype(x.dtype)


def wide_type(x: jax.Array) -> jnp.dtype:
    """In which `x` is rounded: float32, or float64 where it is float64."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _two_to(bits, dtype) -> jax.Array:
    return jnp.round(jnp.exp2(jnp.asarray(bits, dtype)))  # exp2 is not exact everywhere


def _divisor(scale):
    return jnp.where(scale > 0.0, scale, 1.0)


@jax.custom_vjp
def _rounded(x, steps, scale, zero, lowest, highest):
    """(clip(round(steps) + zero) - zero) * scale; x where the scale is 0 or not a number.

    `steps` is x / scale; the gradient is that of x, see the module docstring.
    """
    return _rounded_forward(x, steps, scale, zero, lowest, highest)[0]


def _rounded_forward(x, steps, scale, zero, lowest, highest):
    integers = jnp.round(steps) + zero
    clipped = jnp.clip(integers, lowest, highest)
    passes = (integers == clipped) | ~(scale > 0.0)
    return jnp.where(scale > 0.0, (clipped - zero) * scale, x), passes


def _rounded_backward(passes, gradient):
    return jnp.where(passes, gradient, 0.0), None, None, None, None, None


_rounded.defvjp(_rounded_forward, _rounded_backward)
