"""Seconds until an entry point has printed its --help, beside Python and an `import jax`.

    python benchmarks/startup.py

Medians of whole processes, the three kinds in turn, so that a busy machine slows them alike.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEERS = {"python": ["-c", "pass"], "import jax": ["-c", "import jax"]}


def seconds(arguments: list[str]) -> float:
    """Of one process of this interpreter."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--entry_points", nargs="+", default=["infer", "train", "life"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    commands = PEERS | {n: ["-m", f"t5x_audio.{n}", "--help"] for n in flags.entry_points}
    times = {name: [] for name in commands}
    for _ in range(flags.repeats):
        for name, command in commands.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    if flags.json:
        print(json.dumps(medians))
        return
    for name, value in medians.items():
        print(f"{name}: {value:.2f} s, {value / medians['import jax']:.2f} of an import of jax")


if __name__ == "__main__":
    main()
