"""Published GE2E weights (resemblyzer 0.1.4, Apache-2.0) into our speaker encoder.

The wheel is installed with --no-deps (it asks for PyTorch and a compiler) and only its weight file
is read: by our own checkpoint reader, after its SHA-256 has been compared.
"""

import functools

import numpy as np
from flax import nnx

from t5x_audio.audio import model_files
from t5x_audio.data.speaker_embeddings import ClipEmbedder
from t5x_audio.errors import UserError
from t5x_audio.interop import torch_file
from t5x_audio.vocoder import speaker_encoder

REQUIREMENT = "--no-deps resemblyzer==0.1.4"
SHA256 = "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"


def load_speaker_encoder() -> speaker_encoder.SpeakerEncoder:
    """Loads the pretrained encoder from the installed resemblyzer wheel, without importing it.

    Raises:
      UserError: the wheel is missing or its weights are not the pinned ones.
    """
    path = model_files.find_model_file("resemblyzer", "pretrained.pt", SHA256, REQUIREMENT)
    arrays = torch_file.read_torch_file(path)
    prefix = "model_state."
    weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return from_torch(weights, speaker_encoder.SpeakerEncoderConfig())


def from_torch(
    weights: dict[str, np.ndarray], config: speaker_encoder.SpeakerEncoderConfig
) -> speaker_encoder.SpeakerEncoder:
    """Builds the encoder from a PyTorch state dict of `lstm` and `linear`.

    PyTorch keeps matrices as [out, in] and gives an LSTM two biases, which only ever act as a sum.

    Raises:
      UserError: an entry is missing or has another shape than `config` says.
    """
    encoder = config.make(nnx.Rngs(0))
    for i, layer in enumerate(encoder.layers):
        _assign(layer.input.kernel, _take(weights, f"lstm.weight_ih_l{i}").T, f"layer {i} input")
        _assign(layer.recurrent, _take(weights, f"lstm.weight_hh_l{i}").T, f"layer {i} recurrent")
        bias = _take(weights, f"lstm.bias_ih_l{i}") + _take(weights, f"lstm.bias_hh_l{i}")
        _assign(layer.input.bias, bias, f"layer {i} bias")
    _assign(encoder.projection.kernel, _take(weights, "linear.weight").T, "projection")
    _assign(encoder.projection.bias, _take(weights, "linear.bias"), "projection bias")
    return encoder


def _take(weights, name):
    if name not in weights:
        raise UserError(f"speaker encoder weights: {name} is missing; give a GE2E checkpoint")
    return weights[name]


def _assign(param, value, what: str):
    if param.shape != value.shape:
        raise UserError(
            f"speaker encoder weights: {what} has shape {value.shape}, the configuration says "
            f"{param.shape}; use the sizes the checkpoint was trained with"
        )
    param[...] = np.asarray(value, np.float32)


def clip_embedder() -> ClipEmbedder:
    """The published encoder as a function: waveforms float32 [T] at 16 kHz -> float32 [N, 256].

    It is loaded when it is first called: who makes it may still have a mesh to lay out.
    """
    load = functools.cache(load_speaker_encoder)
    return ClipEmbedder(
        lambda: f"ge2e {SHA256[:16]}", lambda waveforms: load().embed_batch(waveforms)
    )
