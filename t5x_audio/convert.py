r"""Backbones from and to Hugging Face, and from GGUF files; published tokenizers and vocoders.

    python -m t5x_audio.convert --from_hf=Step-Audio-TTS-3B --model_dir=models/tts_3b
    python -m t5x_audio.convert --from_gguf=SmolLM2-135M.Q4_1.gguf --model_dir=models/smollm2
    python -m t5x_audio.convert --model_dir=models/tts_3b --to_hf=exported
    python -m t5x_audio.convert --from_paraformer=DIR --codebook=linguistic_tokenizer.npy \
      --from_speech_tokenizer=speech_tokenizer_v1.onnx --model_dir=runs/step
    python -m t5x_audio.convert --model_dir=runs/step --to_paraformer=DIR --to_speech_tokenizer=FILE
    python -m t5x_audio.convert --from_flow=flow.pt --from_hift=hift.pt \
      --from_campplus=campplus.onnx --model_dir=runs/step

Tensors keep their type (quantised ones become float32) and pass one at a time: memory is bounded by
the largest (benchmarks/large_import.py), except in the export of a run's checkpoint, which holds
one shard of a stack of layers. What was imported from Hugging Face and not changed is exported as
the same files, byte for byte; `--dtype` and other models get files of their own.

Tokenizers become `<model_dir>/linguistic_tokenizer` and `<model_dir>/semantic`, as in a run
(docs/tokenizers.md); vocoders `flow` and `hift`: Step-Audio-TTS-3B's, which is CosyVoice-1's, and
that of its successors; `speaker_encoder`, their CAM++ (docs/vocoder.md).
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t5x_audio import launch
from t5x_audio.errors import UserError

KEPT = "hugging_face"  # under a model directory: what the next export needs
_HEADERS_FILE = "safetensors_headers.json"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".msgpack")
_TORCH_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def run(
    *,
    model_dir: str,
    from_hf: str | None = None,
    from_gguf: str | None = None,
    to_hf: str | None = None,
    dtype: str | None = None,
    from_paraformer: str | None = None,
    codebook: str | None = None,
    from_speech_tokenizer: str | None = None,
    to_paraformer: str | None = None,
    to_speech_tokenizer: str | None = None,
    from_flow: str | None = None,
    from_hift: str | None = None,
    from_campplus: str | None = None,
    to_flow: str | None = None,
    to_hift: str | None = None,
    to_campplus: str | None = None,
) -> dict[str, Any]:
    """Imports a checkpoint to `model_dir`, or exports the model there.

    Args:
      model_dir: a model directory of this project: made by an import, read by an export.
      from_hf: folder of the checkpoint to import: config.json and *.safetensors.
      from_gguf: file of llama.cpp to import.
      to_hf: folder to export to; it must not hold a checkpoint yet.
      dtype: 'bfloat16', 'float16' or 'float32' for an export; None keeps each tensor's own.
      from_paraformer: folder of FunASR to import: model.pt, am.mvn, config.yaml; with `codebook`.
      codebook: the k-means centres, a .npy file.
      from_speech_tokenizer: ONNX file of CosyVoice to import, alone or with the former.
      to_paraformer: folder to export the linguistic tokenizer to, its codebook included.
      to_speech_tokenizer: ONNX file to export the semantic tokenizer to.
      from_flow, from_hift: files of a vocoder to import, flow.pt and hift.pt, of either form.
      from_campplus: ONNX file of its speaker encoder to import.
      to_flow, to_hift, to_campplus: files to export them to.

    Returns:
      Of a backbone its family, of each model parameters and tensors, and where they went.

    Raises:
      UserError: none or several of the ways, or a checkpoint that is missing, damaged, of another
        family or with tensors that do not fit its configuration.
    """
    files_in = (from_paraformer, codebook, from_speech_tokenizer, from_flow, from_hift)
    files_in = (*files_in, from_campplus)
    files_out = (to_paraformer, to_speech_tokenizer, to_flow, to_hift, to_campplus)
    parts_in = next(filter(None, (from_paraformer, *files_in[2:])), None)
    parts_out = next(filter(None, files_out), None)
    ways = [from_hf, from_gguf, to_hf, parts_in, parts_out]
    if ways.count(None) != len(ways) - 1:
        raise UserError(
            "convert: give --from_hf=FOLDER, --from_gguf=FILE or --to_hf=FOLDER alone; or some of "
            "--from_paraformer=FOLDER, --from_speech_tokenizer=FILE, --from_flow=FILE, "
            "--from_hift=FILE and --from_campplus=FILE; or some of the same with --to_"
        )
    if (codebook is None) != (from_paraformer is None):
        raise UserError("convert: --from_paraformer=FOLDER and --codebook=FILE.npy go together")
    if dtype is not None and (to_hf is None or dtype not in _TORCH_DTYPES):
        raise UserError(f"--dtype={dtype}: for --to_hf only, one of {', '.join(_TORCH_DTYPES)}")
    if from_hf is not None:
        return import_folder(Path(from_hf), Path(model_dir))
    if from_gguf is not None:
        return import_gguf(Path(from_gguf), Path(model_dir))
    if parts_in is not None:
        return import_parts(Path(model_dir), *map(_path, files_in))
    if parts_out is not None:
        return export_parts(Path(model_dir), *map(_path, files_out))
    return export_checkpoint(Path(model_dir), Path(to_hf), dtype)


def import_folder(folder: Path, model_dir: Path) -> dict[str, Any]:
    """Imports a folder of Hugging Face; see `run`."""
    from t5x_audio.interop import hugging_face
    from t5x_audio.interop.safetensors_files import Checkpoint

    config = hugging_face.read_config(folder / "config.json")
    source = Checkpoint(folder)
    return _import(folder, config, source, model_dir, lambda kept: _keep(folder, kept, source))


def import_gguf(path: Path, model_dir: Path) -> dict[str, Any]:
    """Imports a file of llama.cpp; see `run`."""
    from t5x_audio.interop.gguf_file import GgufFile

    source = GgufFile(path)
    return _import(path, source.config, source, model_dir, lambda kept: None)


def _import(
    place: Path, config, source, model_dir: Path, keep: Callable[[Path], None]
) -> dict[str, Any]:
    """Copies the tensors of `source` to `model_dir`; `keep` puts aside what an export needs."""
    from tqdm import tqdm

    from t5x_audio.interop import hugging_face
    from t5x_audio.training import checkpoints

    hugging_face.require_tensors(place, config, source.shapes)
    tensors = hugging_face.tensors(config)
    summary = _summary(config, tensors) | {"model_dir": str(model_dir)}
    if checkpoints.checkpoint_steps(model_dir):
        checkpoints.require_same_configs(model_dir, {"model": config})
        print(f"{model_dir}: finished already", file=sys.stderr)
        return summary
    with (
        tqdm(total=len(tensors), unit="tensor", desc="import") as progress,
        checkpoints.leaving_nothing_behind(model_dir),
    ):
        keep(model_dir / KEPT)
        stacks = {
            parameter: _stack(place, source, those, progress)
            for parameter, those in _by_parameter(tensors).items()
        }
        checkpoints.save_parts(model_dir, config, stacks)
    return summary


def _by_parameter(tensors) -> dict[str, list]:
    """Parameter here -> its tensors, of a stack in the order of the layers."""
    found = {}
    for tensor in tensors:
        found.setdefault(tensor.parameter, []).append(tensor)
    return found


def _stack(place: Path, source, tensors: list, progress):
    """The parameter that these tensors make up, a part of it each."""
    from t5x_audio.training.partwise_arrays import PartwiseArray

    first = tensors[0]
    dtype = source.dtypes[first.name]
    for tensor in tensors:
        if source.dtypes[tensor.name] != dtype:
            found = source.dtypes[tensor.name]
            raise UserError(f"{place}: {tensor.name} is {found}, other layers are {dtype}")

    def read(start: int):
        tensor = tensors[start if stacked else 0]
        array = tensor.to_ours(source.read(tensor.name))
        progress.update()
        return array[None] if stacked else array

    stacked = first.layer is not None
    shape = (len(tensors), *first.inner) if stacked else first.inner
    return PartwiseArray(shape, dtype, 1 if stacked else shape[0], read)


def export_checkpoint(model_dir: Path, folder: Path, dtype: str | None) -> dict[str, Any]:
    """See `run`."""
    from tqdm import tqdm

    from t5x_audio.backbone.transformer import TransformerConfig
    from t5x_audio.interop import hugging_face
    from t5x_audio.interop.safetensors_files import INDEX_FILE, SINGLE_FILE, Writer
    from t5x_audio.training import checkpoints

    config = checkpoints.load_config(model_dir)
    if not isinstance(config, TransformerConfig):
        raise UserError(f"{model_dir}: holds a {type(config).__name__}, not a backbone")
    hugging_face.family_of(config)
    if config.soft_width:
        print(f"{model_dir}: no family has its soft_projector: left out", file=sys.stderr)
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).exists():
            raise UserError(f"{folder}: holds {name} already; give another --to_hf")
    tensors = hugging_face.tensors(config)
    stored = checkpoints.array_types(model_dir)
    writer = Writer(folder, _headers(model_dir, config, tensors, stored, dtype))
    with tqdm(total=len(tensors), unit="tensor", desc="export") as progress:
        for parameter, those in _by_parameter(tensors).items():
            array = checkpoints.open_array(model_dir, f"params/{parameter}")
            for tensor, part in _apart(array, those):
                for name in _names_of(tensor, writer.names):
                    writer.write(name, tensor.from_ours(part))
                progress.update()
    writer.finish()
    _restore_kept(model_dir / KEPT, folder, config, dtype or _torch_name(stored))
    return _summary(config, tensors) | {"hf_dir": str(folder)}


def _apart(array, tensors: list):
    """Yields (tensor, its array here) of a parameter."""
    if tensors[0].layer is None:
        yield tensors[0], array.whole()
        return
    for start, part in array:
        yield from zip(tensors[start : start + len(part)], part, strict=True)


def _summary(config, tensors) -> dict[str, Any]:
    from t5x_audio.interop import hugging_face

    return {
        "family": hugging_face.family_of(config),
        "parameters": hugging_face.count(config),
        "tensors": len(tensors),
    }


def _keep(folder: Path, kept: Path, source) -> None:
    """Puts aside all small files of a checkpoint and the headers of its large ones."""
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copy(path, kept / path.name)
    (kept / _HEADERS_FILE).write_text(json.dumps(source.headers()))


def _headers(model_dir: Path, config, tensors, stored, dtype: str | None) -> dict[str, str]:
    """Of the files to write: as they were imported, or new ones."""
    from t5x_audio.interop.safetensors_files import DTYPES, layout

    kept = model_dir / KEPT / _HEADERS_FILE
    types = {t.name: stored[f"params/{t.parameter}"] for t in tensors}
    if dtype is not None:
        types = dict.fromkeys(types, DTYPES[_TORCH_DTYPES[dtype]])
    elif kept.exists():
        headers = json.loads(kept.read_text())
        entries = {n: e for text in headers.values() for n, e in json.loads(text).items()}
        if all(
            t.name in entries
            and tuple(entries[t.name]["shape"]) == t.shape
            and DTYPES[entries[t.name]["dtype"]] == types[t.name]
            for t in tensors
        ):
            return headers
    return layout((t.name, t.shape, types[t.name]) for t in tensors)


def _names_of(tensor, names: set[str]) -> list[str]:
    """The names under which a tensor is written: a tied head may stand in the files too."""
    if tensor.parameter == "embedding" and "lm_head.weight" in names:
        return [tensor.name, "lm_head.weight"]
    return [tensor.name]


def _torch_name(stored) -> str:
    return str(next(iter(stored.values())))


def _restore_kept(kept: Path, folder: Path, config, dtype: str) -> None:
    """config.json and the tokenizer's files of an import; config.json alone for a new model."""
    from t5x_audio.interop import hugging_face

    values = hugging_face.config_values(config, dtype)
    if kept.is_dir():
        for path in kept.iterdir():
            if path.name != _HEADERS_FILE:
                shutil.copy(path, folder / path.name)
        if hugging_face.read_config(folder / "config.json") == config:
            return
        values = json.loads((kept / "config.json").read_text()) | values
    temporary = folder / "config.json.writing"
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, folder / "config.json")


