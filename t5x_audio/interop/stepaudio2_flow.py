"""The flow of Step-Audio's successors from and to their `flow.pt`: paired codes, conformer, DiT.

A state dict of PyTorch. Sizes are read off the tensors; conventions are those of `cosyvoice_flow`.
Every name and shape is compared before anything is made.
Source: Step-Audio-EditX's stepvocoder/cosyvoice2 and stepaudio2's cosyvoice2 (names and layouts).
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from t5x_audio.errors import UserError
from t5x_audio.interop import assembly, torch_file
from t5x_audio.interop.assembly import Tensor
from t5x_audio.interop.cosyvoice_flow import (
    convolution_rows,
    count_layers,
    linear_rows,
    make_tensor,
    norm_rows,
    relative_block_rows,
    require_shape,
)
from t5x_audio.vocoder.conformer import ConformerConfig
from t5x_audio.vocoder.dit import TIME_WIDTH, DitConfig
from t5x_audio.vocoder.paired_flow import PairedFlow, PairedFlowConfig
from t5x_audio.vocoder.upsampling_conformer import UpsamplingConformerConfig

TABLE = "input_embedding.embedding.weight"  # which no other flow has
_ESTIMATOR = "decoder.estimator"


def load(path: pathlib.Path) -> tuple[PairedFlow, dict[str, Any]]:
    """Reads a flow.

    Args:
      path: of flow.pt.

    Returns:
      (the flow at 24 kHz with a hop of 480, {'tensors', 'parameters'}: how many were read).

    Raises:
      UserError: the file is missing or damaged, or a tensor is missing, unknown or of another
        shape.
    """
    weights = torch_file.read_torch_file(path)
    config = config_of(path, {name: tuple(array.shape) for name, array in weights.items()})
    return assembly.load_torch(path, config, tensors(config), weights)


def save(model: PairedFlow, path: pathlib.Path) -> dict[str, Any]:
    """Writes a flow.pt.

    Args:
      model: a flow on mels as they are.
      path: of the file.

    Returns:
      {'tensors', 'parameters'} written.

    Raises:
      UserError: the file is there already, or the model has scales that the file has not.
    """
    config = model.config
    if (config.mel_mean, config.mel_std) != (0.0, 1.0):
        raise UserError("flow: its mels are standardised; a flow.pt has mel_mean 0, mel_std 1")
    if config.encoder.blocks.convolution_kernel is not None:
        raise UserError("flow: encoder.convolution_kernel is set; a flow.pt has no convolution")
    return assembly.save_torch(model, path, tensors(config))


def config_of(place, shapes: Mapping[str, tuple[int, ...]]) -> PairedFlowConfig:
    """The sizes of a state dict of these shapes; UserError when what tells them is missing."""

    def shape(name: str) -> tuple[int, ...]:
        return require_shape(place, shapes, name, "flow of paired codes")

    rows, half = shape(TABLE)
    num_mels, speaker_dim = shape("spk_embed_affine_layer.weight")
    heads, _ = shape("encoder.encoders.0.self_attn.pos_bias_u")
    up_kernel = shape("encoder.up_layer.conv.weight")[2]
    head_dim = shape(f"{_ESTIMATOR}.blocks.0.attn.q_norm.weight")[0]
    return PairedFlowConfig(
        codebook=rows - 1,
        num_mels=num_mels,
        speaker_dim=speaker_dim,
        encoder=UpsamplingConformerConfig(
            blocks=ConformerConfig(
                width=2 * half,
                num_layers=count_layers(shapes, "encoder.encoders.", "norm_mha.weight"),
                num_heads=heads,
                mlp_dim=shape("encoder.encoders.0.feed_forward.w_1.weight")[0],
            ),
            num_up_layers=count_layers(shapes, "encoder.up_encoders.", "norm_mha.weight"),
            look_ahead=shape("encoder.pre_lookahead_layer.conv1.weight")[2] - 1,
            up_factor=(up_kernel - 1) // 2,
        ),
        estimator=DitConfig(
            width=shape(f"{_ESTIMATOR}.in_proj.weight")[0],
            num_layers=count_layers(shapes, f"{_ESTIMATOR}.blocks.", "attn.proj.weight"),
            num_heads=shape(f"{_ESTIMATOR}.blocks.0.attn.to_q.weight")[0] // head_dim,
            head_dim=head_dim,
            mlp_dim=shape(f"{_ESTIMATOR}.blocks.0.mlp.fc1.weight")[0],
            kernel_size=shape(f"{_ESTIMATOR}.blocks.0.conv.block.1.weight")[2],
        ),
    )


def tensors(config: PairedFlowConfig) -> list[Tensor]:
    """Every tensor of a flow of this configuration."""
    width, mels = config.encoder.width, config.num_mels
    rows = [
        (TABLE, (config.codebook + 1, width // 2), "embedding/embedding", None, (0, 1)),
        *linear_rows("spk_embed_affine_layer", "speaker", config.speaker_dim, mels),
        *linear_rows("encoder_proj", "project", width, mels),
        *_encoder(config.encoder),
        *_estimator(config.estimator, mels),
    ]
    return [make_tensor(*row) for row in rows]


def _encoder(config: UpsamplingConformerConfig) -> Iterator[tuple]:
    width = config.width
    ahead = "encoder.pre_lookahead_layer"
    yield from convolution_rows(
        f"{ahead}.conv1", "encoder/ahead", width, width, config.look_ahead + 1
    )
    yield from convolution_rows(f"{ahead}.conv2", "encoder/back", width, width, 3)
    up = 2 * config.up_factor + 1
    yield from convolution_rows("encoder.up_layer.conv", "encoder/up", width, width, up)
    yield from norm_rows("encoder.after_norm", "encoder/final_norm", width)
    for prefix, part, layers in (
        ("", "low", config.blocks.num_layers),
        ("up_", "high", config.num_up_layers),
    ):
        there, here = f"encoder.{prefix}embed.out", f"encoder/{part}"
        yield from linear_rows(f"{there}.0", f"{here}/embed", width, width)
        yield from norm_rows(f"{there}.1", f"{here}/embed_norm", width)
        for layer in range(layers):
            name = f"encoder.{prefix}encoders.{layer}"
            yield from relative_block_rows(name, f"{here}/layers", config.blocks, layer)


def _estimator(config: DitConfig, mels: int) -> Iterator[tuple]:
    width, inner = config.width, config.num_heads * config.head_dim
    here = "estimator"
    yield from linear_rows(f"{_ESTIMATOR}.t_embedder.mlp.0", f"{here}/time_in", TIME_WIDTH, width)
    yield from linear_rows(f"{_ESTIMATOR}.t_embedder.mlp.2", f"{here}/time_out", width, width)
    yield from linear_rows(f"{_ESTIMATOR}.in_proj", f"{here}/in_project", 4 * mels, width)
    final = f"{_ESTIMATOR}.final_layer"
    yield from linear_rows(f"{final}.adaLN_modulation.1", f"{here}/modulation", width, 2 * width)
    yield from linear_rows(f"{final}.linear", f"{here}/out_project", width, mels)
    for layer in range(config.num_layers):
        there, ours = f"{_ESTIMATOR}.blocks.{layer}", f"{here}/blocks"
        for letter, part in (("q", "query"), ("k", "key"), ("v", "value")):
            name = f"{there}.attn.to_{letter}"
            yield from linear_rows(name, f"{ours}/{part}", width, inner, layer)
        for letter, part in (("q", "query_norm"), ("k", "key_norm")):
            name = f"{there}.attn.{letter}_norm"
            yield from norm_rows(name, f"{ours}/{part}", config.head_dim, layer)
        yield from linear_rows(f"{there}.attn.proj", f"{ours}/out", inner, width, layer)
        yield from linear_rows(f"{there}.mlp.fc1", f"{ours}/up", width, config.mlp_dim, layer)
        yield from linear_rows(f"{there}.mlp.fc2", f"{ours}/down", config.mlp_dim, width, layer)
        for number, part in ((1, "first"), (6, "second")):
            name, place = f"{there}.conv.block.{number}", f"{ours}/convolutions/{part}"
            yield from convolution_rows(name, place, width, width, config.kernel_size, layer)
        yield from norm_rows(f"{there}.conv.block.3", f"{ours}/convolutions/norm", width, layer)
        name = f"{there}.adaLN_modulation.1"
        yield from linear_rows(name, f"{ours}/modulation", width, 9 * width, layer)
