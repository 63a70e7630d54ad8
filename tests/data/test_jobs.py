"""The two jobs that make data: prepare_data and train_vocabulary, with the engine replaced."""

import errno

import numpy as np
import pytest

from t5x_audio import prepare_data, train_vocabulary
from t5x_audio.data import asterisk, corpus
from t5x_audio.data.engine import recognizer, speak
from t5x_audio.errors import UserError
from t5x_audio.sequences.vocabulary import Vocabulary


class Engine:
    """Writes two clips; counts how often it is asked."""

    def __init__(self, error=None):
        self.error, self.calls = error, 0

    def build(self, directory, work_dir, voice, listener):
        self.calls += 1
        if self.error:
            raise self.error
        clip = corpus.Clip("q", np.ones(1600, np.int16), "what is one plus two", "joe", "question")
        checked = {"arithmetic": {"made": 3, "kept": 2, "dropped": 1}}
        info = {"questions": 1, "test_questions": 0, "checked": checked}
        clips = {"train": [clip], "validation": [clip]}
        return corpus.write_corpus(directory, clips, questions=[], info=info)


@pytest.fixture(autouse=True)
def no_models(monkeypatch):
    monkeypatch.setattr(speak, "Piper", lambda interpreter: None)
    monkeypatch.setattr(recognizer, "Recognizer", lambda model: None)

    def unavailable(*_, **__):
        raise asterisk.Unavailable("apt-get is not on this machine")

    monkeypatch.setattr(asterisk, "build", unavailable)


def test_without_recordings_a_notice_and_on(tmp_path, capsys):
    engine = Engine()
    result = prepare_data.run(engine=engine, run_dir=str(tmp_path))
    assert (result["clips"], result["recorded_clips"], result["dropped_clips"]) == (2, 0, 1)
    said = capsys.readouterr().err
    assert "NOTICE: no human recordings: apt-get is not on this machine" in said
    assert "arithmetic" in said and "2 of      3" in said
    assert not (tmp_path / "corpus" / ".work").exists()
    assert prepare_data.run(engine=engine, run_dir=str(tmp_path)) == result
    assert engine.calls == 1  # what is finished is left alone


def test_recordings_are_not_lost_when_the_voice_fails(tmp_path, monkeypatch):
    def build(directory, work_dir, limit, max_seconds):
        clip = corpus.Clip("a", np.ones(1600, np.int16), "hello world", "allison")
        info = {"licence": "x", "dropped": {}}
        return corpus.write_corpus(directory, {"train": [clip]}, info=info)

    monkeypatch.setattr(asterisk, "build", build)
    with pytest.raises(UserError, match="no voice"):
        prepare_data.run(engine=Engine(UserError("no voice")), run_dir=str(tmp_path))
    assert corpus.read_summary(tmp_path / "corpus" / "asterisk")["clips"] == 1
    result = prepare_data.run(engine=Engine(), run_dir=str(tmp_path))
    assert (result["clips"], result["recorded_clips"]) == (3, 1)


def test_a_full_disk_is_one_line(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "/x/clip")
    with pytest.raises(UserError, match="/x/clip: cannot be written .No space left"):
        prepare_data.run(engine=Engine(full), run_dir=str(tmp_path), asterisk=False)
    with pytest.raises(UserError, match="RUN_DIR"):
        prepare_data.run(engine=Engine())
    with pytest.raises(UserError, match="nothing to make"):
        prepare_data.run(engine=None, run_dir=str(tmp_path), asterisk=False)


_SIZES = dict(linguistic_size=8, semantic_size=16, num_specials=8, multiple_of=16)


def test_train_vocabulary(tmp_path):
    with pytest.raises(UserError, match="prepare_data"):
        train_vocabulary.run(run_dir=str(tmp_path), text_size=90, **_SIZES)
    prepare_data.run(engine=Engine(), run_dir=str(tmp_path), asterisk=False)
    result = train_vocabulary.run(run_dir=str(tmp_path), text_size=90, **_SIZES)
    vocabulary = Vocabulary.load(str(tmp_path / "vocabulary"))
    assert (
        result["size"] == vocabulary.size and result["text_pieces"] == vocabulary.num_pieces <= 90
    )
    text = "what is one plus two"
    assert vocabulary.decode_text(vocabulary.encode_text(text)) == text
    assert train_vocabulary.run(run_dir=str(tmp_path), text_size=90, **_SIZES) == result
    with pytest.raises(UserError, match="other sizes"):
        train_vocabulary.run(run_dir=str(tmp_path), text_size=99, **_SIZES)
