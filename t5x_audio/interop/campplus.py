"""The published speaker encoder from and to its file: `campplus.onnx` of CosyVoice and Step-Audio.

The graph takes features float32 [B, T, 80] ('input') and gives float32 [B, 192] ('output'). Sizes
are read off the file. Batch norms that its exporter folded into convolutions act as published, but
have no statistics of their own left: a training that goes on takes those of its batches.
"""

import functools
import hashlib
import os
import pathlib
from typing import Any

import numpy as np

from t5x_audio.data.speaker_embeddings import ClipEmbedder
from t5x_audio.errors import UserError
from t5x_audio.interop import assembly, campplus_graph, campplus_units
from t5x_audio.interop.assembly import Tensor
from t5x_audio.training import checkpoints
from t5x_audio.vocoder.campplus import CamPlus, CamPlusConfig

FOLDER = "speaker_encoder"  # under a run directory


def load(path: pathlib.Path) -> tuple[CamPlus, dict[str, Any]]:
    """Reads an encoder.

    Returns:
      (the encoder, in evaluation mode; {'tensors', 'parameters', 'folded_norms'}: how many were
      read, and how many norms the exporter had folded).

    Raises:
      UserError: missing, damaged, or another graph: what differs is named.
    """
    config, arrays, folded = campplus_graph.read(path)
    wanted = tensors(config)
    assembly.require_tensors(path, wanted, {name: a.shape for name, a in arrays.items()})
    model = assembly.build(config, assembly.to_ours(wanted, arrays))
    model.eval()
    return model, assembly.report(wanted) | {"folded_norms": folded}


def save(model: CamPlus, path: pathlib.Path) -> dict[str, Any]:
    """Writes the graph of an encoder; the classes of a training are no part of it.

    Returns:
      {'tensors', 'parameters'} written. UserError if the file is there already.
    """
    if path.exists():
        raise UserError(f"{path}: is there already; give another file")
    wanted = tensors(model.config)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = assembly.from_ours(wanted, assembly.arrays_of(model))
    campplus_graph.write(path, arrays, model.config)
    return assembly.report(wanted)


def tensors(config: CamPlusConfig) -> list[Tensor]:
    """Every tensor of an encoder of this configuration, statistics of batch norms included."""
    found = []
    for unit in campplus_units.units(config):
        kernel = unit.shape[::-1]
        if "convolution" not in unit.here and not unit.here.endswith("/local"):
            kernel = kernel[-2:]  # a linear layer
        name = f"{unit.here}/kernel"
        found.append(Tensor(f"{unit.there}.weight", unit.shape, name, kernel, None))
        if unit.bias:
            bias = unit.shape[:1]
            found.append(Tensor(f"{unit.there}.bias", bias, f"{unit.here}/bias", bias, None))
        affine = campplus_units.is_affine(unit)
        norms = ((unit.before, unit.shape[1], True), (unit.after, unit.shape[0], affine))
        for norm, width, with_scale in norms:
            if norm is None:
                continue
            for theirs, ours in campplus_units.NORM.items():
                if with_scale or theirs.startswith("running"):
                    place = f"{norm[1]}/{ours}"
                    found.append(Tensor(f"{norm[0]}.{theirs}", (width,), place, (width,), None))
    return found


def clip_embedder(run_dir: str) -> ClipEmbedder:
    """The encoder of a run as a function: waveforms float32 [T] at 16 kHz -> float32 [N, D].

    It is loaded when it is first asked for: who makes it may still have a mesh to lay out.

    Args:
      run_dir: holds speaker_encoder/, imported or trained.
    """

    @functools.cache
    def encoder() -> CamPlus:
        folder = os.path.join(run_dir, FOLDER)
        model = checkpoints.load_model(folder)
        if not isinstance(model, CamPlus):
            raise UserError(f"{folder}: holds a {type(model).__name__}, not a CamPlus")
        return model

    return ClipEmbedder(
        lambda: f"campplus {fingerprint(encoder())}",
        lambda waveforms: encoder().embed_batch(waveforms),
    )


def fingerprint(model: CamPlus) -> str:
    """Changes when a weight or a statistic does."""
    digest = hashlib.sha256()
    arrays = assembly.arrays_of(model)
    for tensor in tensors(model.config):
        digest.update(np.ascontiguousarray(arrays[tensor.parameter]).tobytes())
    return digest.hexdigest()[:16]
