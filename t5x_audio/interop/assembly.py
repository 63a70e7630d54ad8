"""Models out of tensors of other frameworks, and back: names, shapes, and the stacks of layers.

For models that fit into memory; the backbones' tensors pass one at a time (`hugging_face`).
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.interop import torch_file


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor there and its place here.

    Attributes:
      name, shape: there.
      parameter, inner: name and shape here, without the axis of a stack.
      layer: index in a stack, or of a stack of stacks an index of each; None where there is none.
      axes: of the tensor there, in their order here; None: reversed, as of a linear layer or a
        convolution, whose axes of length 1 disappear.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    inner: tuple[int, ...]
    layer: int | tuple[int, ...] | None
    axes: tuple[int, ...] | None = None

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """The tensor as it is here, float32."""
        return np.transpose(array, self.axes).reshape(self.inner).astype(np.float32)

    def from_ours(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        axes = self.axes or tuple(range(len(self.shape)))[::-1]
        permuted = array.reshape([self.shape[axis] for axis in axes])
        return np.ascontiguousarray(np.transpose(permuted, np.argsort(axes)))


def require_tensors(place, wanted: Sequence[Tensor], shapes: Mapping[str, tuple]) -> None:
    """UserError naming the first tensor that is missing, unknown or of another shape."""
    missing = [t.name for t in wanted if t.name not in shapes]
    if missing:
        more = f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise UserError(f"{place}: lacks {missing[0]}{more}; its configuration asks for it")
    for tensor in wanted:
        if tuple(shapes[tensor.name]) != tensor.shape:
            raise UserError(
                f"{place}: {tensor.name} has shape {tuple(shapes[tensor.name])}, its "
                f"configuration says {tensor.shape}"
            )
    if unknown := sorted(shapes.keys() - {t.name for t in wanted}):
        more = f" and {len(unknown) - 1} more" * (len(unknown) > 1)
        raise UserError(f"{place}: has {unknown[0]}{more}, which this model has not")


def to_ours(wanted: Iterable[Tensor], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{parameter here: array}, stacks stacked; `wanted` has the layers in their order."""
    parts: dict[str, list] = {}
    last = {}
    for tensor in wanted:
        parts.setdefault(tensor.parameter, []).append(tensor.to_ours(arrays[tensor.name]))
        last[tensor.parameter] = np.atleast_1d(() if tensor.layer is None else tensor.layer)
    sizes = {name: [int(index) + 1 for index in indices] for name, indices in last.items()}
    return {name: np.reshape(p, (*sizes[name], *p[0].shape)) for name, p in parts.items()}


def from_ours(wanted: Iterable[Tensor], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{tensor there: array}; the inverse of `to_ours`."""
    found = {}
    for tensor in wanted:
        array = arrays[tensor.parameter]
        found[tensor.name] = tensor.from_ours(
            array if tensor.layer is None else array[tensor.layer]
        )
    return found


def build(config, arrays: Mapping[str, np.ndarray]) -> nnx.Module:
    """The model of `config` with these values, by name; what has none stays as it is made new."""
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    graph, state = nnx.split(model)
    names = {name_of(path): variable for path, variable in nnx.to_flat_state(state)}
    for name, variable in names.items():
        if name not in arrays and isinstance(variable, nnx.Param):
            raise ValueError(f"no value for {name}")
        if name in arrays and variable.shape != arrays[name].shape:
            raise ValueError(f"{name} is {variable.shape}, not {arrays[name].shape}")
    if unknown := sorted(arrays.keys() - names):
        raise ValueError(f"no parameter is named {unknown[0]}")
    if names.keys() - arrays.keys():  # making it costs more than filling an abstract one
        graph, state = nnx.split(config.make(nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(state):
        if name_of(path) in arrays:
            variable.set_value(jnp.asarray(arrays[name_of(path)]))
    return nnx.merge(graph, state)


def name_of(path: Iterable) -> str:
    """'layers/query/kernel' of a place in a state."""
    return "/".join(str(part) for part in path)


def load_torch(path, config, wanted: Sequence[Tensor], weights: Mapping[str, np.ndarray]):
    """(the model of a PyTorch file with these tensors, its `report`); see `require_tensors`."""
    require_tensors(path, wanted, {name: tuple(array.shape) for name, array in weights.items()})
    return build(config, to_ours(wanted, weights)), report(wanted)


def save_torch(model: nnx.Module, path: pathlib.Path, wanted: Sequence[Tensor]) -> dict[str, Any]:
    """Writes these tensors of a model; its `report`. UserError if the file is there already."""
    if path.exists():
        raise UserError(f"{path}: is there already; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch_file.write_torch_file(path, from_ours(wanted, arrays_of(model)))
    return report(wanted)


def arrays_of(model: nnx.Module) -> dict[str, np.ndarray]:
    """{name: array} of the model's parameters and variables."""
    return {
        name_of(path): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if not isinstance(variable, nnx.RngState)
    }


def report(wanted: Iterable[Tensor]) -> dict[str, Any]:
    """How many tensors and numbers these are."""
    shapes = [tensor.shape for tensor in wanted]
    return {"tensors": len(shapes), "parameters": sum(int(np.prod(s)) for s in shapes)}
