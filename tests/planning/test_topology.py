"""Topologies that are refused before the compiler is asked."""

import importlib.util

import pytest

from t5x_audio.errors import UserError
from t5x_audio.planning import topology


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("v5p", "write CHIP:AxB or CHIP:AxBxC"),
        ("v5p:8x8x", "write CHIP:AxB or CHIP:AxBxC"),
        ("h100:8x8", "h100: no such TPU; there are v4, v5e, v5p, v6e, tpu7x"),
    ],
)
def test_what_is_no_topology(name, line):
    with pytest.raises(UserError, match=line):
        topology.devices(name)


def test_a_missing_compiler_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    with pytest.raises(UserError, match="the TPU compiler is missing: `make pods`"):
        topology.devices("v5e:2x2")
