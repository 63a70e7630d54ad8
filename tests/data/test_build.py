"""The data engine end to end with a voice and an ear of arithmetic: kept, dropped, continued."""

import dataclasses

import numpy as np
import pytest

from t5x_audio.data import corpus, records
from t5x_audio.data.engine import build, readings, variants, world
from t5x_audio.data.text_normalization import normalize
from t5x_audio.errors import UserError

_BLOCK = 400


class Voice:
    """Says a text as one constant block a letter; what it mumbles, it says wrong."""

    def __init__(self, mumbles=(), first_only=()):
        self.mumbles, self.first_only, self.said = set(mumbles), set(first_only), []
        self.manners = {}

    def speak(self, lines, work_dir, **manner):
        assert len(set(lines)) == len(lines)
        self.manners |= dict.fromkeys(lines, manner)
        return [self._say(line) for line in lines]

    def _say(self, line):
        text = normalize(line)
        wrong = text in self.mumbles or (text in self.first_only and text not in self.said)
        self.said.append(text)
        codes = [ord(ch) / 256 for ch in ("mumble" if wrong else text)]
        return np.repeat(np.float32(codes), _BLOCK)


class Ear:
    """Reads the blocks back; stops the work after some calls."""

    def __init__(self, stop_after=None):
        self.calls, self.stop_after = 0, stop_after

    def transcribe(self, waveforms):
        self.calls += 1
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        return ["".join(chr(round(v * 256)) if v else " " for v in w[::_BLOCK]) for w in waveforms]


@pytest.fixture(autouse=True)
def plain_voices(monkeypatch):
    monkeypatch.setattr(variants, "VOICES", dict.fromkeys(variants.VOICES, variants.Variant()))


_DIALS = build.SpokenQuestions(
    num_questions=60,
    num_test_questions=14,
    num_voices=3,
    voices_per_question=1.5,
    batch_size=10,
    length_scale=0.7,
    question_noise=(0.5, 0.6),
    answer_length_scale=1.2,
    answer_noise=(0.3, 0.1),
)


def _build(tmp_path, voice, ear):
    return _DIALS.build(str(tmp_path / "qa"), str(tmp_path / "work"), voice, ear)


def test_splits_voices_and_answers(tmp_path):
    voice = Voice()
    summary = _build(tmp_path, voice, Ear())
    assert summary["questions"] == 60 and summary["test_questions"] == 14
    assert not (tmp_path / "work").exists()
    rows = {row["id"]: row for row in corpus.read_questions(tmp_path / "qa")}
    for question in world.make_questions(60, 14, _DIALS.fact_share, _DIALS.seed):
        asked = {"length_scale": 0.7, "noise_scale": 0.5, "duration_noise": 0.6}
        told = {"length_scale": 1.2, "noise_scale": 0.3, "duration_noise": 0.1}
        assert voice.manners[question.spoken_question] == asked
        assert voice.manners[question.spoken_answer] == told
    seen = {}
    for split in records.SPLITS:
        clips = list(corpus.iterate_clips(tmp_path / "qa", split))
        assert len({clip.id for clip in clips}) == len(clips)
        for clip in clips:
            row = rows[clip.question_id]
            assert (row["split"] == "train") == (split == "train")
            assert clip.text == row["question" if clip.role == "question" else "answer"]
            assert "".join(chr(round(v * 256)) for v in clip.samples[::_BLOCK]) == clip.text
        asked = [clip for clip in clips if clip.role == "question"]
        told = {clip.question_id for clip in clips if clip.role == "answer"}
        assert told == {clip.question_id for clip in asked}
        assert {clip.speaker for clip in clips if clip.role == "answer"} == {"joe"}
        seen[split] = asked
    assert {clip.speaker for clip in seen["test"]} == {"eve"}
    assert {clip.speaker for clip in seen["train"]} == {"joe", "kim", "lee"}
    assert len(seen["train"]) == 69 and len(seen["test"]) == len(seen["validation"]) == 14
    assert _build(tmp_path, None, None) == summary  # a finished corpus needs neither


