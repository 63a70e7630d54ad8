"""CosyVoice-1's flow model from and to `flow.pt`, the form of Step-Audio-TTS-3B.

A state dict of PyTorch. Sizes are read off the tensors; a head of the estimator has 64 channels,
which no tensor tells. A linear layer is [out, in] there and [in, out] here, a convolution
[out, in, k] and [k, in, out]; the conformer's layers, the blocks of a stage and the middle stages
are stacked here. Every name and shape is compared before anything is made.
Source: CosyVoice's flow/flow.py, flow/decoder.py and transformer/encoder.py, Matcha-TTS's
models/components (modules' names and layouts).
"""

import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from t5x_audio.errors import UserError
from t5x_audio.interop import assembly, torch_file
from t5x_audio.interop.assembly import Tensor
from t5x_audio.vocoder.conformer import ConformerConfig
from t5x_audio.vocoder.flow import FlowConfig, FlowMatching
from t5x_audio.vocoder.unet import UnetConfig

HEAD_DIM = 64
_TRANSPOSED = (2, 0, 1)  # of [in, out, k], a transposed convolution


def load(path: pathlib.Path) -> tuple[FlowMatching, dict[str, Any]]:
    """Reads a flow.

    Args:
      path: of flow.pt.

    Returns:
      (the flow at 22.05 kHz with a hop of 256, {'tensors', 'parameters'}: how many were read).

    Raises:
      UserError: the file is missing or damaged, or a tensor is missing, unknown or of another
        shape.
    """
    weights = torch_file.read_torch_file(path)
    config = config_of(path, {name: tuple(array.shape) for name, array in weights.items()})
    return assembly.load_torch(path, config, tensors(config), weights)


def save(model: FlowMatching, path: pathlib.Path) -> dict[str, Any]:
    """Writes a flow.pt.

    Args:
      model: a flow of the published form.
      path: of the file.

    Returns:
      {'tensors', 'parameters'} written.

    Raises:
      UserError: the file is there already, or the model has parts or scales that the file has not.
    """
    require_published_form(model.config)
    return assembly.save_torch(model, path, tensors(model.config))


def require_published_form(config: FlowConfig) -> None:
    """UserError naming the first setting that a flow.pt cannot say."""
    published = {
        "residual_std": None,
        "regulator_residual": False,
        "mel_mean": 0.0,
        "mel_std": 1.0,
    }
    for name, value in published.items():
        if getattr(config, name) != value:
            raise UserError(f"flow: {name} is {getattr(config, name)}; a flow.pt has {value}")
    if config.encoder.convolution_kernel is not None:
        raise UserError("flow: encoder.convolution_kernel is set; a flow.pt has no convolution")
    if config.estimator.head_dim != HEAD_DIM:
        found = config.estimator.head_dim
        raise UserError(f"flow: estimator.head_dim is {found}; a flow.pt is read with {HEAD_DIM}")


def config_of(place, shapes: Mapping[str, tuple[int, ...]]) -> FlowConfig:
    """The sizes of a state dict of these shapes; UserError when what tells them is missing."""

    def shape(name: str) -> tuple[int, ...]:
        return require_shape(place, shapes, name, "flow of CosyVoice-1")

    def count(prefix: str, suffix: str) -> int:
        return count_layers(shapes, prefix, suffix)

    codebook, width = shape("input_embedding.weight")
    num_mels, speaker_dim = shape("spk_embed_affine_layer.weight")
    heads = shape("encoder.encoders.0.self_attn.pos_bias_u")[0]
    estimator = "decoder.estimator."
    num_stages = count(f"{estimator}down_blocks.", "0.res_conv.weight")
    return FlowConfig(
        codebook=codebook,
        num_mels=num_mels,
        speaker_dim=speaker_dim,
        encoder=ConformerConfig(
            width=width,
            num_layers=count("encoder.encoders.", "norm_mha.weight"),
            num_heads=heads,
            mlp_dim=shape("encoder.encoders.0.feed_forward.w_1.weight")[0],
        ),
        regulator_layers=(count("length_regulator.model.", "weight") - 1) // 3,
        estimator=UnetConfig(
            channels=tuple(
                shape(f"{estimator}down_blocks.{i}.0.res_conv.weight")[0] for i in range(num_stages)
            ),
            num_mid_stages=count(f"{estimator}mid_blocks.", "0.res_conv.weight"),
            num_blocks=count(f"{estimator}down_blocks.0.1.", "norm1.weight"),
            num_heads=shape(f"{estimator}down_blocks.0.1.0.attn1.to_q.weight")[0] // HEAD_DIM,
            head_dim=HEAD_DIM,
        ),
    )


