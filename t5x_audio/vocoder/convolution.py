"""1-D and 2-D convolutions of the vocoder: channels last, optional weight norm, fast on a CPU.

Choices, measured on 2 CPU cores in float32:
- XLA's dense channels-last convolution runs at 60 to 140 GFLOP/s, also dilated, forwards and
  backwards: two to five times as fast as shifted matrix products or im2col.
- Inside `lax.cond` and `lax.scan` the *gradient* of that convolution is 33 times slower (985
  against 30 ms), while forward convolutions are not. `nested=True` is for layers that live there:
  both gradients are written as forward convolutions of transposed arrays.
- The gradient of a strided convolution is ten times slower than its forward (zeros are multiplied),
  so strides are folded into channels first. Transposed convolutions are a matrix product and an
  overlap-add of reshaped pieces, for the same reason.
There are no grouped or depthwise convolutions here.

Weight norm (Salimans & Kingma 2016): kernel = scale * v / |v|, one scale for each output channel.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.vocoder.initialisers import fan_in

_NORM_EPSILON = 1e-12


def length_mask(lengths: jax.Array, size: int) -> jax.Array:
    """Float32 [B, size, 1]: 1 where the position is below the row's length, else 0."""
    return (jnp.arange(size) < lengths[:, None]).astype(jnp.float32)[..., None]


