import pathlib
import re
import types

import numpy as np
import pytest
import seqio

import tasks
from t5x_audio.errors import UserError
from t5x_audio.sequences.layouts import Layouts
from t5x_audio.sequences.vocabulary import LINGUISTIC, SEMANTIC
from tasks import aqaa, asr, corpus, interleaved, mixtures

ANSWERS = {"q0": "one plus one is two", "q4": "two plus two is four"}


@pytest.fixture(scope="module", autouse=True)
def registered(run_dir, vocabulary):
    return tasks.register_all(run_dir, vocabulary)


def examples(name, split="train"):
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, split=split, shuffle=False)
    return list(dataset.as_numpy_iterator())


@pytest.fixture(scope="module")
def clips(run_dir, vocabulary):
    token_corpus = corpus.TokenCorpus(run_dir, vocabulary)
    return {split: list(token_corpus.clips(split)) for split in ("train", "validation", "test")}


def test_all_tasks_are_registered(registered):
    assert sorted(registered) == sorted(tasks.TASKS)
    assert set(tasks.TASKS) <= set(seqio.TaskRegistry.names())


# Questions x voices (+ answers), counted from conftest.
@pytest.mark.parametrize(
    ("name", "train", "validation", "test"),
    [
        ("continuation", 4 * 4 + 5, 2 * 3, 2 * 2),
        ("linguistic_alone", 4 * 4 + 5, 2 * 3, 2 * 2),
        ("semantic_alone", 4 * 4 + 5, 2 * 3, 2 * 2),
        ("asr", 4 * 4 + 5, 2 * 3, 2 * 2),
        ("tts", 4 * 4 + 5 - 3, 2 * 3 - 1, 2 * 2 - 1),
        ("text", 4, 2, 2),
        ("tqta", 4, 2, 2),
        ("aqta", 4 * 3, 2 * 2, 2),
        ("taqta", 4 * 3, 2 * 2, 2),
        ("aqaa", 4 * 3, 2 * 2, 2),
        ("tqaa", 4, 2, 2),
        # The one question of its category has no wrong answer; nor have two with one answer.
        ("aqaa_preference", 3 * 3, 0, 0),
    ],
)
def test_every_example_once(name, train, validation, test):
    counts = {}
    for split in ("train", "validation", "test"):
        found = examples(name, split)
        assert len({(e["id"]) for e in found}) == len(found)
        counts[split] = len(found)
    assert counts == {"train": train, "validation": validation, "test": test}


def test_aqaa_joins_the_question_in_any_voice_with_its_answer(vocabulary, clips):
    layouts = Layouts(vocabulary)
    for split in ("train", "validation", "test"):
        by_id = {clip.id: clip for clip in clips[split]}
        for example in examples("aqaa", split):
            asked = by_id[example["id"].decode()]
            answer = by_id[f"{asked.question_id}-answer"]
            tokens, weights = layouts.aqaa(asked.codes, answer.text, answer.codes)
            np.testing.assert_array_equal(example["tokens"], tokens)
            np.testing.assert_array_equal(example["weights"], weights)
            assert example["speaker"].decode() == asked.speaker
            assert example["short_answer"].decode() in answer.text


def test_held_out_questions_are_in_no_training_example(clips):
    held_out = {"q4", "q5"}
    assert not held_out & {clip.question_id for clip in clips["train"]}
    for name in ("aqaa", "aqta", "tqaa", "aqaa_preference"):
        assert not held_out & {e["question_id"].decode() for e in examples(name)}
    assert {e["id"].decode() for e in examples("text")} == {"q0", "q1", "q2", "q3"}


def test_each_stream_alone_is_its_part_of_the_continuation(vocabulary):
    stories = [examples(n) for n in ("continuation", "linguistic_alone", "semantic_alone")]
    for whole, first, second in zip(*stories, strict=True):
        assert whole["id"] == first["id"] == second["id"]
        linguistic = vocabulary.modality(whole["tokens"]) == LINGUISTIC
        semantic = vocabulary.modality(whole["tokens"]) == SEMANTIC
        np.testing.assert_array_equal(whole["tokens"][~semantic], first["tokens"])
        np.testing.assert_array_equal(whole["tokens"][~linguistic], second["tokens"])


def test_tts_gives_the_voice_in_context(vocabulary, clips):
    by_id = {clip.id: clip for clip in clips["train"]}
    for example in examples("tts"):
        clip = by_id[example["id"].decode()]
        pairs = example["tokens"].tolist().count(vocabulary.audio_start) - 1
        assert pairs == (clip.speaker != "joe")
        target = example["tokens"][example["weights"] > 0]
        expected = [vocabulary.audio_start, *vocabulary.from_local(clip.codes)]
        assert target.tolist() == [*expected, vocabulary.audio_end, vocabulary.eot]


