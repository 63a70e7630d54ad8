"""Record files: what goes in comes out; damage is named."""

import os
import pathlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.data import records
from t5x_audio.errors import UserError


@settings(max_examples=30, deadline=None)
@given(
    st.text(max_size=20),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
    st.lists(st.integers(-32768, 32767), max_size=50),
)
def test_encode_then_decode_returns_the_record(text, integer, real, samples):
    record = dict(id=text, n=integer, x=real, audio=np.array(samples, np.int16))
    back = records.decode_record(records.encode_record(record))
    assert back["audio"].dtype == np.int16
    np.testing.assert_array_equal(back.pop("audio"), record.pop("audio"))
    assert back == record


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("count", [0, 2, 10])
def test_all_records_come_back_once(tmp_path, num_shards, count):
    with records.RecordWriter(tmp_path, "train", num_shards) as writer:
        for i in range(count):
            writer.write({"id": i})
    assert len(list(tmp_path.iterdir())) == num_shards
    source = records.open_records(tmp_path, "train")
    assert len(source) == count
    assert sorted(record["id"] for record in source) == list(range(count))
    assert [r["id"] for r in pickle.loads(pickle.dumps(source))] == [r["id"] for r in source]


def test_nothing_has_its_final_name_before_close_and_old_shards_go(tmp_path):
    with records.RecordWriter(tmp_path, "train", 3) as writer:
        writer.write({"id": 1})
    writer = records.RecordWriter(tmp_path, "train", 2)
    writer.write({"id": 2})
    assert [r["id"] for r in records.open_records(tmp_path, "train")] == [1]
    writer.close()
    assert [r["id"] for r in records.open_records(tmp_path, "train")] == [2]
    assert len(os.listdir(tmp_path)) == 2


def test_an_exception_leaves_no_file(tmp_path):
    with pytest.raises(KeyError), records.RecordWriter(tmp_path, "train") as writer:
        writer.write({"id": 1})
        raise KeyError
    assert not os.listdir(tmp_path)


def _written(tmp_path, count=40):
    rng = np.random.default_rng(0)
    with records.RecordWriter(tmp_path, "train") as writer:
        for _ in range(count):
            writer.write({"audio": rng.integers(-9999, 9999, 9999, np.int16)})
    return records.shard_path(tmp_path, "train", 0, 1)


@pytest.mark.parametrize("damage", ["empty", "foreign", "cut"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = _written(tmp_path)
    data = pathlib.Path(path).read_bytes()
    data = {"empty": b"", "foreign": b"RIFF" * 5000, "cut": data[: len(data) // 2]}[damage]
    pathlib.Path(path).write_bytes(data)
    with pytest.raises(UserError, match="train-00000-of-00001"):
        records.open_records(tmp_path, "train")


def test_a_flipped_bit_is_found_when_read(tmp_path):
    path = _written(tmp_path)
    data = bytearray(pathlib.Path(path).read_bytes())
    data[len(data) // 2] ^= 255
    pathlib.Path(path).write_bytes(bytes(data))
    with pytest.raises(UserError, match="damaged"):
        list(records.open_records(tmp_path, "train"))


def test_missing_things_are_named(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        records.open_records(tmp_path / "none", "train")
    with pytest.raises(UserError, match="'test'"):
        records.open_records(tmp_path, "test")
    with records.RecordWriter(tmp_path, "train", 2) as writer:
        writer.write({"id": 1})
    os.remove(records.shard_path(tmp_path, "train", 1, 2))
    with pytest.raises(UserError, match="train-00001-of-00002.array_record: missing; the shards"):
        records.open_records(tmp_path, "train")
    os.rename(
        records.shard_path(tmp_path, "train", 0, 2), tmp_path / "train-00003-of-00008.array_record"
    )
    with pytest.raises(UserError, match="train-00000-of-00008.array_record: missing and 6 more"):
        records.open_records(tmp_path, "train")
    with records.RecordWriter(tmp_path / "other", "train") as writer:
        writer.write({"id": 1})
    os.rename(
        records.shard_path(tmp_path / "other", "train", 0, 1),
        records.shard_path(tmp_path, "train", 0, 1),
    )
    with pytest.raises(UserError, match="'train' are mixed, of 1 and of 8; delete"):
        records.open_records(tmp_path, "train")
