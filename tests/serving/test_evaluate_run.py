"""The evaluation of a whole, untrained run, with judges that cost nothing."""

import json
import shutil
import types

import numpy as np
import pytest

from t5x_audio import evaluate, make_report
from t5x_audio.errors import UserError
from t5x_audio.evaluation.judges import Judges, reference_voice

SMALL = {"num_questions": 3, "batch_size": 2, "num_examples": 2, "num_timed": 1}
SMALL |= {"max_new_tokens": 50, "temperature": 0.0}


def _judges(recordings):
    def embed(sound):
        return np.tile([1.0, 0.0], (len(sound), 1))

    return Judges(
        transcribe=lambda sound: ["the opposite of hot is cold"] * len(sound),
        mos=lambda samples: 2.0,
        embed=embed,
        voice=reference_voice(embed, recordings),
    )


def _evaluate(root, **settings):
    places = {"model_dir": str(root / "evaluation"), "run_dir": str(root)}
    return evaluate.run(make_judges=_judges, **(places | SMALL | settings))


@pytest.fixture(scope="module")
def _kept():
    return {}


@pytest.fixture
def evaluated(loaded, run_dir, tmp_path_factory, _kept):
    """A run and its figures; evaluated once."""
    if not _kept:
        root = shutil.copytree(run_dir, tmp_path_factory.mktemp("evaluated") / "run")
        _kept["run"] = root, _evaluate(root)
    return _kept["run"]


def test_results(evaluated):
    root, figures = evaluated
    results = json.loads((root / "evaluation" / "results.json").read_text())
    assert results["figures"] == figures
    assert figures["questions"] == 3 and len(results["questions"]) == 3
    assert figures["recordings_dnsmos"] == 2.0
    assert figures["time_to_first_audio"] > 0 and figures["tokens_per_second"] > 0
    # Everyone hears the one sentence, right for the one question it answers if that was drawn.
    drawn = [row["short_answer"] for row in results["questions"]]
    assert figures["recordings_heard_accuracy"] == pytest.approx(("cold" in drawn) / 3)
    table = (root / "evaluation" / "results.md").read_text()
    assert "| right as heard |" in table
    for example in results["examples"]:
        for name in example["clips"].values():
            assert (root / "evaluation" / name).is_file()


def test_finished_evaluation_is_not_repeated(evaluated, capsys):
    root, figures = evaluated
    before = (root / "evaluation" / "results.json").stat().st_mtime_ns
    assert _evaluate(root) == figures
    assert "already evaluated" in capsys.readouterr().err
    assert (root / "evaluation" / "results.json").stat().st_mtime_ns == before


def test_interrupted_evaluation_goes_on(evaluated, tmp_path, monkeypatch):
    root = shutil.copytree(evaluated[0], tmp_path / "run")
    folder = root / "evaluation"
    (folder / "results.json").unlink()
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (folder / "answers.jsonl").write_text("".join(lines[:2]) + lines[2][:20])  # cut off
    from t5x_audio.serving.assistant import SpokenAssistant

    asked = []
    answer_batch = SpokenAssistant.answer_batch
    monkeypatch.setattr(
        SpokenAssistant,
        "answer_batch",
        lambda self, waveforms, size: (
            asked.append(len(waveforms)) or answer_batch(self, waveforms, size)
        ),
    )
    _evaluate(root)
    assert asked == [1]
    assert (folder / "answers.jsonl").read_text() == "".join(lines)


def test_report_of_the_evaluation(evaluated):
    root, _ = evaluated
    result = make_report.run(model_dir=str(root / "report.html"), run_dir=str(root))
    assert result["examples"] == 2
    page = (root / "report.html").read_text()
    assert page.count("<audio") == 6 and "What is the opposite of" in page


def test_an_answer_without_audio_is_silence_and_leaves_no_file(tmp_path):
    spoken = np.sin(np.arange(2400, dtype=np.float32) / 9) / 2
    assistant = types.SimpleNamespace(
        rate=24000, speak=lambda code: spoken if len(code) else spoken[:0]
    )
    codes = np.zeros(5, np.int32)
    question = types.SimpleNamespace(id="q", codes=codes, recording=spoken)
    for _ in range(2):  # made, then read back
        speech = evaluate.speak_all(assistant, [question], [codes[:0]], tmp_path)
        assert len(speech["answers"][0]) == 0 and len(speech["resynthesis"][0]) == 1600
    assert [path.name for path in tmp_path.iterdir()] == ["resynthesis"]


def test_an_unknown_split_leaves_earlier_results(evaluated):
    root, _ = evaluated
    with pytest.raises(UserError, match="split='train'"):
        _evaluate(root, split="train")
    assert (root / "evaluation" / "results.json").is_file()


def test_run_without_questions(run_dir, tmp_path):
    root = shutil.copytree(run_dir, tmp_path / "run")
    (root / "corpus" / "spoken_qa" / "questions.jsonl").unlink()
    with pytest.raises(UserError, match="questions.jsonl: cannot be read"):
        _evaluate(root)
