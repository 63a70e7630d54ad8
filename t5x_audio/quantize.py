r"""Packs the weights of a model, or of all parts of a run, to 8, 4, 3 or 2 bits.

    python -m t5x_audio.quantize --source=models/tts_3b --bits=4 --group=128 \
        --model_dir=models/tts_3b_4bit
    python -m t5x_audio.quantize --source=runs/demo --bits=8 --model_dir=runs/demo_8bit
    python -m t5x_audio.infer --model_dir=runs/demo_8bit --input=question.wav --output=answer.wav

What is written is a model directory, or a run directory, like the source. Weights are rounded to
the nearest integer (`quantization/packing.py`), those of a language model's embedding to 8 bits;
norms and biases stay as they are, and so do vocabulary and voice of a run. One large array is in
memory at a time, of a stack of layers one layer, beside its copy that is written. A finished part
is not made again.
"""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

from t5x_audio import launch
from t5x_audio.errors import UserError

NAMES = {"hift": "generator"}
"""Models of a run's parts that are not called 'model'."""


def run(
    *, source: str, model_dir: str, bits: int, group: int | None = None, rules: Any = None
) -> dict[str, Any]:
    """Writes the packed model, or run, of `source` to `model_dir`.

    Args:
      source: a model directory or a run directory.
      model_dir: where the packed one goes.
      bits: of a weight: 8, 4, 3 or 2.
      group: inputs of an output that share a scale, a multiple of 8; None = all of them.
      rules: `quantization.rules.Rules` that say which weights; None = all matrices and kernels,
        and of a language model the embedding.

    Returns:
      Bytes before and after, parameters, and how many of them were packed.

    Raises:
      UserError: no such width, nothing to pack there, or a finished model of other settings.
    """
    from t5x_audio.quantization import packing
    from t5x_audio.serving.model_dir import PARTS
    from t5x_audio.training import checkpoints

    place, output = Path(source), Path(model_dir)
    packing.require_width(bits, group)
    if checkpoints.checkpoint_steps(place):
        parts = {"": "model"}
    else:
        found = [part for part in PARTS if checkpoints.checkpoint_steps(place / part)]
        parts = {part: NAMES.get(part, "model") for part in found}
    if not parts:
        raise UserError(f"{place}: is neither a model directory nor a run directory with parts")
    if output.resolve() == place.resolve():
        raise UserError(f"--model_dir={output}: is the source; give another directory")
    totals = dict.fromkeys(("parameters", "packed", "bytes_before", "bytes_after"), 0)
    for part, name in parts.items():
        for key, value in _pack(place / part, output / part, name, bits, group, rules).items():
            totals[key] += value
    if "" not in parts:
        _copy_the_rest(place, output, parts)
    launch.save_operative_config(output)
    return {"model_dir": model_dir, "parts": len(parts)} | totals


def _pack(source: Path, output: Path, name: str, bits: int, group, rules) -> dict[str, int]:
    """One model; its counts."""
    from flax import nnx
    from tqdm import tqdm

    from t5x_audio.backbone.transformer import TransformerConfig
    from t5x_audio.quantization.packed_model import DEFAULT, LANGUAGE_MODEL, PackedConfig
    from t5x_audio.training import checkpoints

    old = checkpoints.load_config(source, name)
    if isinstance(old, PackedConfig):
        raise UserError(f"{source}: is packed already, to {old.bits} bits; give its source")
    usual = LANGUAGE_MODEL if isinstance(old, TransformerConfig) else DEFAULT
    config = PackedConfig(old, bits, group, rules or usual)
    model = nnx.eval_shape(lambda: old.make(nnx.Rngs(0)))
    weights = config.weights(model)
    arrays: dict[str, dict] = {"params": {}, "variables": {}}
    counts = dict.fromkeys(("parameters", "packed", "bytes_before", "bytes_after"), 0)
    stored = checkpoints.array_types(source, name)
    for full in stored:
        kind, _, path = full.partition("/")
        array = checkpoints.open_array(source, full, name)
        counts["bytes_before"] += array.nbytes
        counts["parameters"] += _size(array) if kind == "params" else 0
        made = {path: array}
        if kind == "params" and path in weights:
            made = _packed(path, array, *weights[path], group)
            counts["packed"] += _size(array)
        arrays[kind] |= made
        counts["bytes_after"] += sum(one.nbytes for one in made.values())
    if checkpoints.checkpoint_steps(output):
        checkpoints.require_same_configs(output, {name: config})
        print(f"{output}: finished already", file=sys.stderr)
        return counts
    with (
        tqdm(total=counts["bytes_after"], unit="B", unit_scale=True, desc=source.name) as progress,
        checkpoints.leaving_nothing_behind(output),
    ):
        for some in arrays.values():
            some.update({path: _counted(array, progress) for path, array in some.items()})
        checkpoints.save_parts(output, config, arrays["params"], arrays["variables"], name)
    return counts


def _size(array) -> int:
    return array.nbytes // array.dtype.itemsize


def _packed(path: str, array, weight, bits: int, stack: int, group) -> dict[str, Any]:
    """{name: array} of the integers and scales of a weight, each part made of a part of it."""
    import numpy as np

    from t5x_audio.quantization import packed_model, packing
    from t5x_audio.training.partwise_arrays import PartwiseArray

    inputs, outputs = packed_model.matrix(weight, stack)
    count, groups = packing.packed_sizes(inputs, bits, group)
    leading = array.shape[:stack]
    rows = array.rows if stack else array.shape[0]

    def part(start: int):  # asked for twice, so that nothing has to be kept
        values = array.read(start) if stack else array.whole()
        try:
            return packed_model.pack_array(values, weight, bits, group)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def made(field: str, shape: tuple[int, ...], dtype) -> PartwiseArray:
        shape = (*leading, *shape)
        return PartwiseArray(
            shape,
            np.dtype(dtype),
            rows if stack else shape[0],
            lambda start: getattr(part(start), field),
        )

    return {
        f"{path}/0": made("packed", (count, outputs), np.uint8),
        f"{path}/1": made("scales", (groups, outputs), np.float32),
    }


def _counted(array, progress):
    """`array`, whose parts move the progress."""

    def read(start: int):
        part = array.read(start)
        progress.update(part.nbytes)
        return part

    return dataclasses.replace(array, read=read)


def _copy_the_rest(source: Path, output: Path, parts) -> None:
    """Vocabulary and voice."""
    from t5x_audio.serving.model_dir import PARTS, RunDirectory
    from t5x_audio.serving.voice import answer_voice

    for part in PARTS:
        if part not in parts and (source / part).is_dir():
            shutil.copytree(source / part, output / part, dirs_exist_ok=True)
    old, new = RunDirectory(source), RunDirectory(output)
    if "flow" in parts and (old.speaker_embedding.exists() or old.tokens("spoken_qa").is_dir()):
        answer_voice(old)
        shutil.copy(old.speaker_embedding, new.speaker_embedding)


def _add_flags(parser) -> None:
    parser.add_argument("--source", help="model directory or run directory", required=True)
    parser.add_argument("--bits", type=int, help="of a weight: 8, 4, 3 or 2", required=True)
    parser.add_argument("--group", type=int, help="inputs that share a scale; default all")


if __name__ == "__main__":
    launch.main("t5x_audio.quantize", description=__doc__, add_flags=_add_flags)
