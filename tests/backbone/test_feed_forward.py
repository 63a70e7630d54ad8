"""Products and SwiGLU, with their hand-written gradients, against the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.backbone.feed_forward import dense, swiglu


def gradient(function):
    return jax.jit(jax.value_and_grad(function, (0, 1)))


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3)])
def test_dense(sizes):
    x = jax.random.normal(jax.random.key(0), (2, 4, sizes[0]))
    kernel = jax.random.normal(jax.random.key(1), sizes)

    def loss(product):
        return lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel)))

    got = gradient(loss(dense))(x, kernel)
    want = gradient(loss(jnp.matmul))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_dense_computes_in_the_type_of_its_input_and_keeps_that_of_the_weight():
    x, kernel = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.float32)
    out, pull = jax.vjp(dense, x, kernel)
    assert out.dtype == jnp.bfloat16
    assert [g.dtype for g in pull(out)] == [jnp.bfloat16, jnp.float32]


def test_swiglu():
    gate, up = jax.random.normal(jax.random.key(2), (2, 50)) * 4

    def plain(gate, up):
        return jax.nn.silu(gate) * up

    def loss(function):
        return lambda gate, up: jnp.sum(jnp.sin(function(gate, up)))

    got = gradient(loss(swiglu))(gate, up)
    want = gradient(loss(plain))(gate, up)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
