"""Which arrays of a model are quantised and with how many bits: a table of patterns.

A rule is a pair (pattern, bits). Patterns are regular expressions for a whole path; the first that
fits decides, what none fits stays as it is. Weights go by the path of the parameter
('encoder/stem/conv/kernel'), activations by the path of the module whose output is quantised
('encoder/stem'). Bits are a number, 0 to leave it as it is, or None: whatever is asked for when the
model runs, in training a draw.

Choices: parameters and modules are found by walking the module, so that any NNX module can be
quantised, its code unchanged. A rule that decides nothing is an error: it is misspelt, or an
earlier one hides it. What an output channel is follows from the logical axes, else from the owner:
the last axis of a kernel. Stacked layers (a leading axis 'layers') have scales and ranges of their
own.
"""

import dataclasses
import re

import flax.nnx as nnx

from t5x_audio.errors import UserError
from t5x_audio.quantization import fake_quant

Rule = tuple[str, int | None]


@dataclasses.dataclass(frozen=True)
class Rules:
    """See the module docstring.

    Attributes:
      weights: (pattern of a parameter's path, bits).
      activations: (pattern of a module's path, bits).
    """

    weights: tuple[Rule, ...] = ()
    activations: tuple[Rule, ...] = ()

    def __post_init__(self):
        for kind in ("weights", "activations"):
            object.__setattr__(self, kind, tuple(tuple(rule) for rule in getattr(self, kind)))
            for pattern, bits in getattr(self, kind):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"Rules.{kind}: {pattern!r} is no pattern: {error}") from None
                if bits not in (None, 0):
                    fake_quant.require_bits(bits, f"Rules.{kind}: {pattern!r}")


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter to be quantised.

    Attributes:
      owner, field: where the live parameter is.
      bits: a number, or None for what is asked for.
      channel_axes: see `fake_quant.quantize_weight`; axes of a stack count from the front, those
        of outputs from the back.
    """

    owner: nnx.Module
    field: str
    bits: int | None
    channel_axes: tuple[int, ...]

    @property
    def variable(self) -> nnx.Variable:
        """The parameter."""
        return getattr(self.owner, self.field)


@dataclasses.dataclass(frozen=True)
class Output:
    """A module whose output is to be quantised.

    Attributes:
      module: the live module.
      bits: a number, or None for what is asked for.
      stack: sizes of the leading axes of stacked layers, () outside of a stack.
    """

    module: nnx.Module
    bits: int | None
    stack: tuple[int, ...]


def find(model: nnx.Module, rules: Rules) -> tuple[dict[str, Weight], dict[str, Output]]:
    """({path: parameter}, {path: module}) of what `rules` quantise.

    UserError for a rule that decides nothing, and for a pattern of weights that fits something
    other than the nnx.Param of a matrix or a kernel.
    """
    modules = {_path(path): node for path, node in _modules(model)}
    weights = {}
    parameters = {
        f"{name}/{field}".lstrip("/"): (node, field)
        for name, node in modules.items()
        for field, value in vars(node).items()
        if isinstance(value, nnx.Param)
    }
    for name, bits in _decided(parameters, rules.weights, "weights").items():
        owner, field = parameters[name]
        variable = getattr(owner, field)
        stack = len(_stack_of(owner))
        if variable.ndim - stack < 2:
            raise UserError(
                f"Rules.weights: {name} of shape {tuple(variable.shape)} is no kernel; quantise "
                "matrices and kernels only"
            )
        axes = (*range(stack), *_output_axes(variable))
        weights[name] = Weight(owner, field, bits, axes)
    decided = _decided(modules, rules.activations, "activations")
    outputs = {
        name: Output(modules[name], bits, _stack_of(modules[name]))
        for name, bits in decided.items()
    }
    return weights, outputs


def _modules(model):
    return [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]


def _path(path) -> str:
    return "/".join(map(str, path))


def _decided(known, rules, kind: str) -> dict[str, int | None]:
    """{path: bits} by the first rule that fits, without those that stay as they are."""
    decided, used = {}, set()
    for name in known:
        for number, (pattern, bits) in enumerate(rules):
            if re.fullmatch(pattern, name):
                used.add(number)
                if bits != 0:
                    decided[name] = bits
                break
    for number, (pattern, _) in enumerate(rules):
        if number not in used:
            hidden = any(re.fullmatch(pattern, name) for name in known)
            why = "an earlier rule decides all that it fits" if hidden else "it fits none"
            raise UserError(
                f"Rules.{kind}: the rule {pattern!r} matches no layer: {why}; there are, among "
                f"others, {', '.join(list(known)[-3:])}"
            )
    return decided


def _output_axes(variable) -> tuple[int, ...]:
    axes = variable.get_metadata().get("logical_axes") or ()
    return (-2, -1) if axes and axes[-1] == "head_dim" else (-1,)


def _stack_of(module) -> tuple[int, ...]:
    """Sizes of the leading 'layers' axes of a module's parameters, by the first that tells."""
    for _, node in _modules(module):
        for field, value in vars(node).items():
            if isinstance(value, nnx.Variable) and (rank := _rank(node, field, value)) is not None:
                return tuple(value.shape[: value.ndim - rank])
    return ()


def _rank(owner, field: str, value) -> int | None:
    """Number of axes of a parameter of a single layer; None where nothing tells."""
    axes = value.get_metadata().get("logical_axes")
    if axes is not None:
        return value.ndim - axes.count("layers")
    size = () if isinstance(owner, nnx.Linear) else getattr(owner, "kernel_size", None)
    if field == "kernel" and size is not None:
        return 2 + (1 if isinstance(size, int) else len(size))
    if isinstance(owner, nnx.LayerNorm | nnx.RMSNorm | nnx.BatchNorm | nnx.GroupNorm):
        return 1
    return None
