"""Reads PyTorch checkpoint files into numpy without PyTorch, in both of its formats; writes zip.

- zip (since PyTorch 1.6): <root>/data.pkl describes the object, <root>/data/<key> hold storages;
- legacy: four pickles (magic, protocol version, system, object), a pickled list of storage keys,
  then for every key an int64 element count and its raw data.

A pickle may name any callable, so ours knows only the handful of names that rebuild tensors and
containers and refuses all others: reading a hostile file runs nothing. Storages are mapped, not
read, so that a file larger than the memory can be converted tensor by tensor.
Source: torch/serialization.py, torch/_utils.py (formats only).
"""

import collections
import dataclasses
import io
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np

from t5x_audio.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_DTYPES = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
}
_DTYPE_NAMES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
    "complex64": "ComplexFloat",
    "complex128": "ComplexDouble",
}
# What unpickling and indexing raise on a truncated or garbled file.
_MALFORMED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    MemoryError,
    OverflowError,
)


def read_torch_file(path) -> dict[str, np.ndarray]:
    """Reads every tensor of a .pt, .pth or .bin file.

    Args:
      path: a file written by torch.save; a state dict or any nesting of dicts and lists.

    Returns:
      {name: array}, names of nested containers joined by dots ('model_state.linear.weight').
      Entries that are not tensors are left out. Arrays may be read-only views of the mapped file.

    Raises:
      UserError: missing, truncated or not a PyTorch file, or one that names other code.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a PyTorch checkpoint")
    try:
        read = _read_zip if zipfile.is_zipfile(path) else _read_legacy
        root, storages = read(path)
        return {name: _to_array(tensor, storages) for name, tensor in _tensors(root)}
    except _Refused as error:
        raise UserError(f"{path}: {error}") from None
    except _MALFORMED as error:
        raise UserError(
            f"{path}: not a whole PyTorch file ({type(error).__name__}); fetch it again"
        ) from None


class _Refused(Exception):
    """A file that is readable but not acceptable; the message says why."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A flat run of elements: `key` names the bytes, `offset` counts elements into them."""

    key: str
    dtype: np.dtype | None  # None: untyped, the tensor says
    count: int
    offset: int = 0


@dataclasses.dataclass
class _Tensor:
    """A strided view of a storage, in elements; data come once the whole pickle is read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Dtype:
    """Stands for torch.float32 and torch.FloatStorage alike; untyped when dtype is None."""

    dtype: np.dtype | None


def _rebuild_tensor(storage, offset, shape, strides, *_, dtype=None):
    dtype = dtype or storage.dtype
    if dtype is None:
        raise _Refused("holds a tensor without an element type; save it again with torch.save")
    return _Tensor(storage, storage.offset + offset, tuple(shape), tuple(strides), dtype)


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, *_):
    return _rebuild_tensor(storage, offset, shape, strides, dtype=dtype.dtype)


def _rebuild_parameter(tensor, *_):
    return tensor


class _Device:
    """Stands for torch.device('cuda', 0) and the like, which an array has no use for."""

    def __init__(self, *_):
        pass


_GLOBALS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): _Device,
    ("torch.storage", "UntypedStorage"): _Dtype(None),
    ("torch", "UntypedStorage"): _Dtype(None),
    **{("torch", f"{kind}Storage"): _Dtype(np.dtype(t)) for kind, t in _DTYPES.items()},
    **{("torch", name): _Dtype(np.dtype(_DTYPES[kind])) for name, kind in _DTYPE_NAMES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows the names in _GLOBALS and no others."""

    def find_class(self, module, name):
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise _Refused(
                f"names {module}.{name}, which is not plain tensors; save the state dict alone"
            ) from None

    def persistent_load(self, pid):
        kind, storage_type, key, _, count, *view = pid
        if kind != "storage":
            raise _Refused(f"holds a {kind!r} entry, which is not a tensor")
        offset = view[0][1] if view and view[0] is not None else 0
        return _Storage(str(key), storage_type.dtype, int(count), int(offset))


def _read_zip(path: pathlib.Path):
    """Returns (the pickled object, {storage key: uint8 array})."""
    mapped = np.memmap(path, np.uint8, mode="r")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        described = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        if not described:
            raise _Refused("a zip file without data.pkl; give a file written by torch.save")
        root = described[0].split("/")[0]
        if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
            raise _Refused("written on a big-endian machine; convert it there")
        prefix = f"{root}/data/"
        storages = {
            info.filename.removeprefix(prefix): _member(archive, info, mapped)
            for info in archive.infolist()
            if info.filename.startswith(prefix)
        }
        return _Unpickler(io.BytesIO(archive.read(described[0]))).load(), storages


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, mapped: np.ndarray) -> np.ndarray:
    """The bytes of an archive member, mapped when it is stored uncompressed."""
    if info.compress_type != zipfile.ZIP_STORED:
        return np.frombuffer(archive.read(info), np.uint8)
    local = 30  # the local header's fixed part; name and extra field follow
    name_size, extra_size = struct.unpack_from("<HH", mapped, info.header_offset + 26)
    start = info.header_offset + local + name_size + extra_size
    return mapped[start : start + info.file_size]


