"""The whole life of an audio LLM, from recordings to a report, as the ordered list of its jobs.

Every job is an entry point of its own, started here as a separate process with the gin files a pod
would use; only the file of sizes (`gin/models/<size>.gin`) and the hardware file differ. What is
finished is skipped, what was interrupted continues, and the wall-clock time of every job is kept
in `<run_dir>/stages.json`, where the report reads it.

    python -m t5x_audio.life --size=demo
    python -m t5x_audio.life --size=tiny --run_dir=runs/tiny --from_stage=sft1
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
import time


@dataclasses.dataclass(frozen=True)
class Stage:
    """One job: what it is called, the entry point, and what is there when it is done.

    Attributes:
      name: name of the gin run file (`gin/runs/<name>.gin`) and of the stage on the command line.
      job: module under `t5x_audio` that is run.
      output: path under the run directory that exists once the stage has been finished.
      says: one line for people.
    """

    name: str
    job: str
    output: str
    says: str


STAGES = (
    Stage("prepare_data", "prepare_data", "corpus", "speech: recordings and the data engine"),
    Stage("train_vocabulary", "train_vocabulary", "vocabulary", "SentencePiece vocabulary"),
    Stage("train_linguistic", "train", "linguistic", "linguistic encoder (SAN-M, CTC)"),
    Stage("fit_codebook", "fit_codebook", "linguistic_tokenizer", "linguistic codebook (k-means)"),
    Stage("train_semantic", "train", "semantic", "semantic tokenizer (VQ inside)"),
    Stage("tokenize_corpus", "tokenize_corpus", "tokens", "speech to codes"),
    Stage("cache_tasks", "cache_tasks", "tasks", "SeqIO tasks to cached shards"),
    Stage("pretrain_stage1", "train", "pretrain1", "pretraining 1: continuation and text"),
    Stage("pretrain_stage2", "train", "pretrain2", "pretraining 2: and interleaved"),
    Stage("pretrain_stage3", "train", "pretrain3", "pretraining 3: and ASR and TTS"),
    Stage("sft1", "train", "sft1", "fine-tuning 1: answers, written and spoken"),
    Stage("sft2", "train", "sft2", "fine-tuning 2: spoken answers"),
    Stage("dpo", "train", "dpo", "audio-masked DPO"),
    Stage("merge", "merge", "merged", "merge 5:5:1"),
    Stage("train_flow", "train", "flow", "vocoder: flow matching"),
    Stage("train_hift", "train", "hift", "vocoder: HiFT"),
    Stage("evaluate", "evaluate", "evaluation", "evaluation on held-out spoken questions"),
    Stage(
        "evaluate_resynthesis", "evaluate_resynthesis", "resynthesis", "what codes leave of speech"
    ),
    Stage("make_report", "make_report", "report.html", "report"),
)


def command(stage: Stage, size: str, run_dir: str, extra: list[str]) -> list[str]:
    """The command line of `stage`, runnable by hand as printed."""
    return [
        sys.executable,
        "-m",
        f"t5x_audio.{stage.job}",
        f"--gin_file=gin/models/{size}.gin",
        f"--gin_file=gin/runs/{stage.name}.gin",
        f"--gin.RUN_DIR={run_dir}",
        f"--model_dir={run_dir}/{stage.output}",
        *extra,
    ]


def settings(argv: list[str]) -> str:
    """Digest of the gin files a command names and of those they include."""
    prefix = "--gin_file="
    waiting = [word.removeprefix(prefix) for word in argv if word.startswith(prefix)]
    texts = {}
    while waiting:
        path = waiting.pop()
        if path not in texts and pathlib.Path(path).is_file():
            texts[path] = pathlib.Path(path).read_text()
            waiting += re.findall(r"^include '(.+)'", texts[path], re.MULTILINE)
    return hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:12]


class Ledger:
    """`stages.json`: which command finished when, how long it took, on what machine."""

    def __init__(self, run_dir: pathlib.Path):
        """Reads the ledger of `run_dir`, or starts an empty one."""
        self.path = run_dir / "stages.json"
        self.rows = json.loads(self.path.read_text()) if self.path.exists() else {}

    def finished(self, stage: Stage, argv: list[str]) -> bool:
        """Whether this command, with these settings, has finished and its output is there."""
        row = self.rows.get(stage.name, {})
        output = self.path.parent / stage.output
        return "finished" in row and self._is_same(row, argv) and output.exists()

    def add(self, stage: Stage, argv: list[str], seconds: float, finished: bool, made: bool):
        """Adds a run; `seconds` are added to those of earlier, interrupted runs.

        One that found its output made already (`made` False) leaves the time that took.
        """
        known = self.rows.get(stage.name, {})
        if made and not self._is_same(known, argv):
            known = {}
        if known and not made:
            seconds = 0.0
        row = {
            "command": shlex.join(argv[1:]),
            "settings": settings(argv),
            "seconds": round(known.get("seconds", 0.0) + seconds, 1),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        }
        if finished:
            now = datetime.datetime.now(datetime.UTC)
            row["finished"] = now.isoformat(timespec="seconds")
        self.rows[stage.name] = row
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.rows, indent=1))
        temporary.replace(self.path)

    @staticmethod
    def _is_same(row: dict, argv: list[str]) -> bool:
        return (row.get("command"), row.get("settings")) == (shlex.join(argv[1:]), settings(argv))


def select(first: str | None, only: list[str] | None) -> list[Stage]:
    """The stages asked for, in order."""
    names = [stage.name for stage in STAGES]
    for name in [*(only or []), *([first] if first else [])]:
        if name not in names:
            raise SystemExit(fail(f"no stage is called {name!r}: choose from {', '.join(names)}"))
    stages = STAGES[names.index(first) :] if first else STAGES
    return [stage for stage in stages if not only or stage.name in only]


def fail(line: str) -> int:
    """Prints `line` as the one error line and returns the exit code of bad input."""
    print(f"error: {line}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Runs the stages; returns the exit code of the first that fails, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="demo", help="a file of gin/models (default: demo)")
    parser.add_argument("--run_dir", help="where everything is written (default: runs/<size>)")
    parser.add_argument("--from_stage", help="run this stage and the later ones again")
    parser.add_argument("--only", action="append", help="run only this stage (repeatable)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    flags, extra = parser.parse_known_args(argv)
    unknown = [flag for flag in extra if not flag.startswith("--gin")]
    if unknown:
        return fail(f"unknown flag {unknown[0]}: see --help; gin bindings start with --gin.")
    if not pathlib.Path(f"gin/models/{flags.size}.gin").exists():
        return fail(f"gin/models/{flags.size}.gin does not exist: run from the project's root")
    try:
        stages = select(flags.from_stage, flags.only)
    except SystemExit as stop:
        return stop.code
    run_dir = flags.run_dir or f"runs/{flags.size}"
    again = bool(flags.from_stage or flags.only)
    if flags.dry_run:
        return run_stages(stages, flags.size, run_dir, extra, again, True)
    try:
        with only_here(run_dir) as alone:
            if not alone:
                return fail(f"{run_dir}: is being worked on by another process; wait for it")
            return run_stages(stages, flags.size, run_dir, extra, again, False)
    except OSError as error:
        place = error.filename or run_dir
        return fail(f"{place}: {error.strerror}; mend that, or give another --run_dir")


@contextlib.contextmanager
def only_here(run_dir: str):
    """Holds the lock of a run directory; yields whether nobody else has it.

    The system gives it back when the process ends, however it ends.
    """
    pathlib.Path(run_dir).mkdir(parents=True, exist_ok=True)
    with open(pathlib.Path(run_dir) / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run_stages(stages, size: str, run_dir: str, extra: list[str], again: bool, dry: bool) -> int:
    """Runs `stages` one after another; see `main`."""
    ledger = Ledger(pathlib.Path(run_dir))
    started = time.monotonic()
    for number, stage in enumerate(stages, 1):
        argv = command(stage, size, run_dir, extra)
        print(f"[{number}/{len(stages)}] {stage.says}", flush=True)
        if dry:
            print("  " + shlex.join(["python", *argv[1:]]))
            continue
        if not again and ledger.finished(stage, argv):
            print(f"  already there: {run_dir}/{stage.output}", flush=True)
            continue
        code = run_stage(stage, argv, ledger)
        if code in (130, 143):
            print("interrupted: start the same command again to continue", file=sys.stderr)
        if code:
            return code
    if not dry:
        minutes = (time.monotonic() - started) / 60
        print(f"done: {run_dir}/{stages[-1].output} minutes={minutes:.1f}", flush=True)
    return 0


def run_stage(stage: Stage, argv: list[str], ledger: Ledger) -> int:
    """Runs one job and keeps its time, also that of an interrupted one; returns its exit code."""
    output = ledger.path.parent / stage.output
    before, begun = newest_change(output), time.monotonic()
    if before is None:
        ledger.rows.pop(stage.name, None)  # The output was deleted: its time is gone with it.
    code = run_job(argv)
    made = code != 0 or newest_change(output) != before
    try:
        ledger.add(stage, argv, time.monotonic() - begun, code == 0, made)
    except OSError:
        if code == 0:  # Otherwise the job has said what is wrong, such as a full disk.
            raise
    return code


def newest_change(path: pathlib.Path) -> int | None:
    """When a file at or under `path` was last written, in ns; None when there is no file."""
    files = path.rglob("*") if path.is_dir() else [path]
    return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=None)


def run_job(argv: list[str]) -> int:
    """Runs a command that may save its work when it is told to stop; returns its exit code.

    Ctrl-C reaches the job from the terminal and SIGTERM is passed on; either is waited out. A
    second Ctrl-C kills it.
    """
    job, interrupted = subprocess.Popen(argv), False
    before = signal.signal(signal.SIGTERM, lambda *_: job.terminate())
    try:
        while True:
            try:
                code = job.wait()
                break
            except KeyboardInterrupt:
                if interrupted:
                    job.kill()
                interrupted = True
    finally:
        signal.signal(signal.SIGTERM, before)
    if interrupted:
        return 130
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
