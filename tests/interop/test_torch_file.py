"""Both checkpoint formats, from files that tests/parity/make_torch_files.py wrote with PyTorch."""

import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.interop import torch_file

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FILES = ["torch_zip.pt", "torch_legacy.pt"]


@pytest.mark.parametrize("name", FILES)
def test_reads_what_torch_wrote(name):
    arrays = torch_file.read_torch_file(GOLDEN / name)
    expected = np.load(GOLDEN / "torch_content.npz")
    assert set(arrays) == set(expected.files)
    for key in expected.files:
        assert arrays[key].shape == expected[key].shape, key
        np.testing.assert_array_equal(arrays[key].astype(np.float64), expected[key], err_msg=key)
    kinds = {"float": np.float32, "half": np.float16, "bfloat16": ml_dtypes.bfloat16}
    for key, dtype in {**kinds, "long": np.int64, "int8": np.int8, "bool": np.bool_}.items():
        assert arrays[key].dtype == dtype


class _Call:
    """Pickles into a call of any function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def legacy_file(path, payload):
    """A legacy checkpoint around the pickle bytes of its object, with no storages."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    head = b"".join(pickle.dumps(part, protocol=2) for part in parts)
    path.write_bytes(head + payload + pickle.dumps([], protocol=2))


def zip_file(path, payload):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)


@pytest.mark.parametrize("write", [legacy_file, zip_file])
def test_a_hostile_pickle_runs_nothing(tmp_path, write):
    trap = tmp_path / "trap"
    path = tmp_path / "hostile.pt"
    write(path, pickle.dumps(_Call(os.mkdir, str(trap)), protocol=2))
    with pytest.raises(UserError, match=r"hostile\.pt: names posix"):
        torch_file.read_torch_file(path)
    assert not trap.exists()
    for function in (eval, getattr, __import__):
        write(path, pickle.dumps({"a": _Call(function, "1")}, protocol=2))
        with pytest.raises(UserError, match="names "):
            torch_file.read_torch_file(path)


def crafted_tensor(offset, shape, strides):
    """A pickle of one tensor over a storage of four floats, opcode by opcode."""

    def numbers(values):
        return b"(" + b"".join(b"I%d\n" % value for value in values) + b"t"

    storage = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ"
    arguments = storage + b"I%d\n" % offset + numbers(shape) + numbers(strides) + b"I00\nN"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR."


def crafted_file(path, *view):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", crafted_tensor(*view))
        archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())


def test_a_tensor_may_not_reach_outside_its_storage(tmp_path):
    path = tmp_path / "crafted.pt"
    crafted_file(path, 1, (3,), (1,))
    np.testing.assert_array_equal(torch_file.read_torch_file(path)["tensor"], [1, 2, 3])
    for view in [
        (0, (5,), (1,)),
        (3, (2,), (1,)),
        (1, (2,), (-1,)),
        (0, (2,), (9,)),
        (0, (2,), ()),
    ]:
        crafted_file(path, *view)
        with pytest.raises(UserError, match="not a whole PyTorch file"):
            torch_file.read_torch_file(path)


def read_or_refuse(path):
    """A damaged file may still read (damage inside a tensor) or must be refused as UserError."""
    try:
        torch_file.read_torch_file(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", FILES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_truncated_and_garbled_files_are_refused(tmp_path_factory, name, data):
    content = (GOLDEN / name).read_bytes()
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError):
        torch_file.read_torch_file(path)
    place = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(
        content[:place] + bytes([data.draw(st.integers(0, 255))]) + content[place + 1 :]
    )
    read_or_refuse(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        torch_file.read_torch_file(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(UserError, match="not a whole PyTorch file"):
        torch_file.read_torch_file(tmp_path / "text.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="not a PyTorch file"):
        torch_file.read_torch_file(tmp_path / "pickle.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(UserError, match=r"without data\.pkl"):
        torch_file.read_torch_file(tmp_path / "zip.pt")


def test_what_is_written_is_read(tmp_path):
    """Every type and shape; tests/parity/test_linguistic.py has torch.load read such a file."""
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.normal(size=(3, 4)).astype(np.float32).T,
        "a.b.scalar": np.float64(3.5).reshape(()),
        "empty": np.zeros((0, 2), np.float16),
        "long": np.arange(300),
        "bfloat16": np.arange(5).astype(ml_dtypes.bfloat16),
        "bool": np.array([True, False]),
    }
    path = tmp_path / "model.pt"
    torch_file.write_torch_file(path, arrays)
    read = torch_file.read_torch_file(path)
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape), name
        np.testing.assert_array_equal(read[name], array, err_msg=name)
    first = path.read_bytes()
    torch_file.write_torch_file(path, arrays)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_zip_without_its_end_is_not_whole(tmp_path):
    path = tmp_path / "model.pt"
    torch_file.write_torch_file(path, {"x": np.zeros(1000)})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="not a whole PyTorch file"):
        torch_file.read_torch_file(path)
