"""What surrounds the steps of the loop: signals, the console line, endings."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from t5x_audio.errors import UserError
from t5x_audio.training import metrics as metrics_lib


def run_directory(model_dir: str | None, run_dir: str | None, name: str | None) -> Path:
    """`model_dir`, or `run_dir`/`name`, made if necessary. UserError if none is given."""
    if model_dir is None and (run_dir is None or name is None):
        raise UserError("no place to write to; add --model_dir=...")
    directory = Path(model_dir) if model_dir is not None else Path(run_dir, name)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{directory}: cannot be made a directory ({error.strerror})") from error
    return directory


class StopSignals:
    """Within the context, SIGINT and SIGTERM ask to stop instead of raising.

    The second signal raises KeyboardInterrupt at once: nothing more is saved. Several hosts must
    stop at the same step, whichever of them is told to: there JAX's preemption service takes
    SIGTERM, and SIGINT is left alone.
    """

    def __init__(self):
        self.stop = False
        self._previous = {}
        self._asked = 0

    def requested(self) -> bool:
        """Whether to stop now; every host asks once a step, and all get the same answer."""
        if jax.process_count() == 1:
            return self.stop
        self._asked += 1
        self.stop = self.stop or multihost_utils.reached_preemption_sync_point(self._asked)
        return self.stop

    def __enter__(self):
        if jax.process_count() > 1:
            return self
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._previous[kind] = signal.signal(kind, self._receive)
        return self

    def _receive(self, signum, frame):
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        print("\nstopping after this step, with everything saved", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)


class Console:
    """The progress bar and the clock: loss, rate, time left.

    Args:
      directory: names the run.
      start, steps: first and last step.
      key: batch field that is counted, None for examples.
      unit: what is counted.
      mfu_per_unit: model FLOPs of a unit over the peak of all devices, for the MFU; None for none.
    """

    def __init__(
        self,
        directory,
        start: int,
        steps: int,
        key: str | None,
        unit: str,
        mfu_per_unit: float | None = None,
    ):
        self._key, self._unit, self._mfu_per_unit = key, unit, mfu_per_unit
        self._shown = ""
        self._bar = tqdm.tqdm(
            total=steps,
            initial=start,
            desc=Path(directory).name,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts to count anew."""
        self._start, self._steps = time.perf_counter(), 0
        self._units, self._flops = 0.0, 0.0

    def advance(self, batch, flops: float = 0.0, times: float = 1.0) -> None:
        """Counts one step on `times` a host batch, and its floating-point operations."""
        self._steps += 1
        self._flops += flops
        self._units += times * count(batch, self._key)
        self._bar.update(1)

    def rates(self) -> dict[str, float]:
        """Seconds of steps since the last call, without pauses, and what was done in one."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rates = {
            "step_seconds": seconds,
            "steps_per_second": self._steps / seconds,
            f"{self._unit}_per_second": self._units / seconds,
            "gflop_per_second": self._flops / seconds / 1e9,
        }
        if self._mfu_per_unit is not None:
            rates["mfu"] = self._mfu_per_unit * self._units / seconds
        if not self._steps:  # Only the first step, whose time is compilation.
            rates = {}
        self._shown = f"{self._units / seconds:,.0f} {self._unit}/s" if rates else ""
        self.restart_clock()
        return rates

    def show(self, values: dict[str, float]) -> None:
        """Puts the loss and the last rate on the line."""
        text = f"loss {values['loss']:.4g}" if "loss" in values else ""
        if "mfu" in values:
            text += f", MFU {values['mfu']:.1%}"
        self._bar.set_postfix_str(", ".join(filter(None, [text, self._shown])), refresh=False)

    @contextlib.contextmanager
    def paused(self):
        """Time within doesn't count towards the rates."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._bar.write(text, file=sys.stderr)

    def go_back(self, step: int) -> None:
        """After a roll-back."""
        self._bar.n = step
        self.restart_clock()

    def close(self) -> None:
        """Leaves the bar where it is."""
        self._bar.close()


class Goodput:
    """Share of the time since a run was first started that went into steps which count.

    What is lost: starting, compiling, waiting for a machine, evaluation, saving, and steps that
    were done again after a restart or a roll-back, whose lines the metrics no longer hold.

    Args:
      directory: of the run; remembers when it was first started.
      step: at which it goes on.
    """

    def __init__(self, directory: Path, step: int):
        self._path, self._directory = directory / "started.json", directory
        if not self._path.exists() and jax.process_index() == 0:
            self._path.write_text(json.dumps({"unix_seconds": time.time()}) + "\n")
        self._started = time.time()
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._started = float(json.loads(self._path.read_text())["unix_seconds"])
        self.go_back(step)

    def go_back(self, step: int) -> None:
        """Counts the steps up to `step` that the metrics hold."""
        lines = metrics_lib.read_metrics(self._directory)
        self._seconds = sum(line.get("step_seconds", 0.0) for line in lines if line["step"] <= step)

    def add(self, rates: dict[str, float]) -> dict[str, float]:
        """{'goodput': share in [0, 1]} after steps at these rates."""
        self._seconds += rates.get("step_seconds", 0.0)
        return {"goodput": min(self._seconds / max(time.time() - self._started, 1e-9), 1.0)}


def count(batch, key: str | None) -> float:
    """What a batch holds of field `key`: a vector's sum, nonzero elements, or examples."""
    if key is None:
        return float(len(next(iter(batch.values()))))
    if key not in batch:
        raise UserError(f"throughput_key={key!r}: the batch has only {', '.join(sorted(batch))}")
    field = np.asarray(batch[key])
    return float(field.sum() if field.ndim == 1 else np.count_nonzero(field))


def went_wrong(directory, step: int, what: str, saved) -> UserError:
    """The error of a run that cannot go on from `step`."""
    saved.wait()
    good = saved.latest_step()
    resume = f"the last good checkpoint is step {good}" if good else "there is no checkpoint yet"
    return UserError(
        f"{directory}: {what} at step {step}; {resume}; "
        "lower the learning rate or look at the data, then start again"
    )


def data_ended(directory, step: int, steps: int) -> UserError:
    """The error of a dataset that isn't endless."""
    return UserError(
        f"{directory}: the data ended after step {step} of {steps}; let the dataset repeat"
    )


def data_failed(error: UserError, saved) -> UserError:
    """The error of a run whose data could not be read any further."""
    good = saved.latest_step()
    kept = f"saved at step {good}, start again then" if good else "nothing is lost"
    return UserError(f"{error}; {kept}")


def results(directory: str | os.PathLike, step: int) -> dict:
    """The closing line: directory, step and the last metrics of each split."""
    last: dict = {"model_dir": str(directory), "step": step}
    for line in metrics_lib.read_metrics(directory):
        prefix = "" if line["split"] == "train" else f"{line['split']}_"
        last |= {f"{prefix}{n}": v for n, v in line.items() if n not in ("step", "split")}
    return last
