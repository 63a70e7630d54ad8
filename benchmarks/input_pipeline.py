# ruff: noqa: E402
"""The reader of packed batches: tokens a second on one core, padding, and resuming far into a run.

    python benchmarks/input_pipeline.py

The cache is made up: clips of speech as tokens, 2 to 20 seconds of 41.7 tokens, in one shard that
stands in the cache many times (hard links), so that 10 billion tokens take little disk but are
records in files like any others. Resuming is from the state that a run has at the given step: the
number of examples read until then follows from those of the first batches.
"""

import argparse
import itertools
import json
import os
import pathlib
import shutil
import sys
import time

# The project is run from its tree; it is not installed in the environments.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np

from t5x_audio.data import lm_reader, records

TOKENS_PER_SECOND_OF_SPEECH = 41.7
VOCABULARY, PAD = 74752, 0


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


def timed_batches(iterator, count: int) -> tuple[float, list[dict]]:
    """(seconds, batches)."""
    begun = time.perf_counter()
    batches = list(itertools.islice(iterator, count))
    return time.perf_counter() - begun, batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/input_pipeline"))
    parser.add_argument("--tokens", type=float, default=1e10, help="in the cache")
    parser.add_argument("--shard_tokens", type=float, default=2e7, help="in one file")
    parser.add_argument("--length", type=int, default=4096, help="of a row")
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--batches", type=int, default=100, help="timed")
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
        report = {"examples": examples} | measure(flags)
    finally:
        shutil.rmtree(flags.folder, ignore_errors=True)
    print(json.dumps(report) if flags.json else _table(report))


def measure(flags) -> dict:
    """What the reader does with the cache of the folder."""
    before = resident_gigabytes()
    begun = time.perf_counter()
    dataset = lm_reader.PackedLmDataset(
        str(flags.folder), {"speech": 1}, sequence_length=flags.length, batch_size=flags.rows,
        seed=flags.seed,
    )  # fmt: skip
    opened = time.perf_counter() - begun
    iterator = iter(dataset)
    timed_batches(iterator, 16)  # as many as are packed at a time
    seconds, batches = timed_batches(iterator, flags.batches)
    filled = np.mean([batch["segment_ids"] > 0 for batch in batches])
    state = json.loads(json.dumps(iterator.get_state()))
    ((reader, position),) = state.items()
    scale = flags.step / position["batch"]
    position["batch"] = flags.step
    position["phase"]["parent"]["next_index"] = int(
        position["phase"]["parent"]["next_index"] * scale
    )
    position["phase"]["next_row"] = 0
    resumed, begun = iter(dataset), time.perf_counter()
    resumed.set_state({reader: position})
    next(resumed)
    return {
        "tokens_per_second": float(filled) * flags.batches * flags.rows * flags.length / seconds,
        "packing_efficiency": float(filled),
        "open_seconds": opened,
        "resume_seconds": time.perf_counter() - begun,
        "memory_gigabytes": resident_gigabytes() - before,
    }


def _table(report) -> str:
    return (
        f"{report['examples']:,} examples: {report['tokens_per_second']:,.0f} tokens/s on one "
        f"core, {report['packing_efficiency']:.2%} of positions filled; opened in "
        f"{report['open_seconds']:.1f} s, first batch after resuming in "
        f"{report['resume_seconds']:.2f} s, {report['memory_gigabytes']:.2f} GB of memory"
    )


if __name__ == "__main__":
    main()
