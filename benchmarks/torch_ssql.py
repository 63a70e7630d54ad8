"""SSQL over SimSiam in PyTorch eager, as one would write it there: the peer of benchmark and test.

Written from the paper's public recipe (arXiv 2207.05432; megvii-research/SSQL-ECCV2022): names of
modules are those of t5x_audio/images, so that weights go from one to the other by name. Scales of
weights carry no gradient, as in ours.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def straight_through(x, lowest, highest):
    return torch.clamp(x + (torch.round(x) - x).detach(), lowest, highest)


def quantize_weight(weight, bits):
    largest = weight.detach().abs().flatten(1).amax(1).view(-1, *(1,) * (weight.ndim - 1))
    steps = (2**bits - 1) / 2
    # In this order the largest weight is exactly `steps`, a tie of the rounding.
    scaled = straight_through(weight / largest * steps, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return scaled * (largest / steps)


def quantize_activation(x, low, high, bits):
    scale = (high - low) / (2**bits - 1)
    zero = -torch.round(low / scale)
    shifted = x / scale
    shifted = shifted + (torch.round(shifted) - shifted).detach() + zero
    return (torch.clamp(shifted, 0, 2**bits - 1) - zero) * scale


class Mode:
    """What a forward does: 'plain', 'observe' or 'quantize', and with how many bits."""

    def __init__(self):
        self.name, self.weight_bits, self.activation_bits = "plain", 8, 8


class Point(nn.Module):
    """Where an activation is observed or quantised."""

    def __init__(self, mode, bits=None):
        super().__init__()
        self.mode, self.bits, self.low, self.high = mode, bits, None, None

    def reset(self):
        self.low = self.high = None

    def forward(self, x):
        if self.mode.name == "observe":
            low, high = x.detach().min(), x.detach().max()
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)
        elif self.mode.name == "quantize":
            return quantize_activation(
                x, self.low, self.high, self.bits or self.mode.activation_bits
            )
        return x


class Conv(nn.Conv2d):
    def __init__(self, mode, n_in, n_out, size, stride=1, bits=None):
        super().__init__(n_in, n_out, size, stride, size // 2, bias=False)
        self.mode, self.bits = mode, bits

    def forward(self, x):
        weight = self.weight
        if self.mode.name == "quantize":
            weight = quantize_weight(weight, self.bits or self.mode.weight_bits)
        return self._conv_forward(x, weight, None)


class Dense(nn.Linear):
    def __init__(self, mode, n_in, n_out, bias, bits):
        super().__init__(n_in, n_out, bias=bias)
        self.mode, self.bits = mode, bits

    def forward(self, x):
        weight = self.weight
        if self.mode.name == "quantize" and self.bits != 0:
            weight = quantize_weight(weight, self.bits)
        return F.linear(x, weight, self.bias)


class Unit(nn.Module):
    def __init__(self, mode, n_in, n_out, size, stride=1, linear=False, bits=None):
        super().__init__()
        self.conv, self.norm = Conv(mode, n_in, n_out, size, stride, bits), nn.BatchNorm2d(n_out)
        self.point = None if linear else Point(mode, bits)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return x if self.point is None else self.point(F.relu(x))


class Block(nn.Module):
    def __init__(self, mode, n_in, channels, stride, bottleneck):
        super().__init__()
        n_out = channels * 4 if bottleneck else channels
        inner = [Unit(mode, n_in, channels, 3, stride)]
        if bottleneck:
            inner = [Unit(mode, n_in, channels, 1), Unit(mode, channels, channels, 3, stride)]
        self.inner = nn.ModuleList(inner)
        self.outer = Unit(mode, channels, n_out, 1 if bottleneck else 3, linear=True)
        self.shortcut = None
        if stride > 1 or n_in != n_out:
            self.shortcut = Unit(mode, n_in, n_out, 1, stride, linear=True)
        self.point = Point(mode)

    def forward(self, x):
        y = x
        for unit in self.inner:
            y = unit(y)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.point(F.relu(shortcut + self.outer(y)))


class Encoder(nn.Module):
    def __init__(self, config, mode):
        super().__init__()
        n_in = config.channels[0]
        self.stem = Unit(mode, 3, n_in, 3, config.stem_stride, bits=8)
        self.stages = nn.ModuleList()
        for stage, (count, channels) in enumerate(zip(config.blocks, config.channels, strict=True)):
            blocks = nn.ModuleList()
            for index in range(count):
                stride = 2 if stage and not index else 1
                blocks.append(Block(mode, n_in, channels, stride, config.bottleneck))
                n_in = channels * 4 if config.bottleneck else channels
            self.stages.append(blocks)

    def forward(self, x):
        x = self.stem(x)
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        return x.mean((2, 3))


class Head(nn.Module):
    def __init__(self, mode, n_in, widths, last_norm, bits):
        super().__init__()
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for number, width in enumerate(widths, 1):
            last = number == len(widths)
            normed = last_norm or not last
            self.layers.append(Dense(mode, n_in, width, not normed, bits))
            norm = nn.BatchNorm1d(width, affine=not last) if normed else nn.Identity()
            self.norms.append(norm)
            n_in = width

    def forward(self, x):
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), 1):
            x = norm(layer(x))
            x = x if number == len(self.layers) else F.relu(x)
        return x


def disagreement(p, z):
    return -F.cosine_similarity(p, z.detach(), dim=-1).mean()


class SimSiam(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mode = Mode()
        self.encoder = Encoder(config.encoder, self.mode)
        self.projector = Head(self.mode, config.encoder.width, config.projector, True, 8)
        self.predictor = Head(self.mode, config.width, (config.predictor, config.width), False, 0)

    def both(self, x1, x2):
        z1, z2 = (self.projector(self.encoder(x)) for x in (x1, x2))
        return z1, z2, self.predictor(z1), self.predictor(z2)

    def loss(self, x1, x2, bits=None):
        """Of SimSiam; with (bits of weights, of activations) of SSQL."""
        if bits is None:
            z1, z2, p1, p2 = self.both(x1, x2)
            return 0.5 * (disagreement(p1, z2) + disagreement(p2, z1))
        for module in self.modules():
            if isinstance(module, Point):
                module.reset()
        self.mode.name = "observe"
        z1, z2, p1, p2 = self.both(x1, x2)
        self.mode.name, (self.mode.weight_bits, self.mode.activation_bits) = "quantize", bits
        _, _, q1, q2 = self.both(x1, x2)
        self.mode.name = "plain"
        plain = 0.5 * (disagreement(p1, z2) + disagreement(p2, z1))
        low = 0.5 * (disagreement(q1, z2) + disagreement(q2, z1))
        return 0.5 * (plain + low)


def torch_name(path: str) -> str:
    """'encoder/stem/conv/kernel' -> 'encoder.stem.conv.weight'."""
    *owner, field = path.split("/")
    field = {"kernel": "weight", "scale": "weight"}.get(field, field)
    return ".".join((*owner, field))


def to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """A kernel in PyTorch's order of axes; anything else as it is."""
    if not path.endswith("kernel"):
        return np.array(array)
    return np.ascontiguousarray(np.moveaxis(array, (-1, -2), (0, 1)))


@torch.no_grad()
def load(model: SimSiam, weights: dict[str, np.ndarray]) -> None:
    """Takes the weights of ours, by path; all must be there."""
    parameters = dict(model.named_parameters())
    given = {torch_name(path): to_torch(path, array) for path, array in weights.items()}
    if parameters.keys() != given.keys():
        raise ValueError(f"not the same parameters: {sorted(parameters.keys() ^ given.keys())}")
    for name, parameter in parameters.items():
        parameter.copy_(torch.from_numpy(given[name]))
