"""Record files: what every corpus, token cache and task cache of the project is stored in.

Choices:
- ArrayRecord (github.com/google/array_record) with one record a group, so that any record is read
  by its index: a global shuffle is a permutation of indices and resuming costs nothing.
- A record is one flat dict (str, int, float, bytes, numpy arrays) in the msgpack form of
  `flax.serialization`, so no protocol buffers and no TensorFlow are needed to read one.
- Shards are written under temporary names and renamed together at `close`, so a file with its final
  name is always whole. Records go round the shards in turn: the same input gives the same files.
"""

import bisect
import contextlib
import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence

from array_record.python import array_record_module
from flax import serialization

from t5x_audio.errors import UserError

SPLITS = ("train", "validation", "test")

# ArrayRecord pads to 64 kB blocks; a file that holds no record is exactly two of them.
_EMPTY_FILE_BYTES = 2 * 65536
_SHARD_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.array_record$")


def encode_record(record: dict) -> bytes:
    """Packs a flat dict of str, int, float, bytes and numpy arrays."""
    return serialization.msgpack_serialize(dict(record))


def decode_record(data: bytes) -> dict:
    """Inverse of `encode_record`. Arrays keep their dtype and shape."""
    record = serialization.msgpack_restore(data)
    if not isinstance(record, dict):
        raise ValueError(f"a record is a dict, this is a {type(record).__name__}")
    return record


def shard_path(directory: str, split: str, shard: int, num_shards: int) -> str:
    """`<directory>/<split>-00000-of-00002.array_record`."""
    return os.path.join(directory, f"{split}-{shard:05d}-of-{num_shards:05d}.array_record")


def shard_paths(directory: str, split: str) -> list[str]:
    """The shards of a split in order; [] when there is none.

    Raises UserError when shards are missing or two sets with different counts are mixed.
    """
    paths = _named_like_shards(directory, split)
    found = [tuple(map(int, _SHARD_NAME.search(path).groups())) for path in paths]
    counts = sorted({count for _, count in found})
    if len(counts) > 1:
        raise UserError(
            f"{directory}: the shards of split '{split}' are mixed, of {counts[0]} and of "
            f"{counts[1]}; delete and remake them"
        )
    missing = sorted({(i, n) for n in counts for i in range(n)} - set(found))
    if missing:
        path = shard_path(directory, split, *missing[0])
        others = f" and {len(missing) - 1} more of its split" if missing[1:] else ""
        raise UserError(f"{path}: missing{others}; the shards are incomplete, remake them")
    return paths


def _named_like_shards(directory: str, split: str) -> list[str]:
    pattern = os.path.join(glob.escape(str(directory)), f"{split}-*.array_record")
    return sorted(path for path in glob.glob(pattern) if _SHARD_NAME.search(path))


def has_split(directory: str, split: str) -> bool:
    """Whether the directory holds a whole set of shards of this split."""
    return bool(shard_paths(directory, split))


def remove_split(directory: str, split: str) -> None:
    """Removes the shards of a split, if there are any."""
    for path in _named_like_shards(directory, split):
        os.remove(path)


class RecordWriter:
    """Writes the shards of one split; nothing has its final name before `close`.

    As a context manager it closes on success and discards the temporary files on an exception.

    Args:
      directory: made when missing.
      split: train, validation or test.
      num_shards: record i goes to shard i % num_shards.
    """

    def __init__(self, directory: str, split: str, num_shards: int = 1):
        if num_shards < 1:
            raise ValueError(f"num_shards must be positive, not {num_shards}")
        directory = str(directory)
        os.makedirs(directory, exist_ok=True)
        self._final = [shard_path(directory, split, i, num_shards) for i in range(num_shards)]
        self._stale = set(_named_like_shards(directory, split)) - set(self._final)
        self._temporary = [f"{path}.writing" for path in self._final]
        self._writers = [
            array_record_module.ArrayRecordWriter(path, "group_size:1") for path in self._temporary
        ]
        self.num_records = 0

    def write(self, record: dict) -> None:
        """Appends one record."""
        self._writers[self.num_records % len(self._writers)].write(encode_record(record))
        self.num_records += 1

    def close(self) -> None:
        """Finishes the files and gives them their final names, replacing older shards.

        Raises UserError, leaving no file, when the disk is full.
        """
        for shard, (writer, path) in enumerate(zip(self._writers, self._temporary, strict=True)):
            try:
                writer.close()  # the first to tell of a full disk
                arrived = array_record_module.ArrayRecordReader(path).num_records()
            except RuntimeError as error:
                self.discard()
                raise UserError(f"{path}: cannot be written ({_first_line(error)})") from error
            if arrived != len(range(shard, self.num_records, len(self._writers))):
                self.discard()
                raise UserError(f"{path}: not all records reached the file; is the disk full?")
        for path in self._stale:
            os.remove(path)
        for temporary, final in zip(self._temporary, self._final, strict=True):
            os.replace(temporary, final)

    def discard(self) -> None:
        """Drops what was written."""
        for writer, path in zip(self._writers, self._temporary, strict=True):
            with contextlib.suppress(RuntimeError):
                if writer.is_open():
                    writer.close()
            if os.path.exists(path):
                os.remove(path)

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, exception_type, *_) -> None:
        if exception_type is None:
            self.close()
        else:
            self.discard()


class Records(Sequence):
    """Random access to the records of given files, in file order. Can be pickled and shared.

    Raises UserError, naming the file, when one is missing or damaged.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = [str(path) for path in paths]
        self._readers = [_open(path) for path in self.paths]
        self._ends = list(itertools.accumulate(r.num_records() for r in self._readers))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict:
        index = int(index)
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        within = index - (self._ends[shard - 1] if shard else 0)
        try:
            return decode_record(self._readers[shard].read([within])[0])
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"{self.paths[shard]}: record {within} is damaged ({_first_line(error)}); "
                "delete the file and make it again"
            ) from error

    def __iter__(self) -> Iterator[dict]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> list[str]:
        return self.paths

    def __setstate__(self, paths: list[str]) -> None:
        self.__init__(paths)


def open_records(directory: str, split: str) -> Records:
    """The records of one split of a directory as a sequence of dicts.

    Raises UserError when the directory or the split is missing, or a file is damaged.
    """
    directory = str(directory)
    if not os.path.isdir(directory):
        raise UserError(f"{directory}: no such directory; run the job that makes it first")
    paths = shard_paths(directory, split)
    if not paths:
        raise UserError(f"{directory}: holds no records of split '{split}'")
    return Records(paths)


def _open(path: str):
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        reader = array_record_module.ArrayRecordReader(path)
        damaged = not reader.ok()
        empty = not damaged and reader.num_records() == 0
    except RuntimeError as error:
        raise UserError(f"{path}: is not a record file ({_first_line(error)})") from error
    # The reader takes a cut-off or foreign file for one without records.
    if damaged or (empty and os.path.getsize(path) != _EMPTY_FILE_BYTES):
        raise UserError(f"{path}: is damaged or no record file; delete it and make it again")
    return reader


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["?"])[0][:120]
