# ruff: noqa: E402
"""A run served with weights of each width: bytes, loading, memory, speed and what is left of it.

    python benchmarks/served_widths.py --run_dir=runs/demo

Of a finished run: t5x_audio.quantize packs all of its parts to 8, 4, 3 and 2 bits, then
t5x_audio.evaluate asks each the held-out questions, by entry points in processes of their own.
Beside answers: how many codes of the questions are those of the unpacked tokenizers, and how the
vocoder's speech of true answers is understood. Packed runs stay in <run_dir>/served_widths/; what
is finished is not done again. The page goes to docs/results/.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.packed_weights import size_of
from benchmarks.processes import run_python
from t5x_audio import launch, quantize
from t5x_audio.evaluation import spoken_qa, summary
from t5x_audio.serving.model_dir import PARTS, RunDirectory
from t5x_audio.tokenize_corpus import load_tokenizer
from t5x_audio.training import checkpoints

LOAD = (
    "import sys, jax; from flax import nnx; "
    "from t5x_audio.serving.assistant import SpokenAssistant; "
    "assistant = SpokenAssistant.load(sys.argv[1])"
)
COLUMNS = {
    "weights": "",
    "MB on the disk": "",
    "loading, s": "",
    "memory of loading, GB": "",
    "first audio, s": "time_to_first_audio",
    "tokens/s": "tokens_per_second",
    "real-time factor": "real_time_factor",
    "right in the text": "text_accuracy",
    "right as heard": "heard_accuracy",
    "WER of resynthesis": "resynthesis_wer",
    "DNSMOS of resynthesis": "resynthesis_dnsmos",
    "linguistic codes that stay": "",
    "semantic codes that stay": "",
}
"""{column: figure of evaluate.py}."""
SHARES = ("text_accuracy", "heard_accuracy", "resynthesis_wer")


def packed_run(flags, bits: int) -> pathlib.Path:
    """The run with weights of so many bits, beside the data of the source."""
    place = flags.run_dir / "served_widths" / f"{bits}bit"
    words = f"-m t5x_audio.quantize --source={flags.run_dir} --model_dir={place} --bits={bits}"
    run_python(*words.split(), f"--group={flags.group}")
    for folder in ("corpus", "tokens"):
        if not (place / folder).exists():
            (place / folder).symlink_to((flags.run_dir / folder).resolve())
    return place


def evaluated(flags, place: pathlib.Path) -> dict:
    """Figures of evaluate.py."""
    job = [sys.executable, "-m", "t5x_audio.evaluate", f"--gin_file=gin/models/{flags.size}.gin"]
    job += ["--gin_file=gin/runs/evaluate.gin", f"--gin.RUN_DIR={place}"]
    done = subprocess.run([*job, f"--model_dir={place / 'evaluation'}"], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads((place / "evaluation" / "results.json").read_text())["figures"]


def questions(flags) -> list[np.ndarray]:
    """Held-out spoken questions, float32 [T_i] at 16 kHz."""
    root = RunDirectory(flags.run_dir)
    places = root.corpus("spoken_qa"), root.tokens("spoken_qa")
    size = root.check().linguistic_size
    found = spoken_qa.load_questions(*places, size, split="test", limit=flags.questions)
    return [one.audio for one in found]


def row(flags, name: str, place: pathlib.Path, audio, codes) -> tuple[str, ...]:
    """A line of the table; `codes` are those of the unpacked tokenizers."""
    loading = run_python("-c", LOAD, str(place))
    made = evaluated(flags, place)
    cells = [name, f"{weights_size(place):.1f}", f"{loading[0]:.1f}", f"{loading[1]:.2f}"]
    for key in filter(None, COLUMNS.values()):
        value = made.get(key)
        text = "" if value is None else f"{value:.2f}"
        cells.append(f"{100 * value:.1f} %" if text and key in SHARES else text)
    for found, before in zip(streams(place, audio), codes, strict=True):
        cells.append(f"{100 * np.mean(found == before):.1f} %")
    return tuple(cells)


def weights_size(place: pathlib.Path) -> float:
    """MB of a run's models on the disk, without what a training keeps beside them."""
    total = 0.0
    for part in (place / name for name in PARTS):
        for step in checkpoints.checkpoint_steps(part)[-1:]:
            name = quantize.NAMES.get(part.name, "model")
            total += 1000 * size_of(part / "checkpoints" / str(step) / name)
    return total


def streams(place: pathlib.Path, audio) -> list[np.ndarray]:
    """Linguistic and semantic codes of all recordings by the tokenizers of a run."""
    pairs = load_tokenizer(str(place)).encode_batch(audio)
    return [np.concatenate(codes) for codes in zip(*pairs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run_dir", type=pathlib.Path, required=True, help="a finished run")
    parser.add_argument("--size", default="demo", help="its file of gin/models")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--group", type=int, default=64, help="inputs that share a scale")
    parser.add_argument("--questions", type=int, default=40, help="whose codes are compared")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    flags = parser.parse_args()
    launch.prepare_environment()
    load = os.getloadavg()[0]
    audio = questions(flags)
    codes = streams(flags.run_dir, audio)
    rows = [row(flags, "float32", flags.run_dir, audio, codes)]
    for bits in flags.bits:
        rows.append(row(flags, f"{bits} bits", packed_run(flags, bits), audio, codes))
    text = "\n\n".join(
        (
            "# A run served with weights of each width",
            f"Made by `{' '.join(['python benchmarks/served_widths.py', *sys.argv[1:]])}` (seed 0; "
            f"{os.cpu_count()} cores, {platform.machine()}, {datetime.date.today()}; load average "
            f"before the start {load:.1f}; jax {importlib.metadata.version('jax')}).",
            f"The run {flags.size}: tokenizers, backbone and vocoder, packed by "
            f"`t5x_audio.quantize --group={flags.group}` and unpacked for each product. Loading is "
            "that of a whole process, start included. Speeds are those of each row's own "
            "evaluation, whatever the machine did beside it: decoding_widths.py compares them. "
            "Resynthesis is that of true answers by the vocoder; of embeddings 8 bits stay.",
            summary.table_markdown(summary.Table("", tuple(COLUMNS), tuple(rows))),
        )
    )
    (flags.output / "served_widths.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
