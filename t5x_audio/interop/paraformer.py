"""The published linguistic tokenizer from and to its files: FunASR's Paraformer and a codebook.

A folder of FunASR holds `model.pt` (a state dict), `am.mvn` (mean and scale of the stacked filter
banks, as a Kaldi network) and `config.yaml`; Step-Audio adds `linguistic_tokenizer.npy`, the
k-means centres. Only the encoder makes codes: predictor and decoder of a checkpoint are counted,
not read, and an export has none. A linear layer is [out, in] there and [in, out] here; the layers
after the first are stacked here. Every name and shape is compared before anything is made.
Sources: FunASR's models/sanm, models/scama/encoder.py and frontends/wav_frontend.py; Step-Audio's
tokenizer.py.
"""

import pathlib
import shutil
from typing import Any

import numpy as np

from t5x_audio.errors import UserError
from t5x_audio.interop import assembly, torch_file
from t5x_audio.interop.assembly import Tensor
from t5x_audio.tokenizers import linguistic
from t5x_audio.tokenizers.linguistic import LinguisticTokenizer, LinguisticTokenizerConfig
from t5x_audio.tokenizers.sanm import SanmConfig

CODEBOOK_FILE = "linguistic_tokenizer.npy"
WEIGHTS_FILE, CMVN_FILE, CONFIG_FILE = "model.pt", "am.mvn", "config.yaml"
KEPT = "paraformer"  # under a model directory: what the next export gives back
_KEPT_SUFFIXES = (".mvn", ".yaml", ".json", ".txt", ".model", "")

_CONTEXTS = {"SANMEncoderChunkOpt": "chunk", "SANMEncoder": "full"}
_WRAPPINGS = ("", "state_dict.", "model_state_dict.", "model.", "module.")
_FRONT_END = {
    "fs": 16000,
    "window": "hamming",
    "n_mels": linguistic.FBANK.num_mels,
    "frame_length": 25,
    "frame_shift": 10,
    "lfr_m": linguistic.STACKED_FRAMES,
    "lfr_n": linguistic.FRAME_STRIDE,
}
_SIZES = {  # name in encoder_conf -> field of SanmConfig
    "output_size": "width",
    "attention_heads": "num_heads",
    "linear_units": "mlp_dim",
    "num_blocks": "num_layers",
    "kernel_size": "kernel_size",
}
_STRUCTURE = {"sanm_shfit": 0, "normalize_before": True, "selfattention_layer_type": "sanm"}


def load(
    folder: pathlib.Path, codebook: pathlib.Path
) -> tuple[LinguisticTokenizer, dict[str, Any]]:
    """Reads a tokenizer.

    Args:
      folder: with model.pt, am.mvn and config.yaml.
      codebook: a .npy file of centres [K, width].

    Returns:
      (the tokenizer, {'tensors', 'parameters', 'not_used'}: how many were read, and how many of
      the checkpoint make no codes).

    Raises:
      UserError: a file is missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    encoder = read_config(folder / CONFIG_FILE)
    centres = _read_codebook(codebook, encoder.width)
    config = LinguisticTokenizerConfig(encoder, codebook_size=len(centres), text_size=0)
    path = folder / WEIGHTS_FILE
    weights, others = _encoder_weights(path)
    wanted = tensors(encoder)
    assembly.require_tensors(path, wanted, {n: a.shape for n, a in weights.items()})
    arrays = assembly.to_ours(wanted, weights)
    shift, scale = read_cmvn(folder / CMVN_FILE, encoder.input_dim)
    arrays |= {
        "count": np.float32(linguistic.MAX_COUNT),
        "mean": -shift,
        "variance": _variance(scale, folder / CMVN_FILE),
        "codebook": centres,
    }
    model = assembly.build(config, arrays)
    report = assembly.report(wanted) | {"not_used": others}
    return model, report


def save(
    model: LinguisticTokenizer, folder: pathlib.Path, kept: pathlib.Path | None = None
) -> dict[str, Any]:
    """Writes model.pt, am.mvn, config.yaml and linguistic_tokenizer.npy to `folder`.

    Args:
      model: the tokenizer; layers of supervision and the CTC head are not written.
      folder: of the files.
      kept: of `keep`: what still holds of the imported files is written as it was.

    Returns:
      {'tensors', 'parameters'} written. UserError if one of the files is there already.
    """
    encoder = model.config.encoder
    for name in (WEIGHTS_FILE, CMVN_FILE, CONFIG_FILE, CODEBOOK_FILE):
        if (folder / name).exists():
            raise UserError(f"{folder}: holds {name} already; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = tensors(encoder)
    arrays = assembly.arrays_of(model)
    torch_file.write_torch_file(folder / WEIGHTS_FILE, assembly.from_ours(wanted, arrays))
    np.save(folder / CODEBOOK_FILE, arrays["codebook"])
    shift, scale = -arrays["mean"], _scale(arrays["variance"])
    write_cmvn(folder / CMVN_FILE, shift, scale)
    (folder / CONFIG_FILE).write_text(config_text(encoder))
    if kept is not None and kept.is_dir() and read_config(kept / CONFIG_FILE) == encoder:
        before = read_cmvn(kept / CMVN_FILE, encoder.input_dim)
        for path in sorted(kept.iterdir()):
            if path.name != CMVN_FILE or np.array_equal(before, (shift, scale)):
                shutil.copy(path, folder / path.name)
    return assembly.report(wanted)


def keep(folder: pathlib.Path, kept: pathlib.Path) -> None:
    """Puts aside what `save` gives back: am.mvn, config.yaml and the text tokenizer's files."""
    kept.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _KEPT_SUFFIXES:
            shutil.copy(path, kept / path.name)


