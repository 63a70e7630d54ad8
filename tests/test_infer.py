import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from t5x_audio import infer
from t5x_audio.errors import UserError


def _wav(path, samples, rate=16000, subtype=None):
    soundfile.write(path, samples, rate, subtype=subtype)
    return str(path)


TONE = (0.3 * np.sin(np.arange(16000) / 7)).astype(np.float32)


def test_help_is_quick_and_loads_nothing_heavy():
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "t5x_audio.infer", "--help"], capture_output=True, text=True
        )
        times.append(time.perf_counter() - begun)
    assert done.returncode == 0 and "--input" in done.stdout and "--text" in done.stdout
    assert min(times) < 1.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "give either --input"),
        ({"input": "a.wav", "text": "hello"}, "give either --input"),
        ({"text": "  "}, "the question is empty"),
        ({"text": "hello", "output": "answer.mp4"}, "only write .wav and .flac"),
        ({"text": "hello"}, "no such run directory"),
        ({"input": "missing.wav"}, "no such file"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        infer.run(model_dir="nowhere", **arguments)


def test_model_dir_is_asked_for():
    with pytest.raises(UserError, match="--model_dir=runs/demo"):
        infer.run(text="hello")


def test_output_that_is_a_folder(tmp_path):
    (tmp_path / "answer.wav").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        infer.run(model_dir="nowhere", text="hello", output=str(tmp_path / "answer.wav"))


def test_output_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        infer.run(model_dir="nowhere", text="hello", output=str(tmp_path / "file" / "answer.wav"))


BAD_RECORDINGS = {
    "silent": (lambda path: _wav(path, np.zeros(16000, np.float32)), "is silent"),
    "nan": (lambda path: _wav(path, np.full(16000, np.nan, np.float32), subtype="FLOAT"), "NaN"),
    "one sample": (lambda path: _wav(path, TONE[:1]), "only 1 sample"),
    "too long": (lambda path: _wav(path, np.tile(TONE, 31)), "more than the 30 s"),
    "empty": (lambda path: path.write_bytes(b"") and str(path) or str(path), "is empty"),
    "text": (lambda path: path.write_text("what is two?") and str(path), "cannot be read as audio"),
}


@pytest.mark.parametrize("name", BAD_RECORDINGS)
def test_bad_recordings(name, tmp_path):
    make, message = BAD_RECORDINGS[name]
    path = make(tmp_path / "question.wav")
    with pytest.raises(UserError, match=message) as error:
        infer.run(model_dir="nowhere", input=path)
    assert "question.wav" in str(error.value) and "\n" not in str(error.value)
