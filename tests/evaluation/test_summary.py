"""The Markdown edition of a report."""

import xml.etree.ElementTree

import pytest

from t5x_audio.evaluation import summary
from t5x_audio.evaluation.curves import Series
from t5x_audio.evaluation.report import Report, Stage, Table


@pytest.fixture
def stages():
    # Two windows of 10 and 20 steps at 5 and 10 steps a second.
    metrics = {
        "loss": [Series("train", (10, 30), (3.0, 2.0)), Series("validation", (30,), (2.5,))],
        "steps_per_second": [Series("train", (10, 30), (5.0, 10.0))],
        "gflop_per_second": [Series("train", (10, 30), (40.0, 60.0))],
    }
    return (
        Stage("train_semantic", "codes", 65.0, metrics, None),
        Stage("merge", "weights", 4.0, {}, None),
        Stage("sft2", "not run yet", None, {}, None),
    )


def test_time_and_arithmetic(stages):
    assert summary.time_in_steps(stages[0]) == pytest.approx(2 + 2)
    assert summary.gflop_per_second(stages[0]) == 50
    assert summary.time_in_steps(stages[1]) is None is summary.gflop_per_second(stages[1])


def test_page(stages):
    table = Table("Quality", ("", "answers"), (("right", "90 %"),), {"right": "a note"})
    report = Report("Title", "Lead.", (), (), (table,), stages, (("seed", "0"), ("python", "3")))
    lines = summary.render(report, "make tiny", "tiny.svg").splitlines()
    assert "| right | 90 % |" in lines and "- right: a note" in lines
    assert "| train_semantic | 1 min 05 s | 4 s | 50 |" in lines
    assert "| together | 1 min 09 s |  |  |" in lines and not any("sft2" in x for x in lines)
    assert "![losses of every stage over its steps](tiny.svg)" in lines
    assert lines[-2:] == ["- seed: 0", "- python: 3"] and lines[-3] == ""
    assert "Made by `make tiny`." in lines
    bare = summary.render(report, None, None)
    assert "tiny.svg" not in bare and "Made by" not in bare


def test_losses_are_one_valid_picture(stages):
    root = xml.etree.ElementTree.fromstring(summary.draw_losses(stages * 5))
    assert len(root.findall("{*}svg")) == 5  # only stages with a loss
    assert root.get("viewBox") == "0 0 1024 368"
    assert summary.draw_losses(stages[1:]) is None
