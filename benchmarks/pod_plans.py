"""The plans of docs/results/pods.md: each compiled for its pod, none of them run.

    python benchmarks/pod_plans.py [--only=v5p_130b] [--output=docs/results/pods.md]

A plan that is in --run_dir already is not compiled again; the page has all that are there.
"""

import argparse
import datetime
import importlib.metadata
import pathlib
import re
import shlex
import subprocess
import sys

_130B = [
    "--gin_file=gin/models/step1_130b.gin", "--gin_file=gin/runs/pretrain_stage1.gin",
    "--gin.RUN_DIR=run",
]  # fmt: skip


def _on(topology: str) -> list[str]:
    chip = topology.partition(":")[0]
    return [*_130B, f"--topology={topology}", f"--gin_file=gin/hardware/{chip}.gin"]


_V5P = _on("v5p:8x8x16")
# 256 chips are few for 131 billion parameters: moments in bfloat16, few tokens a chip.
_TIGHT = ["--gin.optimizers.AdamW.moments_dtype=bfloat16"]
# One copy of the weights, in two directions over 16 chips.
_SERVING = ["--gin.DATA=1", "--gin.TENSOR_PARALLELISM=8", "--context=4096", "--batch=2"]
_SERVING_V5P = [*_on("v5p:2x2x4"), *_SERVING]
_SERVING_V6E = [*_on("v6e:4x4"), *_SERVING]
# name -> (what it shows, flags of t5x_audio.plan)
PLANS = {
    "v5p_130b": ("Step-1 at 130B, 1,024 v5p, 4,096 tokens a chip", _V5P),
    "v5p_130b_all_products": (
        "the same, no matrix product computed again",
        [*_V5P, "--gin.BACKBONE_REMAT=all_products"],
    ),
    "v5p_130b_full": (
        "the same, only the inputs of layers kept",
        [*_V5P, "--gin.BACKBONE_REMAT=full"],
    ),
    "v5p_130b_no_flags": (
        "the same as the first, without flags of the compiler",
        [*_V5P, "--gin.train.run.xla_flags=()"],
    ),
    "v5p_130b_32k": (
        "the 130B with a context of 32,768 tokens, 1,024 v5p, 4,096 tokens a chip",
        [
            *_V5P, "--gin.DATA=1", "--gin.SEQUENCE_PARALLELISM=8", "--gin.SEQUENCES_LENGTH=32768",
            "--gin.SEQUENCES_BATCH=128",
        ],
    ),
    "v6e_130b": (
        "the 130B on 256 v6e, 2,048 tokens a chip",
        [
            *_on("v6e:16x16"), *_TIGHT, "--gin.SEQUENCES_LENGTH=2048", "--gin.SEQUENCES_BATCH=256",
        ],
    ),
    "v5e_130b": (
        "the 130B on 256 v5e, 384 tokens a chip",
        [
            *_on("v5e:16x16"), *_TIGHT, "--gin.SEQUENCES_LENGTH=1536", "--gin.SEQUENCES_BATCH=64",
            "--gin.TENSOR_PARALLELISM=4",
        ],
    ),
    "serve_v5p_bfloat16": ("the 130B answers two streams on 16 v5p", _SERVING_V5P),
    "serve_v5p_int8": ("the same with weights in int8", [*_SERVING_V5P, "--weights=int8"]),
    "serve_v6e_bfloat16": ("the 130B answers two streams on 16 v6e", _SERVING_V6E),
    "serve_v6e_int8": ("the same with weights in int8", [*_SERVING_V6E, "--weights=int8"]),
}  # fmt: skip
_HEAD = """# Plans for pods

Nothing here was run on a TPU. XLA's TPU compiler compiled the training step of `t5x_audio.train`,
or the programs of a decoder, for a pod that is not there; memory, operations and collectives are
its own, times are modelled from them (t5x_audio/planning/step_time.py says how, and how far such a
model was from two published runs, none of which had FSDP over a whole slice). Pallas kernels are
taken at half of the peak, though the compiler's schedule gives them 89 % (kernels.md); what
communication costs the computation beside it is not known. Sums over devices are in bfloat16. MFU
counts 6 operations for each token and parameter but the input embedding's, none for attention. A
decoder is judged by the roofline: its time is that of bytes, which the compiler's cycles for thin
matrix products overrate by half.

Made by `make pod-plans`.
"""


def plan(name: str, run_dir: pathlib.Path) -> None:
    """Writes the Markdown section of one plan, unless it is there."""
    title, flags = PLANS[name]
    command = ["-m", "t5x_audio.plan", *flags]
    kept = run_dir / f"{name}.md"
    if kept.exists():
        return
    print(f"{name}: {title}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    *table, _ = done.stdout.splitlines()
    libtpu = importlib.metadata.version("libtpu")
    jax = importlib.metadata.version("jax")
    lines = [
        f"## {title[0].upper()}{title[1:]}", "", f"`python {shlex.join(command)}`", "",
        f"{datetime.date.today()}, jax {jax}, libtpu {libtpu}.", "", *table, "",
    ]  # fmt: skip
    kept.write_text("\n".join(lines))


def summary(sections: list[str]) -> str:
    """A table with one line for each section: memory, and rates of training or decoding."""
    rows = [
        "| plan | GiB of a device | modelled MFU, hybrid (roofline) | tokens/s a stream |",
        "|---|---|---|---|",
    ]
    for section in sections:
        title = re.search(r"^## (.+)$", section, re.MULTILINE)[1]
        total, hbm = (
            re.search(rf"^\| {name}[^|]*\| ([\d.]+) \|$", section, re.MULTILINE)[1]
            for name in ("total", "HBM:")
        )
        mfu = re.search(r"^\| MFU \| ([\d.]+) \| ([\d.]+) \|$", section, re.MULTILINE)
        rate = re.search(r"^([\d.]+) tokens a second and stream", section, re.MULTILINE)
        rates = f"{mfu[1]} ({mfu[2]}) | " if mfu else f"| {rate[1]} "
        rows.append(f"| {title} | {total} of {hbm} | {rates}|")
    return "\n".join([*rows, ""])


def main() -> None:
    """Makes the plans that are asked for and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", choices=PLANS, help="repeatable; default all")
    parser.add_argument("--run_dir", default="runs/pods", help="finished plans")
    parser.add_argument("--output", default="docs/results/pods.md")
    flags = parser.parse_args()
    sys.path.append(f"{sys.prefix}/pods")  # for the version of libtpu
    run_dir = pathlib.Path(flags.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    for name in flags.only or PLANS:
        plan(name, run_dir)
    finished = [run_dir / f"{name}.md" for name in PLANS]
    sections = [path.read_text() for path in finished if path.exists()]
    pathlib.Path(flags.output).write_text("\n".join([_HEAD, summary(sections), *sections]))
    print(f"done: {flags.output}")


if __name__ == "__main__":
    main()
