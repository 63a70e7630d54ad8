"""The matrix product with a weight and SwiGLU, with gradients written for memory traffic.

Automatic differentiation is right but keeps more than is needed (the sigmoid, its product and the
result, each as wide as the feed-forward) and forms weight gradients with the wide operand on the
left, which XLA CPU transposes in memory first. Here the narrow operand is on the left, and SwiGLU
keeps only its two inputs. Other backends assign layouts themselves, so it costs them nothing.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] @ kernel [I, O] -> [..., O] in the type of x."""
    return jnp.einsum("...i,io->...o", x, kernel.astype(x.dtype))


def _dense_forward(x, kernel):
    return dense(x, kernel), (x, kernel)


def _dense_backward(saved, d_output):
    x, kernel = saved
    d_x = jnp.einsum("...o,io->...i", d_output, kernel.astype(d_output.dtype))
    if kernel.shape[0] <= kernel.shape[1]:
        product = jnp.einsum("...i,...o->io", x, d_output, preferred_element_type=jnp.float32)
    else:
        product = jnp.einsum("...o,...i->oi", d_output, x, preferred_element_type=jnp.float32).T
    return d_x, product.astype(kernel.dtype)


dense.defvjp(_dense_forward, _dense_backward)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """SiLU(gate) * up, elementwise."""
    return gate * jax.nn.sigmoid(gate) * up


def _swiglu_forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(saved, d_output):
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return d_output * up * (sigmoid + silu * (1 - sigmoid)), d_output * silu


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