class Convolution(nnx.Module):
    """A convolution over the middle axes of [B, *spatial, in] -> [B, *spatial', out].

    `kernel_size`, `strides`, `dilation` and `padding` have one entry for each spatial axis
    (or are a plain int for one axis); `padding` None keeps the length at stride 1.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel_size,
        *,
        strides=1,
        dilation=1,
        padding=None,
        weight_norm: bool = False,
        use_bias: bool = True,
        nested: bool = False,
        kernel_init=None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        """Kernel [*kernel_size, in, out], bias [out] and, with weight norm, scale [out]."""
        self.kernel_size = _per_axis(kernel_size, 1)
        rank = len(self.kernel_size)
        self.strides = _per_axis(strides, rank)
        self.dilation = _per_axis(dilation, rank)
        self.padding = (
            tuple((k - 1) * d // 2 for k, d in zip(self.kernel_size, self.dilation, strict=True))
            if padding is None
            else _per_axis(padding, rank)
        )
        self.dtype, self.nested = dtype, nested
        init = kernel_init or fan_in()
        kernel = init(rngs.params(), (*self.kernel_size, n_in, n_out), jnp.float32)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(n_out)) if use_bias else None
        self.scale = nnx.Param(_channel_norm(kernel)) if weight_norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """See the class."""
        dtype = jnp.dtype(self.dtype)
        x, padding = x.astype(dtype), self.padding
        kernel = effective_kernel(self.kernel, self.scale).astype(dtype)
        for axis, stride in enumerate(self.strides):
            if stride > 1:
                x, kernel = fold_stride(x, kernel, axis, stride, padding[axis])
                padding = (*padding[:axis], 0, *padding[axis + 1 :])
        convolve = nested_convolution if self.nested else dense_convolution
        y = convolve(x, kernel, self.dilation, padding)
        return y if self.bias is None else y + self.bias[...].astype(dtype)


def dense_convolution(x: jax.Array, kernel: jax.Array, dilation, padding) -> jax.Array:
    """Stride 1: x [B, *spatial, in], kernel [*size, in, out]; dilation, padding: one an axis."""
    spatial = "DHW"[-len(dilation) :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1,) * len(dilation),
        [(p, p) for p in padding],
        rhs_dilation=dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def nested_convolution(x: jax.Array, kernel: jax.Array, dilation, padding) -> jax.Array:
    """`dense_convolution` whose gradients stay fast inside `lax.cond` and `lax.scan`."""
    return dense_convolution(x, kernel, dilation, padding)


def _nested_forward(x, kernel, dilation, padding):
    return dense_convolution(x, kernel, dilation, padding), (x, kernel)


def _nested_backward(dilation, padding, saved, gradient):
    x, kernel = saved
    size = kernel.shape[:-2]
    axes = tuple(range(len(size)))
    turned = jnp.flip(kernel, axes).swapaxes(-1, -2)
    reach = tuple((k - 1) * d - p for k, d, p in zip(size, dilation, padding, strict=True))
    x_gradient = dense_convolution(gradient, turned, dilation, reach)
    # Channels as batch, batch as channels: the gradient becomes a kernel as wide as the input.
    spatial = "DHW"[-len(size) :]
    kernel_gradient = jax.lax.conv_general_dilated(
        jnp.swapaxes(x, 0, -1),
        jnp.moveaxis(gradient, 0, -2),
        dilation,
        [(p, p) for p in padding],
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )
    return x_gradient, jnp.moveaxis(kernel_gradient, 0, -2)


nested_convolution.defvjp(_nested_forward, _nested_backward)


def fold_stride(x: jax.Array, kernel: jax.Array, axis: int, stride: int, padding: int):
    """(x, kernel) whose convolution at stride 1, unpadded, is the strided one along `axis`.

    `stride` neighbours of x become channels of one position; the kernel is padded with zeros.
    """
    size, length = kernel.shape[axis], x.shape[axis + 1]
    count = (length + 2 * padding - size) // stride + 1
    folded = -(-size // stride)
    total = (count - 1 + folded) * stride
    pads = [(0, 0)] * x.ndim
    pads[axis + 1] = (padding, max(0, total - length - padding))
    x = jax.lax.slice_in_dim(jnp.pad(x, pads), 0, total, axis=axis + 1)
    widths = [(0, folded * stride - size) if a == axis else (0, 0) for a in range(kernel.ndim)]
    return _fold(x, axis + 1, stride, -1), _fold(jnp.pad(kernel, widths), axis, stride, -2)


def _fold(array, axis: int, stride: int, channels: int):
    """Moves blocks of `stride` along `axis` into the `channels` axis (negative index)."""
    shape = list(array.shape)
    shape[axis : axis + 1] = [shape[axis] // stride, stride]
    array = jnp.moveaxis(array.reshape(shape), axis + 1, channels - 1)
    place = array.ndim + channels - 1
    merged = array.shape[place] * array.shape[place + 1]
    return array.reshape(*array.shape[:place], merged, *array.shape[place + 2 :])


class TransposedConvolution(nnx.Module):
    """Up-sampling by `stride`: [B, T, in] -> [B, T * stride, out]; kernel_size - stride is even."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel_size: int,
        stride: int,
        *,
        weight_norm: bool = False,
        kernel_init=None,
        dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        """Kernel [kernel_size, in, out], bias [out] and, with weight norm, scale [in]."""
        if kernel_size < stride or (kernel_size - stride) % 2:
            raise ValueError(f"kernel {kernel_size} must be stride {stride} plus an even number")
        self.kernel_size, self.stride, self.dtype = kernel_size, stride, dtype
        init = kernel_init or fan_in()
        kernel = init(rngs.params(), (kernel_size, n_in, n_out), jnp.float32)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(n_out))
        # Like torch's weight_norm on a transposed convolution: one scale per *input* channel.
        self.scale = nnx.Param(_channel_norm(kernel, axis=1)) if weight_norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """See the class."""
        dtype = jnp.dtype(self.dtype)
        batch, length, _ = x.shape
        kernel = effective_kernel(self.kernel, self.scale, axis=1).astype(dtype)
        n_out, pieces = kernel.shape[-1], -(-self.kernel_size // self.stride)
        kernel = jnp.pad(kernel, ((0, pieces * self.stride - self.kernel_size), (0, 0), (0, 0)))
        flat = kernel.transpose(1, 0, 2).reshape(x.shape[-1], -1)
        y = (x.astype(dtype) @ flat).reshape(batch, length, pieces, self.stride * n_out)
        y = overlap_add(y).reshape(batch, (length + pieces - 1) * self.stride, n_out)
        crop = (self.kernel_size - self.stride) // 2
        return y[:, crop : crop + length * self.stride] + self.bias[...].astype(dtype)


def overlap_add(pieces: jax.Array) -> jax.Array:
    """Adds piece p of frame t at block t + p: [B, T, P, S] -> [B, T + P - 1, S]."""
    count = pieces.shape[2]
    return sum(jnp.pad(pieces[:, :, p], ((0, 0), (p, count - 1 - p), (0, 0))) for p in range(count))


def effective_kernel(kernel: nnx.Param, scale: nnx.Param | None, axis: int = -1) -> jax.Array:
    """The kernel that is applied: as stored, or scale * kernel / |kernel| along `axis`."""
    value = kernel[...]
    if scale is None:
        return value
    shape = [1] * value.ndim
    shape[axis] = -1
    return value * (scale[...] / _channel_norm(value, axis)).reshape(shape)


def _channel_norm(kernel: jax.Array, axis: int = -1) -> jax.Array:
    others = tuple(i for i in range(kernel.ndim) if i != axis % kernel.ndim)
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=others) + _NORM_EPSILON)


def _per_axis(value, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)