def test_interleaved_covers_every_clip_in_both_forms(vocabulary, clips):
    documents = list(interleaved.documents(iter(clips["train"])))
    by_text = {clip.text for clip in clips["train"]}
    assert {text for d in documents for text in d["texts"]} == by_text
    assert sum(len(d["texts"]) for d in documents) == len(clips["train"])
    assert all(len(d["texts"]) <= interleaved.MAX_CLIPS for d in documents)
    first, second = (interleaved.spans(d) for d in documents[:2])
    assert isinstance(first[0], str) and isinstance(second[1], str)
    assert sum(map(len, first[1::2])) == len(documents[0]["codes"])
    found = examples("interleaved")
    assert len(found) == len(documents)
    np.testing.assert_array_equal(found[1]["tokens"], Layouts(vocabulary).interleaved(second)[0])


def test_long_clips_stay_alone():
    def clip(name, length):
        codes = np.zeros(length, np.int32)
        return corpus.Clip(name, "text", codes, "voice", "utterance", "", "")

    lengths = [300, 300, 5, 5, 5, 5]
    documents = interleaved.documents(clip(str(i), n) for i, n in enumerate(lengths))
    assert [d["lengths"].tolist() for d in documents] == [[300], [300, 5, 5], [5, 5]]


def test_rejected_answers_are_wrong(vocabulary):
    layouts = Layouts(vocabulary)
    for example in examples("aqaa_preference"):
        assert example["rejected_short_answer"] != example["short_answer"]
        assert example["category"] == b"sums"
        for prefix, text in (("chosen_", "answer"), ("rejected_", "rejected")):
            tokens, weights = example[prefix + "tokens"], example[prefix + "weights"]
            answer = tokens[np.flatnonzero(weights)[0] :]
            text_ids, codes = layouts.decode_aqaa_answer(answer)
            assert vocabulary.decode_text(text_ids) == example[text].decode()
            assert len(codes) and not weights[vocabulary.is_audio(tokens)].any()
    first, second = examples("aqaa_preference"), examples("aqaa_preference")
    assert [e["rejected"] for e in first] == [e["rejected"] for e in second]


def test_mixture_needs_known_tasks_and_caches(tmp_path):
    with pytest.raises(UserError, match="asrr"):
        mixtures.register("broken", {"asrr": 1}, str(tmp_path))
    mixture = mixtures.register("stage", {"continuation": 2, "text": 1}, str(tmp_path))
    with pytest.raises(UserError, match="cache_tasks"):
        mixture.get_rate(seqio.TaskRegistry.get("text"))


def test_metrics_and_postprocess(vocabulary):
    layouts = Layouts(vocabulary)
    task = seqio.TaskRegistry.get("aqaa")
    example = examples("aqaa", "test")[0]
    target = task.postprocess_fn(None, example=example, is_target=True)
    assert target == "four"
    answer = layouts.encode_aqaa_answer(vocabulary.encode_text("it is four"), [1, 2, 20, 21, 22])
    prediction = task.postprocess_fn(answer, example=example, is_target=False)
    assert prediction == "it is four"
    predictions = [prediction, "it is five", "it is twenty four", "four"]
    assert aqaa.text_accuracy([target] * 4, predictions) == {"text_accuracy": 50.0}
    wer = asr.word_error_rate(["one two three four", ""], ["one two tree", "noise"])
    assert wer == {"wer": 50.0}
    assert asr.word_error_rate(["4"], ["four"]) == {"wer": 0.0}


def test_no_tokens(tmp_path, vocabulary):
    with pytest.raises(UserError, match="tokenize_corpus"):
        tasks.register_all(str(tmp_path), vocabulary)
    # The registry still serves the run that was registered before.
    assert examples("text")


def test_the_task_of_the_docs_is_short_and_works(vocabulary, run_dir):
    page = (pathlib.Path(__file__).parents[2] / "docs/tasks.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    body = code[code.index("def register") :]
    assert len(body.strip().splitlines()) < 20
    names = {}
    exec(code, names)
    clips = [
        corpus.Clip(f"c{i}", text, np.arange(5, dtype=np.int32), "", "", "", "")
        for i, text in enumerate(("one", "two words", "three"))
    ]
    few = types.SimpleNamespace(clips=lambda split: clips)
    layouts = Layouts(vocabulary)
    assert names["register"](few, layouts) == ["spelling"]
    task, found = seqio.get_mixture_or_task("spelling"), examples("spelling")
    assert [example["text"] for example in found] == [b"one", b"three"]
    said = [
        task.postprocess_fn(example["tokens"], example=example, is_target=True) for example in found
    ]
    assert said == ["o n e", "t h r e e"]
    (metric,) = task.metric_fns
    assert metric(said, ["o n e", "t r e e"]) == {"right": 0.5}
