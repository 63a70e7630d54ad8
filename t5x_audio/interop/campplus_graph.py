"""What a graph of CAM++ consists of, found in an ONNX file and written to one.

PyTorch's exporter leaves the weights of a convolution without a name where it has folded a batch
norm into it, so convolutions are told by their order and what they are connected with. A norm that
was folded is read as one that only adds, and one that only adds is written as a bias: what was read
is written again with the same numbers.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from t5x_audio.errors import UserError
from t5x_audio.interop import onnx_graph
from t5x_audio.interop.campplus_units import EPSILON, NORM, Unit, is_affine, units
from t5x_audio.interop.onnx_writer import Builder
from t5x_audio.vocoder.campplus import CamPlusConfig

_NEUTRAL = np.float32(1.0 - EPSILON)  # the variance of a norm that only adds
_OPSET = 11
_MANY = 6  # differences that a message names
_ADVICE = "give a campplus.onnx as PyTorch exports it"


# ---- reading -------------------------------------------------------------------------------


def read(path: pathlib.Path) -> tuple[CamPlusConfig, dict[str, np.ndarray], int]:
    """A file's (configuration, {name there: array}, number of norms that were folded).

    Raises:
      UserError: missing, damaged, or another graph; all that differs is named.
    """
    graph = onnx_graph.Graph(path)
    nodes = graph.of_type("Conv")
    kernels = [graph.input_constant(node, 1) for node in nodes]
    if any(kernel is None for kernel in kernels):
        raise UserError(f"{path}: has convolutions with computed weights; {_ADVICE}")
    config = _config(graph, nodes, kernels)
    reading = _Reading(graph)
    reading.check_operators(config)
    rest = list(zip(nodes, kernels, strict=True))
    for unit in units(config):
        if not rest:
            reading.differences.append(f"lacks {unit.there}")
            continue
        # Branches side by side may stand in any order.
        near = [i for i, (_, kernel) in enumerate(rest[:3]) if kernel.shape == unit.shape]
        reading.take(unit, *rest.pop(near[0] if near else 0))
    reading.differences += [f"has {node.name or node.output[0]} besides" for node, _ in rest]
    reading.check_unused()
    if reading.differences:
        more = len(reading.differences) - _MANY
        named = "; ".join(reading.differences[:_MANY]) + f"; and {more} more" * (more > 0)
        raise UserError(f"{path}: {named}. {_ADVICE[0].upper()}{_ADVICE[1:]}")
    return config, reading.arrays, reading.folded


def _config(graph: onnx_graph.Graph, nodes: list, kernels: list) -> CamPlusConfig:
    """Sizes, read off the convolutions and what they feed."""
    flat = [i for i, kernel in enumerate(kernels) if kernel.ndim == 3]
    front = len(nodes) - len(flat)
    if front < 8 or front % 4 or len(flat) < 7 or flat[0] != front:
        raise UserError(
            f"{graph.path}: has {front} convolutions in two dimensions and {len(flat)} in one, "
            f"which is no CAM++; {_ADVICE}"
        )
    blocks, place, pools = [[]], front + 1, []
    while place < len(nodes) - 1:
        pool = _pool_behind(graph, nodes[place])
        if pool is None:
            blocks.append([])
            place += 1
            continue
        four = nodes[place : place + 4]
        local = [i for i, node in enumerate(four) if node.input[0] == pool.input[0]]
        if len(four) < 4 or not local:
            raise UserError(f"{graph.path}: {nodes[place].name} begins no layer; {_ADVICE}")
        pools.append(pool)
        blocks[-1].append((kernels[place], kernels[place + local[0]], four[local[0]]))
        place += 4
    blocks = blocks[:-1]
    if not all(blocks) or not blocks:
        raise UserError(f"{graph.path}: has a block without layers; {_ADVICE}")
    first = [block[0] for block in blocks]
    channels, width = kernels[0].shape[0], kernels[front].shape[1]
    return CamPlusConfig(
        num_mels=8 * width // channels,
        embedding=kernels[-1].shape[0],
        front_channels=channels,
        front_blocks=front // 4 - 1,
        channels=kernels[front].shape[0],
        growth=first[0][1].shape[0],
        bottleneck=first[0][0].shape[0],
        block_layers=tuple(len(block) for block in blocks),
        block_kernels=tuple(local.shape[2] for _, local, _ in first),
        block_dilations=tuple(
            onnx_graph.attribute(node, "dilations", [1])[0] for _, _, node in first
        ),
        segment=onnx_graph.attribute(pools[0], "kernel_shape")[0],
    )


def _pool_behind(graph: onnx_graph.Graph, node):
    """The pooling over segments of a layer whose bottleneck this is, or None."""
    for _ in range(3):  # batch norm, ReLU
        users = graph.users(node)
        for user in users:
            if user.op_type == "AveragePool":
                return user
        if len(users) != 1:
            return None
        node = users[0]
    return None


class _Reading:
    """What has been found so far.

    Attributes:
      arrays: {name there: array}.
      folded: norms that were folded.
      differences: from what CAM++ is.
    """

    def __init__(self, graph: onnx_graph.Graph):
        self._graph = graph
        self.arrays: dict[str, np.ndarray] = {}
        self.folded = 0
        self.differences: list[str] = []

    def take(self, unit: Unit, node, kernel: np.ndarray) -> None:
        """Takes the weights of a convolution and of its norms."""
        if kernel.shape != unit.shape:
            self.differences.append(f"{unit.there}.weight has {kernel.shape}, not {unit.shape}")
        for name, want in unit.geometry.items():
            plain = [0 if name == "pads" else 1] * len(want)
            got = onnx_graph.attribute(node, name, plain)
            if name != "kernel_shape" and got != want:
                self.differences.append(f"{unit.there} has {name} {got}, not {want}")
        self.arrays[f"{unit.there}.weight"] = kernel
        if unit.before is not None:
            relu = self._graph.maker(node.input[0])
            norm = self._graph.maker(relu.input[0]) if relu and relu.op_type == "Relu" else None
            self._take_norm(unit.before[0], norm, unit.shape[1])
        bias, norm = self._graph.input_constant(node, 2), self._norm_behind(node)
        if unit.bias:
            self._take_bias(unit, bias)
        elif unit.after is None or (norm is not None and bias is not None):
            if bias is not None:
                self.differences.append(f"{unit.there} has a bias")
        elif norm is not None:
            self._take_norm(unit.after[0], norm, unit.shape[0], is_affine(unit))
        elif bias is None:
            self.differences.append(f"lacks {unit.after[0]}")
        else:
            self._take_folded(unit, bias)

    def _norm_behind(self, node):
        """The norm that alone takes what a convolution gives, or None."""
        for _ in range(2):
            users = self._graph.users(node)
            if len(users) != 1:
                return None
            (node,) = users
            if node.op_type == "BatchNormalization":
                return node
            if node.op_type != "Squeeze":
                return None
        return None

    def _take_norm(self, there: str, node, width: int, affine: bool = True) -> None:
        if node is None or node.op_type != "BatchNormalization":
            self.differences.append(f"lacks {there}")
            return
        epsilon = onnx_graph.attribute(node, "epsilon", EPSILON)
        if not np.isclose(epsilon, EPSILON):
            self.differences.append(f"{there} has epsilon {epsilon:.1e}, not {EPSILON:.1e}")
        for i, name in enumerate(NORM, 1):
            array = self._graph.input_constant(node, i)
            plain = name in ("weight", "bias") and not affine
            if array is None or array.shape != (width,):
                found = None if array is None else array.shape
                self.differences.append(f"{there}.{name} has {found}, not ({width},)")
            elif not plain:
                self.arrays[f"{there}.{name}"] = array
            elif not (array == (name == "weight")).all():
                self.differences.append(f"{there} has a {name}")

    def _take_bias(self, unit: Unit, bias) -> None:
        if bias is None or bias.shape != unit.shape[:1]:
            found = None if bias is None else bias.shape
            self.differences.append(f"{unit.there}.bias has {found}, not {unit.shape[:1]}")
        else:
            self.arrays[f"{unit.there}.bias"] = bias

    def _take_folded(self, unit: Unit, bias: np.ndarray) -> None:
        self.folded += 1
        there = unit.after[0]
        ones = np.ones(unit.shape[0], np.float32)
        found = {"running_mean": -bias, "running_var": _NEUTRAL * ones}
        if is_affine(unit):
            found |= {"weight": ones, "bias": bias, "running_mean": 0 * ones}
        self.arrays |= {f"{there}.{name}": array for name, array in found.items()}

    def check_operators(self, config: CamPlusConfig) -> None:
        """Names activations and poolings that are too many, too few or others."""
        layers, front = sum(config.block_layers), 2 + 4 * config.front_blocks
        wanted = {
            "Relu": front + 3 * layers + len(config.block_layers) + 2,
            "Sigmoid": layers,
            "AveragePool": layers,
        }
        for op, count in wanted.items():
            if (found := len(self._graph.of_type(op))) != count:
                self.differences.append(f"has {found} {op} nodes, not {count}")
        for pool in self._graph.of_type("AveragePool"):
            segment = [config.segment]
            names = ("kernel_shape", "strides")
            if any(onnx_graph.attribute(pool, name, [1]) != segment for name in names):
                self.differences.append(f"{pool.name} pools other than {config.segment} frames")

    def check_unused(self) -> None:
        """Names weights without a place."""
        for name, array in self._graph.named_unused().items():
            if array.size > 1 and array.dtype.kind == "f":
                self.differences.append(f"has {name} {array.shape} besides")


# ---- writing -------------------------------------------------------------------------------


def write(path: pathlib.Path, weights: Mapping[str, np.ndarray], config: CamPlusConfig) -> None:
    """Writes a file: 'input' float32 [B, T, num_mels] -> 'output' float32 [B, embedding].

    Args:
      path: of the new file; it appears under its name only when complete.
      weights: by their names there, float32.
      config: sizes.
    """
    from onnx import TensorProto

    b = _Builder(weights, config)
    x = b.add("Transpose", "input", perm=[0, 2, 1])
    x = b.add("Unsqueeze", x, axes=[1])
    x = b.front(x)
    x = b.unit("xvector.tdnn.linear", x)
    for i, count in enumerate(config.block_layers, 1):
        for j in range(1, count + 1):
            y = b.layer(x, f"xvector.block{i}.tdnnd{j}")
            x = b.add("Concat", x, y, axis=1)
        rectified = i == len(config.block_layers)
        x = b.unit(f"xvector.transit{i}.linear", x, rectified)
    x = b.unit("xvector.dense.linear", b.statistics(x), False)
    b.add("Squeeze", x, output="output", axes=[2])
    inputs = {"input": (TensorProto.FLOAT, ["batch", "frames", config.num_mels])}
    outputs = {"output": (TensorProto.FLOAT, ["batch", config.embedding])}
    b.write(path, "campplus", inputs, outputs, _OPSET)


class _Builder(Builder):
    """With the layers of this network."""

    def __init__(self, weights: Mapping[str, np.ndarray], config: CamPlusConfig):
        biases = {
            f"{unit.there}.bias": _bias_of(unit, weights)
            for unit in units(config)
            if unit.after is not None
        }
        self._folded = {name: bias for name, bias in biases.items() if bias is not None}
        ones = np.ones(config.embedding, np.float32)
        plain = {"weight": ones, "bias": 0 * ones}
        dense = {f"xvector.dense.nonlinear.batchnorm.{n}": a for n, a in plain.items()}
        super().__init__(dict(weights) | self._folded | dense)
        self._config = config
        self._units = {unit.there: unit for unit in units(config)}

    def unit(self, there: str, x: str, rectified: bool = True) -> str:
        """The norm and ReLU before, the convolution, the norm and, if wanted, ReLU behind."""
        unit = self._units[there]
        if unit.before is not None:
            x = self.add("Relu", self._norm(x, unit.before[0]), scope=_scope(there))
        weights = [self.weight(f"{there}.weight")]
        folded = f"{there}.bias" in self._folded
        if unit.bias or folded:
            weights.append(self.weight(f"{there}.bias"))
        x = self.add("Conv", x, *weights, scope=_scope(there), group=1, **unit.geometry)
        if unit.after is not None and not folded:
            x = self._norm(x, unit.after[0])
        return self.add("Relu", x, scope=_scope(there)) if rectified else x

    def _norm(self, x: str, there: str) -> str:
        weights = [self.weight(f"{there}.{name}") for name in NORM]
        return self.add(
            "BatchNormalization", x, *weights, scope=_scope(there), epsilon=EPSILON, momentum=0.9
        )

    def front(self, x: str) -> str:
        """[B, 1, mels, T] -> [B, channels * mels / 8, T]."""
        x = self.unit("head.conv1", x)
        for i in range(2 * self._config.front_blocks):
            stage, block = divmod(i, self._config.front_blocks)
            there = f"head.layer{stage + 1}.{block}"
            y = self.unit(f"{there}.conv1", x)
            y = self.unit(f"{there}.conv2", y, False)
            shortcut = x if block else self.unit(f"{there}.shortcut.0", x, False)
            x = self.add("Relu", self.add("Add", y, shortcut, scope=_scope(there)))
        x = self.unit("head.conv2", x)
        width = self._config.front_channels * self._config.num_mels // 8
        return self.add("Reshape", x, self.constant([0, width, -1], np.int64))

    def layer(self, x: str, there: str) -> str:
        """[B, n_in, T] -> [B, growth, T]; the mask is computed once a segment."""
        scope, segment = _scope(there), self._config.segment
        x = self.unit(f"{there}.linear1", x)
        local = self.unit(f"{there}.cam_layer.linear_local", x, False)
        whole = self.add("ReduceMean", x, scope=scope, axes=[2], keepdims=1)
        pooling = {"kernel_shape": [segment], "strides": [segment], "ceil_mode": 1}
        context = self.add("Add", whole, self.add("AveragePool", x, scope=scope, **pooling))
        context = self.unit(f"{there}.cam_layer.linear1", context)
        context = self.unit(f"{there}.cam_layer.linear2", context, False)
        mask = self.add("Unsqueeze", self.add("Sigmoid", context, scope=scope), axes=[3])
        mask = self.add("Expand", mask, self.constant([1, 1, 1, segment], np.int64))
        mask = self.add("Reshape", mask, self.constant([0, self._config.growth, -1], np.int64))
        frames = self.add("Gather", self.add("Shape", x), self.constant([2], np.int64), axis=0)
        start, axis = self.constant([0], np.int64), self.constant([2], np.int64)
        mask = self.add("Slice", mask, start, frames, axis)
        return self.add("Mul", local, mask, scope=scope)

    def statistics(self, x: str) -> str:
        """[B, C, T] -> mean and unbiased deviation [B, 2 C, 1]."""
        mean = self.add("ReduceMean", x, axes=[2], keepdims=1)
        centred = self.add("Sub", x, mean)
        squares = self.add("Mul", centred, centred)
        total = self.add("ReduceSum", squares, axes=[2], keepdims=1)
        frames = self.add("Gather", self.add("Shape", x), self.constant([2], np.int64), axis=0)
        fewer = self.add("Sub", self.add("Cast", frames, to=1), self.constant([1.0]))
        deviation = self.add("Sqrt", self.add("Div", total, fewer))
        return self.add("Concat", mean, deviation, axis=1)


def _bias_of(unit: Unit, weights: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The bias that the norm behind a convolution comes to; None where it does more than add."""
    there = unit.after[0]
    if (weights[f"{there}.running_var"] != _NEUTRAL).any():
        return None
    mean = weights[f"{there}.running_mean"]
    if not is_affine(unit):
        return -mean
    if mean.any() or (weights[f"{there}.weight"] != 1.0).any():
        return None
    return weights[f"{there}.bias"]


def _scope(there: str) -> str:
    return "/" + there.replace(".", "/")