def _read_legacy(path: pathlib.Path):
    """Returns (the pickled object, {storage key: uint8 array})."""
    with path.open("rb") as file:
        if file.read(2) == b"PK":  # a zip without its end
            raise EOFError
        file.seek(0)
        if _Unpickler(file).load() != _LEGACY_MAGIC:
            raise _Refused("not a PyTorch file; give one written by torch.save")
        if _Unpickler(file).load() != _LEGACY_VERSION:
            raise _Refused("an unknown version of the legacy format; save it with a newer PyTorch")
        if not _Unpickler(file).load().get("little_endian", True):
            raise _Refused("written on a big-endian machine; convert it there")
        unpickler = _Recorder(file)
        root = unpickler.load()
        keys = _Unpickler(file).load()
        mapped = np.memmap(path, np.uint8, mode="r")
        storages, place = {}, file.tell()
        for key in keys:
            (count,) = struct.unpack_from("<q", mapped, place)
            start, size = place + 8, count * unpickler.item_sizes[str(key)]
            if size < 0 or start + size > len(mapped):
                raise EOFError
            storages[str(key)] = mapped[start : start + size]
            place = start + size
        return root, storages


class _Recorder(_Unpickler):
    """Also notes the element size of every storage, which the legacy data section leaves out."""

    def __init__(self, file):
        super().__init__(file)
        self.item_sizes = {}

    def persistent_load(self, pid):
        storage = super().persistent_load(pid)
        self.item_sizes[storage.key] = 1 if storage.dtype is None else storage.dtype.itemsize
        return storage


def _tensors(node, prefix: str = ""):
    """Yields (dotted name, _Tensor) of a nesting of dicts, lists and tuples."""
    if isinstance(node, _Tensor):
        yield prefix or "tensor", node
    elif isinstance(node, dict | list | tuple):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            yield from _tensors(child, f"{prefix}.{key}" if prefix else str(key))


def _to_array(tensor: _Tensor, storages: dict[str, np.ndarray]) -> np.ndarray:
    data = storages[tensor.storage.key]
    item = tensor.dtype.itemsize
    flat = data[: len(data) // item * item].view(tensor.dtype)
    if len(tensor.shape) != len(tensor.strides) or min((*tensor.strides, tensor.offset, 0)) < 0:
        raise ValueError("inconsistent shape and strides")
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, tensor.dtype)
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if min((*tensor.shape, 1)) < 0 or tensor.offset + reach >= len(flat):
        raise EOFError
    strides = [s * item for s in tensor.strides]
    view = np.lib.stride_tricks.as_strided(
        flat[tensor.offset :], tensor.shape, strides, writeable=False
    )
    return np.require(view, requirements="A")


# ---- writing -------------------------------------------------------------------------------


def write_torch_file(path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a state dict that torch.load reads, also with weights_only=True.

    The file appears under its name only when complete.

    Args:
      path: of the new file.
      arrays: {name: array} of types that PyTorch has.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".writing")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("data.pkl"), _pickled(arrays))
        archive.writestr(_entry("byteorder"), b"little")
        for i, array in enumerate(arrays.values()):
            with archive.open(_entry(f"data/{i}"), "w", force_zip64=True) as member:
                member.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        archive.writestr(_entry("version"), b"3\n")
    temporary.replace(path)


def _entry(name: str) -> zipfile.ZipInfo:
    """A member of the archive, the same at any time of writing."""
    return zipfile.ZipInfo(f"archive/{name}")


def _pickled(arrays: dict[str, np.ndarray]) -> bytes:
    """The pickle (protocol 2) of a dict of tensors, each contiguous and alone in its storage.

    Spelled out in opcodes: pickling torch's own names would need torch.
    """
    parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for i, (name, array) in enumerate(arrays.items()):
        storage = f"{_DTYPE_NAMES[array.dtype.name]}Storage"
        steps = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
        kind = (_text("storage"), _global("torch", storage), _text(str(i)), _text("cpu"))
        parts += [
            _text(name),
            _global("torch._utils", "_rebuild_tensor_v2"),
            _tuple(
                _tuple(*kind, _integer(array.size)) + pickle.BINPERSID,
                _integer(0),
                _tuple(*map(_integer, array.shape)),
                _tuple(*map(_integer, steps)),
                pickle.NEWFALSE,
                _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,
            ),
            pickle.REDUCE,
        ]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _text(value: str) -> bytes:
    encoded = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE
