"""Weights as a CPU reads them fastest, for inference: layers apart, an output's weights in a row.

Choices:
- Slices of stacked layers would be copied for every call of a scan; taken apart they are read where
  they lie. That costs compilation for each layer, so deep stacks stay unless there is but one shape
  to compile.
- XLA's CPU compiler copies the right operand of a product into an order of its own. By rows of
  outputs that copy is cheap, and a product of few rows needs none. Packed weights stay packed.

What it is worth: benchmarks/{tokenizers,vocoder}.py and docs/results/{tokenizer,vocoder}_speed.md.
"""

import jax
import jax.numpy as jnp
from flax import nnx

FEW_ROWS = 16


class ByOutput(nnx.Param):
    """A weight kept as [O, I], for `dense_by_output`."""


def dense_by_output(x: jax.Array, kernel: jax.Array, dtype=None) -> jax.Array:
    """x [..., I] times kernel [O, I] -> [..., O] in `dtype`, by default the type of x."""
    rows = x.reshape(-1, x.shape[-1])
    kernel = kernel.astype(x.dtype)
    if len(rows) > FEW_ROWS:
        product = jnp.einsum("ri,oi->ro", rows, kernel, preferred_element_type=dtype)
    else:
        product = jnp.einsum("oi,ri->or", kernel, rows, preferred_element_type=dtype)
        # Unseen by XLA, which would exchange the operands rather than transpose.
        product = jax.lax.optimization_barrier(product).T
    return product.reshape(*x.shape[:-1], -1)


class LinearByOutput(nnx.Module):
    """An `nnx.Linear` with its kernel turned."""

    def __init__(self, linear: nnx.Linear):
        """Takes the weights of `linear`, which stays as it is."""
        self.dtype = linear.dtype
        self.kernel = ByOutput(linear.kernel[...].T)
        self.bias = linear.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., I] -> [..., O]."""
        dtype = self.dtype or x.dtype
        y = dense_by_output(x.astype(dtype), self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(dtype)


def unstacked(layers: nnx.Module, count: int) -> nnx.List:
    """`count` modules with arrays of their own, of one whose arrays have a leading axis of them.

    What is apart already stays as it is.
    """
    if isinstance(layers, nnx.List):
        return layers
    graphdef, state = nnx.split(layers)

    def one(variable, index):
        axes = variable.get_metadata().get("logical_axes")
        # Its value may be several arrays, such as packed integers and their scales.
        made = variable.replace(jax.tree.map(lambda x: x[index], variable.get_raw_value()))
        return made if axes is None else made.replace(logical_axes=axes[1:])

    def is_variable(node):
        return isinstance(node, nnx.Variable)

    return nnx.List(
        nnx.merge(graphdef, jax.tree.map(lambda v, i=i: one(v, i), state, is_leaf=is_variable))
        for i in range(count)
    )


def arranged(module: nnx.Module, max_layers: int | None = None) -> nnx.Module:
    """A copy of a module for inference on a CPU; elsewhere the module itself.

    Args:
      module: its submodules may have a method `take_apart(max_layers)`.
      max_layers: deeper stacks stay, since every layer is compiled for every shape; None = none do.
    """
    if jax.default_backend() != "cpu":
        return module
    module = nnx.merge(*nnx.split(module))
    for _, node in list(nnx.iter_graph(module)):
        if hasattr(node, "take_apart"):
            node.take_apart(max_layers)
    for _, node in list(nnx.iter_graph(module)):
        if not isinstance(node, nnx.Module):
            continue
        for name, child in list(vars(node).items()):
            if isinstance(child, nnx.Linear) and _plain_matrix(child.kernel):
                setattr(node, name, LinearByOutput(child))
    return module


def _plain_matrix(kernel: nnx.Param) -> bool:
    return isinstance(kernel.get_raw_value(), jax.Array) and kernel.ndim == 2