def import_parts(
    model_dir: Path,
    paraformer_dir: Path | None,
    codebook: Path | None,
    onnx_file: Path | None,
    flow_file: Path | None,
    hift_file: Path | None,
    campplus_file: Path | None,
) -> dict[str, Any]:
    """See `run`. All are read and checked before anything is written."""
    from t5x_audio.interop import campplus, cosyvoice_hift, paraformer, speech_tokenizer
    from t5x_audio.serving.model_dir import RunDirectory
    from t5x_audio.training import checkpoints

    places, loaded = RunDirectory(model_dir), {}
    if paraformer_dir is not None:
        loaded[places.linguistic_tokenizer] = paraformer.load(paraformer_dir, codebook)
    if onnx_file is not None:
        loaded[places.semantic_tokenizer] = speech_tokenizer.load(onnx_file)
    if flow_file is not None:
        loaded[places.flow] = _load_flow(flow_file)
    if hift_file is not None:
        loaded[places.hift] = cosyvoice_hift.load(hift_file)
    if campplus_file is not None:
        loaded[places.speaker_encoder] = campplus.load(campplus_file)
    summary: dict[str, Any] = {"model_dir": str(model_dir)}
    for place, (model, report) in loaded.items():
        summary |= {f"{place.name}_{name}": number for name, number in report.items()}
        name = _model_name(place, places)
        if checkpoints.checkpoint_steps(place):
            checkpoints.require_same_configs(place, {name: model.config})
            print(f"{place}: finished already", file=sys.stderr)
            continue
        with checkpoints.leaving_nothing_behind(place):
            if place == places.linguistic_tokenizer:
                paraformer.keep(paraformer_dir, place / paraformer.KEPT)
            checkpoints.save_model(place, {name: model.config}, {name: model})
    return summary


