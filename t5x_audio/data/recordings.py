"""Recordings before they are clips: what a source of speech gives, and what is asked of it.

A source lists its recordings in splits and hands out any shard of a split in a reproducible order,
so that many workers can each read their own. Each recording is opened when its turn comes and
becomes a `corpus.Clip`, or a UserError whose one line names the file and what is wrong with it.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from t5x_audio.audio import io, quality
from t5x_audio.data import corpus, records
from t5x_audio.data.text_normalization import normalize
from t5x_audio.errors import UserError

NORMALIZATIONS = {"english": normalize, "none": lambda text: " ".join(text.split())}
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3")
_FIELDS = ("text", "speaker", "role", "question_id", "category")


def require_normalization(name: str) -> None:
    """UserError unless it is one of NORMALIZATIONS."""
    if name not in NORMALIZATIONS:
        raise UserError(f"normalization={name!r}: there are {', '.join(NORMALIZATIONS)}")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a recording must keep to.

    Attributes:
      max_seconds: longest; a longer file is refused before it is decoded.
      min_rate: lowest sampling rate in Hz: from less the upper band of 16 kHz speech is missing,
        which the tokenizers have not seen.
      max_clipped: largest share of samples that are cut off, see `audio.quality`.
    """

    max_seconds: float = 30.0
    min_rate: int = 16000
    max_clipped: float = 0.01


@dataclasses.dataclass(frozen=True)
class Recording:
    """One recording.

    Attributes:
      id: of the clip.
      fields: text, speaker and whatever else of `corpus.Clip` is known.
      name: for errors: the file, or the place in its corpus.
      load: limits -> float32 [T] at 16 kHz; UserError when it cannot be used.
      normalized: its text has been normalised already.
    """

    id: str
    fields: dict[str, str]
    name: str
    load: Callable[[Limits], np.ndarray]
    normalized: bool = False

    def clip(self, limits: Limits, normalization: str = "english") -> corpus.Clip:
        """The clip, its text normalised. UserError, naming the recording, when it is no good."""
        samples = self.load(limits)
        io.check_samples(samples, corpus.RATE, name=self.name, max_seconds=limits.max_seconds)
        clipped = quality.clipped_share(samples)
        if clipped > limits.max_clipped:
            raise UserError(
                f"{self.name}: is clipped, {clipped:.1%} of its samples are cut off, more than "
                f"max_clipped={limits.max_clipped:g}; record it at a lower level"
            )
        fields = {"text": "", "speaker": ""} | self.fields
        if not self.normalized:
            fields["text"] = NORMALIZATIONS[normalization](fields["text"])
        return corpus.Clip(id=self.id, audio=io.to_int16(samples), **fields)


class Source(Protocol):
    """Where recordings come from. Can be pickled; every worker opens its own."""

    def sizes(self) -> dict[str, int]:
        """Recordings of each of our splits."""

    def facts(self) -> dict:
        """JSON that changes when the recordings do."""

    def shard(self, split: str, shard: int, num_shards: int) -> Iterator[Recording]:
        """One of `num_shards` parts of a split, together all of it, always in the same order."""


def from_file(
    clip_id: str, path, text: str, speaker: str, *, name: str, start=0.0, seconds=None
) -> Recording:
    """A recording in a sound file, or `seconds` of it from `start` on."""

    def load(limits: Limits) -> np.ndarray:
        return io.load(
            path,
            corpus.RATE,
            max_seconds=limits.max_seconds,
            min_rate=limits.min_rate,
            start=start,
            seconds=seconds,
            check_silence=False,
        )

    return Recording(clip_id, {"text": text, "speaker": speaker}, name, load)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus on disk, as `corpus` describes it; its texts stay as they are."""

    directory: str

    def sizes(self) -> dict[str, int]:
        """UserError when there is no such corpus."""
        if not os.path.isdir(self.directory):
            raise UserError(f"{self.directory}: no such corpus; run prepare_data first")
        splits = [split for split in records.SPLITS if records.has_split(self.directory, split)]
        return {split: len(records.open_records(self.directory, split)) for split in splits}

    def facts(self) -> dict:
        """Names and sizes of the shards."""
        names = [name for name in sorted(os.listdir(self.directory)) if ".array_record" in name]
        return {name: os.path.getsize(os.path.join(self.directory, name)) for name in names}

    def shard(self, split: str, shard: int, num_shards: int) -> Iterator[Recording]:
        """The recordings shard, shard + num_shards, ... of a split."""
        reader = records.open_records(self.directory, split)
        for index in range(shard, len(reader), num_shards):
            clip = corpus.Clip.from_record(reader[index])
            fields = {field: getattr(clip, field) for field in _FIELDS}
            name = f"{self.directory}: {split} {clip.id}"
            samples = clip.samples
            yield Recording(clip.id, fields, name, lambda _, x=samples: x, normalized=True)


@dataclasses.dataclass(frozen=True)
class Folder:
    """The sound files of a folder and the folders in it.

    The id is the path without its ending, the speaker the folder just inside, and the text a file
    of the same name that ends in .txt, where there is one. Hidden files are passed over.

    Attributes:
      path: of the folder.
      validation, test: shares of the splits, which follow from the ids.
    """

    path: str
    validation: float = 0.02
    test: float = 0.02

    def sizes(self) -> dict[str, int]:
        """UserError when there is no such folder, or no sound in it."""
        return {split: len(paths) for split, paths in self._paths().items()}

    def facts(self) -> dict:
        """Names and sizes of the files."""
        files = {
            str(path): (pathlib.Path(self.path) / path).stat().st_size
            for paths in self._paths().values()
            for path in paths
        }
        return {"files": files, "shares": [self.validation, self.test]}

    def shard(self, split: str, shard: int, num_shards: int) -> Iterator[Recording]:
        """The recordings shard, shard + num_shards, ... of a split."""
        root = pathlib.Path(self.path)
        for path in self._paths().get(split, [])[shard::num_shards]:
            beside = (root / path).with_suffix(".txt")
            text = beside.read_text(encoding="utf-8", errors="replace") if beside.exists() else ""
            speaker = path.parts[0] if len(path.parts) > 1 else ""
            yield from_file(_id(path), root / path, text, speaker, name=str(root / path))

    def _paths(self) -> dict[str, list[pathlib.Path]]:
        root = pathlib.Path(self.path)
        if not root.is_dir():
            raise UserError(f"--folder={self.path}: no such folder")
        found, ids = {}, {}
        for path in sorted(path.relative_to(root) for path in root.rglob("*")):
            hidden = any(part.startswith(".") for part in path.parts)
            if hidden or path.suffix.lower() not in AUDIO_ENDINGS:
                continue
            other = ids.setdefault(_id(path), path)
            if other is not path:
                raise UserError(f"{root / path}: has the same id as {root / other}; rename one")
            split = corpus.split_of(_id(path), self.validation, self.test)
            found.setdefault(split, []).append(path)
        if not found:
            raise UserError(
                f"--folder={self.path}: holds no sound, none of {', '.join(AUDIO_ENDINGS)}"
            )
        return found


def _id(path: pathlib.Path) -> str:
    return str(path.with_suffix("")).replace("/", "-")
