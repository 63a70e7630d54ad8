"""A model whose weights are packed integers, and otherwise the same model.

`PackedConfig` stands in for a model's configuration: what it makes is the model's own class with
some parameters exchanged for `PackedParam`s, which hold integers and scales and give the weight
when they are read. So every model serves packed, its code unchanged; a scan over stacked layers
unpacks one layer at a time.

Choices: which weights are packed is a table of `rules.Rules`; what it names no bits for takes
`bits`. Norms, biases and embeddings stay as they are, by `DEFAULT`; a language model's embedding,
of which a token reads one row, takes 8 bits, by `LANGUAGE_MODEL`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.quantization.packing import PackedWeight, pack, packed_sizes, unpack, unpack_rows
from t5x_audio.quantization.rules import Rules, find

DEFAULT = Rules(weights=((r"(.*/)?(kernel|query|key|value|out|gate|up|down|head)", None),))
"""All matrices and kernels of dense layers, convolutions and attention."""

LANGUAGE_MODEL = Rules(weights=(("embedding", 8), *DEFAULT.weights))
"""Those of a `Transformer`, whose table has a scale for each column, or for a group of its rows."""


class PackedParam(nnx.Param):
    """A parameter whose value is a `PackedWeight`; `[...]` gives the float32 weight, an array of
    ints its rows.

    Its metadata `tail` is the shape of the weight behind the axes of a stack of layers.
    """

    def __getitem__(self, key):
        packed = self.get_raw_value()
        if isinstance(key, jax.Array):
            return unpack_rows(packed, key)
        weight = unpack(packed).reshape(*packed.packed.shape[:-2], *self.get_metadata("tail"))
        return weight if key is ... else weight[key]

    def times(self, x: jax.Array) -> jax.Array:
        """x [..., inputs] times the matrix, its axes joined to [inputs, outputs], in x's type.

        It is unpacked for every product anew: the compiler may not do it once for all tokens, which
        would take the memory of the whole weights.
        """
        x, packed = jax.lax.optimization_barrier((x, self.get_raw_value()))
        return jnp.einsum("...i,io->...o", x, unpack(packed, x.dtype))


@dataclasses.dataclass(frozen=True)
class PackedConfig:
    """See the module docstring. Other attributes are those of `model`.

    Attributes:
      model: configuration of the model.
      bits: of the weights, of `packing.WIDTHS`.
      group: inputs that share a scale; None = all of them.
      rules: which weights; their own bits, if given, come first.
    """

    model: Any
    bits: int
    group: int | None = None
    rules: Rules = DEFAULT

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model, all packed weights 0."""
        model = self.model.make(rngs)
        for weight, bits, stack in self.weights(model).values():
            inputs, outputs = matrix(weight, stack)
            count, groups = packed_sizes(inputs, bits, self.group)
            leading = weight.variable.shape[:stack]
            packed = PackedWeight(
                jnp.zeros((*leading, count, outputs), jnp.uint8),
                jnp.zeros((*leading, groups, outputs), jnp.float32),
                bits,
                inputs,
            )
            exchange(weight, packed, stack)
        return model

    def weights(self, model: nnx.Module) -> dict[str, tuple]:
        """{path: (`rules.Weight`, bits, axes of its stack)} of the weights that are packed."""
        found = find(model, Rules(self.rules.weights))[0]
        return {
            name: (weight, weight.bits or self.bits, _stack(weight))
            for name, weight in found.items()
        }


def packed_model(model: nnx.Module, config: PackedConfig) -> nnx.Module:
    """`model` with its weights packed, in place."""
    for name, (weight, bits, stack) in config.weights(model).items():
        try:
            exchange(
                weight,
                pack_array(np.asarray(weight.variable[...]), weight, bits, config.group),
                stack,
            )
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return model


def pack_array(array: np.ndarray, weight, bits: int, group: int | None) -> PackedWeight:
    """The values of a `rules.Weight`, or of some layers of its stack, packed."""
    stack = _stack(weight)
    inputs, outputs = matrix(weight, stack)
    return pack(array.reshape(*array.shape[:stack], inputs, outputs), bits, group)


def matrix(weight, stack: int) -> tuple[int, int]:
    """(inputs, outputs) of a `rules.Weight` as a matrix: outputs are its last axes."""
    tail = weight.variable.shape[stack:]
    outputs = math.prod(tail[-(len(weight.channel_axes) - stack) :])
    return math.prod(tail) // outputs, outputs


def exchange(weight, packed: PackedWeight, stack: int) -> None:
    """Puts `packed` in the place of a `rules.Weight`'s parameter."""
    metadata = weight.variable.get_metadata() | {"tail": weight.variable.shape[stack:]}
    setattr(weight.owner, weight.field, PackedParam(packed, **metadata))


def _stack(weight) -> int:
    return sum(axis >= 0 for axis in weight.channel_axes)
