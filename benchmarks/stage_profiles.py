"""Where the time of each training stage goes on this machine, from XLA's own trace.

    python benchmarks/stage_profiles.py --size=demo --run_dir=runs/demo

Every training job of the life is run anew for some steps in a folder of its own beside the run's,
on the run's data, with `train.run.profile_at`. The table gives the floating-point operations a
second of matrix products and convolutions, and the shares of the kinds of XLA operations in the
time that the threads of the backend spent in operations (a thread's nested operations are taken
out of those around them). The batch shapes of the traced steps are those that come first, so rates
differ a little from a whole run's.
"""

import argparse
import collections
import json
import pathlib
import re
import shutil
import subprocess
import sys

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from t5x_audio import life
from t5x_audio.training.metrics import read_metrics

KINDS = {
    "matrix products": r"dot|ynn|gemm|matmul",
    "convolutions": r"convolution|conv_general",
    "FFT": r"fft",
    "sort, gather, scatter": r"sort|gather|scatter|dynamic",
    "layout": r"copy|transpose|pad|slice|concatenate|reverse|broadcast_fusion",
}
REST = "element by element, sums"


def kind_of(operation: str) -> str:
    """Kind of an XLA operation by the name of its instruction."""
    matching = (kind for kind, pattern in KINDS.items() if re.search(pattern, operation))
    return next(matching, REST)


def time_by_operation(trace: pathlib.Path) -> collections.Counter:
    """Nanoseconds of each XLA operation over all threads, those nested in it taken out."""
    from jax.profiler import ProfileData

    spent = collections.Counter()
    for plane in ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            if not line.name.startswith("tf_XLA"):
                continue
            events = [(e.start_ns, -e.duration_ns, e.name) for e in line.events if e.duration_ns]
            open_until = []  # (end, name) of what is still running on this thread
            for start, negative, name in sorted(events):
                while open_until and open_until[-1][0] <= start:
                    open_until.pop()
                if open_until:
                    spent[open_until[-1][1]] += negative
                spent[name] -= negative
                open_until.append((start - negative, name))
    return collections.Counter(
        {n: t for n, t in spent.items() if "::" not in n and not n.startswith("end:") and t > 0}
    )


def profile(stage: life.Stage, flags, folder: pathlib.Path) -> dict:
    """Runs one job for `flags.steps` steps and sums up its trace."""
    model_dir = folder / stage.output
    shutil.rmtree(model_dir, ignore_errors=True)
    extra = [
        f"--model_dir={model_dir}",
        f"--gin.train.run.steps={flags.steps}",
        f"--gin.train.run.profile_at={flags.steps - flags.traced + 1}",
        f"--gin.train.run.profile_steps={flags.traced}",
        f"--gin.train.run.log_every={flags.traced}",
        "--gin.train.run.eval_every=0",
        *flags.extra,
    ]
    if stage.name == "train_hift":  # its discriminators play in the traced steps
        extra.append("--gin.HIFT_DISC_START_STEP=0")
    job = subprocess.run(life.command(stage, flags.size, flags.run_dir, extra), check=False)
    if job.returncode:  # it has said why
        sys.exit(job.returncode)
    rates = [row for row in read_metrics(model_dir) if "gflop_per_second" in row]
    spent = time_by_operation(max((model_dir / "profile").rglob("*.xplane.pb")))
    total, shares = sum(spent.values()), collections.Counter()
    for operation, time in spent.items():
        shares[kind_of(operation)] += time / total
    return {
        "stage": stage.name,
        "seconds_per_step": 1.0 / rates[-1]["steps_per_second"],
        "gflop_per_second": rates[-1]["gflop_per_second"],
        "shares": {kind: shares[kind] for kind in [*KINDS, REST]},
        "longest": [(name, time / total) for name, time in spent.most_common(8)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default="demo", help="a file of gin/models")
    parser.add_argument("--run_dir", default="runs/demo", help="a finished run of this size")
    parser.add_argument("--only", action="append", help="only this stage (repeatable)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--traced", type=int, default=5, help="how many of them, at the end")
    parser.add_argument("--json", action="store_true")
    flags, flags.extra = parser.parse_known_args()
    folder = pathlib.Path(flags.run_dir) / "profiles"
    stages = [stage for stage in life.select(None, flags.only) if stage.job == "train"]
    rows = [profile(stage, flags, folder) for stage in stages]
    if flags.json:
        print(json.dumps(rows, indent=1))
        return
    kinds = [*KINDS, REST]
    print("| stage | s a step | GFLOP/s | " + " | ".join(kinds) + " |")
    print("|---" * (3 + len(kinds)) + "|")
    for row in rows:
        cells = [row["stage"], f"{row['seconds_per_step']:.2f}", f"{row['gflop_per_second']:.0f}"]
        print("| " + " | ".join(cells + [f"{row['shares'][k]:.0%}" for k in kinds]) + " |")


if __name__ == "__main__":
    main()
