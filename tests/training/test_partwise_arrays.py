"""Checkpoints written and read part by part: the same as Orbax's own, in parts, or not there."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5x_audio.errors import UserError
from t5x_audio.training import checkpoints, partwise_arrays
from t5x_audio.training.partwise_arrays import PartwiseArray


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 4


def in_parts(array, rows=1):
    return PartwiseArray(array.shape, array.dtype, rows, lambda at: array[at : at + rows])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    rows=st.integers(1, 5),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_what_goes_in_comes_out(tmp_path_factory, shape, rows, dtype, seed):
    folder = tmp_path_factory.mktemp("model")
    rows = min(rows, shape[0])
    array = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    zeros = np.zeros(shape, dtype)  # TensorStore may leave them out
    arrays = {"layers/query": in_parts(array, rows), "zeros": in_parts(zeros, rows)}
    checkpoints.save_parts(folder, Config(), arrays)
    template = {
        "layers": {"query": jax.ShapeDtypeStruct(array.shape, array.dtype)},
        "zeros": jax.ShapeDtypeStruct(array.shape, array.dtype),
    }
    params, _ = checkpoints.restore_states(folder, "model", template, {})
    np.testing.assert_array_equal(params["layers"]["query"], array)
    np.testing.assert_array_equal(params["zeros"], zeros)
    opened = checkpoints.open_array(folder, "params/layers/query")
    assert (opened.shape, opened.dtype, opened.rows) == (array.shape, array.dtype, rows)
    assert opened.nbytes == array.nbytes
    starts = range(0, shape[0], rows)
    for start, (found, part) in zip(starts, opened, strict=True):
        assert found == start
        np.testing.assert_array_equal(part, array[start : start + rows])
    np.testing.assert_array_equal(opened.whole(), array)


def test_checkpoints_of_runs_are_read_in_their_own_chunks(tmp_path):
    array = jnp.arange(48.0).reshape(8, 6)  # on one device: one chunk
    checkpoints.save_states(tmp_path, {"model": Config()}, {"model": ({"weight": array}, {})})
    opened = checkpoints.open_array(tmp_path, "params/weight")
    assert opened.rows == 8
    np.testing.assert_array_equal(opened.whole(), array)
    with pytest.raises(UserError, match="has no params/other; another model's weights"):
        checkpoints.open_array(tmp_path, "params/other")


def test_one_part_of_a_large_array_is_in_memory_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(partwise_arrays, "_TOGETHER", 1000)
    alive, most = set(), 0

    class Part(np.ndarray):
        def __array_finalize__(self, _):
            nonlocal most
            if self.base is None:
                alive.add(id(self))
                most = max(most, len(alive))

        def __del__(self):
            alive.discard(id(self))

    def read(start):
        return np.ndarray.__new__(Part, (1, 64), np.float32)

    big = PartwiseArray((32, 64), np.dtype(np.float32), 1, read)
    checkpoints.save_parts(tmp_path, Config(), {"a": big, "b": big})
    assert 1 <= most <= 2  # the one being written and the one being made


def test_many_small_arrays_take_little_more_than_their_bytes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    values = {f"layer{i}/kernel": rng.random((16, 64), np.float32) for i in range(300)}
    monkeypatch.setattr(partwise_arrays, "_TOGETHER", 50 * 16 * 64 * 4)  # several commits
    arrays = {
        name: PartwiseArray(value.shape, value.dtype, 16, lambda _, value=value: value)
        for name, value in values.items()
    }
    checkpoints.save_parts(tmp_path, Config(), arrays)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(sizes) < 1.3 * sum(value.nbytes for value in values.values())
    for name in ("layer0/kernel", "layer299/kernel"):
        np.testing.assert_array_equal(
            checkpoints.open_array(tmp_path, f"params/{name}").whole(), values[name]
        )


@pytest.mark.parametrize("existed", [False, True])
def test_an_error_in_a_part_is_the_caller_s_and_leaves_nothing(tmp_path, existed):
    folder = tmp_path / "model"
    if existed:
        folder.mkdir()
        (folder / "config.gin").write_text("")

    def read(start):
        if start:
            raise UserError("the source is damaged")
        return np.ones((1, 3), np.float32)

    array = PartwiseArray((2, 3), np.dtype(np.float32), 1, read)
    with (
        pytest.raises(UserError, match="the source is damaged"),
        checkpoints.leaving_nothing_behind(folder),
    ):
        checkpoints.save_parts(folder, Config(), {"weight": array})
    assert names(tmp_path) == (["model"] if existed else [])
    assert not existed or names(folder) == ["config.gin"]


def test_a_disk_too_small_is_one_line(tmp_path):
    array = PartwiseArray((2**40, 2**10), np.dtype(np.float32), 1, lambda start: None)
    with pytest.raises(UserError, match=r"needs 4194304\.0 GiB of disk, but only .* are free"):
        checkpoints.save_parts(tmp_path, Config(), {"weight": array})


def test_damaged_parts_are_one_line(tmp_path):
    array = np.random.default_rng(0).normal(size=(4, 4096)).astype(np.float32)
    checkpoints.save_parts(tmp_path, Config(), {"weight": in_parts(array)})
    opened = checkpoints.open_array(tmp_path, "params/weight")
    for path in tmp_path.rglob("d/*"):
        if path.stat().st_size > 4096:
            path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(checkpoints.DamagedCheckpoint, match="damaged"):
        opened.whole()
