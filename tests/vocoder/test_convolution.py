import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_audio.vocoder.convolution import (
    Convolution,
    TransposedConvolution,
    length_mask,
    overlap_add,
)


def test_length_mask():
    mask = length_mask(jnp.array([0, 2]), 3)
    np.testing.assert_array_equal(mask[..., 0], [[0, 0, 0], [1, 1, 0]])


@pytest.mark.parametrize("dilation", [1, 3])
def test_convolution_equals_the_definition(dilation):
    conv = Convolution(3, 4, 5, dilation=dilation, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(4.0)
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 17, 3)))
    reach = 2 * dilation
    padded = np.pad(x, ((0, 0), (reach, reach), (0, 0)))
    kernel = np.asarray(conv.kernel[...])
    wanted = np.arange(4.0) + sum(
        padded[:, k * dilation : k * dilation + 17] @ kernel[k] for k in range(5)
    )
    np.testing.assert_allclose(conv(jnp.asarray(x)), wanted, rtol=1e-4, atol=1e-5)


def test_weight_norm_starts_at_the_plain_kernel_and_scales_channels():
    plain = Convolution(3, 4, 3, rngs=nnx.Rngs(0))
    normed = Convolution(3, 4, 3, weight_norm=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 9, 3))
    np.testing.assert_allclose(normed(x), plain(x), rtol=1e-5, atol=1e-6)
    normed.kernel[...] = 7.0 * normed.kernel[...]
    np.testing.assert_allclose(normed(x), plain(x), rtol=1e-4, atol=1e-5)
    normed.scale[...] = 2.0 * normed.scale[...]
    np.testing.assert_allclose(normed(x), 2.0 * plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stride", "extra", "length"), [(1, 0, 3), (3, 0, 4), (2, 1, 5), (3, 4, 2)]
)
def test_transposed_convolution_scatters_each_frame(stride, extra, length):
    kernel_size = stride + 2 * extra
    conv = TransposedConvolution(2, 3, kernel_size, stride, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).standard_normal((1, length, 2))
    kernel = np.asarray(conv.kernel[...])
    full = np.zeros((1, (length - 1) * stride + kernel_size, 3))
    for t in range(length):
        for k in range(kernel_size):
            full[:, t * stride + k] += x[:, t] @ kernel[k]
    wanted = full[:, extra : extra + length * stride]
    got = nnx.jit(lambda c, x: c(x))(conv, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_transposed_convolution_refuses_an_odd_margin():
    with pytest.raises(ValueError, match="even"):
        TransposedConvolution(2, 3, 5, 2, rngs=nnx.Rngs(0))


def test_overlap_add():
    pieces = jnp.arange(6.0).reshape(1, 3, 2, 1)  # frames (0,1) (2,3) (4,5)
    np.testing.assert_array_equal(overlap_add(pieces)[0, :, 0], [0, 1 + 2, 3 + 4, 5])


@pytest.mark.parametrize(
    ("size", "strides", "padding"),
    [((5,), (3,), (2,)), ((6,), (5,), (2,)), ((3, 9), (1, 2), (1, 4))],
)
@pytest.mark.parametrize("nested", [False, True])
def test_strides_and_gradients_equal_the_plain_convolution(size, strides, padding, nested):
    conv = Convolution(
        2, 3, size, strides=strides, padding=padding, nested=nested, rngs=nnx.Rngs(0)
    )
    x = np.random.default_rng(0).standard_normal((2, *(17, 20)[: len(size)], 2)).astype(np.float32)
    spatial = "HW"[: len(size)]

    def plain(x, kernel):
        names = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
        pads = [(p, p) for p in padding]
        return jax.lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=names)

    def value_and_gradients(f):
        return jax.jit(jax.value_and_grad(lambda x, k: jnp.sum(jnp.sin(f(x, k))), (0, 1)))

    graph, state = nnx.split(conv)
    kernel = conv.kernel[...]

    def ours(x, kernel):
        return nnx.merge(
            graph, jax.tree.map(lambda leaf: kernel if leaf.ndim > 1 else leaf, state)
        )(x)

    wanted, got = (value_and_gradients(f)(x, kernel) for f in (plain, ours))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), wanted, got)


def test_nested_gradients_of_a_dilated_convolution():
    convs = [Convolution(3, 4, 5, dilation=2, nested=n, rngs=nnx.Rngs(0)) for n in (False, True)]
    x = np.random.default_rng(0).standard_normal((2, 13, 3)).astype(np.float32)

    def gradients(conv):
        graph, state = nnx.split(conv)
        loss = lambda x, state: jnp.sum(jnp.sin(nnx.merge(graph, state)(x)))  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(x, state))

    for a, b in zip(*map(gradients, convs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