def export_parts(
    model_dir: Path,
    paraformer_dir: Path | None,
    onnx_file: Path | None,
    flow_file: Path | None,
    hift_file: Path | None,
    campplus_file: Path | None,
) -> dict[str, Any]:
    """See `run`."""
    from t5x_audio.interop import campplus, cosyvoice_hift, paraformer, speech_tokenizer
    from t5x_audio.serving.model_dir import RunDirectory
    from t5x_audio.tokenizers.linguistic import LinguisticTokenizer
    from t5x_audio.tokenizers.semantic import SemanticTokenizer
    from t5x_audio.training import checkpoints
    from t5x_audio.vocoder.campplus import CamPlus
    from t5x_audio.vocoder.flow import FlowMatching
    from t5x_audio.vocoder.hift import HiftGenerator
    from t5x_audio.vocoder.paired_flow import PairedFlow

    places, summary = RunDirectory(model_dir), {}
    kept = places.linguistic_tokenizer / paraformer.KEPT
    for place, kind, path, label, save in (
        (places.linguistic_tokenizer, LinguisticTokenizer, paraformer_dir, "paraformer_dir",
         lambda model, path: paraformer.save(model, path, kept)),
        (places.semantic_tokenizer, SemanticTokenizer, onnx_file, "onnx_file",
         speech_tokenizer.save),
        (places.flow, (FlowMatching, PairedFlow), flow_file, "flow_file", _save_flow),
        (places.hift, HiftGenerator, hift_file, "hift_file", cosyvoice_hift.save),
        (places.speaker_encoder, CamPlus, campplus_file, "campplus_file", campplus.save),
    ):  # fmt: skip
        if path is None:
            continue
        model = checkpoints.load_model(place, _model_name(place, places))
        if not isinstance(model, kind):
            kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise UserError(f"{place}: holds a {type(model).__name__}, not a {kinds}")
        report = save(model, path)
        summary |= {f"{place.name}_{name}": number for name, number in report.items()}
        summary[label] = str(path)
    return summary


