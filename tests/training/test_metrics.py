import json
import struct

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.proto import event_pb2

from t5x_audio.training import learner, metrics, progress

pairs = st.tuples(st.floats(-100, 100), st.sampled_from([0.0, 1.0, 7.0]))


@given(st.lists(pairs, min_size=1, max_size=8))
def test_summary_is_the_weighted_mean(values):
    steps = [{"loss": (value * weight, weight)} for value, weight in values]
    total = sum(weight for _, weight in values)
    summary = metrics.summarize(steps)
    if total == 0:
        assert summary == {}
    else:
        expected = sum(value * weight for value, weight in values) / total
        assert summary["loss"] == pytest.approx(expected, abs=1e-9)


def test_metrics_that_only_some_steps_have():
    one, two = learner.mean_metric(2.0, 3), learner.mean_metric(4.0)
    assert metrics.summarize([{"a": one}, {"a": two, "b": two}]) == {"a": 2.5, "b": 4.0}
    total = learner.sum_metrics({"a": one}, {"a": two, "b": two})
    assert [float(x) for x in total["a"]] == [10.0, 4.0] and float(total["b"][0]) == 4.0


def test_first_bad_names_step_and_metric():
    good = {"loss": (jnp.ones(()), jnp.ones(()))}
    bad = {"loss": (jnp.ones(()), jnp.ones(())), "grad_norm": (jnp.array(jnp.inf), jnp.ones(()))}
    assert metrics.first_bad([good, good]) is None
    assert metrics.first_bad([good, bad, good]) == (1, "grad_norm")


def test_restart_drops_later_lines_and_a_line_cut_short(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, "train", {"loss": float(step)})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "spl')
    writer = metrics.MetricWriter(tmp_path, from_step=3)
    writer.write(4, "train", {"loss": 40.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def records(data):
    """The records of a TensorBoard file: length, checksum of it, bytes, checksum of them."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        record, data = data[12 : 12 + length], data[16 + length :]
        yield record


def test_event_files_hold_the_curves(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    writer.write(1, "train", {"loss": 0.5, "rate": 3.0})
    writer.write(2, "train", {"loss": 0.25})
    writer.close()
    (path,) = (tmp_path / "events" / "train").iterdir()
    events = [event_pb2.Event.FromString(record) for record in records(path.read_bytes())]
    assert events[0].file_version == "brain.Event:2"
    points = [
        (event.step, value.tag, value.simple_value)
        for event in events
        for value in event.summary.value
    ]
    assert points == [(1, "loss", 0.5), (1, "rate", 3.0), (2, "loss", 0.25)]


def test_counts_of_a_batch():
    batch = {"lengths": [3, 5], "segment_ids": [[1, 1, 0], [2, 0, 0]]}
    assert progress.count(batch, "lengths") == 8
    assert progress.count(batch, "segment_ids") == 3
    assert progress.count(batch, None) == 2


def test_goodput_counts_every_step_once(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(progress.time, "time", lambda: now)
    goodput, writer = progress.Goodput(tmp_path, 0), metrics.MetricWriter(tmp_path)

    def line(step, seconds):
        writer.write(step, "train", {"step_seconds": seconds})
        return goodput.add({"step_seconds": seconds})["goodput"]

    now = 1020.0
    assert line(10, 10.0) == 0.5
    now = 1040.0
    assert line(20, 10.0) == 0.5
    writer.close()
    # Killed, and started again from step 10: the second ten seconds were in vain.
    now = 1050.0
    writer, goodput = metrics.MetricWriter(tmp_path, from_step=10), progress.Goodput(tmp_path, 10)
    now = 1060.0
    assert line(20, 8.0) == pytest.approx(18 / 60)
    goodput.go_back(10)
    assert goodput.add({}) == {"goodput": pytest.approx(10 / 60)}
    writer.close()
