# ruff: noqa: E402
"""What interleaving is worth: the perplexity of each stream in the merged one and alone.

    python benchmarks/merged_streams.py --run_dir=runs/speech

Three language models of one size (tiny, with fewer layers) learn to continue recordings: by the
merged stream (two linguistic, three semantic codes in turn), by the linguistic stream alone and by
the semantic one alone. Rows are as long in seconds for all three, so each step sees the same audio,
and every model takes as many steps. Compared is the lowest held-out perplexity of each stream over
the training. The merged stream is learnt more slowly at first: which of the two streams comes next
has to be found out too.
Needs a run with tokens, such as pretraining_streams.py makes. The page goes to docs/results/.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import subprocess
import sys

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from t5x_audio.evaluation import summary
from t5x_audio.training.metrics import read_metrics

SIZES = (
    "BACKBONE_LAYERS=4",
    "BACKBONE_EMBED=128",
    "BACKBONE_MLP=352",
    "BACKBONE_WEIGHT_DECAY=0.1",
)
# task -> tokens in 0.12 s of audio
TASKS = {"continuation": 5, "linguistic_alone": 2, "semantic_alone": 3}
ALONE = {"linguistic": "linguistic_alone", "semantic": "semantic_alone"}


def cache(flags) -> None:
    """Caches the three tasks in a folder of their own."""
    mixture = "{'all': {'continuation': 1, 'linguistic_alone': 1, 'semantic_alone': 1}}"
    _job(
        "cache_tasks",
        "--gin_file=gin/models/tiny.gin",
        "--gin_file=gin/runs/cache_tasks.gin",
        f"--gin.RUN_DIR={flags.run_dir}",
        f"--gin.cache_tasks.run.mixtures={mixture}",
        "--gin.cache_tasks.run.extra_tasks=()",
        f"--model_dir={flags.run_dir}/merged_streams/tasks",
    )


def train(flags, task: str, seed: int) -> dict[str, tuple[float, int]]:
    """{stream: lowest held-out perplexity and its step} of a model that learns one task."""
    folder = flags.run_dir / "merged_streams" / f"{task}-{seed}"
    _job(
        "train",
        "--gin_file=gin/models/tiny.gin",
        "--gin_file=gin/runs/pretrain_stage1.gin",
        f"--gin.RUN_DIR={flags.run_dir}/merged_streams",
        f"--gin.STAGE1_MIXTURE={{'{task}': 1}}",
        f"--gin.STAGE1_STEPS={flags.steps}",
        f"--gin.SEQUENCES_LENGTH={round(flags.seconds / 0.12) * TASKS[task]}",
        f"--gin.SEQUENCES_BATCH={flags.rows}",
        "--gin.SEQUENCES_EVAL_BATCHES=None",
        "--gin.BACKBONE_EVAL_EVERY=50",
        *(f"--gin.{binding}" for binding in SIZES),
        f"--gin.train.run.seed={seed}",
        f"--gin.lm_reader.PackedLmDataset.seed={seed}",
        f"--model_dir={folder}",
    )
    lines = [line for line in read_metrics(folder) if line["split"] == "validation"]
    found = {}
    for stream in ALONE:
        name = f"perplexity_{stream}"
        values = [(line[name], line["step"]) for line in lines if name in line]
        if values:
            found[stream] = min(values)
    return found


def _job(name: str, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"t5x_audio.{name}", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def page(results: dict[str, list[dict]], flags) -> str:
    """The table in Markdown."""
    rows = []
    for stream, task in ALONE.items():
        merged = [one[stream] for one in results["continuation"]]
        alone = [one[stream] for one in results[task]]
        pairs = zip(merged, alone, strict=True)
        change = statistics.mean(m[0] / a[0] - 1 for m, a in pairs)
        rows.append((stream, _spread(alone), _spread(merged), f"{100 * change:+.1f} %"))
    table = summary.Table("", ("stream", "alone", "merged", "change"), tuple(rows))
    command = f"python benchmarks/merged_streams.py {' '.join(sys.argv[1:])}"
    where = f"{os.cpu_count()} cores, {platform.machine()}, {datetime.date.today()}"
    return "\n\n".join(
        (
            "# The streams alone and merged",
            f"Made by `{command}` (seeds 0 to {flags.seeds - 1}; {where}; "
            f"jax {importlib.metadata.version('jax')}).",
            f"Lowest held-out perplexity in {flags.steps} steps of {flags.rows} rows of "
            f"{flags.seconds:g} s; mean over the seeds and, in brackets, the range and the steps "
            "at which it was met. Where that is the last step, the model had not learnt all it "
            "could, and the comparison says how fast it learns, not how much.",
            summary.table_markdown(table),
        )
    )


def _spread(found: list[tuple[float, int]]) -> str:
    values, steps = zip(*found, strict=True)
    spread = f"{min(values):.1f} to {max(values):.1f}, step {min(steps)} to {max(steps)}"
    return f"{statistics.mean(values):.1f} ({spread})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run_dir", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=2, help="of a batch")
    parser.add_argument("--seconds", type=float, default=18.0, help="of audio in a row")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    flags = parser.parse_args()
    cache(flags)
    results: dict[str, list[dict]] = {task: [] for task in TASKS}
    # Seed by seed: an interrupted experiment has whole comparisons.
    for seed in range(flags.seeds):
        for task in TASKS:
            results[task].append(train(flags, task, seed))
    text = page(results, flags)
    (flags.output / "merged_streams.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
