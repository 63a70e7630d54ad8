"""infer from its command line on a whole, untrained run."""

import json

import numpy as np
import pytest
import soundfile

from t5x_audio import infer, launch

STEREO = np.stack([0.3 * np.sin(np.arange(18000) / 15), np.zeros(18000)], axis=1)


def _infer(*arguments) -> int:
    return launch.launch("t5x_audio.infer", infer.__doc__, arguments, infer.add_flags)


def test_spoken_question_of_another_rate(loaded, run_dir, tmp_path, capsys):
    question, output = tmp_path / "question.flac", tmp_path / "made" / "answer.wav"
    soundfile.write(question, STEREO, 22050)
    code = _infer(f"--model_dir={run_dir}", f"--input={question}", f"--output={output}", "--json")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result = json.loads(printed.out)
    samples, rate = soundfile.read(output)
    assert rate == 16000 and len(samples) == round(result["audio_seconds"] * rate)
    assert 0 < result["first_audio_seconds"] <= result["total_seconds"]
    assert result["text"] in printed.err and result["tokens_per_second"] > 0


def test_typed_question(loaded, run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = ("--gin.infer.run.weights='int8'", "--gin.infer.run.cache='int8'")
    assert _infer(f"--model_dir={run_dir}", "--text=what is up", "--seed=1", *kept) == 0
    assert (tmp_path / "answer.wav").exists()
    assert capsys.readouterr().out.startswith("done: text=")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--text=hello", "--output=x.mp4"), "can only write .wav and .flac"),
        (("--text=hello", "--model_dir=nowhere"), "nowhere: no such run directory"),
        (("--input=none.wav",), "none.wav: no such file"),
        (("--inptu=none.wav",), "unrecognized arguments"),
        (("--text=hello", "--gin.infer.run.cache='int3'"), "cache='int3': use None or int8"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    run_dir, arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    try:
        code = _infer(f"--model_dir={run_dir}", *arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and message in error and "\n" not in error