def tensors(config: SanmConfig) -> list[Tensor]:
    """Every tensor of an encoder of this configuration."""
    width, mlp = config.width, config.mlp_dim

    def linear(there: str, here: str, n_in: int, n_out: int):
        return [
            (f"{there}.weight", (n_out, n_in), f"{here}/kernel", (n_in, n_out)),
            (f"{there}.bias", (n_out,), f"{here}/bias", (n_out,)),
        ]

    def norm(there: str, here: str, size: int):
        return [
            (f"{there}.weight", (size,), f"{here}/scale", (size,)),
            (f"{there}.bias", (size,), f"{here}/bias", (size,)),
        ]

    found = [
        Tensor(f"encoder.after_norm.{name}", shape, f"encoder/final_norm/{ours}", inner, None)
        for name, shape, ours, inner in (
            ("weight", (width,), "scale", (width,)),
            ("bias", (width,), "bias", (width,)),
        )
    ]
    for layer in range(config.num_layers):
        n_in = config.input_dim if layer == 0 else width
        there = "encoder.encoders0.0" if layer == 0 else f"encoder.encoders.{layer - 1}"
        here = "encoder/first" if layer == 0 else "encoder/rest"
        rows = [
            *norm("norm1", "attention_norm", n_in),
            *linear("self_attn.linear_q_k_v", "qkv", n_in, 3 * width),
            *linear("self_attn.linear_out", "out", width, width),
            (
                "self_attn.fsmn_block.weight",
                (width, 1, config.kernel_size),
                "memory",
                (config.kernel_size, width),
            ),
            *norm("norm2", "mlp_norm", width),
            *linear("feed_forward.w_1", "up", width, mlp),
            *linear("feed_forward.w_2", "down", mlp, width),
        ]
        for name, shape, parameter, inner in rows:
            index = None if layer == 0 else layer - 1
            found.append(Tensor(f"{there}.{name}", shape, f"{here}/{parameter}", inner, index))
    return found


# ---- config.yaml ---------------------------------------------------------------------------


