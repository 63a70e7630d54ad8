import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_audio.evaluation import curves, report, spectrogram


def _tone(seconds, rate, hz):
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def _report(**kwargs):
    series = curves.Series("train", (0, 1, 2), (3.0, 2.0, 1.0))
    example = report.Example(
        "What is <two> plus two?",
        "arithmetic",
        (report.Line("written", "four & more", True), report.Line("heard", "", False)),
        (report.Clip("answer", _tone(0.5, 16000, 440), 16000),),
    )
    fields = {
        "title": "A title",
        "lead": "lead",
        "figures": (("86 %", "right"),),
        "examples": (example,),
        "tables": (
            report.Table("T", ("", "answers"), (("accuracy", "86 %"),), {"accuracy": "why"}),
        ),
        "stages": (report.Stage("sft1", "says", 75.0, {"loss": [series]}, "train.run.seed = 1"),),
        "facts": (("jax", "0.10"),),
    }
    return report.Report(**(fields | kwargs))


def test_page_is_self_contained():
    page = report.render(_report())
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert attribute.startswith("data:"), attribute[:80]
    without_namespaces = page.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in without_namespaces and "https://" not in without_namespaces
    assert "url(" not in page and "@import" not in page


def test_page_shows_what_it_was_given_and_escapes_it():
    page = report.render(_report())
    assert "What is &lt;two&gt; plus two?" in page
    assert "four &amp; more" in page
    assert 'class="mark right"' in page and 'class="mark wrong"' in page
    assert "train.run.seed = 1" in page and "1 min 15 s" in page and "86 %" in page
    assert page.count("<audio") == 1 and page.count('<svg class="chart"') == 1


def test_embedded_recording_is_the_clip():
    import base64
    import io

    import soundfile

    samples = _tone(0.25, 22050, 300)
    example = report.Example("q", "", (), (report.Clip("c", samples, 22050),))
    page = report.render(_report(examples=(example,)))
    data = re.search(r'src="data:audio/flac;base64,([^"]*)"', page).group(1)
    decoded, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert rate == 22050
    np.testing.assert_allclose(decoded, samples, atol=1 / 32768)


def test_empty_report_renders():
    empty = _report(examples=(), tables=(), stages=(), facts=(), figures=())
    assert "<h1>A title</h1>" in report.render(empty)


def test_losses_are_known_by_name():
    names = ("loss", "loss_text", "ctc_loss", "mel_l1", "velocity_mse", "token_error_rate")
    assert all(map(report.is_loss, names))
    assert not any(map(report.is_loss, ("accuracy", "learning_rate", "codebook_usage")))


@pytest.mark.parametrize(
    "seconds, text", [(0.42, "0.42 s"), (17.2, "17 s"), (185, "3 min 05 s"), (3720, "1 h 02 min")]
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


def test_spectrogram_peaks_at_the_tone():
    level = spectrogram.spectrogram(_tone(1.0, 16000, 2000), 16000)
    assert level.shape[0] > 100
    peak = level[:, level.shape[1] // 2].argmax() / level.shape[0] * 8000
    assert abs(peak - 2000) < 60
    assert level.min() >= 0 and level.max() == 1


@given(st.integers(0, 3000))
def test_pictures_of_any_length(num_samples):
    samples = np.full(num_samples, 0.1, np.float32)
    assert spectrogram.envelope_path(samples).startswith("M0,")
    assert np.isfinite(spectrogram.spectrogram(samples, 16000)).all()


def test_read_curves_merges_splits_and_survives_a_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "split": "train", "loss": 3.0},
        {"step": 2, "split": "train", "loss": 9.0},
        {"step": 2, "split": "train", "loss": 2.0},  # logged again after an interruption
        {"step": 2, "split": "validation", "loss": 2.5, "accuracy": 0.5},
        {"step": 3, "split": "train", "loss": math.nan},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4, "lo')
    found = curves.read_curves(tmp_path)
    assert found["loss"] == [
        curves.Series("train", (1, 2), (3.0, 2.0)),
        curves.Series("validation", (2,), (2.5,)),
    ]
    assert found["accuracy"] == [curves.Series("validation", (2,), (0.5,))]


def test_chart_covers_the_values():
    steps = tuple(range(0, 1000, 2))
    values = tuple(5 * math.exp(-s / 200) + 1 for s in steps)
    svg = curves.draw([curves.Series("train", steps, values)], label="loss")
    mean = re.search(r'class="mean" d="M([^"]*)"', svg).group(1)
    points = [tuple(map(float, p.split(","))) for p in mean.split("L")]
    assert len(points) <= curves.MAX_POINTS
    assert points[0][1] < points[-1][1]  # falling loss: downwards = larger y
    assert all(0 <= x <= 256 and 0 <= y <= 160 for x, y in points)


@given(
    st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=600),
    st.sampled_from(["train", "validation"]),
)
def test_chart_of_any_values(values, name):
    svg = curves.draw([curves.Series(name, tuple(range(len(values))), tuple(values))], label="x")
    assert "nan" not in svg and "inf" not in svg


@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e5))
def test_nice_ticks_are_inside(low, width):
    ticks = curves.nice_ticks(low, low + width)
    assert 1 <= len(ticks) <= 9
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in ticks)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=50), st.integers(1, 20))
def test_running_mean_matches_numpy(values, span):
    expected = [np.mean(values[max(0, i + 1 - span) : i + 1]) for i in range(len(values))]
    np.testing.assert_allclose(curves.running_mean(values, span), expected, atol=1e-9)
