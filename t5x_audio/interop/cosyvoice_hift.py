"""CosyVoice's HiFT generator from and to `hift.pt`: at 22.05 kHz Step-Audio-TTS-3B's, at 24 kHz
that of its successors.

A state dict of PyTorch with weight norm, under either of PyTorch's names for its two factors; it is
written under the newer. The number of up-sampling stages tells the two forms apart; sizes of the
source and the iSTFT that no tensor tells are the published ones, or those of a given configuration.
Every name and shape is compared before anything is made.
Source: CosyVoice's hifigan/generator.py and hifigan/f0_predictor.py (names and layouts).
"""

import math
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from t5x_audio.errors import UserError
from t5x_audio.interop import assembly, torch_file
from t5x_audio.interop.assembly import Tensor
from t5x_audio.interop.cosyvoice_flow import count_layers
from t5x_audio.vocoder.hift import HIFT_24K, HiftConfig, HiftGenerator

_SCALE, _DIRECTION = (f"parametrizations.weight.original{i}" for i in (0, 1))
_OLDER = (
    (re.compile(r"\.weight_g$"), f".{_SCALE}"),
    (re.compile(r"\.weight_v$"), f".{_DIRECTION}"),
)
_FORWARD, _TRANSPOSED = (2, 1, 0), (2, 0, 1)  # of [out, in, k] and [in, out, k]


def load(
    path: pathlib.Path, config: HiftConfig | None = None
) -> tuple[HiftGenerator, dict[str, Any]]:
    """Reads a generator.

    Args:
      path: of hift.pt.
      config: its sizes; None = those of the release that has as many stages.

    Returns:
      (the generator, {'tensors', 'parameters'}: how many were read).

    Raises:
      UserError: the file is missing or damaged, or a tensor is missing, unknown or of another
        shape.
    """
    weights = {_newer(name): a for name, a in torch_file.read_torch_file(path).items()}
    config = config or published(weights)
    return assembly.load_torch(path, config, tensors(config), weights)


def published(names: Iterable[str]) -> HiftConfig:
    """Of the published forms the one that tensors of these (newer) names belong to."""
    stages = count_layers(names, "ups.", "bias")
    return HIFT_24K if stages == len(HIFT_24K.upsample_rates) else HiftConfig()


def save(model: HiftGenerator, path: pathlib.Path) -> dict[str, Any]:
    """Writes a hift.pt.

    Args:
      model: a generator of the published form.
      path: of the file.

    Returns:
      {'tensors', 'parameters'} written.

    Raises:
      UserError: the file is there already, or the model works otherwise than the published one.
    """
    config = model.config
    form = HIFT_24K if config.sample_rate == HIFT_24K.sample_rate else HiftConfig()
    names = ("filters_source", "filters_noise", "envelope_fmax", "phase_range")
    names += ("random_phase", "source_phase")
    for name in names:
        ours, theirs = getattr(config, name), getattr(form, name)
        if ours != theirs:
            raise UserError(f"hift: {name} is {ours}; a hift.pt has {theirs}")
    return assembly.save_torch(model, path, tensors(config))


def tensors(config: HiftConfig) -> list[Tensor]:
    """Every tensor of a generator of this configuration."""
    widths = [config.base_channels // 2**i for i in range(len(config.upsample_rates) + 1)]
    bins, waves = config.istft_n_fft + 2, config.num_harmonics + 1
    found = [
        *_f0_predictor(config),
        Tensor("m_source.l_linear.weight", (1, waves), "source/merge/kernel", (waves, 1), None),
        Tensor("m_source.l_linear.bias", (1,), "source/merge/bias", (1,), None),
        *_normed("conv_pre", "conv_pre", (config.base_channels, config.num_mels, 7)),
        *_normed("conv_post", "conv_post", (bins, widths[-1], 7)),
    ]
    for i, width in enumerate(widths[1:]):
        up = (widths[i], width, config.upsample_kernels[i])
        found += _normed(f"ups.{i}", f"upsamples/{i}", up, _TRANSPOSED)
        factor = math.prod(config.upsample_rates[i + 1 :])
        down = (width, bins, 1 if factor == 1 else 2 * factor)
        found += _plain(f"source_downs.{i}", f"source_downs/{i}", down)
        source = config.source_kernels[i]
        found += _block(f"source_resblocks.{i}", f"source_blocks/{i}", width, source, config)
        for j, size in enumerate(config.resblock_kernels):
            name = f"resblocks.{i * len(config.resblock_kernels) + j}"
            found += _block(name, f"blocks/{i}/{j}", width, size, config)
    return found


def _f0_predictor(config: HiftConfig) -> Iterator[Tensor]:
    n_in, width = config.num_mels, config.f0_channels
    for i in range(config.f0_layers):
        ours = f"f0_predictor/convolutions/{i}"
        yield from _normed(f"f0_predictor.condnet.{2 * i}", ours, (width, n_in, 3))
        n_in = width
    name, ours = "f0_predictor.classifier", "f0_predictor/classifier"
    yield Tensor(f"{name}.weight", (1, width), f"{ours}/kernel", (width, 1), None)
    yield Tensor(f"{name}.bias", (1,), f"{ours}/bias", (1,), None)


def _block(there: str, here: str, width: int, size: int, config: HiftConfig) -> Iterator[Tensor]:
    for i in range(len(config.resblock_dilations)):
        for number, convolution, snake in ((1, "dilated", "snakes_in"), (2, "plain", "snakes_out")):
            shape = (width, width, size)
            yield from _normed(f"{there}.convs{number}.{i}", f"{here}/{convolution}/{i}", shape)
            name = f"{there}.activations{number}.{i}.alpha"
            yield Tensor(name, (width,), f"{here}/{snake}/{i}/alpha", (width,), None)


def _normed(there: str, here: str, shape: tuple, axes: tuple = _FORWARD) -> Iterator[Tensor]:
    """A convolution with weight norm over the first axis of its weight of this shape."""
    n_out = shape[1] if axes == _TRANSPOSED else shape[0]
    inner = tuple(shape[axis] for axis in axes)
    yield Tensor(f"{there}.{_SCALE}", (shape[0], 1, 1), f"{here}/scale", shape[:1], None)
    yield Tensor(f"{there}.{_DIRECTION}", shape, f"{here}/kernel", inner, None, axes)
    yield Tensor(f"{there}.bias", (n_out,), f"{here}/bias", (n_out,), None)


def _plain(there: str, here: str, shape: tuple) -> Iterator[Tensor]:
    yield Tensor(f"{there}.weight", shape, f"{here}/kernel", shape[::-1], None, _FORWARD)
    yield Tensor(f"{there}.bias", shape[:1], f"{here}/bias", shape[:1], None)


def _newer(name: str) -> str:
    name = name.removeprefix("generator.")  # as it is trained, and as Step-Audio 2 has it
    for older, newer in _OLDER:
        name = older.sub(newer, name)
    return name
