"""A compiled program goes into a file and comes back, for that program alone."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.errors import UserError
from t5x_audio.training import executables, xla_flags

MESH = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])


def lowered(factor):
    step = jax.jit(lambda state, batch: ({"x": factor * state["x"] + batch}, batch.sum()))
    return step.lower({"x": jnp.zeros(4)}, jnp.ones(4))


@pytest.fixture
def saved(tmp_path):
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    one = lowered(2.0)
    executables.save(tmp_path / "step", one.compile(), one, MESH)
    jax.config.update("jax_enable_compilation_cache", before)
    return tmp_path / "step"


def test_what_comes_back_computes_the_same(saved):
    step = executables.load(saved, lowered(2.0), MESH)
    state, total = step({"x": jnp.arange(4.0)}, jnp.full(4, 3.0))
    np.testing.assert_array_equal(state["x"], [3.0, 5.0, 7.0, 9.0])
    assert total == 12.0
    assert [path.name for path in saved.parent.iterdir()] == ["step"]


def test_another_program_is_refused(saved):
    with pytest.raises(UserError, match="compiled for another model"):
        executables.load(saved, lowered(3.0), MESH)


def test_other_devices_are_refused(saved):
    pod = types.SimpleNamespace(platform="tpu")
    mesh = types.SimpleNamespace(devices=np.array([pod]))
    with pytest.raises(UserError, match="device, jax or set of XLA flags"):
        executables.load(saved, lowered(2.0), mesh)


def test_other_flags_are_refused(saved, monkeypatch):
    monkeypatch.setenv(xla_flags.VARIABLE, "--xla_tpu_enable_data_parallel_all_reduce_opt=true")
    with pytest.raises(UserError, match="XLA flags"):
        executables.load(saved, lowered(2.0), MESH)


def test_bad_files(saved, tmp_path):
    (tmp_path / "text").write_text("a note")
    (tmp_path / "cut").write_bytes(saved.read_bytes()[:100])
    for name, message in (
        ("none", "cannot be read"), ("text", "no executable"), ("cut", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            executables.load(tmp_path / name, lowered(2.0), MESH)


def test_what_may_come_from_the_cache_is_not_saved(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    one = lowered(2.0)
    compiled = one.compile()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    try:
        with pytest.raises(ValueError, match="jax_enable_compilation_cache"):
            executables.save(tmp_path / "step", compiled, one, MESH)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert not (tmp_path / "step").exists()
