"""Sets of compiler flags: what reaches the environment, and what is refused."""

import os

import pytest

from t5x_audio.errors import UserError
from t5x_audio.planning import chips
from t5x_audio.training import xla_flags


def given():
    return dict(f.lstrip("-").split("=") for f in os.environ.get(xla_flags.VARIABLE, "").split())


def test_flags_reach_the_environment_and_what_is_there_stays(monkeypatch):
    monkeypatch.setenv(xla_flags.VARIABLE, "--xla_enable_async_all_gather=false --other=3")
    xla_flags.apply(["continuation_fusion"], "v5e")
    flags = given()
    assert flags["xla_enable_async_all_gather"] == "false" and flags["other"] == "3"
    assert flags["xla_tpu_enable_async_collective_fusion"] == "true"
    xla_flags.apply(["continuation_fusion"])
    assert given() == flags


def test_no_set_no_variable(monkeypatch):
    monkeypatch.delenv(xla_flags.VARIABLE, raising=False)
    xla_flags.apply([])
    assert xla_flags.VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("names", "chip", "line"),
    [
        (["faster"], None, "'faster' is none of sparse_core_collectives, continuation_fusion"),
        (["continuation_fusion"], "v5p", "continuation_fusion is for v4, v5e, not v5p"),
    ],
)
def test_faults(names, chip, line):
    with pytest.raises(UserError, match=line):
        xla_flags.apply(names, chip)


def test_every_set_is_for_known_chips_and_says_why():
    for one in xla_flags.SETS.values():
        assert set(one.chips) <= chips.CHIPS.keys() and one.why.endswith(".")
        assert set(one.flags.values()) <= {"true", "false"}
        # Known to give wrong results there (see the module).
        fused = one.flags.get("xla_tpu_enable_async_collective_fusion_fuse_all_gather")
        assert fused != "true" or "v5p" not in one.chips