def require_shape(place, shapes: Mapping[str, tuple[int, ...]], name: str, kind: str):
    """The shape of a tensor; UserError when it is missing, so that this is no `kind`."""
    if name not in shapes:
        raise UserError(f"{place}: lacks {name}; it is no {kind}")
    return shapes[name]


def count_layers(names: Iterable[str], prefix: str, suffix: str) -> int:
    """How many layers have a tensor `<prefix><layer>.<suffix>`."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\." + re.escape(suffix))
    found = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
    return max(found, default=-1) + 1


def tensors(config: FlowConfig) -> list[Tensor]:
    """Every tensor of a flow of this configuration."""
    width, mels = config.encoder.width, config.num_mels
    rows = [
        ("input_embedding.weight", (config.codebook, width), "embedding/embedding", None, (0, 1)),
        *linear_rows("spk_embed_affine_layer", "speaker", config.speaker_dim, mels),
        *linear_rows("encoder_proj", "project", width, mels),
        *_encoder(config.encoder),
        *_regulator(config),
        *_estimator(config),
    ]
    return [make_tensor(*row) for row in rows]


# ---- rows (name there, shape, name here, layer, axes or None), for the successor's flow too ----


def make_tensor(there, shape, here, layer, axes) -> Tensor:
    """Of a row."""
    axes = axes or tuple(range(len(shape)))[::-1]
    return Tensor(there, shape, here, tuple(shape[axis] for axis in axes), layer, axes)


def linear_rows(there, here, n_in, n_out, layer=None, bias=True) -> Iterator[tuple]:
    """A linear layer."""
    yield f"{there}.weight", (n_out, n_in), f"{here}/kernel", layer, None
    if bias:
        yield f"{there}.bias", (n_out,), f"{here}/bias", layer, None


def norm_rows(there, here, size, layer=None) -> Iterator[tuple]:
    """A layer norm or group norm."""
    yield f"{there}.weight", (size,), f"{here}/scale", layer, None
    yield f"{there}.bias", (size,), f"{here}/bias", layer, None


def convolution_rows(there, here, n_in, n_out, size, layer=None) -> Iterator[tuple]:
    """A convolution over time."""
    yield f"{there}.weight", (n_out, n_in, size), f"{here}/kernel", layer, None
    yield f"{there}.bias", (n_out,), f"{here}/bias", layer, None


def relative_block_rows(
    there: str, here: str, config: ConformerConfig, layer: int
) -> Iterator[tuple]:
    """A conformer block without convolution."""
    width, heads = config.width, (config.num_heads, config.width // config.num_heads)
    attention, ours = f"{there}.self_attn", f"{here}/attention"
    for name, part in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
        yield from linear_rows(f"{attention}.linear_{name}", f"{ours}/{part}", width, width, layer)
    position = f"{ours}/position"
    yield from linear_rows(f"{attention}.linear_pos", position, width, width, layer, bias=False)
    yield f"{attention}.pos_bias_u", heads, f"{ours}/content_bias", layer, (0, 1)
    yield f"{attention}.pos_bias_v", heads, f"{ours}/position_bias", layer, (0, 1)
    up, down = f"{there}.feed_forward.w_1", f"{there}.feed_forward.w_2"
    yield from linear_rows(up, f"{here}/up", width, config.mlp_dim, layer)
    yield from linear_rows(down, f"{here}/down", config.mlp_dim, width, layer)
    yield from norm_rows(f"{there}.norm_mha", f"{here}/attention_norm", width, layer)
    yield from norm_rows(f"{there}.norm_ff", f"{here}/mlp_norm", width, layer)


def _encoder(config: ConformerConfig) -> Iterator[tuple]:
    width = config.width
    yield from linear_rows("encoder.embed.out.0", "encoder/embed", width, width)
    yield from norm_rows("encoder.embed.out.1", "encoder/embed_norm", width)
    yield from norm_rows("encoder.after_norm", "encoder/final_norm", width)
    for layer in range(config.num_layers):
        name = f"encoder.encoders.{layer}"
        yield from relative_block_rows(name, "encoder/layers", config, layer)


def _regulator(config: FlowConfig) -> Iterator[tuple]:
    mels, there = config.num_mels, "length_regulator.model"
    for i in range(config.regulator_layers):
        yield from convolution_rows(
            f"{there}.{3 * i}", f"regulator/convolutions/{i}", mels, mels, 3
        )
        yield from norm_rows(f"{there}.{3 * i + 1}", f"regulator/norms/{i}", mels)
    yield from convolution_rows(
        f"{there}.{3 * config.regulator_layers}", "regulator/out", mels, mels, 1
    )


def _estimator(config: FlowConfig) -> Iterator[tuple]:
    there, unet, mels = "decoder.estimator", config.estimator, config.num_mels
    channels, n_in = unet.channels, 4 * mels
    time_dim = 4 * channels[0]
    yield from linear_rows(f"{there}.time_mlp.linear_1", "estimator/time_in", n_in, time_dim)
    yield from linear_rows(f"{there}.time_mlp.linear_2", "estimator/time_out", time_dim, time_dim)
    last = len(channels) - 1
    for i, (before, after) in enumerate(zip((n_in, *channels), channels, strict=False)):
        name = f"{there}.down_blocks.{i}"
        yield from _stage(name, f"estimator/down/{i}", before, after, unet)
        halved = f"{name}.2.conv" if i < last else f"{name}.2"
        yield from convolution_rows(halved, f"estimator/down_convs/{i}", after, after, 3)
    for i in range(unet.num_mid_stages):
        name = f"{there}.mid_blocks.{i}"
        yield from _stage(name, "estimator/mid", channels[-1], channels[-1], unet, i)
    up = (*channels[::-1], channels[0])
    for i, (before, after) in enumerate(zip(up, up[1:], strict=False)):
        name, ours = f"{there}.up_blocks.{i}", f"estimator/up_convs/{i}"
        yield from _stage(name, f"estimator/up/{i}", 2 * before, after, unet)
        if i < last:
            yield f"{name}.2.conv.weight", (after, after, 4), f"{ours}/kernel", None, _TRANSPOSED
            yield f"{name}.2.conv.bias", (after,), f"{ours}/bias", None, None
        else:
            yield from convolution_rows(f"{name}.2", ours, after, after, 3)
    yield from convolution_rows(
        f"{there}.final_block.block.0", "estimator/final/conv", up[-1], up[-1], 3
    )
    yield from norm_rows(f"{there}.final_block.block.1", "estimator/final/norm", up[-1])
    yield from convolution_rows(f"{there}.final_proj", "estimator/project", up[-1], mels, 1)


def _stage(there, here, n_in, n_out, unet: UnetConfig, layer=None) -> Iterator[tuple]:
    """A residual block and its transformer blocks; `layer` of the stack of middle stages."""
    residual, ours = f"{there}.0", f"{here}/residual"
    for block, part, size in (("block1", "first", n_in), ("block2", "second", n_out)):
        name = f"{residual}.{block}.block"
        yield from convolution_rows(f"{name}.0", f"{ours}/{part}/conv", size, n_out, 3, layer)
        yield from norm_rows(f"{name}.1", f"{ours}/{part}/norm", n_out, layer)
    time_dim = 4 * unet.channels[0]
    yield from linear_rows(f"{residual}.mlp.1", f"{ours}/time", time_dim, n_out, layer)
    yield from convolution_rows(f"{residual}.res_conv", f"{ours}/skip", n_in, n_out, 1, layer)
    inner, blocks = unet.num_heads * unet.head_dim, f"{here}/blocks"
    for i in range(unet.num_blocks):
        name, index = f"{there}.1.{i}", i if layer is None else (layer, i)
        yield from norm_rows(f"{name}.norm1", f"{blocks}/attention_norm", n_out, index)
        for letter, part in (("q", "query"), ("k", "key"), ("v", "value")):
            query = f"{name}.attn1.to_{letter}"
            yield from linear_rows(query, f"{blocks}/{part}", n_out, inner, index, bias=False)
        yield from linear_rows(f"{name}.attn1.to_out.0", f"{blocks}/out", inner, n_out, index)
        yield from norm_rows(f"{name}.norm3", f"{blocks}/mlp_norm", n_out, index)
        yield from linear_rows(f"{name}.ff.net.0.proj", f"{blocks}/up", n_out, 4 * n_out, index)
        yield from linear_rows(f"{name}.ff.net.2", f"{blocks}/down", 4 * n_out, n_out, index)
