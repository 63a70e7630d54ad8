# ruff: noqa: E402
"""Packs a checkpoint of the 3B's shape: bytes on the disk, time, memory, and loading it again.

    python benchmarks/packed_weights.py --folder=runs/packed_weights

The checkpoint has random bfloat16 weights in the names and shapes of Step-Audio-TTS-3B and is
written part by part. Packing is the entry point of users, loading what every loader does; both in
processes of their own; what is not packed is not loaded, since it would not fit every machine.
Memory is what they hold themselves, the highest of looks 20 ms apart. Needs 10 GB of disk; a folder
that is there already is not written to. The page goes to docs/results/.
"""

import argparse
import datetime
import importlib.metadata
import math
import os
import pathlib
import platform
import shutil
import sys

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from benchmarks.processes import run_python
from benchmarks.sizes import backbone, macros
from t5x_audio.evaluation import summary
from t5x_audio.training import checkpoints
from t5x_audio.training.partwise_arrays import PartwiseArray

LOAD = (
    "import sys, jax; from t5x_audio.training.checkpoints import load_model; from flax import nnx; "
    "jax.block_until_ready(nnx.state(load_model(sys.argv[1])))"
)


def write_model(folder: pathlib.Path, size: str) -> int:
    """A model directory with random weights; returns how many."""
    config = backbone(macros(size))
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))))
    params = {"/".join(map(str, path)): _random(variable.shape) for path, variable in state}
    checkpoints.save_parts(folder, config, params)
    return sum(math.prod(array.shape) for array in params.values())


def _random(shape: tuple[int, ...]) -> PartwiseArray:
    rows = 1 if len(shape) > 2 else min(shape[0], 4096)
    deviation = shape[-2] ** -0.5 if len(shape) > 1 else 1.0

    def read(start: int) -> np.ndarray:
        rng = np.random.default_rng([start, *shape])
        some = (min(rows, shape[0] - start), *shape[1:])
        values = rng.standard_normal(some, np.float32) * np.float32(deviation)
        return values.astype(ml_dtypes.bfloat16)

    return PartwiseArray(shape, np.dtype(ml_dtypes.bfloat16), rows, read)


def size_of(folder: pathlib.Path) -> float:
    """GB on the disk."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/packed_weights"))
    parser.add_argument("--size", default="step1_3b", help="a file of gin/models")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    flags = parser.parse_args()
    if flags.folder.exists():
        sys.exit(f"error: {flags.folder} exists already; remove it or give another --folder")
    load = os.getloadavg()[0]
    source = flags.folder / "model"
    parameters = write_model(source, flags.size)
    rows = [("bfloat16", f"{size_of(source):.2f}", "", "", "", "")]
    for bits in flags.bits:
        packed = flags.folder / f"{bits}bit"
        words = f"-m t5x_audio.quantize --source={source} --model_dir={packed} --bits={bits}"
        made = run_python(*words.split(), f"--group={flags.group}")
        loaded = run_python("-c", LOAD, str(packed))
        figures = (f"{made[0]:.0f}", f"{made[1]:.2f}", f"{loaded[0]:.0f}", f"{loaded[1]:.2f}")
        rows.append((f"{bits} bits", f"{size_of(packed):.2f}", *figures))
        print(*rows[-1], sep=" | ", flush=True)
        shutil.rmtree(packed)
    shutil.rmtree(flags.folder)
    columns = ("weights", "GB on the disk", "packing, s", "memory of packing, GB")
    columns += ("loading, s", "memory of loading, GB")
    largest = 4 * largest_part(flags.size) / 1e9
    text = "\n\n".join(
        (
            "# Packed weights of a backbone",
            f"Made by `{' '.join(['python benchmarks/packed_weights.py', *sys.argv[1:]])}` "
            f"({os.cpu_count()} cores, {platform.machine()}, {datetime.date.today()}; load average "
            f"before the start {load:.1f}; jax {importlib.metadata.version('jax')}).",
            f"{flags.size}, {parameters:,} random weights; {flags.group} inputs share a scale, the "
            "embedding has 8 bits. Times are those of whole processes, start included. The largest "
            f"array, or layer of a stack, takes {largest:.2f} GB as float32.",
            summary.table_markdown(summary.Table("", columns, tuple(rows))),
        )
    )
    (flags.output / "packed_weights.md").write_text(text + "\n")
    print(text)


def largest_part(size: str) -> int:
    """Weights that packing holds at once: those of an array, or of one layer of a stack."""
    config = backbone(macros(size))
    leaves = jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(config.make(nnx.Rngs(0)))))
    layers = config.num_layers
    return max(x.size // layers if x.shape[0] == layers else x.size for x in leaves)


if __name__ == "__main__":
    main()
