"""A graph in the making, written as an ONNX file; values go by their names."""

import pathlib
from collections.abc import Mapping

import numpy as np

_IR_VERSION = 8


class Builder:
    """Nodes and initialisers in the order in which they are added.

    Attributes:
      nodes, initializers: of ONNX.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]):
        """`weights`: what `weight` looks for."""
        self.nodes, self.initializers = [], []
        self._weights = weights
        self._names: set[str] = set()

    def add(self, op: str, *inputs: str, scope: str = "", output: str = "", **attributes) -> str:
        """A node `<scope>/<op>`, numbered where there are more; the name of its output."""
        from onnx import helper

        stem, count = f"{scope}/{op}", 0
        name = stem
        while name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        output = output or f"{name}_output_0"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def constant(self, value, dtype=np.float32, scope: str = "") -> str:
        """A Constant node."""
        from onnx import numpy_helper

        return self.add(
            "Constant", scope=scope, value=numpy_helper.from_array(np.asarray(value, dtype))
        )

    def weight(self, ours: str, name: str = "") -> str:
        """An initialiser `name` (else as we call it) with the weight that we call `ours`."""
        from onnx import numpy_helper

        name = name or ours
        self.initializers.append(numpy_helper.from_array(self._weights[ours], name))
        return name

    def write(self, path: pathlib.Path, name: str, inputs, outputs, opset: int) -> None:
        """Writes the graph; the file appears under its name only when complete.

        Args:
          path: of the new file.
          name: of the graph.
          inputs, outputs: {name: (type of ONNX, shape)}.
          opset: of the operators.
        """
        import onnx
        from onnx import helper

        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info(n, *value) for n, value in inputs.items()],
            [helper.make_tensor_value_info(n, *value) for n, value in outputs.items()],
            self.initializers,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=_IR_VERSION,
            producer_name="t5x_audio",
        )
        temporary = path.with_name(path.name + ".writing")
        onnx.save(model, temporary)
        temporary.replace(path)
