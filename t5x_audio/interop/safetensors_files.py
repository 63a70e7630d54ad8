"""Safetensors checkpoints in one or several files: what they hold, and writing tensor by tensor.

Reading goes through the safetensors library, which checks header and length of a file. Its writer
wants all tensors in memory at once, so files are laid out here and filled in through the memory
map; the layout (tensors by falling size of their type, then by name) is the library's.
"""

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from t5x_audio.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Checkpoint:
    """The tensors of a folder. UserError, naming the file, when one is missing or damaged.

    Attributes:
      files: in order of name.
      dtypes, shapes: by tensor.
    """

    def __init__(self, folder: Path):
        """Reads headers only."""
        import safetensors

        self.files = _files(folder)
        self._readers, self.dtypes, self.shapes = {}, {}, {}
        for path in self.files:
            try:
                reader = safetensors.safe_open(path, framework="np")
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(
                    f"{path}: damaged or cut short ({error}); fetch it again"
                ) from error
            for name in reader.keys():  # noqa: SIM118  (not a dict)
                if name in self._readers:
                    raise UserError(f"{path}: holds {name}, as does another file of the checkpoint")
                part = reader.get_slice(name)
                self._readers[name] = reader
                self.shapes[name] = tuple(part.get_shape())
                if part.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{path}: {name} is of type {part.get_dtype()}, which is no float"
                    )
                self.dtypes[name] = DTYPES[part.get_dtype()]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its own type."""
        return self._readers[name].get_tensor(name)

    def headers(self) -> dict[str, str]:
        """File name -> its header as text, from which `Writer` makes the same file again."""
        return {path.name: _header(path) for path in self.files}


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.exists():
        if (folder / SINGLE_FILE).exists():
            return [folder / SINGLE_FILE]
        raise UserError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: unreadable ({error})") from error
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: missing, though {INDEX_FILE} names it")
    return [folder / name for name in names]


def _header(path: Path) -> str:
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return file.read(size).decode()


def layout(
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]], max_bytes: int = 5 * 10**9
) -> dict[str, str]:
    """File name -> header for tensors (name, shape, type), in files of at most `max_bytes`."""
    groups, sizes = [[]], [0]
    for name, shape, dtype in tensors:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if groups[-1] and sizes[-1] + size > max_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append((name, shape, dtype, size))
        sizes[-1] += size
    headers = {}
    for i, group in enumerate(groups, 1):
        many = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, shape, dtype, size in sorted(group, key=lambda t: (-t[2].itemsize, t[0])):
            offsets = [start, start + size]
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
            start += size
        text = json.dumps(header, separators=(",", ":"))
        headers[many if len(groups) > 1 else SINGLE_FILE] = text + " " * (-len(text) % 8)
    return headers


class Writer:
    """Files of given headers, filled in tensor by tensor, under their names only when complete.

    Attributes:
      names: of the tensors.
    """

    def __init__(self, folder: Path, headers: dict[str, str]):
        """Lays out the files; UserError when the disk cannot hold them."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._headers, self._places = folder, headers, {}
        for name, header in headers.items():
            path, entries = self._path(name), json.loads(header)
            entries.pop("__metadata__", None)
            start = 8 + len(header.encode())
            end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            self._lay_out(path, header, end)
            for tensor, entry in entries.items():
                self._places[tensor] = (path, start + entry["data_offsets"][0], entry)
        self.names = set(self._places)
        self._left = set(self._places)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.writing"

    @staticmethod
    def _lay_out(path: Path, header: str, size: int) -> None:
        text = header.encode()
        try:
            with open(path, "wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); {size} bytes"
            ) from error

    def write(self, name: str, array: np.ndarray) -> None:
        """One tensor, converted to the type of its place; ValueError for another shape."""
        path, start, entry = self._places[name]
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        if array.shape != shape:
            raise ValueError(f"{name} is {array.shape}, its place {shape}")
        place = np.memmap(path, dtype, "r+", start, shape)
        place[...] = array
        place.flush()
        self._left.discard(name)

    def finish(self) -> None:
        """Gives the files their names; an index beside several of them."""
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were not written, {min(self._left)} first")
        for name in self._headers:
            os.replace(self._path(name), self._folder / name)
        if len(self._headers) > 1:
            total = sum(
                e["data_offsets"][1] - e["data_offsets"][0] for _, _, e in self._places.values()
            )
            names = {
                t: path.name.removesuffix(".writing") for t, (path, _, _) in self._places.items()
            }
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
            (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