def _load_flow(path: Path):
    """A flow.pt of either form."""
    from t5x_audio.interop import cosyvoice_flow, stepaudio2_flow, torch_file

    paired = stepaudio2_flow.TABLE in torch_file.read_torch_file(path)
    return (stepaudio2_flow if paired else cosyvoice_flow).load(path)


def _save_flow(model, path: Path) -> dict[str, Any]:
    from t5x_audio.interop import cosyvoice_flow, stepaudio2_flow
    from t5x_audio.vocoder.paired_flow import PairedFlow

    paired = isinstance(model, PairedFlow)
    return (stepaudio2_flow if paired else cosyvoice_flow).save(model, path)


def _model_name(place: Path, places) -> str:
    """HiFT's checkpoints have a discriminator beside the generator."""
    return "generator" if place == places.hift else "model"


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _add_flags(parser) -> None:
    parser.add_argument("--from_hf", help="folder of the checkpoint to import")
    parser.add_argument("--from_gguf", help="file of llama.cpp to import")
    parser.add_argument("--to_hf", help="folder to export to")
    parser.add_argument("--dtype", help="of an export: bfloat16, float16 or float32")
    parser.add_argument("--from_paraformer", help="folder of FunASR to import")
    parser.add_argument("--codebook", help="its k-means centres, a .npy file")
    parser.add_argument("--from_speech_tokenizer", help="ONNX file of CosyVoice to import")
    parser.add_argument("--to_paraformer", help="folder to export the linguistic tokenizer to")
    parser.add_argument("--to_speech_tokenizer", help="ONNX file to export the semantic one to")
    for name in ("flow.pt", "hift.pt", "campplus.onnx"):
        flag = name.partition(".")[0]
        parser.add_argument(f"--from_{flag}", help=f"{name} to import")
        parser.add_argument(f"--to_{flag}", help=f"{name} to export to")


if __name__ == "__main__":
    launch.main("t5x_audio.convert", description=__doc__, add_flags=_add_flags)
