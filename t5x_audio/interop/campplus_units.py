"""CAM++ as a list of convolutions with their batch norms, by their names there and here.

Source: 3D-Speaker's and FunASR's CAMPPlus (names and layouts).
"""

import dataclasses
from collections.abc import Iterator

from t5x_audio.vocoder.campplus import CamPlusConfig

EPSILON = 1e-5  # of every batch norm
NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


@dataclasses.dataclass(frozen=True)
class Unit:
    """A convolution with its batch norms.

    Attributes:
      there, here: names of the convolution.
      shape: of its weight there, [out, in, *kernel].
      strides, dilation: of it; strides one for each axis.
      before, after: (there, here) of the norms around it; None where there is none.
      bias: whether it has one of its own.
    """

    there: str
    here: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] = (1,)
    dilation: int = 1
    before: tuple[str, str] | None = None
    after: tuple[str, str] | None = None
    bias: bool = False

    @property
    def geometry(self) -> dict[str, list[int]]:
        """Attributes of the node."""
        kernel = self.shape[2:]
        pads = [(size - 1) // 2 * self.dilation for size in kernel]
        return {
            "kernel_shape": list(kernel),
            "strides": list(self.strides),
            "dilations": [self.dilation] * len(kernel),
            "pads": pads * 2,
        }


def units(config: CamPlusConfig) -> Iterator[Unit]:
    """The convolutions of a configuration in the order of the graph."""
    yield from _front(config)
    width = config.front_channels * config.num_mels // 8
    tdnn = ("xvector.tdnn.nonlinear.batchnorm", "tdnn/norm")
    shape = (config.channels, width, 5)
    yield Unit("xvector.tdnn.linear", "tdnn/convolution", shape, (2,), after=tdnn)
    width, last = config.channels, len(config.block_layers) - 1
    sizes = zip(config.block_layers, config.block_kernels, config.block_dilations, strict=True)
    for i, (count, kernel, dilation) in enumerate(sizes):
        for j in range(count):
            names = (f"xvector.block{i + 1}.tdnnd{j + 1}", f"blocks/{i}/layers/{j}")
            yield from _layer(config, *names, width, kernel, dilation)
            width += config.growth
        there = f"xvector.transit{i + 1}"
        yield Unit(
            f"{there}.linear",
            f"blocks/{i}/transit",
            (width // 2, width, 1),
            before=(f"{there}.nonlinear.batchnorm", f"blocks/{i}/norm"),
            after=("xvector.out_nonlinear.batchnorm", "norm") if i == last else None,
        )
        width //= 2
    dense = ("xvector.dense.nonlinear.batchnorm", "dense_norm")
    yield Unit("xvector.dense.linear", "dense", (config.embedding, 2 * width, 1), after=dense)


def _front(config: CamPlusConfig) -> Iterator[Unit]:
    width = config.front_channels

    def unit(there, norm, here, n_in, kernel, stride):
        after = (norm, f"front/{here}/norm")
        shape = (width, n_in, kernel, kernel)
        return Unit(there, f"front/{here}/convolution", shape, (stride, 1), after=after)

    yield unit("head.conv1", "head.bn1", "first", 1, 3, 1)
    for i in range(2 * config.front_blocks):
        stage, block = divmod(i, config.front_blocks)
        there, stride = f"head.layer{stage + 1}.{block}", 1 if block else 2
        yield unit(f"{there}.conv1", f"{there}.bn1", f"blocks/{i}/first", width, 3, stride)
        yield unit(f"{there}.conv2", f"{there}.bn2", f"blocks/{i}/second", width, 3, 1)
        if stride > 1:
            names = (f"{there}.shortcut.0", f"{there}.shortcut.1", f"blocks/{i}/shortcut")
            yield unit(*names, width, 1, stride)
    yield unit("head.conv2", "head.bn2", "last", width, 3, 2)


def _layer(config: CamPlusConfig, there, here, n_in, kernel, dilation) -> Iterator[Unit]:
    width, growth = config.bottleneck, config.growth
    yield Unit(
        f"{there}.linear1",
        f"{here}/bottleneck",
        (width, n_in, 1),
        before=(f"{there}.nonlinear1.batchnorm", f"{here}/norm_in"),
        after=(f"{there}.nonlinear2.batchnorm", f"{here}/norm"),
    )
    cam, half = f"{there}.cam_layer", width // 2
    shape = (growth, width, kernel)
    yield Unit(f"{cam}.linear_local", f"{here}/local", shape, dilation=dilation)
    yield Unit(f"{cam}.linear1", f"{here}/context_in", (half, width, 1), bias=True)
    yield Unit(f"{cam}.linear2", f"{here}/context_out", (growth, half, 1), bias=True)


def is_affine(unit: Unit) -> bool:
    """Whether the norm behind has a scale and a bias; the last one has not."""
    return unit.here != "dense"
