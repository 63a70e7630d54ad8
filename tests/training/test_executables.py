"""A compiled program goes into a file and comes back, for that program alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_audio.errors import UserError
from t5x_audio.training import executables, xla_flags


def lowered(factor):
    step = jax.jit(lambda state, batch: ({"x": factor * state["x"] + batch}, batch.sum()))
    return step.lower({"x": jnp.zeros(4)}, jnp.ones(4))


@pytest.fixture
def saved(tmp_path):
    one = lowered(2.0)
    executables.save(tmp_path / "step", one.compile(), one)
    return tmp_path / "step"


def test_what_comes_back_computes_the_same(saved):
    step = executables.load(saved, lowered(2.0))
    state, total = step({"x": jnp.arange(4.0)}, jnp.full(4, 3.0))
    np.testing.assert_array_equal(state["x"], [3.0, 5.0, 7.0, 9.0])
    assert total == 12.0
    assert [path.name for path in saved.parent.iterdir()] == ["step"]


def test_another_program_is_refused(saved):
    with pytest.raises(UserError, match="compiled for another program"):
        executables.load(saved, lowered(3.0))


def test_other_flags_are_refused(saved, monkeypatch):
    monkeypatch.setenv(xla_flags.VARIABLE, "--xla_tpu_enable_data_parallel_all_reduce_opt=true")
    with pytest.raises(UserError, match="XLA flags differ"):
        executables.load(saved, lowered(2.0))


def test_bad_files(saved, tmp_path):
    (tmp_path / "text").write_text("a note")
    (tmp_path / "cut").write_bytes(saved.read_bytes()[:100])
    for name, message in (
        ("none", "cannot be read"), ("text", "no executable"), ("cut", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            executables.load(tmp_path / name, lowered(2.0))
