# ruff: noqa: E402
"""Imports and exports a checkpoint of the 3B's shape (7 GB): time, memory, and the same bytes back.

    python benchmarks/large_import.py --folder=runs/large_import

The checkpoint is made of random bits in the names and shapes of Step-Audio-TTS-3B, in bfloat16 and
several files, as published. Import and export are the entry points of users, in processes of their
own. Memory is what they hold themselves, the highest of looks 20 ms apart; pages of the files that
are mapped belong to the system, which may take them back. Needs 22 GB of disk; a folder that is
there already is not written to.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import sys

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import ml_dtypes
import numpy as np
import safetensors.numpy

from benchmarks.processes import run_python
from benchmarks.sizes import backbone, macros
from t5x_audio.interop import hugging_face

FILES = 5
CONVERT = ("-m", "t5x_audio.convert")


def write_checkpoint(folder: pathlib.Path, size: str) -> int:
    """Random tensors of the size's backbone, file by file; returns their bytes."""
    values = macros(size)
    config = backbone(values)
    folder.mkdir(parents=True)
    described = {
        "model_type": "step1", "hidden_size": config.embed, "intermediate_size": config.mlp,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_attention_groups": config.num_kv_heads, "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_eps, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described))
    tensors, rng = hugging_face.tensors(config), np.random.default_rng(0)
    shares = np.array_split(np.arange(len(tensors)), FILES)
    where, total = {}, 0
    for number, share in enumerate(shares, 1):
        name = f"model-{number:05d}-of-{FILES:05d}.safetensors"
        part = {tensors[i].name: random_bits(rng, tensors[i].shape) for i in share}
        safetensors.numpy.save_file(part, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
        total += sum(array.nbytes for array in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def random_bits(rng, shape) -> np.ndarray:
    """Any bfloat16 between -1 and 1, small ones and zeros among them."""
    bits = rng.integers(0, 0x3F80, shape, np.uint16)
    bits |= rng.integers(0, 2, shape, np.uint16) << 15
    return bits.view(ml_dtypes.bfloat16)


def digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file with weights."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/large_import"))
    parser.add_argument("--size", default="step1_3b", help="a file of gin/models")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    if flags.folder.exists():
        sys.exit(f"error: {flags.folder} exists already; remove it or give another --folder")
    there, model, back = (str(flags.folder / name) for name in ("hf", "model", "back"))
    total = write_checkpoint(pathlib.Path(there), flags.size)
    imported, import_memory = run_python(*CONVERT, f"--from_hf={there}", f"--model_dir={model}")
    exported, export_memory = run_python(*CONVERT, f"--model_dir={model}", f"--to_hf={back}")
    same = digests(pathlib.Path(there)) == digests(pathlib.Path(back))
    shutil.rmtree(flags.folder)
    report = {
        "gigabytes": total / 1e9, "import_seconds": imported, "export_seconds": exported,
        "import_memory_gigabytes": import_memory, "export_memory_gigabytes": export_memory,
        "same_bytes": same,
    }  # fmt: skip
    print(json.dumps(report) if flags.json else _table(report))
    if not same:
        sys.exit("error: the exported files differ from the imported ones")


def _table(report) -> str:
    return (
        f"{report['gigabytes']:.2f} GB: import {report['import_seconds']:.0f} s with "
        f"{report['import_memory_gigabytes']:.2f} GB of memory, export "
        f"{report['export_seconds']:.0f} s with {report['export_memory_gigabytes']:.2f} GB; "
        f"same bytes back: {report['same_bytes']}"
    )


if __name__ == "__main__":
    main()
