"""Clips, splits and the mark of a whole corpus."""

import collections

import numpy as np
import pytest

from t5x_audio.data import corpus
from t5x_audio.errors import UserError


def _clip(i: int, **fields) -> corpus.Clip:
    audio = np.full(1600 * (i + 1), i, np.int16)
    return corpus.Clip(id=f"c{i}", audio=audio, text=f"text {i}", speaker="s", **fields)


def test_written_clips_come_back(tmp_path):
    tmp_path = tmp_path / "corpus" / "a"
    clips = [_clip(i, role="question", question_id=f"q{i}", category="x") for i in range(5)]
    questions = [{"id": f"q{i}", "question": "é?"} for i in range(5)]
    split = {"train": clips, "test": clips[:1]}
    summary = corpus.write_corpus(tmp_path, split, num_shards=2, questions=questions)
    assert summary["clips"] == 6 and summary["hours"] == pytest.approx(1.6 / 3600, abs=1e-4)
    assert corpus.read_summary(tmp_path) == summary
    assert corpus.read_questions(tmp_path) == questions
    back = sorted(corpus.iterate_clips(tmp_path, "train"), key=lambda clip: clip.id)
    for clip, other in zip(clips, back, strict=True):
        np.testing.assert_array_equal(clip.audio, other.audio)
        assert clip.to_record().keys() == other.to_record().keys()
        assert clip.duration == other.duration == clip.to_record()["duration"]
        assert (clip.text, clip.role, clip.category) == (other.text, other.role, other.category)
    assert corpus.finished_corpora(tmp_path.parent) == [str(tmp_path)]


def test_a_cut_off_corpus_is_seen_as_unfinished(tmp_path):
    tmp_path = tmp_path / "corpus" / "a"

    def clips():
        yield _clip(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.write_corpus(tmp_path, {"train": [_clip(1)], "test": clips()})
    assert corpus.read_summary(tmp_path) is None
    with pytest.raises(UserError, match="no finished corpus"):
        corpus.finished_corpora(tmp_path.parent)


def test_splits_by_hash_are_stable_and_of_the_asked_size():
    splits = collections.Counter(corpus.split_of(f"clip {i}", 0.1, 0.2) for i in range(4000))
    assert splits["validation"] == pytest.approx(400, rel=0.2)
    assert splits["test"] == pytest.approx(800, rel=0.15)
    assert corpus.split_of("a", 0, 0) == "train" and corpus.split_of("a", 0, 1) == "test"


def test_bad_clips_and_rows_are_named(tmp_path):
    with pytest.raises(ValueError, match="role"):
        _clip(1, role="singer")
    with pytest.raises(ValueError, match="int16"):
        corpus.Clip("a", np.zeros(5, np.float32), "t", "s")
    with pytest.raises(UserError, match="lacks 'audio'"):
        corpus.Clip.from_record({"id": "a"})
    with pytest.raises(UserError, match="questions.jsonl"):
        corpus.read_questions(tmp_path)
    (tmp_path / corpus.QUESTIONS_FILE).write_text('{"a": 1}\n{oops\n')
    with pytest.raises(UserError, match="line 2"):
        corpus.read_questions(tmp_path)
