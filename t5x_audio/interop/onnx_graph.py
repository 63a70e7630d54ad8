"""A graph in an ONNX file: what feeds what, so that weights are found by their place.

Graphs are known as exporters of PyTorch make them: constants come as initialisers or Constant
nodes, perhaps transposed; Cast and Identity are looked through.
"""

import pathlib
from collections.abc import Iterable

import numpy as np

from t5x_audio.errors import UserError


class Graph:
    """The nodes and constants of an ONNX file.

    Attributes:
      path: of the file.
    """

    def __init__(self, path: pathlib.Path):
        """Reads the file. UserError when it is missing or no ONNX file."""
        import onnx
        from google.protobuf.message import DecodeError

        self.path = path
        try:
            graph = onnx.load(path).graph
        except FileNotFoundError as error:
            missing = error.filename or path  # or a file of external data
            raise UserError(f"{missing}: no such file; give an ONNX file") from None
        except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
            raise UserError(f"{path}: no whole ONNX file; fetch it again") from error
        self._nodes = _without_casts(graph.node)
        self._makers = {name: node for node in self._nodes for name in node.output}
        self._users: dict[str, list] = {}
        for node in self._nodes:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        for node in self._nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                array = onnx.numpy_helper.to_array(node.attribute[0].t)
                self._constants[node.output[0]] = array
        self._used: set[str] = set()

    def of_type(self, op_type: str) -> list:
        """The nodes of a type, in the order of the graph."""
        return [node for node in self._nodes if node.op_type == op_type]

    def maker(self, name: str):
        """The node that makes a value, or None."""
        return self._makers.get(name)

    def users(self, node) -> list:
        """The nodes that take what a node gives."""
        return self._users.get(node.output[0], [])

    def constant(self, name: str, use: bool = True) -> np.ndarray | None:
        """The constant behind a name, perhaps transposed, or None; `use` marks it as used."""
        if name in self._constants:
            if use:
                self._used.add(name)
            return self._constants[name]
        node = self._makers.get(name)
        array = self.constant(node.input[0], use) if node and node.op_type == "Transpose" else None
        if array is None:
            return None
        axes = [list(a.ints) for a in node.attribute if a.name == "perm"]
        return np.transpose(array, axes[0] if axes else None)

    def input_constant(self, node, index: int) -> np.ndarray | None:
        """The constant that is a node's input `index`, or None."""
        return self.constant(node.input[index]) if index < len(node.input) else None

    def constant_operand(self, node) -> np.ndarray | None:
        """The matrix by which a node multiplies; None where both factors are computed."""
        array = self.constant(node.input[1], use=False)
        return None if array is None or array.ndim != 2 else self.constant(node.input[1])

    def added_constant(self, node) -> np.ndarray | None:
        """The vector that is added to what a node gives, or None."""
        for user in self._users.get(node.output[0], []):
            if user.op_type == "Add":
                for name in user.input:
                    array = self.constant(name, use=False)
                    if array is not None and array.ndim == 1:
                        return self.constant(name)
        return None

    def producer(self, name: str, op_type: str, *, among: Iterable = (), but_not: Iterable = ()):
        """The nearest node of a type that `name` comes from.

        Args:
          name: of a value.
          op_type: of the node.
          among: only these nodes; empty = any.
          but_not: none of these.
        """
        wanted, refused = {id(node) for node in among}, {id(node) for node in but_not}
        frontier, seen = [name], set()
        while frontier:
            nodes = [self._makers[n] for n in frontier if n in self._makers]
            frontier = []
            for node in nodes:
                if id(node) in seen:
                    continue
                seen.add(id(node))
                fits = not wanted or id(node) in wanted
                if node.op_type == op_type and fits and id(node) not in refused:
                    return node
                frontier += node.input
        return None

    def heads_between(self, projection, scores) -> int | None:
        """Attention heads: the third size to which the projection is reshaped."""
        frontier = [projection.output[0]]
        for _ in range(6):  # bias, reshape, and what else may lie between
            users = [user for name in frontier for user in self._users.get(name, [])]
            for node in users:
                if node.op_type == "Reshape":
                    return self._third_size(node.input[1], projection)
            frontier = [name for node in users if node is not scores for name in node.output]
        return None

    def _third_size(self, name: str, projection) -> int | None:
        shape = self.constant(name)
        if shape is None and (node := self._makers.get(name)) is not None:
            parts = [self.constant(part) for part in node.input] if node.op_type == "Concat" else []
            shape = [-1 if part is None else int(part.reshape(-1)[0]) for part in parts]
        if shape is None or len(shape) < 4:
            return None
        if shape[2] > 0:
            return int(shape[2])
        width = self.constant_operand(projection).shape[1]
        return int(width // shape[3]) if shape[3] > 0 else None

    def norm_before(self, node) -> tuple[np.ndarray | None, np.ndarray | None]:
        """(scale, bias) of the layer norm that feeds a node, in one step or spelled out."""
        norm = self._makers.get(node.input[0])
        if norm is None:
            return None, None
        if norm.op_type == "LayerNormalization":
            return self.input_constant(norm, 1), self.input_constant(norm, 2)
        bias = self._vector_of(norm)
        for name in norm.input:
            scaled = self._makers.get(name)
            if scaled is not None and scaled.op_type == "Mul":
                return self._vector_of(scaled), bias
        return None, bias

    def _vector_of(self, node) -> np.ndarray | None:
        for name in node.input:
            array = self.constant(name, use=False)
            if array is not None and array.ndim == 1:
                return self.constant(name)
        return None

    def named_unused(self) -> dict[str, np.ndarray]:
        """{name: constant} of what has not been asked for."""
        return {n: a for n, a in self._constants.items() if n not in self._used}

    def unused_weights(self) -> list[np.ndarray]:
        """The float constants of more than one number that have not been asked for."""
        return [a for a in self.named_unused().values() if a.size > 1 and a.dtype.kind == "f"]

    def mark_used(self, array: np.ndarray) -> None:
        """Marks this constant, of `unused_weights`, as used."""
        self._used |= {name for name, other in self._constants.items() if other is array}


def attribute(node, name: str, default=None):
    """The value of a node's attribute: a number, or a list of numbers."""
    from onnx import helper

    for found in node.attribute:
        if found.name == name:
            value = helper.get_attribute_value(found)
            return list(value) if isinstance(value, (list, tuple)) else value
    return default


def _without_casts(nodes) -> list:
    """The nodes but Cast and Identity, whose outputs become another name of their inputs."""
    names: dict[str, str] = {}
    kept = []
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
        if node.op_type in ("Cast", "Identity"):
            names[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    return kept
