"""Metrics out of compiled steps and into files: metrics.jsonl and TensorBoard curves.

A learner returns (sum, weight) scalars on the device. They stay there, unfetched, until the loop
logs: one transfer per log line and no wait per step. metrics.jsonl holds one JSON object per
line: {"step", "split", name: value ...}; after a restart the lines beyond the restored step are
dropped, so every step is there once. The event files are written through the record writer and
messages of the `tensorboard` package; its higher-level writer would import TensorFlow.
"""

import json
import math
import os
import socket
import time
from pathlib import Path

import jax
import numpy as np

from t5x_audio.training.learner import Metrics


def summarize(metrics: list[Metrics]) -> dict[str, float]:
    """Weighted mean of every metric over steps; a metric of weight 0 is left out."""
    totals: dict[str, np.ndarray] = {}
    for one in jax.device_get(metrics):
        for name, pair in one.items():
            totals[name] = totals.get(name, 0.0) + np.asarray(pair, np.float64)
    return {name: float(value / weight) for name, (value, weight) in totals.items() if weight}


def first_bad(metrics: list[Metrics]) -> tuple[int, str] | None:
    """(index, name) of the first metric that is NaN or infinite, else None."""
    for index, one in enumerate(jax.device_get(metrics)):
        for name, (value, weight) in one.items():
            if not (math.isfinite(value) and math.isfinite(weight)):
                return index, name
    return None


class MetricWriter:
    """Appends to <directory>/metrics.jsonl and to event files per split, on the first host only.

    Args:
      directory: exists already.
      from_step: lines of later steps are dropped: they'll be written again.
    """

    def __init__(self, directory: str | os.PathLike, from_step: int = 0):
        self._directory = Path(directory)
        self._path = self._directory / "metrics.jsonl"
        self._from_step = from_step
        self._events: dict[str, _EventFile] = {}
        self._lines = None
        if jax.process_index() != 0:
            return
        if self._path.exists():
            kept = [line for line in read_metrics(directory) if line["step"] <= from_step]
            temporary = self._path.with_suffix(".jsonl.tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, self._path)
        self._lines = open(self._path, "a")  # noqa: SIM115

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """One line and one point on every curve of `split` ('train', 'validation')."""
        if self._lines is None:
            return
        self._lines.write(json.dumps({"step": step, "split": split} | values) + "\n")
        self._lines.flush()
        if split not in self._events:
            self._events[split] = _EventFile(self._directory / "events" / split, self._from_step)
        self._events[split].scalars(step, values)

    def close(self) -> None:
        """Closes the files."""
        if self._lines is not None:
            self._lines.close()
        for events in self._events.values():
            events.close()


def read_metrics(directory: str | os.PathLike) -> list[dict]:
    """The lines of metrics.jsonl; none if it's missing. A last line cut short is left out."""
    path = Path(directory) / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class _EventFile:
    """A TensorBoard event file of scalars."""

    def __init__(self, directory: Path, from_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(open(directory / name, "wb"))  # noqa: SIM115
        self._write(file_version="brain.Event:2")
        # Tells TensorBoard to forget what an interrupted run wrote beyond this step.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=from_step + 1, session_log=start)

    def _write(self, **fields):
        event = self._event.Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
        self._records.flush()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        points = [self._summary.Summary.Value(tag=n, simple_value=v) for n, v in values.items()]
        self._write(step=step, summary=self._summary.Summary(value=points))

    def close(self) -> None:
        self._records.close()
