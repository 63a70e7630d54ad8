# ruff: noqa: E402
r"""The three stages of pretraining on recorded speech: does every audio stream become predictable?

    python benchmarks/pretraining_streams.py --run_dir=runs/speech --manifest=speech.jsonl \
      --text=book.jsonl

All jobs are those of a pod, at size tiny. Both tokenizers are trained on the manifest's recordings,
the telephone prompts that `prepare_data` fetches and the spoken world that it makes; the recordings
alone are tokenised, and a language model goes through the three stages on them. What is measured is
the perplexity of linguistic and semantic codes of the task `continuation` on held-out recordings,
the same ones throughout. A job that has finished is not done again. The page and its picture go to
docs/results/.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from t5x_audio.evaluation import curves, summary

STAGES = ("pretrain1", "pretrain2", "pretrain3")
STREAMS = ("linguistic", "semantic", "text")
BINDINGS = (
    "DATA_BUCKET_SECONDS=(2.4, 4.8, 9.6, 18.0)",
    "SEQUENCES_LENGTH=1024",
    "SEQUENCES_BATCH=4",
    "SEQUENCES_EVAL_BATCHES=None",
    "BACKBONE_EVAL_EVERY=20",
)
CACHED = ("cache_tasks.run.mixtures={'all': %STAGE3_MIXTURE}", "cache_tasks.run.extra_tasks=()")


def jobs(flags) -> list[list[str]]:
    """The command lines, in order."""
    run = f"--run_dir={flags.run_dir}"
    gin = [f"--gin.{binding}" for binding in (*BINDINGS, *flags.gin)]
    life = ["life", "--size=tiny", run, *gin]
    tiny = ["--gin_file=gin/models/tiny.gin", f"--gin.RUN_DIR={flags.run_dir}"]
    return [
        ["import_corpus", run, "--name=recordings", f"--manifest={flags.manifest}"]
        + ["--validation=0.1"],
        [*life, *_only("prepare_data")],
        ["import_text", run, "--name=text", f"--files={flags.text}", "--normalize"],
        [*life, *_only("train_vocabulary", "train_linguistic", "fit_codebook", "train_semantic")],
        [*life, *_only("tokenize_corpus")]
        + ["--gin.tokenize_corpus.run.corpora=('recordings', 'asterisk')"],
        ["cache_tasks", *tiny, "--gin_file=gin/runs/cache_tasks.gin", *gin]
        + [f"--gin.{binding}" for binding in CACHED]
        + [f"--model_dir={flags.run_dir}/tasks"],
        [*life, *_only(*(f"pretrain_stage{n}" for n in (1, 2, 3)))],
    ]


def _only(*names: str) -> list[str]:
    return [f"--only={name}" for name in names]


def perplexities(folder: pathlib.Path, stream: str) -> dict[str, curves.Series]:
    """{split: perplexity of a stream over the steps of a stage}."""
    series = curves.read_curves(folder, tasks=True).get(f"perplexity_{stream}", [])
    return {one.name: one for one in series}


def over_all_stages(run_dir: pathlib.Path, stream: str) -> list[curves.Series]:
    """Training (of all tasks) and held-out continuation, steps counted on through the stages."""
    joined, before = {"train": ([], []), "validation/continuation": ([], [])}, 0
    for stage in STAGES:
        found = perplexities(run_dir / stage, stream)
        for split, (steps, values) in joined.items():
            steps += [before + step for step in found[split].steps]
            values += found[split].values
        before += found["train"].steps[-1]
    return [curves.Series(name, tuple(x), tuple(y)) for name, (x, y) in joined.items()]


def page(flags) -> str:
    """The table in Markdown."""
    rows = []
    for stage in STAGES:
        found = {s: perplexities(flags.run_dir / stage, s) for s in STREAMS}
        held_out = [found[s]["validation/continuation"].values for s in STREAMS[:2]]
        text = found["text"]["validation/text"].values
        steps = found["text"]["validation/text"].steps[-1]
        cells = [f"{values[0]:.1f} to {values[-1]:.1f}" for values in (*held_out, text)]
        rows.append((stage, str(steps), *cells))
    table = summary.Table("", ("stage", "steps", "linguistic", "semantic", "text"), tuple(rows))
    command = f"python benchmarks/pretraining_streams.py {' '.join(flags.words)}"
    facts = (
        f"seed 0, {os.cpu_count()} cores, {platform.machine()}, {datetime.date.today()}; "
        f"jax {importlib.metadata.version('jax')}"
    )
    return "\n\n".join(
        (
            "# Perplexity of each stream over the three stages, on recorded speech",
            f"Made by `{command}` ({facts}).",
            "Held-out perplexity, from the first to the last evaluation of each stage (every 20 "
            "steps): linguistic and semantic codes of recordings that are continued, and text.",
            summary.table_markdown(table),
            "![perplexity of linguistic and semantic codes over steps](pretraining.svg)",
            "Blue: training, all tasks of the stage, and its running mean; orange: held-out "
            f"recordings, continued. {flags.remark}".rstrip(),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run_dir", type=pathlib.Path, required=True)
    parser.add_argument("--manifest", required=True, help="JSONL of recordings with transcripts")
    parser.add_argument("--text", required=True, help="JSONL or text file, for the task text")
    parser.add_argument("--gin", action="append", default=[], help="NAME=value for every job")
    parser.add_argument("--remark", default="", help="a sentence for the page: what data this was")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    flags = parser.parse_args()
    for job in jobs(flags):
        done = subprocess.run([sys.executable, "-m", f"t5x_audio.{job[0]}", *job[1:]], check=False)
        if done.returncode:
            sys.exit(done.returncode)
    flags.words = [word for word in sys.argv[1:] if not word.startswith("--remark")]
    charts = [(f"perplexity, {s}", over_all_stages(flags.run_dir, s)) for s in STREAMS[:2]]
    (flags.output / "pretraining.svg").write_text(summary.draw_charts(charts))
    (flags.output / "pretraining.md").write_text(page(flags).rstrip() + "\n")
    for stream in STREAMS[:2]:
        last = [perplexities(flags.run_dir / s, stream)["validation/continuation"] for s in STAGES]
        print(f"{stream}: {', '.join(f'{one.values[-1]:.1f}' for one in last)} at the stages' ends")


if __name__ == "__main__":
    main()
