"""Training jobs of one or several processes on this machine, joined as hosts of a pod are."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np

from t5x_audio.data import lm_reader
from t5x_audio.data.records import RecordWriter
from t5x_audio.training.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
GIN = pathlib.Path(__file__).parent / "pod.gin"
DEVICES = 8


def write_caches(run_dir: pathlib.Path, num_shards: int = 1) -> None:
    """Two tasks of 200 examples: runs of numbers, and runs in steps of two."""
    rng = np.random.default_rng(0)
    for task, step in (("counting", 1), ("stepping", 2)):
        directory = run_dir / "tasks" / task
        lengths = rng.integers(5, 30, 200)
        with RecordWriter(directory, "train", num_shards) as writer:
            for length in lengths:
                tokens = (rng.integers(64) + step * np.arange(length)) % 64
                weights = np.ones(length, np.float32)
                writer.write({"tokens": tokens.astype(np.int32), "weights": weights})
        stored = np.concatenate([lengths[shard::num_shards] for shard in range(num_shards)])
        np.save(lm_reader.lengths_path(str(directory), "train"), stored.astype(np.int32))
        stats = {"vocabulary": {"size": 64}, "pad": 0}
        (directory / lm_reader.STATS_FILE).write_text(json.dumps(stats))


class Job:
    """`t5x_audio.train` in `processes` processes, with 8 simulated devices in all."""

    def __init__(self, run_dir, model_dir, processes: int, cache, *flags: str):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache),
        }  # fmt: skip
        self.log = open(pathlib.Path(model_dir).with_suffix(".log"), "ab")  # noqa: SIM115
        self.processes = []
        for index in range(processes):
            command = [
                sys.executable, "-m", "t5x_audio.train", f"--gin_file={GIN}",
                f"--gin.RUN_DIR={run_dir}", f"--model_dir={model_dir}",
                f"--gin.DEVICES={DEVICES // processes}", *flags,
            ]  # fmt: skip
            if processes > 1:
                command.append(f"--distributed={address},{processes},{index}")
            self.processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log
                )
            )

    def running(self) -> bool:
        """Whether none of the processes has ended."""
        return all(process.poll() is None for process in self.processes)

    def wait(self, timeout: float = 300) -> list[int]:
        """Exit codes of all processes; they are killed when one takes longer or fails."""
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in self.processes):
            failed = any(process.poll() for process in self.processes)
            if failed or time.monotonic() > deadline:
                time.sleep(1)
                self.kill()
            time.sleep(0.05)
        self.log.close()
        return [process.returncode for process in self.processes]

    def kill(self) -> None:
        """kill -9 to all of them."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)


def losses(model_dir) -> dict[int, float]:
    """Step -> training loss."""
    lines = read_metrics(model_dir)
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}
