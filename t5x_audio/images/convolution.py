"""2-D convolutions of images: channels last, no bias, gradients that are fast on a CPU.

Choices, measured on 2 CPU cores in float32:
- XLA's gradient by the kernel is 4 to 15 times slower than its forward (32 x 32 pixels, 32
  channels, 128 images: 590 ms of CPU time against 40). Here it is one matrix product: the input,
  shifted along the rows, against the output's gradient, shifted along the columns, in 180 ms.
  Elsewhere than on a CPU XLA's own is taken.
- Strides are folded into channels first, see `vocoder.convolution`; a 1 x 1 kernel just skips.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.vocoder.convolution import dense_convolution, fold_stride
from t5x_audio.vocoder.initialisers import hashed_uniform


class ImageConvolution(nnx.Module):
    """[B, H, W, in] -> [B, H / stride, W / stride, out] by a square kernel of odd size."""

    def __init__(self, n_in: int, n_out: int, size: int, *, stride: int = 1, rngs: nnx.Rngs):
        """Kernel [size, size, in, out] of He's variance by outputs, as ResNets start."""
        self.kernel_size, self.stride = (size, size), stride
        deviation = (2.0 / (size * size * n_out)) ** 0.5
        shape = (size, size, n_in, n_out)
        self.kernel = nnx.Param(hashed_uniform(rngs.params(), shape, deviation))

    def __call__(self, x: jax.Array) -> jax.Array:
        """See the class."""
        kernel = self.kernel[...].astype(x.dtype)
        padding = kernel.shape[0] // 2
        if self.stride > 1 and kernel.shape[0] == 1:
            x = x[:, :: self.stride, :: self.stride]
        elif self.stride > 1:
            for axis in (0, 1):
                x, kernel = fold_stride(x, kernel, axis, self.stride, padding)
            padding = 0
        return convolve(x, kernel, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    """Stride 1: x [B, H, W, in], kernel [h, w, in, out], as much padding on each side."""
    return dense_convolution(x, kernel, (1, 1), (padding, padding))


def _forward(x, kernel, padding):
    return convolve(x, kernel, padding), (x, kernel)


def _backward(padding, saved, gradient):
    x, kernel = saved
    turned = jnp.flip(kernel, (0, 1)).swapaxes(-1, -2)
    reach = tuple(size - 1 - padding for size in kernel.shape[:2])
    by_x = dense_convolution(gradient, turned, (1, 1), reach)
    by_kernel = jax.lax.platform_dependent(
        x,
        gradient,
        cpu=functools.partial(_product, size=kernel.shape[:2], padding=padding),
        default=functools.partial(_automatic, size=kernel.shape[:2], padding=padding),
    )
    return by_x, by_kernel


convolve.defvjp(_forward, _backward)


def _product(x, gradient, *, size, padding):
    """sum over places of x[y + i, x + j] gradient[y, x] for all i, j: one product of matrices."""
    (rows, columns), (height, width) = size, gradient.shape[1:3]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    gradient = jnp.pad(gradient, ((0, 0), (rows - 1, rows - 1), (0, 0), (0, 0)))
    inputs = jnp.concatenate([x[:, :, j : j + width] for j in range(columns)], axis=-1)
    total = height + rows - 1
    outputs = jnp.concatenate(
        [gradient[:, rows - 1 - i :][:, :total] for i in range(rows)], axis=-1
    )
    # [rows * out, columns * in]: with the output's gradient on the left XLA transposes less.
    product = jnp.einsum("nyxo,nyxi->oi", outputs, inputs)
    product = product.reshape(rows, gradient.shape[-1], columns, x.shape[-1])
    return product.transpose(0, 2, 3, 1)


def _automatic(x, gradient, *, size, padding):
    def by_kernel(kernel):
        return dense_convolution(x, kernel, (1, 1), (padding, padding))

    zeros = jnp.zeros((*size, x.shape[-1], gradient.shape[-1]), x.dtype)
    return jax.vjp(by_kernel, zeros)[1](gradient)[0]
