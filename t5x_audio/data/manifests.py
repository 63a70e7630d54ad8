"""Recordings of the user's own as clips of a corpus: JSONL manifests and TFDS builders.

A manifest has one recording a line, as NeMo, ESPnet and others write them:

    {"audio": "a/b.flac", "text": "what is said", "speaker": "anna", "id": "b", "split": "train"}

`audio` is a file, relative to the manifest; `audio_filepath` is understood too. `offset` and
`duration` in seconds cut a part out of it; a `duration` alone changes nothing. Only `audio` must be
there: `text` may be missing where nothing but the sound is learnt, `id` is the path without its
ending, and a `split` follows from the id. TFDS builders are read under the field names of
librispeech, common_voice and the like.
"""

import dataclasses
import json
import pathlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np

from t5x_audio.audio import io
from t5x_audio.data import corpus, records
from t5x_audio.data.text_normalization import normalize
from t5x_audio.errors import UserError

_FIELDS = ("audio", "audio_filepath", "text", "speaker", "id", "split", "offset", "duration")
# What TFDS builders of speech call the fields, and how their splits begin.
_TFDS_FIELDS = {
    "audio": ("speech", "audio", "voice"),
    "text": ("text", "sentence", "transcript", "transcription"),
    "speaker": ("speaker_id", "client_id", "speaker"),
    "id": ("id", "segment_id", "path"),
}
_TFDS_SPLITS = {"train": "train", "dev": "validation", "valid": "validation", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Recording:
    """One recording before it is read; `load` gives float32 [T] at 16 kHz."""

    id: str
    split: str
    text: str
    speaker: str
    load: Any


def read_manifest(path: str, validation: float, test: float) -> list[Recording]:
    """The recordings of a JSONL file; no audio is opened yet.

    Args:
      path: of the manifest.
      validation, test: shares of the splits for rows that name none.

    Raises:
      UserError: naming the line, when it is no JSON or a field is missing, unknown or of another
        kind, or an id comes twice in a split.
    """
    folder = pathlib.Path(path).parent
    found, seen = [], set()
    for where, row in read_rows(path, _FIELDS):
        recording = _of_row(_checked(where, row), folder, validation, test)
        if (recording.split, recording.id) in seen:
            raise UserError(f"{where}: a second clip with id {recording.id!r}")
        seen.add((recording.split, recording.id))
        found.append(recording)
    if not found:
        raise UserError(f"{path}: holds no recording")
    return found


def read_rows(path: str, fields: Collection[str]) -> Iterator[tuple[str, dict]]:
    """The objects of a JSONL file, each with its place in it, for errors.

    UserError, naming the line, when it is no object, has a field of another name than `fields` or
    a `split` that there is not.
    """
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}: line {number}"
            yield where, _row(where, line, fields)


def _row(where: str, line: str, fields: Collection[str]) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: is not an object with fields")
    unknown = [name for name in row if name not in fields]
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r}; there are {', '.join(fields)}")
    if row.get("split", "train") not in records.SPLITS:
        raise UserError(f"{where}: split {row['split']!r} is none of {', '.join(records.SPLITS)}")
    return row


def _checked(where: str, row: dict) -> dict:
    for name, value in row.items():
        numeric = name in ("offset", "duration")
        if not isinstance(value, (int, float) if numeric else str) or (numeric and value < 0):
            kind = "a number from 0 on" if numeric else "a text"
            raise UserError(f"{where}: {name}={value!r} is not {kind}")
    if not (row.get("audio") or row.get("audio_filepath")):
        raise UserError(f"{where}: lacks the field 'audio'")
    return row


def _of_row(row: dict, folder: pathlib.Path, validation: float, test: float) -> Recording:
    name = row.get("audio") or row["audio_filepath"]
    start, length = float(row.get("offset", 0)), row.get("duration")
    part = "offset" in row
    default = str(pathlib.PurePath(name).with_suffix("")).replace("/", "-").strip("-.")
    clip_id = row.get("id") or (f"{default}-{start:g}" if part else default)

    def load() -> np.ndarray:
        samples = io.load(folder / name, corpus.RATE, check_silence=False)
        if part:
            first = int(start * corpus.RATE)
            stop = None if length is None else first + int(length * corpus.RATE)
            samples = samples[first:stop]
        io.check_samples(samples, corpus.RATE, name=f"{folder / name} ({clip_id})")
        return samples

    split = row.get("split") or corpus.split_of(clip_id, validation, test)
    return Recording(clip_id, split, row.get("text", ""), row.get("speaker", ""), load)


def read_tfds(name: str, data_dir: str | None) -> Iterator[Recording]:
    """The recordings of a TFDS builder, downloaded and prepared if they are not there.

    Args:
      name: e.g. 'librispeech' or 'common_voice/en'.
      data_dir: of TFDS; None is ~/tensorflow_datasets.

    Raises:
      UserError: no such builder, no audio among its features, or a split of no known kind.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise UserError(f"--tfds={name}: {str(error).splitlines()[0]}") from error
    names = _tfds_names(name, builder.info.features)
    builder.download_and_prepare()
    for split in builder.info.splits:
        begins = [ours for theirs, ours in _TFDS_SPLITS.items() if split.startswith(theirs)]
        if not begins:
            raise UserError(f"--tfds={name}: split {split!r} is neither train, dev nor test")
        dataset = builder.as_dataset(split=split, shuffle_files=False)
        rate = getattr(builder.info.features[names["audio"]], "sample_rate", None) or corpus.RATE
        for number, example in enumerate(tfds.as_numpy(dataset)):
            texts = {
                field: _text(example[there])
                for field, there in names.items()
                if there is not None and field != "audio"
            }
            clip_id = texts.get("id") or f"{split}-{number}"
            samples = np.asarray(example[names["audio"]])
            yield Recording(
                clip_id, begins[0], texts.get("text", ""), texts.get("speaker", ""),
                lambda x=samples, i=clip_id, r=rate: _resampled(x, r, f"{name}: {i}"),
            )  # fmt: skip


def _tfds_names(name: str, features) -> dict[str, str | None]:
    found = {
        field: next((there for there in names if there in features), None)
        for field, names in _TFDS_FIELDS.items()
    }
    if found["audio"] is None:
        raise UserError(f"--tfds={name}: has no audio, only {', '.join(sorted(features))}")
    return found


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _resampled(samples: np.ndarray, rate: float, name: str) -> np.ndarray:
    """TFDS gives integers of 16 bits, or floats."""
    whole = np.issubdtype(samples.dtype, np.integer)
    samples = (samples / 32768.0 if whole else samples).astype(np.float32)
    io.check_samples(samples, rate, name=name)
    return io.resample(samples, rate, corpus.RATE)


def clips(
    recordings: Iterable[Recording], max_seconds: float, refused: list[dict]
) -> Iterator[tuple[str, corpus.Clip]]:
    """Yields (split, clip); what cannot be used is added to `refused` with the reason."""
    for recording in recordings:
        try:
            samples = recording.load()
        except UserError as error:
            refused.append({"id": recording.id, "reason": str(error)})
            continue
        if samples.size > max_seconds * corpus.RATE:
            seconds = samples.size / corpus.RATE
            reason = f"lasts {seconds:.1f} s, more than max_seconds={max_seconds:g}"
            refused.append({"id": recording.id, "reason": reason})
            continue
        yield (
            recording.split,
            corpus.Clip(
                id=recording.id,
                audio=io.to_int16(samples),
                text=normalize(recording.text),
                speaker=recording.speaker,
            ),
        )
