"""A model's weights as a decoder reads them: layer by layer, in as few bytes as wanted.

Every token reads every weight once, so a decoder of few streams is as fast as its weights are
small. Choices:
- Layers are taken apart where a CPU decodes: slicing their stack would copy every weight for every
  token. A pod keeps the stack: its compiler takes a minute for that of the 130B and over ten for
  the layers.
- Weights become matrices: a slice of a stack can then be read where it lies, by the product itself.
- Where a CPU decodes, the weights of an output lie side by side (`ByOutput`): the products of eight
  rows take half the time, that of one row the same.
- `int8` keeps matrices in 8 bits with a float32 scale for each output (weight-only, symmetric,
  round to nearest; LLM.int8, arXiv 2208.07339, section 2.1, without its outliers). The product is
  formed with the integers in the type of the computation and scaled behind it. Embedding, norms and
  biases stay as they are: of the embedding a token reads one row.
- `w8a8` multiplies the same integers with activations rounded to 8 bits (`integer_product.py`). On
  a CPU a token takes less time than by `int8`, whose weights are made wide for every product.
- Packed weights (`quantization/packed_model.py`) stay packed where no kind is asked for: least
  memory, but every token unpacks them. Any kind unpacks them once.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.backbone.integer_product import Integers
from t5x_audio.backbone.transformer import Layer, Transformer
from t5x_audio.cpu_weights import ByOutput, unstacked
from t5x_audio.errors import UserError

KINDS = ("float32", "bfloat16", "int8", "w8a8")
_INTEGER_KINDS = ("int8", "w8a8")
_MATRICES = ("query", "key", "value", "out", "gate", "up", "down", "head")


def prepare(model: Transformer, kind: str | None = None, unstack: bool = True) -> Transformer:
    """A copy of `model` for decoding.

    Args:
      model: with its layers stacked or not.
      unstack: whether to take the layers apart, for a CPU.
      kind: of KINDS, the type of the weights; None leaves it, and packed ones packed. What is not
        int8 under `int8` and `w8a8` takes the model's own type of computation.

    Raises:
      UserError: no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"weights={kind!r}: use one of {', '.join(KINDS)}")
    model = nnx.merge(*nnx.split(model))
    if unstack and isinstance(model.layers, Layer):
        model.layers = unstacked(model.layers, model.config.num_layers)
    layers = (model.layers,) if isinstance(model.layers, Layer) else model.layers
    for module in (model, *layers):
        if kind is not None:
            _unpack(module)
        _flatten(module)
        if kind in _INTEGER_KINDS:
            _to_int8(module)
        if kind == "w8a8":
            _by_output(module, Integers)
        elif unstack:
            _by_output(module, ByOutput)
    if kind is not None:
        graphdef, state = nnx.split(model)
        dtype = model.config.dtype if kind in _INTEGER_KINDS else kind
        model = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(_cast_to(dtype), state))
    return model


def _cast_to(dtype: str):
    def cast(path, leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        scale = jax.tree_util.keystr(path[-2:]).find("_scale") >= 0
        return leaf.astype(dtype) if floating and not scale else leaf

    return cast


def _weights(module: nnx.Module) -> dict[str, nnx.Param]:
    """Its matrices that are not packed."""
    found = {name: getattr(module, name, None) for name in _MATRICES}
    return {n: w for n, w in found.items() if w is not None and not hasattr(w, "times")}


def _unpack(module: nnx.Module) -> None:
    """Packed weights as the arrays that they stand for, an embedding too."""
    for name in (*_MATRICES, "embedding"):
        weight = getattr(module, name, None)
        if hasattr(weight, "times"):
            axes = weight.get_metadata()["logical_axes"]
            setattr(module, name, nnx.Param(weight[...], logical_axes=axes))


def _flatten(module: nnx.Module) -> None:
    """Heads and their dimensions as one axis; [..., inputs, outputs]."""
    for name, weight in _weights(module).items():
        axes = weight.get_metadata()["logical_axes"]
        if "head_dim" not in axes:
            continue
        at = axes.index("head_dim")
        shape = weight[...].shape
        joined = (*shape[: at - 1], shape[at - 1] * shape[at], *shape[at + 1 :])
        axes = axes[:at] + axes[at + 1 :]
        setattr(module, name, nnx.Param(weight[...].reshape(joined), logical_axes=axes))


def _to_int8(module: nnx.Module) -> None:
    """Matrices of a module as integers, beside them `<name>_scale`."""
    for name, weight in _weights(module).items():
        axes, kernel = weight.get_metadata()["logical_axes"], weight[...].astype(jnp.float32)
        largest = jnp.abs(kernel).max(-2)
        scale = jnp.where(largest > 0, largest, 1.0) / 127.0
        integers = jnp.round(kernel / scale[..., None, :]).astype(jnp.int8)
        setattr(module, name, nnx.Param(integers, logical_axes=axes))
        scale_axes = axes[:-2] + axes[-1:]
        setattr(module, f"{name}_scale", nnx.Param(scale, logical_axes=scale_axes))


def _by_output(module: nnx.Module, kind: type[nnx.Param]) -> None:
    """Turns the matrices of a module, or of a stack of them."""
    for name, weight in _weights(module).items():
        *stack, inputs, outputs = weight.get_metadata()["logical_axes"]
        setattr(module, name, kind(weight[...].mT, logical_axes=(*stack, outputs, inputs)))
