"""The matrix product with a weight and SwiGLU, with gradients written for memory traffic.

Automatic differentiation is right but keeps more than is needed (the sigmoid, its product and the
result, each as wide as the feed-forward) and forms weight gradients with the wide operand on the
left, which XLA CPU transposes in memory first. Here the narrow operand is on the left, and SwiGLU
keeps only its two inputs. Other backends assign layouts themselves, so it costs them nothing.

On a mesh a weight is stored in parts and gathered in the type of the computation, in the forward
pass and again in the backward pass; its gradient is summed over the devices in that type too.
XLA's TPU compiler gathers over two axes of a torus but not over three, where it takes an all-reduce
of twice the traffic: hence two steps, first over `data`, then over `fsdp`. It also merges a product
with the norm, SwiGLU or residual sum beside it: 55 to 80 % of the peak by its own estimate. Apart,
products reach 81 to 95 % and the rest costs little.
"""

import functools

import jax
import jax.numpy as jnp

from t5x_audio.backbone.mesh import FSDP_AXIS, MESH_AXES, Axes, constrain, present


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x: jax.Array, kernel: jax.Array, layout: tuple[Axes, Axes] | None = None) -> jax.Array:
    """x [..., I] @ kernel [I, O] -> [..., O] in the type of x.

    `layout` has the mesh axes of I and O: where `fsdp` stands the kernel is gathered for use, any
    other axis it keeps. None leaves the layout to XLA.
    """
    x = _apart(x, layout)
    return _apart(jnp.einsum("...i,io->...o", x, _in_use(kernel, x.dtype, layout)), layout)


def _in_use(kernel, dtype, layout):
    kernel = kernel.astype(dtype)
    if layout is None:
        return kernel
    kernel = constrain(kernel, *layout)
    return constrain(kernel, *(None if axes == FSDP_AXIS else axes for axes in layout))


def _apart(arrays, layout):
    """`arrays`, which XLA may not merge with what makes or takes them, on a mesh of devices."""
    if layout is None or not present(jax.sharding.get_abstract_mesh(), *MESH_AXES):
        return arrays
    return jax.lax.optimization_barrier(arrays)


def _dense_forward(x, kernel, layout):
    return dense(x, kernel, layout), (x, kernel)


def _dense_backward(layout, saved, d_output):
    x, kernel = saved
    x, d_output = _apart((x, d_output), layout)
    d_x = jnp.einsum("...o,io->...i", d_output, _in_use(kernel, d_output.dtype, layout))
    if kernel.shape[0] <= kernel.shape[1]:
        product = jnp.einsum("...i,...o->io", x, d_output)
    else:
        product = jnp.einsum("...o,...i->oi", d_output, x).T
    return _apart(d_x, layout), product.astype(kernel.dtype)


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
