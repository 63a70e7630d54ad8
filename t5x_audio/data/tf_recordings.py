"""Recordings out of TFDS builders and SeqIO tasks. TensorFlow is loaded when one is opened.

Fields are found under the names that the builders of speech give them (librispeech, common_voice
and the like), splits by how their names begin.
"""

import dataclasses
import importlib
from collections.abc import Iterator

import numpy as np

from t5x_audio.audio import io
from t5x_audio.data import corpus
from t5x_audio.data.recordings import Limits, Recording
from t5x_audio.errors import UserError

_FIELDS = {
    "audio": ("speech", "audio", "voice"),
    "text": ("text", "sentence", "transcript", "transcription"),
    "speaker": ("speaker_id", "client_id", "speaker"),
    "id": ("id", "segment_id", "path"),
}
_SPLITS = {"train": "train", "dev": "validation", "valid": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Tfds:
    """The recordings of a TFDS builder, downloaded and prepared if they are not there.

    Attributes:
      name: e.g. 'librispeech' or 'common_voice/en'.
      data_dir: of TFDS; None is ~/tensorflow_datasets.

    Raises UserError: no such builder, no audio among its features, or a split of no known kind.
    """

    name: str
    data_dir: str | None = None

    def sizes(self) -> dict[str, int]:
        """Recordings of each of our splits."""
        splits = self._builder().info.splits
        return _sum_by_split(self._flag, {name: splits[name].num_examples for name in splits})

    def facts(self) -> dict:
        """Name, version and sizes."""
        builder = self._builder()
        sizes = {name: info.num_bytes for name, info in builder.info.splits.items()}
        return {"tfds": f"{self.name}:{builder.info.version}", "bytes": sizes}

    def shard(self, split: str, shard: int, num_shards: int) -> Iterator[Recording]:
        """A contiguous part of every TFDS split that belongs to ours."""
        import tensorflow_datasets as tfds

        builder = self._builder()
        fields = _found_fields(self._flag, builder.info.features)
        rate = getattr(builder.info.features[fields["audio"]], "sample_rate", None) or corpus.RATE
        for name, info in builder.info.splits.items():
            if _split(self._flag, name) != split:
                continue
            start, stop = (info.num_examples * k // num_shards for k in (shard, shard + 1))
            dataset = builder.as_dataset(split=f"{name}[{start}:{stop}]", shuffle_files=False)
            for number, example in enumerate(tfds.as_numpy(dataset), start):
                yield _recording(example, fields, rate, f"{name}-{number}", self.name)

    @property
    def _flag(self) -> str:
        return f"--tfds={self.name}"

    def _builder(self):
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(self.name, data_dir=self.data_dir)
        except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
            raise UserError(f"{self._flag}: {str(error).splitlines()[0]}") from error
        _found_fields(self._flag, builder.info.features)
        builder.download_and_prepare()
        return builder


@dataclasses.dataclass(frozen=True)
class SeqioTask:
    """The recordings that a SeqIO task of the user's gives, after its preprocessors.

    Attributes:
      name: of the task.
      module: Python module that registers it, imported by every worker; None = seqio's own.
      rate: of its audio in Hz.

    Raises UserError: no such module or task, no audio in its examples, or a split of no known kind.
    """

    name: str
    module: str | None = None
    rate: int = corpus.RATE

    def sizes(self) -> dict[str, int]:
        """Recordings of each of our splits; they are counted where the source doesn't know."""
        task = self._task()
        return _sum_by_split(self._flag, {name: _count(task, name) for name in task.splits})

    def facts(self) -> dict:
        """Name and sizes; what the preprocessors do is not seen."""
        return {"seqio_task": self.name, "sizes": self.sizes(), "rate": self.rate}

    def shard(self, split: str, shard: int, num_shards: int) -> Iterator[Recording]:
        """SeqIO's own shard of each of the task's splits that belongs to ours."""
        import seqio

        task = self._task()
        for name in task.splits:
            if _split(self._flag, name) != split:
                continue
            part = seqio.ShardInfo(shard, num_shards)
            dataset = task.get_dataset(None, split=name, shuffle=False, shard_info=part)
            for number, example in enumerate(dataset.as_numpy_iterator()):
                fields = _found_fields(self._flag, example)
                place = f"{name}-{shard}-of-{num_shards}-{number}"
                yield _recording(example, fields, self.rate, place, self.name)

    @property
    def _flag(self) -> str:
        return f"--seqio_task={self.name}"

    def _task(self):
        import seqio

        if self.module:
            try:
                importlib.import_module(self.module)
            except ImportError as error:
                raise UserError(f"--seqio_module={self.module}: {error}") from error
        if self.name not in seqio.TaskRegistry.names():
            raise UserError(
                f"{self._flag}: no such task is registered; name the module that does it with "
                "--seqio_module=..."
            )
        return seqio.TaskRegistry.get(self.name)


def _count(task, split: str) -> int:
    number = (task.source.num_input_examples(split) if task.source else None) or 0
    if number:
        return number
    return sum(1 for _ in task.get_dataset(None, split=split, shuffle=False))


def _split(flag: str, name: str) -> str:
    begins = [ours for theirs, ours in _SPLITS.items() if name.startswith(theirs)]
    if not begins:
        raise UserError(f"{flag}: split {name!r} is neither train, dev nor test")
    return begins[0]


def _sum_by_split(flag: str, sizes: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, size in sizes.items():
        split = _split(flag, name)
        found[split] = found.get(split, 0) + size
    return found


def _found_fields(flag: str, present) -> dict[str, str | None]:
    found = {
        field: next((there for there in names if there in present), None)
        for field, names in _FIELDS.items()
    }
    if found["audio"] is None:
        raise UserError(f"{flag}: has no audio, only {', '.join(sorted(present))}")
    return found


def _recording(example, fields, rate: float, place: str, source: str) -> Recording:
    texts = {
        field: _text(example[there])
        for field, there in fields.items()
        if there is not None and field != "audio"
    }
    clip_id = texts.pop("id", "") or place
    samples = np.asarray(example[fields["audio"]])
    name = f"{source}: {clip_id}"

    def load(limits: Limits) -> np.ndarray:
        return _resampled(samples, rate, name, limits)

    return Recording(clip_id, texts, name, load)


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _resampled(samples: np.ndarray, rate: float, name: str, limits: Limits) -> np.ndarray:
    """TFDS gives integers of 16 bits, or floats."""
    io.check_rate(name, rate, limits.min_rate)
    whole = np.issubdtype(samples.dtype, np.integer)
    samples = (samples / 32768.0 if whole else samples).astype(np.float32)
    io.check_samples(samples, rate, name=name, max_seconds=limits.max_seconds)
    return io.resample(samples, rate, corpus.RATE)
