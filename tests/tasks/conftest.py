"""A tokenised run so small that every count can be checked by hand."""

import json
import zlib

import numpy as np
import pytest

from t5x_audio.data.records import RecordWriter
from t5x_audio.sequences.vocabulary import Vocabulary, train_sentencepiece

QUESTIONS = [
    ("q0", "train", "sums", "what is one plus one", "one plus one is two", "two"),
    ("q1", "train", "sums", "what is two plus one", "two plus one is three", "three"),
    ("q2", "train", "sums", "one plus two is what", "one plus two is three", "three"),
    ("q3", "train", "days", "what follows monday", "after monday comes tuesday", "tuesday"),
    ("q4", "test", "sums", "what is two plus two", "two plus two is four", "four"),
    ("q5", "test", "sums", "what is one plus three", "one plus three is four", "four"),
]
FIELDS = ("id", "split", "category", "question", "answer", "short_answer")
# Voices that ask in each split; the answers are always joe's.
VOICES = {"train": ("joe", "high", "low"), "validation": ("joe", "high"), "test": ("other",)}


def _record(clip_id, text, speaker, role, question_id="", category=""):
    random = np.random.default_rng(zlib.crc32(clip_id.encode()))
    groups = int(random.integers(2, 8))
    return {
        "id": clip_id,
        "text": text,
        "speaker": speaker,
        "role": role,
        "question_id": question_id,
        "category": category,
        "duration": 0.12 * groups,
        "linguistic": random.integers(0, 16, 2 * groups + 1).astype(np.int32),
        "semantic": random.integers(0, 32, 3 * groups + 2).astype(np.int32),
    }


def _clips(split):
    for qid, kept, category, question, answer, _ in QUESTIONS:
        if (kept == "train") == (split == "train"):
            for voice in VOICES[split]:
                yield _record(f"{qid}-{voice}", question, voice, "question", qid, category)
            yield _record(f"{qid}-answer", answer, "joe", "answer", qid, category)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    texts = [text for row in QUESTIONS for text in row[3:5]]
    path = train_sentencepiece(texts * 3, str(root / "text"), 160)
    Vocabulary(160, 16, 32, 8, 64, sentencepiece=path).save(str(root / "vocabulary"))
    for split in VOICES:
        with RecordWriter(root / "tokens" / "spoken_qa", split, num_shards=2) as writer:
            for record in _clips(split):
                writer.write(record)
    with RecordWriter(root / "tokens" / "asterisk", "train") as writer:
        for i in range(5):
            writer.write(_record(f"u{i}", f"prompt {i}", "allison", "utterance"))
    corpus = root / "corpus" / "spoken_qa"
    corpus.mkdir(parents=True)
    rows = [json.dumps(dict(zip(FIELDS, row, strict=True))) for row in QUESTIONS]
    (corpus / "questions.jsonl").write_text("\n".join(rows) + "\n")
    return str(root)


@pytest.fixture(scope="session")
def vocabulary(run_dir):
    return Vocabulary.load(f"{run_dir}/vocabulary")
