# ruff: noqa: E402
r"""SSQL against SimSiam with the same steps and with the same compute, at every pair of bits.

    python benchmarks/ssql_table.py --run_dir=runs/ssql --source=cifar10

Per seed three trainings by t5x_audio.train (SSQL; SimSiam; SimSiam with twice the steps, which is
about what SSQL costs) and one of a single step, which says what the untrained network is worth,
each followed by t5x_audio.probe_images. A job that has finished is not done again, so the command
can be stopped and started. The page and its pictures go to docs/results/.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import bit_chart
from t5x_audio.evaluation import curves, summary
from t5x_audio.evaluation.linear_probe import BIT_PAIRS, bit_name
from t5x_audio.evaluation.report import Table
from t5x_audio.training.metrics import read_metrics

METHODS = {
    "untrained": ("after one step", 0, "@siamese.Siamese()"),
    "ssql": ("SSQL", 1, "@ssql.Ssql()"),
    "simsiam": ("SimSiam, same steps", 1, "@siamese.Siamese()"),
    "simsiam_2x": ("SimSiam, same compute", 2, "@siamese.Siamese()"),
}
BITS = tuple(bit_name(pair) for pair in BIT_PAIRS)


def train(flags, method: str, seed: int) -> pathlib.Path:
    """Trains and probes one model; -> its directory."""
    _, times, objective = METHODS[method]
    directory = flags.run_dir / f"{method}_{seed}"
    model = [f"--gin_file=gin/models/{flags.size}.gin", f"--gin.IMAGES_SOURCE={flags.source}"]
    steps = steps_of(flags, times)
    arguments = [
        *model, "--gin_file=gin/runs/pretrain_images.gin", f"--gin.RUN_DIR={flags.run_dir}",
        f"--gin.IMAGES_OBJECTIVE={objective}", f"--gin.IMAGES_STEPS={steps}",
        f"--gin.IMAGES_EVAL_EVERY={steps}", f"--gin.train.run.seed={seed}",
        f"--gin.image_reader.ImageBatches.seed={seed}", f"--model_dir={directory}",
    ]  # fmt: skip
    _run("train", arguments)
    if not (directory / "probe.json").is_file():
        probe = ["--gin_file=gin/runs/probe_images.gin", f"--model_dir={directory}"]
        _run("probe_images", [*model, *probe])
    return directory


def steps_of(flags, times: int) -> int:
    """A model without a step has no statistics of its norms; one step teaches next to nothing."""
    return max(1, flags.steps * times)


def _run(job: str, arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", f"t5x_audio.{job}", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def accuracies(directories: dict) -> dict[str, dict[str, tuple[float, float]]]:
    """{method: {'W4A4': (mean, standard deviation)}}."""
    found = {}
    for method, places in directories.items():
        probes = [json.loads((place / "probe.json").read_text()) for place in places]
        found[method] = {bits: bit_chart.spread([probe[bits] for probe in probes]) for bits in BITS}
    return found


def theory(place: pathlib.Path) -> list[curves.Series]:
    """The cosine between both errors over the steps of one run of SSQL."""
    lines = [line for line in read_metrics(place) if line["split"] == "train"]
    lines = [line for line in lines if "error_cosine" in line]
    steps, values = zip(*((line["step"], line["error_cosine"]) for line in lines), strict=True)
    return [curves.Series("train", steps, values)]


def page(flags, found, directories) -> str:
    """The table in Markdown."""
    rows = []
    for method, (title, times, _) in METHODS.items():
        cells = (f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in found[method].values())
        rows.append((title, str(steps_of(flags, times)), *cells))
    table = Table("", ("training", "steps", *BITS), tuple(rows))
    command = f"python benchmarks/ssql_table.py {' '.join(flags.words)}"
    facts = (
        f"seeds {', '.join(map(str, flags.seeds))}, {os.cpu_count()} cores, {platform.machine()}, "
        f"{datetime.date.today()}; jax {importlib.metadata.version('jax')}"
    )
    cosines = [theory(place)[0].values for place in directories["ssql"]]
    late = statistics.mean(v for values in cosines for v in values[len(values) // 2 :])
    return "\n\n".join(
        (
            "# SSQL: features that survive quantisation",
            f"Made by `{command}` ({facts}). {flags.remark}".rstrip(),
            "Top-1 accuracy in percent of a linear probe on frozen features, mean and standard "
            "deviation over seeds. WxAy: weights of x bits, activations of y, simulated; the stem "
            "has 8 of both; ranges are those of 128 training images.",
            summary.table_markdown(table),
            "![accuracy over bits](ssql.svg)",
            "The theory (arXiv 2207.05432) has the loss split into the error between views, the "
            "error of quantisation and a cross term that is near 0. The cosine between both "
            f"errors, mean over the second half of the steps: {late:.3f}.",
            "![cosine between both errors over the steps](ssql_theory.svg)",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run_dir", type=pathlib.Path, required=True)
    parser.add_argument("--source", required=True, help="an .npz of images or a TFDS name")
    parser.add_argument("--size", default="siamese_laptop", help="a file of gin/models")
    parser.add_argument("--steps", type=int, default=1500, help="of SSQL")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--remark", default="", help="a sentence for the page: what data this was")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    flags = parser.parse_args()
    directories = {method: [] for method in METHODS}
    for seed in flags.seeds:  # Seed by seed: an interrupted experiment has whole comparisons.
        for method in METHODS:
            directories[method].append(train(flags, method, seed))
    flags.words = [word for word in sys.argv[1:] if not word.startswith("--remark")]
    found = accuracies(directories)
    charts = [
        (f"cosine of errors, seed {seed}", theory(place))
        for seed, place in zip(flags.seeds, directories["ssql"], strict=True)
    ]
    flags.output.mkdir(parents=True, exist_ok=True)
    lines = {METHODS[method][0]: rows for method, rows in found.items()}
    chart = bit_chart.draw(lines, "linear probe, top-1 in percent")
    (flags.output / "ssql.svg").write_text(chart)
    (flags.output / "ssql_theory.svg").write_text(summary.draw_charts(charts))
    (flags.output / "ssql.md").write_text(page(flags, found, directories).rstrip() + "\n")
    for method, rows in found.items():
        print(method, *(f"{bits}={mean:.1f}±{dev:.1f}" for bits, (mean, dev) in rows.items()))


if __name__ == "__main__":
    main()
