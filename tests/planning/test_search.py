"""All combinations are planned and ranked; what fails is a line of the ranking."""

import pytest

from t5x_audio.errors import UserError
from t5x_audio.planning import search

# A planner whose cost is A * B; A=3 does not fit, B=9 fails.
PLANNER = r"""
import json, re, sys
a, b = (int(re.search(rf"--gin.{name}=(\d+)", " ".join(sys.argv))[1]) for name in "AB")
if b == 9:
    print("error: axis embed does not divide", file=sys.stderr)
    sys.exit(2)
assert sys.argv[1:3] == ["--topology=v5p:2x2x2", "--json"], sys.argv
print("| a table |")
print(json.dumps({"fits": a != 3, "total_bytes": a << 30, "step_seconds_hybrid": a * b,
                  "tokens_per_second": 100 / (a * b), "mfu_hybrid": 0.5}))
"""


@pytest.fixture
def planner(tmp_path, monkeypatch):
    (tmp_path / "planner.py").write_text(PLANNER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "planner"


ARGUMENTS = ["--topology=v5p:2x2x2", "--search", "A=1,2,3", "B=1,5,9", "--json"]


def test_ranking(planner, capsys):
    best = search.run(planner, ARGUMENTS, ["A=1,2,3", "B=1,5,9"])
    assert best["A"] == "1" and best["B"] == "1" and best["total_bytes"] == 2**30
    out, err = capsys.readouterr()
    header, _, *rows = out.splitlines()
    assert header.startswith("| A | B | GiB")
    order = [tuple(row.split(" | ")[:2]) for row in rows]
    assert order[:4] == [("| 1", "1"), ("| 2", "1"), ("| 1", "5"), ("| 2", "5")]
    assert order[4:6] == [("| 3", "1"), ("| 3", "5")] and "| no |" in rows[4]
    assert all("axis embed does not divide" in row for row in rows[6:]) and len(rows) == 9
    assert "[9/9] A=3, B=9" in err


def test_nothing_fits(planner):
    with pytest.raises(UserError, match="none of the combinations fits"):
        search.run(planner, ARGUMENTS, ["A=3", "B=1,9"])


def test_a_defect_is_no_line_of_the_ranking(monkeypatch, tmp_path):
    (tmp_path / "planner.py").write_text("raise SystemExit(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="exit code 1"):
        search.run("planner", ARGUMENTS, ["A=3"])


def test_values():
    names, combinations = search.parse(["FLAGS=('a','b'),()", "--gin.N=1"])
    assert names == ["FLAGS", "N"] and combinations == [("('a','b')", "1"), ("()", "1")]


@pytest.mark.parametrize("entry", ["A", "=1", "A=", "A=1,,2"])
def test_what_cannot_be_read(entry):
    with pytest.raises(UserError, match="NAME=VALUE,VALUE"):
        search.parse([entry])