def read_config(path: pathlib.Path) -> SanmConfig:
    """The encoder that a config.yaml of FunASR describes.

    Raises:
      UserError: no such file, or another front end or encoder than ours.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a folder of FunASR") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: unreadable ({type(error).__name__}); fetch it again") from error
    if not isinstance(values, dict) or values.get("encoder") not in _CONTEXTS:
        found = values.get("encoder") if isinstance(values, dict) else None
        raise UserError(f"{path}: encoder is {found}, none of {', '.join(_CONTEXTS)}")
    encoder, front_end = values.get("encoder_conf") or {}, values.get("frontend_conf") or {}
    context = _CONTEXTS[values["encoder"]]
    structure = _STRUCTURE | {"input_layer": "pe_online" if context == "chunk" else "pe"}
    for section, found, wanted in (
        ("encoder_conf", encoder, structure),
        ("frontend_conf", front_end, _FRONT_END),
    ):
        for name, value in wanted.items():
            if name not in found:
                raise UserError(f"{path}: {section} lacks {name}")
            if found[name] != value:
                raise UserError(f"{path}: {section}.{name} is {found[name]}, only {value} is known")
    for name in _SIZES:
        if not isinstance(encoder.get(name), int):
            raise UserError(f"{path}: encoder_conf lacks {name}, a whole number")
    return SanmConfig(context=context, **{ours: encoder[name] for name, ours in _SIZES.items()})


def config_text(config: SanmConfig) -> str:
    """The config.yaml of an encoder: what `read_config` reads."""
    import yaml

    chunk = config.context == "chunk"
    encoder = {name: getattr(config, ours) for name, ours in _SIZES.items()}
    encoder |= _STRUCTURE | {"input_layer": "pe_online" if chunk else "pe"}
    values = {
        "model": "ParaformerStreaming" if chunk else "Paraformer",
        "encoder": {c: name for name, c in _CONTEXTS.items()}[config.context],
        "encoder_conf": encoder,
        "frontend": "WavFrontendOnline" if chunk else "WavFrontend",
        "frontend_conf": dict(_FRONT_END),
    }
    return yaml.safe_dump(values, sort_keys=False)


# ---- am.mvn --------------------------------------------------------------------------------


def read_cmvn(path: pathlib.Path, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(shift, scale), float32 [width] each: features become (features + shift) * scale."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a folder of FunASR") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({type(error).__name__}); fetch it again") from error
    found = {}
    for line, after in zip(lines, [*lines[1:], []], strict=True):
        if line[:1] in (["<AddShift>"], ["<Rescale>"]) and after[:1] == ["<LearnRateCoef>"]:
            try:  # <LearnRateCoef> 0 [ -8.3 -8.6 ... ]
                found[line[0]] = np.array([float(v) for v in after[3:-1]]).astype(np.float32)
            except ValueError as error:
                raise UserError(f"{path}: {line[0]}: {error}; fetch it again") from None
    for name in ("<AddShift>", "<Rescale>"):
        size = len(found.get(name, ()))
        if size != width:
            raise UserError(f"{path}: {name} has {size} values, {width} are wanted")
    return found["<AddShift>"], found["<Rescale>"]


def write_cmvn(path: pathlib.Path, shift: np.ndarray, scale: np.ndarray) -> None:
    """Writes an am.mvn; the inverse of `read_cmvn`, value for value."""
    size = len(shift)

    def layer(name, values):
        numbers = " ".join(np.format_float_positional(v, trim="-") for v in values)
        return [f"<{name}> {size} {size}", f"<LearnRateCoef> 0 [ {numbers} ]"]

    head = ["<Nnet>", f"<Splice> {size} {size}", "[ 0 ]"]
    lines = [*head, *layer("AddShift", shift), *layer("Rescale", scale), "</Nnet>"]
    path.write_text("\n".join(lines) + "\n")


def _variance(scale: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """Variances float32 whose `_scale` is exactly `scale`."""
    with np.errstate(divide="ignore"):
        exact = 1.0 / np.square(scale.astype(np.float64)) - linguistic.VARIANCE_FLOOR
    if not ((scale > 0) & (exact >= 0)).all():
        raise UserError(f"{path}: <Rescale> holds a scale that no variance gives; fetch it again")
    variance = exact.astype(np.float32)
    for _ in range(4):  # rounding may miss by a step
        off = _scale(variance)
        towards = np.where(off > scale, np.inf, -np.inf).astype(np.float32)
        variance = np.where(off == scale, variance, np.nextafter(variance, towards))
    return variance


def _scale(variance: np.ndarray) -> np.ndarray:
    exact = 1.0 / np.sqrt(variance.astype(np.float64) + linguistic.VARIANCE_FLOOR)
    return exact.astype(np.float32)


# ---- model.pt and the codebook -------------------------------------------------------------


def _encoder_weights(path: pathlib.Path) -> tuple[dict[str, np.ndarray], int]:
    """({name: array} of the encoder, how many other tensors there are)."""
    arrays = torch_file.read_torch_file(path)
    for wrapping in _WRAPPINGS:
        prefix = f"{wrapping}encoder."
        found = {
            name.removeprefix(wrapping): array
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
        if found:
            return found, len(arrays) - len(found)
    raise UserError(f"{path}: has no encoder.* tensors; give a Paraformer checkpoint")


def _read_codebook(path: pathlib.Path, width: int) -> np.ndarray:
    try:
        centres = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give {CODEBOOK_FILE}") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a whole .npy file of numbers; fetch it again") from error
    if not isinstance(centres, np.ndarray) or centres.ndim != 2 or centres.shape[1] != width:
        shape = getattr(centres, "shape", None)
        raise UserError(f"{path}: has shape {shape}, centres [K, {width}] are wanted")
    return centres.astype(np.float32)
