# ruff: noqa: E402
"""The reader of packed batches beside SeqIO's: tokens a second on one core, padding, resuming.

    python benchmarks/input_pipeline.py

The cache is made up: clips of speech as tokens, 2 to 20 seconds of 41.7 tokens, in one shard that
stands in the cache many times (hard links), so that 10 billion tokens take little disk but are
records in files like any others. Resuming is from the state that a run has at the given step: the
number of examples read until then follows from those of the first batches. The two readers take
turns on one core; the clock is that of the process, so that others on a shared machine do not
count, and `core_share` says how much of the core they left.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np

from t5x_audio.data import lm_reader, records

TOKENS_PER_SECOND_OF_SPEECH = 41.7
VOCABULARY, PAD = 74752, 0
PEER = pathlib.Path(__file__).with_name("seqio_reader.py")


def write_cache(folder: pathlib.Path, tokens: float, shard_tokens: float, seed: int) -> int:
    """A task cache of at least `tokens` tokens; returns its number of examples."""
    rng = np.random.default_rng(seed)
    seconds = np.clip(rng.lognormal(1.8, 0.6, int(shard_tokens / 280)), 2, 20)
    lengths = (seconds * TOKENS_PER_SECOND_OF_SPEECH).astype(np.int32)
    with records.RecordWriter(str(folder), "train") as writer:
        for length in lengths:
            ids = rng.integers(1, VOCABULARY, length, np.int32)
            writer.write({"tokens": ids, "weights": np.ones(length, np.float32)})
    copies = -(-int(tokens) // int(lengths.sum()))
    (first,) = records.shard_paths(str(folder), "train")
    for shard in range(copies):
        os.link(first, records.shard_path(str(folder), "train", shard, copies))
    if copies > 1:
        os.remove(first)
    np.save(lm_reader.lengths_path(str(folder), "train"), np.tile(lengths, copies))
    stats = {"vocabulary": {"size": VOCABULARY}, "pad": PAD}
    (folder / lm_reader.STATS_FILE).write_text(json.dumps(stats))
    return copies * len(lengths)


def resident_gigabytes() -> float:
    """Memory of this process that is its own (anonymous pages)."""
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/input_pipeline"))
    parser.add_argument("--tokens", type=float, default=1e10, help="in the cache")
    parser.add_argument("--shard_tokens", type=float, default=2e7, help="in one file")
    parser.add_argument("--length", type=int, default=4096, help="of a row")
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--batches", type=int, default=300, help="timed")
    parser.add_argument("--repeats", type=int, default=3, help="of both readers, in turn")
    parser.add_argument("--skip", type=int, default=1000, help="batches for the peer to resume at")
    parser.add_argument("--step", type=int, default=1_000_000, help="to resume at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    if flags.folder.exists():
        sys.exit(f"error: {flags.folder} exists already; remove it or give another --folder")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core
    cache = flags.folder / "tasks" / "speech"
    try:
        examples = write_cache(cache, flags.tokens, flags.shard_tokens, flags.seed)
        runs = {"ours": [], "plain": [], "weighted": []}
        for _ in range(flags.repeats):
            runs["ours"].append(measure(flags))
            for form in ("plain", "weighted"):
                runs[form].append(measure_peer(flags, form))
        report = {"examples": examples} | {name: summary(runs, name) for name in runs}
    finally:
        shutil.rmtree(flags.folder, ignore_errors=True)
    print(json.dumps(report) if flags.json else _table(report))


def measure(flags) -> dict:
    """What the reader does with the cache of the folder."""
    before = resident_gigabytes()
    begun = time.process_time()
    dataset = lm_reader.PackedLmDataset(
        str(flags.folder), {"speech": 1}, sequence_length=flags.length, batch_size=flags.rows,
        seed=flags.seed,
    )  # fmt: skip
    iterator = iter(dataset)
    next(iterator)
    opened = time.process_time() - begun
    for _ in range(64):
        next(iterator)
    begun, cpu = time.perf_counter(), time.process_time()
    filled = np.mean([np.mean(next(iterator)["segment_ids"] > 0) for _ in range(flags.batches)])
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    state = json.loads(json.dumps(iterator.get_state()))
    ((reader, position),) = state.items()
    scale = flags.step / position["batch"]
    position["batch"] = flags.step
    position["phase"]["parent"]["next_index"] = int(
        position["phase"]["parent"]["next_index"] * scale
    )
    position["phase"]["next_row"] = 0
    resumed, begun = iter(dataset), time.process_time()
    resumed.set_state({reader: position})
    next(resumed)
    return {
        "tokens_per_core_second": float(filled) * flags.batches * flags.rows * flags.length / cpu,
        "core_share": cpu / seconds,
        "packing_efficiency": float(filled),
        "open_seconds": opened,
        "resume_seconds": time.process_time() - begun,
        "memory_gigabytes": resident_gigabytes() - before,
    }


def measure_peer(flags, form: str) -> dict:
    """What SeqIO's reader does with the same examples, in a process on the same core."""
    names = ("length", "rows", "batches", "seed", "skip")
    (core,) = os.sched_getaffinity(0)
    settings = {name: getattr(flags, name) for name in names}
    settings |= {"form": form, "folder": str(flags.folder), "core": core, "vocabulary": VOCABULARY}
    command = [sys.executable, str(PEER), json.dumps(settings)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: dict[str, list[dict]], name: str) -> dict:
    """Medians of a reader's repeats, its range, and our speed over its own turn by turn."""
    rates = {reader: [run["tokens_per_core_second"] for run in runs[reader]] for reader in runs}
    ratios = np.divide(rates["ours"], rates[name])
    return {key: float(np.median([run[key] for run in runs[name]])) for key in runs[name][0]} | {
        "tokens_range": [min(rates[name]), max(rates[name])],
        "ratio": float(np.median(ratios)),
        "ratio_range": [float(ratios.min()), float(ratios.max())],
    }


def _table(report) -> str:
    ours, peers = report["ours"], [report["plain"], report["weighted"]]

    def row(title, show, *others):
        return " | ".join([f"| {title}", show(ours), *map(others[0] if others else show, peers)])

    def tokens(one):
        low, high = one["tokens_range"]
        return f"{one['tokens_per_core_second']:,.0f} ({low:,.0f} to {high:,.0f})"

    def ratio(one):
        low, high = one["ratio_range"]
        return f"{one['ratio']:.2f} ({low:.2f} to {high:.2f})"

    rows = [
        row("", lambda _: "ours", lambda one: "SeqIO" if one is peers[0] else "SeqIO, weighted"),
        "|---|---|---|---",
        row("tokens for a second of the core", tokens),
        row("ours over it", lambda _: "", ratio),
        row("share of the core it had", lambda one: f"{one['core_share']:.2f}"),
        row("positions filled", lambda one: f"{one['packing_efficiency']:.2%}"),
        row("the first batch", lambda one: f"{one['open_seconds']:.2f} s"),
        row(
            "resuming at step n",
            lambda one: f"{one['resume_seconds']:.2f} s at any",
            lambda one: f"{one['skip_seconds']:.1f} s for every 1,000 of them",
        ),
    ]
    last = f"{report['examples']:,} examples; {ours['memory_gigabytes']:.2f} GB of memory (ours)"
    return "\n".join([*(f"{row} |" for row in rows), "", last])


if __name__ == "__main__":
    main()
