import json

import numpy as np
import pytest

from t5x_audio.data import corpus, records
from t5x_audio.errors import UserError
from t5x_audio.evaluation import spoken_qa
from t5x_audio.evaluation.judges import Judges

LINGUISTIC_SIZE = 8


def _clip(name, role, speaker, seconds=0.5):
    audio = (3000 * np.sin(np.arange(int(16000 * seconds)) / 9)).astype(np.int16)
    return corpus.Clip(f"{name}-{role}", audio, "text", speaker, role, name, "sums")


def _row(name, short="seven", novelty="fact"):
    return {
        "id": name, "split": "test", "category": "sums", "question": "three plus four",
        "answer": f"that is {short}", "short_answer": short, "novelty": novelty,
    }  # fmt: skip


@pytest.fixture
def folders(tmp_path):
    """A corpus of five test questions and its codes."""
    names = [f"sums-{i}" for i in range(5)]
    clips = [_clip(n, "question", "test voice") for n in names]
    clips += [_clip(n, "answer", "joe", 1.0) for n in names]
    corpus.write_corpus(tmp_path / "c", {"test": clips}, questions=[_row(n) for n in names])
    with records.RecordWriter(tmp_path / "t", "test") as writer:
        for clip in clips:
            record = clip.to_record()
            del record["audio"]
            writer.write(
                record
                | {"linguistic": np.arange(4, dtype=np.int32)}
                | {"semantic": np.arange(6, dtype=np.int32)}
            )
    return tmp_path / "c", tmp_path / "t"


def test_questions_come_with_answers_and_codes(folders):
    questions = spoken_qa.load_questions(*folders, LINGUISTIC_SIZE)
    assert len(questions) == 5
    one = questions[0]
    assert one.audio.dtype == np.float32 and len(one.audio) == 8000
    assert len(one.recording) == 16000
    assert one.codes.tolist() == [0, 1, 8, 9, 10, 2, 3, 11, 12, 13]
    assert (one.category, one.novelty, one.short_answer) == ("sums", "fact", "seven")


def test_a_smaller_draw_is_part_of_a_larger_one(folders):
    everything = [one.id for one in spoken_qa.load_questions(*folders, LINGUISTIC_SIZE)]
    few = [one.id for one in spoken_qa.load_questions(*folders, LINGUISTIC_SIZE, limit=2)]
    assert few == everything[:2]


def test_missing_codes_are_named(folders, tmp_path):
    with records.RecordWriter(tmp_path / "t", "test"):
        pass
    with pytest.raises(UserError, match="lacks its row, answer or codes"):
        spoken_qa.load_questions(*folders, LINGUISTIC_SIZE)


TONE = np.full(4000, 0.5, np.float32)


def _question(name, short, answer, category="sums", novelty="fact"):
    return spoken_qa.SpokenQuestion(
        name, category, novelty, "q", answer, short, TONE, TONE, np.zeros(5, np.int32)
    )


class _Listener:
    """Hears what it was told it would; counts the recordings it was given."""

    def __init__(self, *transcripts):
        self.transcripts, self.asked = list(transcripts), []

    def __call__(self, recordings):
        self.asked.append(len(recordings))
        return [self.transcripts.pop(0) for _ in recordings]


def _judges(*transcripts):
    listener = _Listener(*transcripts)
    embed = lambda sound: np.tile([0.6, 0.8], (len(sound), 1))  # noqa: E731
    return Judges(listener, lambda samples: 3.0, embed, np.array([1.0, 0.0])), listener


def test_assessment_of_two_answers():
    questions = [
        _question("a", "seven", "that is seven"),
        _question("b", "cold", "the opposite is cold", "opposites", "phrasing"),
    ]
    silence = np.zeros(0, np.float32)
    speech = {
        "answers": [TONE, silence],
        "resynthesis": [TONE, TONE],
        "recordings": [TONE, TONE],
    }
    judges, listener = _judges(
        "that was 7", "that is seven", "the opposite", "that is seven", "the opposite is cold"
    )
    rows = spoken_qa.assess(questions, ["that is seven", "it is cold"], speech, judges)
    assert listener.asked == [1, 2, 2]  # a recording without sound is not shown to the recogniser
    first, second = rows
    assert first["written_right"] and first["answers"]["heard_right"]
    assert (first["answers"]["word_errors"], first["answers"]["words"]) == (1, 3)
    assert second["written_right"] and not second["answers"]["heard_right"]
    assert (second["answers"]["word_errors"], second["answers"]["words"]) == (3, 3)
    assert second["answers"]["mos"] is None

    figures = spoken_qa.summarise(rows)
    assert figures["questions"] == 2
    assert figures["text_accuracy"] == 1.0
    assert figures["heard_accuracy"] == 0.5
    assert figures["wer"] == pytest.approx(4 / 6)
    assert figures["resynthesis_heard_accuracy"] == 0.5
    assert figures["resynthesis_wer"] == pytest.approx(2 / 7)
    assert figures["recordings_wer"] == 0.0
    assert figures["dnsmos"] == 3.0 and figures["audible"] == 0.5
    assert figures["speaker_similarity"] == pytest.approx(0.6)
    json.dumps(rows)  # all of it can be kept

    groups = spoken_qa.by_group(rows, "category")
    assert groups["sums"] == {"questions": 1, "text_accuracy": 1.0, "heard_accuracy": 1.0}
    assert groups["opposites"]["heard_accuracy"] == 0.0


def test_examples_take_categories_in_turn():
    rows = [{"id": f"a{i}", "category": "a"} for i in range(4)]
    rows += [{"id": "b0", "category": "b"}]
    assert spoken_qa.choose_examples(rows, 3) == ["a0", "b0", "a1"]
    assert len(spoken_qa.choose_examples(rows, 99)) == 5
