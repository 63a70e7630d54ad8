"""A Beam pipeline that turns the shards of a source of speech into shards of codes.

Choices:
- One element is one shard, worked off in order by one worker, so that the bytes of the output
  depend on the source and the number of shards, never on the number of workers or on chance.
- A shard is made in a directory of its own attempt and renamed when it is whole: a worker that is
  killed, or one that does the same shard a second time, harms nothing, and what is finished is not
  done again.
- Workers meet on a file system that all of them see; the pipeline itself carries numbers only.
- Beam waits for its workers before it lets an interruption through, and workers outlive a starter
  that is killed. So the pipeline runs in a thread of its own, and processes of this machine hold on
  to a lock of the starter's: when it lets go of it, or is gone, they end at once.
- Recordings that cannot be used become rows of the shard's quarantine. An error that no other
  recording can escape (a full disk, no tokenizer) is written down for the starter and ends the job.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils import shared

from t5x_audio.audio import quality
from t5x_audio.data import corpus, records
from t5x_audio.data.recordings import Limits, Recording, Source
from t5x_audio.errors import Abandoned, UserError

CHUNK_CLIPS = 512  # read and encoded at a time
CHUNK_SECONDS = 600.0  # no more, since the progress is told after each chunk
SUMMARY_FILE = "summary.json"
_PROGRESS_FILE = "progress.json"
_ERROR_FILE = "error.txt"


@dataclasses.dataclass(frozen=True)
class Tokenizing:
    """What every worker has to know; can be pickled.

    Attributes:
      source: of the recordings.
      directory: where attempts and finished shards are, on a file system that all workers see.
      num_shards: of each split.
      limits, normalization: see `recordings`.
      load_tokenizer: -> `DualCodebookTokenizer`; called once in every worker's process.
      lock: of `running`, when the workers are processes of this machine that end with `starter`.
      starter: its process.
    """

    source: Source
    directory: str
    num_shards: int
    limits: Limits
    normalization: str
    load_tokenizer: Callable[[], object]
    lock: str | None = None
    starter: int | None = None

    def shard_directory(self, split: str, shard: int) -> str:
        """Where a finished shard is."""
        return os.path.join(self.directory, f"{split}-{shard:05d}")

    def finished(self, split: str, shard: int) -> dict | None:
        """Figures of a finished shard: clips, seconds, quarantine."""
        return read_json(os.path.join(self.shard_directory(split, shard), SUMMARY_FILE))

    def run(self, splits: Iterable[str], options: list[str]) -> None:
        """Makes every shard that is missing. UserError for what a worker cannot go on from."""
        jobs = [(split, shard) for split in splits for shard in range(self.num_shards)]
        jobs = [job for job in jobs if self.finished(*job) is None]
        self._remove_attempts()
        if not jobs:
            return
        error = _in_a_thread(functools.partial(self._run_pipeline, jobs, options))
        self._raise_written_error()
        if error is not None:
            raise error
        left = [f"{split} {shard}" for split, shard in jobs if self.finished(split, shard) is None]
        if left:
            raise RuntimeError(f"shards {', '.join(left)} were not made and nobody said why")

    def _run_pipeline(self, jobs: list, options: list[str]) -> None:
        with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
            shards = pipeline | "shards" >> beam.Create(jobs) | beam.Reshuffle()
            _ = shards | "tokenize" >> beam.ParDo(_TokenizeShard(self))

    def tokenize_shard(self, tokenizer, split: str, shard: int) -> None:
        """Makes one shard, unless it is there."""
        if self.finished(split, shard) is not None:
            return
        attempt = os.path.join(self.directory, f"attempt-{uuid.uuid4().hex}")
        summary = {"clips": 0, "seconds": 0.0, "quarantine": []}
        read = 0
        recordings = self.source.shard(split, shard, self.num_shards)
        with records.RecordWriter(attempt, split) as writer:
            for chunk in self._chunks(recordings):
                for recording, record, reason in _tokenized(tokenizer, chunk):
                    if reason is None:
                        writer.write(record)
                        summary["clips"] += 1
                        summary["seconds"] += record["duration"]
                    else:
                        row = {"split": split, "id": recording.id, "reason": reason}
                        summary["quarantine"].append(row)
                read += len(chunk)
                progress = {"read": read, "seconds": summary["seconds"]}
                write_json(os.path.join(attempt, _PROGRESS_FILE), progress)
        write_json(os.path.join(attempt, SUMMARY_FILE), summary)
        try:
            os.rename(attempt, self.shard_directory(split, shard))
        except OSError:  # another attempt was faster
            if self.finished(split, shard) is None:
                raise
            shutil.rmtree(attempt, ignore_errors=True)

    def write_error(self, error: Exception) -> None:
        """Leaves a line for the starter of the job; the first stays."""
        path = os.path.join(self.directory, _ERROR_FILE)
        if not os.path.exists(path):
            corpus.write_text(path, str(error).split("\n")[0])

    def _chunks(self, recordings: Iterator[Recording]) -> Iterator[list]:
        """(recording, its clip or the reason why there is none), some hundred at a time."""
        chunk, seconds = [], 0.0
        for recording in recordings:
            try:
                found = recording.clip(self.limits, self.normalization)
                seconds += found.duration
            except UserError as error:
                found = str(error)
            chunk.append((recording, found))
            if len(chunk) == CHUNK_CLIPS or seconds >= CHUNK_SECONDS:
                yield chunk
                chunk, seconds = [], 0.0
        if chunk:
            yield chunk

    def _remove_attempts(self) -> None:
        """Of a job that was stopped."""
        for name in os.listdir(self.directory):
            path = os.path.join(self.directory, name)
            if name.startswith("attempt-"):
                shutil.rmtree(path, ignore_errors=True)
            elif name == _ERROR_FILE:
                os.remove(path)

    def _raise_written_error(self) -> None:
        path = os.path.join(self.directory, _ERROR_FILE)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                raise UserError(file.read())


@contextlib.contextmanager
def running(lock: str) -> Iterator[None]:
    """Holds the lock that says that a starter is at work. UserError when another one is."""
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            directory = os.path.dirname(lock)
            raise UserError(f"{directory}: another tokenize_corpus is writing it") from None
        except OSError:  # the file system has no locks
            pass
        yield
        os.remove(lock)


def _end_with_starter(lock: str) -> None:
    """Ends this process, in whatever it is, when nobody holds the lock any more."""
    with contextlib.suppress(OSError):
        with contextlib.suppress(FileNotFoundError), open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        os._exit(1)


def _in_a_thread(call: Callable[[], None]) -> Exception | None:
    """The error that `call` ends with. `Abandoned` by an interruption, which does not wait."""
    errors = []

    def run():
        try:
            call()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt as interrupt:
        raise Abandoned from interrupt
    return errors[0] if errors else None


class _TokenizeShard(beam.DoFn):
    """(split, shard) -> nothing: the result is on disk."""

    def __init__(self, job: Tokenizing):
        self._job, self._shared = job, shared.Shared()

    def setup(self) -> None:
        if self._job.lock is not None and self._job.starter != os.getpid():
            lock = (self._job.lock,)
            threading.Thread(target=_end_with_starter, args=lock, daemon=True).start()

    def process(self, element: tuple[str, int]) -> Iterator[None]:
        try:
            tokenizer = self._shared.acquire(functools.partial(_load, self._job.load_tokenizer))
            self._job.tokenize_shard(tokenizer, *element)
        except (UserError, OSError) as error:
            self._job.write_error(error)
            raise
        return iter(())


def _load(load: Callable[[], object]):
    return load()


def _tokenized(tokenizer, chunk) -> Iterator[tuple[Recording, dict | None, str | None]]:
    """(recording, record, None) or (recording, None, reason) for each of a chunk, in order."""
    clips = [found for _, found in chunk if isinstance(found, corpus.Clip)]
    streams = iter(tokenizer.encode_batch([clip.samples for clip in clips]))
    for recording, found in chunk:
        if not isinstance(found, corpus.Clip):
            yield recording, None, found
            continue
        linguistic, semantic = next(streams)
        if not len(tokenizer.merge(linguistic, semantic)):
            yield recording, None, f"{recording.name}: too short for one group of codes"
            continue
        record = found.to_record()
        del record["audio"]
        record |= quality.measure(found.samples, corpus.RATE)
        yield recording, record | {"linguistic": linguistic, "semantic": semantic}, None


class Progress:
    """A bar on stderr that follows what the workers write down; a context manager."""

    def __init__(self, job: Tokenizing, name: str, total: int, seconds: float = 1.0):
        """`total`: recordings; `seconds`: how often it looks."""
        self._job, self._name, self._total, self._period = job, name, total, seconds
        self._stop = threading.Event()
        self._finished: dict[str, dict] = {}  # what needs no second look
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        from tqdm import tqdm

        with tqdm(total=self._total, desc=self._name, unit=" clips") as bar:
            stopped = False
            while not stopped:
                stopped = self._stop.wait(self._period)
                read, seconds = self._read()
                if read > bar.n:
                    bar.set_postfix_str(f"{seconds / 3600:.2f} h of audio", refresh=False)
                    bar.update(read - bar.n)

    def _read(self) -> tuple[int, float]:
        """Recordings done with and seconds tokenised, of all finished shards and attempts."""
        read, seconds = 0, 0.0
        try:
            names = os.listdir(self._job.directory)
        except OSError:
            names = []
        for name in names:
            path = os.path.join(self._job.directory, name)
            whole = self._finished.get(name) or read_json(os.path.join(path, SUMMARY_FILE))
            if whole is not None:
                self._finished[name] = whole
                read += whole["clips"] + len(whole["quarantine"])
                seconds += whole["seconds"]
            elif part := read_json(os.path.join(path, _PROGRESS_FILE)):
                read, seconds = read + part["read"], seconds + part["seconds"]
        return read, seconds


def read_json(path: str):
    """What a file of JSON holds, None where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def write_json(path: str, value) -> None:
    """Writes a file of JSON under a temporary name and renames it."""
    corpus.write_text(path, json.dumps(value))
