"""Collectives: their groups in every notation, and times against sums done by hand."""

import types

import numpy as np
import pytest

from t5x_audio.errors import UserError
from t5x_audio.planning import chips, collectives, hlo

V5P, V5E = chips.chip("v5p"), chips.chip("v5e")


def instruction(text):
    program = (
        f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n  {text}\n}}\n"
    )
    return list(hlo.Module(program).entry.instructions.values())[-1]


def torus(*shape):
    devices = [types.SimpleNamespace(coords=c, slice_index=0) for c in np.ndindex(shape)]
    return collectives.Torus.of(devices)


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        (
            "replica_groups=mesh['a'=3,'b'=2], device_ids=([2,3]T(1,0)) {'a'}",
            [[0, 1, 2], [3, 4, 5]],
        ),
        (
            "replica_groups=mesh['a'=3,'b'=2], device_ids=([2,3]T(1,0)) {'b'}",
            [[0, 3], [1, 4], [2, 5]],
        ),
    ],
)
def test_groups(notation, groups):
    found = instruction(f"ROOT %g = f32[16]{{0}} all-gather(%p), {notation}, dimensions={{0}}")
    assert collectives.groups(found) == groups


def test_kinds_and_payloads():
    gather = instruction("ROOT %g = f32[16]{0} all-gather(%p), replica_groups={{0,1}}")
    assert collectives.kind_of(gather) == "all-gather"
    assert collectives.payload(gather, 32) == 64
    scatter = instruction("ROOT %s = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1}}")
    assert collectives.payload(scatter, 32) == 32
    started = instruction(
        "ROOT %c = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), "
        "source_target_pairs={{0,1},{1,0}}"
    )
    assert collectives.kind_of(started) == "collective-permute"
    assert collectives.payload(started, 32) == 32
    assert collectives.groups(started) == [[0, 1], [1, 0]]
    assert collectives.kind_of(instruction("ROOT %n = f32[8]{0} negate(%p)")) is None
    unreadable = instruction("ROOT %g = f32[16]{0} all-gather(%p), replica_groups=?")
    with pytest.raises(ValueError, match="g: cannot read its groups"):
        collectives.groups(unreadable)


def test_a_whole_torus_uses_every_link():
    place, size = torus(4, 4, 8), 128e6
    everyone = [list(range(128))]
    time = collectives.seconds("all-gather", size, everyone, place, V5P)
    assert time == pytest.approx(size * 127 / 128 / (6 * 9e10) + (2 + 2 + 4) * 1e-6)
    twice = collectives.seconds("all-reduce", size, everyone, place, V5P)
    assert twice == pytest.approx(2 * time)


def test_a_part_of_an_axis_is_a_line():
    place = torus(4, 4, 8)
    line = [[0, 8, 16, 24][:2]]  # two of the four along the second axis
    time = collectives.seconds("all-gather", 1e6, line, place, V5P)
    assert time == pytest.approx(1e6 / 2 / 9e10 + 1e-6)
    ring = [[0, 8, 16, 24]]
    time = collectives.seconds("reduce-scatter", 1e6, ring, place, V5P)
    assert time == pytest.approx(1e6 * 3 / 4 / (2 * 9e10) + 2e-6)


def test_flat_ones_close_only_axes_of_16():
    assert torus(16, 16, 1).closed == (True, True, False)
    assert torus(4, 8, 1).closed == (False, False, False)
    assert torus(8, 8, 16).closed == (True, True, True)
    assert torus(2, 2, 4).closed == (False, False, True)


def test_all_to_all_is_bound_by_the_longest_axis():
    time = collectives.seconds("all-to-all", 1e6, [list(range(256))], torus(16, 16, 1), V5E)
    assert time == pytest.approx(1e6 * 16 / 8 / 4.5e10 + 16e-6)


def test_permutations_pay_for_every_hop():
    place = torus(4, 8, 1)  # open: the way back from the end is long
    pairs = [[i, (i + 1) % 4] for i in range(4)]
    along = [[8 * a, 8 * b] for a, b in pairs]
    assert collectives.seconds("collective-permute", 9e6, along, place, V5E) == pytest.approx(
        3 * (9e6 / 4.5e10 + 1e-6)
    )
    closed = torus(4, 4, 4)
    along = [[16 * a, 16 * b] for a, b in pairs]
    assert collectives.seconds("collective-permute", 9e6, along, closed, V5P) == pytest.approx(
        9e6 / 9e10 + 1e-6
    )


def test_nobody_to_talk_to():
    assert collectives.seconds("all-reduce", 1e6, [[3]], torus(2, 2, 1), V5E) == 0.0


def test_between_slices_the_network_counts():
    devices = [types.SimpleNamespace(coords=(0, 0, 0), slice_index=i) for i in range(2)]
    place = collectives.Torus.of(devices)
    time = collectives.seconds("all-reduce", 1e9, [[0, 1]], place, V5P)
    assert time == pytest.approx(1e9 / collectives.DCN_BANDWIDTH)


def test_clocks_follow_from_peak_and_units():
    assert V5P.clock == pytest.approx(1.751e9, rel=1e-3)
    assert V5E.clock == pytest.approx(1.503e9, rel=1e-3)
    with pytest.raises(UserError, match="v9: no such TPU; there are v4, v5e"):
        chips.chip("v9")