def test_readings_are_utterances_of_the_base_voice_in_the_manner_of_answers(tmp_path):
    dials = dataclasses.replace(_DIALS, num_readings=60)
    sentences = readings.make_readings(world.make_questions(60, 14), 60)
    voice = Voice(mumbles=[sentences[0].text])
    summary = dials.build(str(tmp_path / "qa"), str(tmp_path / "work"), voice, Ear())
    assert summary["checked"]["reading"] == {"made": 60, "kept": 59, "dropped": 1}
    assert summary["questions"] == 60
    read = {}
    for split in records.SPLITS:
        clips = corpus.iterate_clips(tmp_path / "qa", split)
        read[split] = [clip for clip in clips if clip.role == "utterance"]
        for clip in read[split]:
            assert (clip.speaker, clip.category, clip.question_id) == ("joe", "reading", "")
            assert "".join(chr(round(v * 256)) for v in clip.samples[::_BLOCK]) == clip.text
    assert not read["test"] and len(read["validation"]) < 10
    texts = {clip.text for clips in read.values() for clip in clips}
    assert texts == {sentence.text for sentence in sentences[1:]}
    told = {"length_scale": 1.2, "noise_scale": 0.3, "duration_noise": 0.1}
    assert all(voice.manners[sentence.spoken] == told for sentence in sentences)


def test_wrong_clips_are_said_again_then_dropped(tmp_path):
    questions = world.make_questions(60, 14)
    never = next(q for q in questions if q.split == "train")
    answer = next(q for q in questions if q.split == "test" and q.answer != never.answer)
    later = next(q for q in questions if q.split == "train" and q is not never)
    voice = Voice(mumbles=[never.question, answer.answer], first_only=[later.question])
    summary = _build(tmp_path, voice, Ear())
    kept = {row["id"] for row in corpus.read_questions(tmp_path / "qa")}
    lost = {never.id} | {q.id for q in questions if q.answer == answer.answer}
    assert kept == {q.id for q in questions} - lost
    assert voice.said.count(later.question) == 2 and voice.said.count(never.question) == 3
    dropped = sum(counts["dropped"] for counts in summary["checked"].values())
    made = sum(counts["made"] for counts in summary["checked"].values())
    assert 2 <= dropped <= 4 and made == 69 + 28 + len({q.answer for q in questions})
    for split in records.SPLITS:
        assert not lost & {
            clip.question_id for clip in corpus.iterate_clips(tmp_path / "qa", split)
        }


@pytest.mark.parametrize("stop_after", [2, 7])
def test_an_interruption_costs_one_batch_and_changes_nothing(tmp_path, stop_after):
    whole, parts = Voice(), Voice()
    _build(tmp_path / "a", whole, Ear())
    with pytest.raises(KeyboardInterrupt):
        _build(tmp_path / "b", parts, Ear(stop_after))
    assert corpus.read_summary(tmp_path / "b" / "qa") is None
    _build(tmp_path / "b", parts, Ear())
    assert len(parts.said) - len(whole.said) <= _DIALS.batch_size
    for split in records.SPLITS:
        pairs = zip(
            records.open_records(tmp_path / "a" / "qa", split),
            records.open_records(tmp_path / "b" / "qa", split),
            strict=True,
        )
        for one, other in pairs:
            np.testing.assert_array_equal(one.pop("audio"), other.pop("audio"))
            assert one == other


def test_a_broken_voice_is_named(tmp_path):
    class Dumb(Voice):
        def _say(self, line):
            return np.full(1600, 0.5, np.float32)

    with pytest.raises(UserError, match="confirmed no training clip"):
        _build(tmp_path, Dumb(), Ear())


def test_bad_dials_are_named():
    questions = world.make_questions(60, 14)
    with pytest.raises(UserError, match="num_voices"):
        build.plan_clips(questions, 99, 1)
    with pytest.raises(UserError, match="voices_per_question"):
        build.plan_clips(questions, 2, 3)
