import json

import numpy as np
import pytest

from t5x_audio import make_report
from t5x_audio.audio import io
from t5x_audio.errors import UserError
from t5x_audio.make_report import VERSIONS


def _judged(heard, right):
    return {"heard": heard, "heard_right": right, "word_errors": 1, "words": 4, "mos": 3.0}


@pytest.fixture
def evaluated(tmp_path):
    """A run directory that holds what the report reads."""
    root = tmp_path / "run"
    speech = root / "evaluation" / "speech"
    tone = (0.3 * np.sin(np.arange(8000) / 7)).astype(np.float32)
    io.save(speech / "q.flac", tone, 16000)
    row = {
        "id": "q", "category": "sums", "novelty": "fact", "question": "what is one plus one",
        "answer": "that is two", "written": "that is three", "written_right": False,
        "answers": _judged("that is free", False),
        "clips": {"question": "speech/q.flac", "answer": "speech/gone.flac"},
    }  # fmt: skip
    results = {
        "seed": 7,
        "figures": {
            "questions": 4, "text_accuracy": 0.75, "heard_accuracy": 0.5, "wer": 0.125,
            "dnsmos": 2.913, "resynthesis_dnsmos": 3.01, "recordings_dnsmos": 3.3,
            "speaker_similarity": None, "time_to_first_audio": 0.41, "tokens_per_second": 321.0,
        },
        "by_category": {
            "sums": {"questions": 3, "text_accuracy": 1.0, "heard_accuracy": 0.5},
            "days": {"questions": 1, "text_accuracy": 0.0, "heard_accuracy": 0.0},
        },
        "examples": [row],
    }  # fmt: skip
    (root / "evaluation" / "results.json").write_text(json.dumps(results))
    stages = {"sft1": {"seconds": 65.0, "machine": "2 cores", "finished": "2026-01-01"}}
    (root / "stages.json").write_text(json.dumps(stages))
    (root / "sft1").mkdir()
    log = [{"step": s, "split": "train", "loss": 3.0 / (s + 1)} for s in range(20)]
    (root / "sft1" / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)))
    (root / "sft1" / "config.gin").write_text("train.run.seed = 3\n")
    return root


def test_report_of_a_run(evaluated):
    path = evaluated / "report.html"
    result = make_report.run(model_dir=str(path), run_dir=str(evaluated))
    page = path.read_text()
    assert result["examples"] == 1 and result["report"] == str(path)
    for shown in ("75.0 %", "12.5 %", "2.91", "3.01", "0.41 s", "321", "What is one plus one"):
        assert shown in page
    assert "that is free" in page and "train.run.seed = 3" in page and "1 min 05 s" in page
    assert page.count("<audio") == 1  # the recording that is gone is left out
    assert 'aria-label="loss of sft1 over steps"' in page
    assert not list(evaluated.glob("*.tmp"))


def test_report_of_resynthesis(evaluated):
    figures = {"clips": 3, "recording_wer": 0.05, "both_wer": 0.25, "both_mel_distance": 6.256}
    results = {"figures": figures, "notes": {name: f"about {name}" for name, _ in VERSIONS}}
    (evaluated / "resynthesis").mkdir()
    (evaluated / "resynthesis" / "results.json").write_text(json.dumps(results))
    path = evaluated / "report.html"
    make_report.run(model_dir=str(path), run_dir=str(evaluated))
    page = path.read_text()
    for shown in ("Resynthesis of 3 clips", "25.0 %", "6.26", "about semantic"):
        assert shown in page


def test_unfinished_run_has_a_report_too(tmp_path):
    result = make_report.run(model_dir=str(tmp_path / "report.html"), run_dir=str(tmp_path))
    assert result["examples"] == 0
    assert "has not been evaluated yet" in (tmp_path / "report.html").read_text()


def test_missing_run_is_named(tmp_path):
    with pytest.raises(UserError, match="no such run directory"):
        make_report.run(model_dir=str(tmp_path / "r.html"), run_dir=str(tmp_path / "none"))


def test_damaged_results_are_named(evaluated):
    (evaluated / "evaluation" / "results.json").write_text("{")
    with pytest.raises(UserError, match="results.json: not JSON"):
        make_report.run(model_dir=str(evaluated / "r.html"), run_dir=str(evaluated))


@pytest.mark.parametrize(
    "value, form, text",
    [(0.861, "percent", "86.1 %"), (2.913, "score", "2.91"), (0.4, "seconds", "0.40 s"),
     (1234.4, "number", "1,234"), (None, "score", "–")],
)  # fmt: skip
def test_numbers_for_people(value, form, text):
    assert make_report.write_number(value, form) == text
