"""JSONL manifests: one recording, or one image, a line.

Of recordings as NeMo, ESPnet and others write them:

    {"audio": "a/b.flac", "text": "what is said", "speaker": "anna", "id": "b", "split": "train"}

`audio` is a file, relative to the manifest; `audio_filepath` is understood too. `offset` and
`duration` in seconds cut a part out of it; a `duration` alone changes nothing. Only `audio` must be
there: `text` may be missing where nothing but the sound is learnt, `id` is the path without its
ending, and a `split` follows from the id.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Collection, Iterator

from t5x_audio.data import corpus, records
from t5x_audio.data.recordings import Recording, from_file
from t5x_audio.errors import UserError

_FIELDS = ("audio", "audio_filepath", "text", "speaker", "id", "split", "offset", "duration")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The recordings of a JSONL file, see `recordings.Source`; no audio is opened before its turn.

    Attributes:
      path: of the manifest.
      validation, test: shares of the splits for rows that name none.

    Every method raises UserError, naming the line, when it is no JSON or a field is missing,
    unknown or of another kind, or an id comes twice in a split.
    """

    path: str
    validation: float = 0.02
    test: float = 0.02

    def sizes(self) -> dict[str, int]:
        """Recordings of each split."""
        return {split: len(rows) for split, rows in self._rows().items()}

    def facts(self) -> dict:
        """Changes with the manifest; what its files hold is not looked at."""
        digest = hashlib.sha256(pathlib.Path(self.path).read_bytes()).hexdigest()[:16]
        return {"manifest": digest, "shares": [self.validation, self.test]}

    def shard(self, split: str, shard: int, num_shards: int) -> Iterator[Recording]:
        """The recordings shard, shard + num_shards, ... of a split."""
        folder = pathlib.Path(self.path).parent
        for clip_id, row in self._rows().get(split, [])[shard::num_shards]:
            yield _recording(clip_id, row, folder)

    def _rows(self) -> dict[str, list[tuple[str, dict]]]:
        """split -> (id, row) in order."""
        found, seen = {}, set()
        for where, row in read_rows(self.path, _FIELDS):
            clip_id = _checked(where, row).get("id") or _id_of(row)
            split = row.get("split") or corpus.split_of(clip_id, self.validation, self.test)
            if (split, clip_id) in seen:
                raise UserError(f"{where}: a second clip with id {clip_id!r}")
            seen.add((split, clip_id))
            found.setdefault(split, []).append((clip_id, row))
        if not found:
            raise UserError(f"{self.path}: holds no recording")
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


def _id_of(row: dict) -> str:
    name = pathlib.PurePath(row.get("audio") or row["audio_filepath"])
    default = str(name.with_suffix("")).replace("/", "-").strip("-.")
    return f"{default}-{row['offset']:g}" if "offset" in row else default


def _recording(clip_id: str, row: dict, folder: pathlib.Path) -> Recording:
    path = folder / (row.get("audio") or row["audio_filepath"])
    part = {}
    if "offset" in row:
        part = {"start": float(row["offset"]), "seconds": row.get("duration")}
    return from_file(
        clip_id,
        path,
        row.get("text", ""),
        row.get("speaker", ""),
        name=f"{path} ({clip_id})",
        **part,
    )
