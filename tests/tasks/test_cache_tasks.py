import json
import os
import shutil

import numpy as np
import pytest

from t5x_audio import cache_tasks
from t5x_audio.data import lm_reader, records
from t5x_audio.errors import UserError

MIXTURES = {"one": {"continuation": 2, "text": 1}, "two": {"aqaa": 1, "text": 1}}


@pytest.fixture(scope="module")
def cached(run_dir):
    arguments = {"model_dir": f"{run_dir}/tasks", "run_dir": run_dir, "mixtures": MIXTURES}
    arguments |= {"extra_tasks": ["aqaa_preference"], "num_shards": 2}
    return arguments, cache_tasks.run(**arguments)


def test_caches_are_what_the_tasks_give(cached, run_dir, vocabulary):
    import seqio

    assert cached[1]["tasks"] == cached[1]["made"] == 4
    for split in ("train", "test"):
        task = seqio.get_mixture_or_task("aqaa")
        dataset = task.get_dataset(None, split=split, shuffle=False)
        expected = {e["id"].decode(): e for e in dataset.as_numpy_iterator()}
        stored = records.open_records(f"{run_dir}/tasks/aqaa", split)
        lengths = np.load(f"{run_dir}/tasks/aqaa/{split}-lengths.npy")
        assert len(stored) == len(expected)
        assert lengths.tolist() == [len(record["tokens"]) for record in stored]
        if split == "train":
            assert set(stored[0]) == {"tokens", "weights"}
            continue
        for record in stored:
            np.testing.assert_array_equal(record["tokens"], expected[record["id"]]["tokens"])
            np.testing.assert_array_equal(record["weights"], expected[record["id"]]["weights"])
            assert record["question"].startswith("what is") and record["short_answer"] == "four"


def test_stats(cached, run_dir, vocabulary):
    stats = lm_reader.read_stats(f"{run_dir}/tasks/aqaa")
    assert stats["vocabulary"] == vocabulary.sizes() and stats["pad"] == vocabulary.pad
    train = stats["train"]
    stored = records.open_records(f"{run_dir}/tasks/aqaa", "train")
    assert train["examples"] == len(stored) == 12
    assert train["tokens"] == sum(train["tokens_by_modality"].values())
    assert train["tokens"] == sum(len(record["tokens"]) for record in stored)
    assert train["targets"] == sum(int(record["weights"].sum()) for record in stored)
    by_modality = train["tokens_by_modality"]
    assert 2 * by_modality["semantic"] == 3 * by_modality["linguistic"]
    # Pairs exist in training only, so there is no other split.
    assert (
        set(lm_reader.read_stats(f"{run_dir}/tasks/aqaa_preference"))
        & {
            "validation",
            "test",
        }
        == set()
    )


def test_a_second_run_makes_nothing(cached, run_dir):
    before = os.stat(f"{run_dir}/tasks/aqaa/stats.json").st_mtime_ns
    again = cache_tasks.run(**cached[0])
    assert again["made"] == 0 and again["already_there"] == 4
    assert again["tokens"] == cached[1]["tokens"]
    assert os.stat(f"{run_dir}/tasks/aqaa/stats.json").st_mtime_ns == before


def test_an_interrupted_run_continues(cached, run_dir):
    shutil.rmtree(f"{run_dir}/tasks/text")
    os.makedirs(f"{run_dir}/tasks/.text.writing")
    assert cache_tasks.run(**cached[0])["made"] == 1
    assert lm_reader.read_stats(f"{run_dir}/tasks/text")["train"]["examples"] == 4
    assert not os.path.exists(f"{run_dir}/tasks/.text.writing")


def test_other_settings_make_other_caches(cached, run_dir, tmp_path):
    arguments = cached[0] | {"model_dir": str(tmp_path), "mixtures": {"one": {"aqaa": 1}}}
    arguments |= {"extra_tasks": []}
    assert cache_tasks.run(**arguments)["made"] == 1
    assert cache_tasks.run(**arguments, text_block=5)["made"] == 1
    assert cache_tasks.run(**arguments, text_block=5)["made"] == 0


def test_mixtures_by_token_share(cached, run_dir):
    import seqio

    mixture = seqio.get_mixture_or_task("one")
    stats = {t: lm_reader.read_stats(f"{run_dir}/tasks/{t}")["train"] for t in MIXTURES["one"]}
    tokens = {}
    for name, figures in stats.items():
        rate = mixture.get_rate(seqio.TaskRegistry.get(name))
        tokens[name] = rate * figures["tokens"] / figures["examples"]
    assert tokens["continuation"] == pytest.approx(2 * tokens["text"])


def test_cached_tasks_feed_the_reader(cached, run_dir):
    dataset = lm_reader.PackedLmDataset(run_dir, {"aqaa": 1, "text": 1}, batch_size=2, open_rows=2)
    batch = next(iter(dataset))
    assert batch["tokens"].shape == (2, 512)
    pairs = lm_reader.PreferenceDataset(run_dir, batch_size=2)
    assert next(iter(pairs))["chosen_tokens"].shape == (2, 512)


def test_bad_input(cached, run_dir, tmp_path):
    with pytest.raises(UserError, match="'text' is -1, not a number >= 0"):
        cache_tasks.run(**cached[0] | {"mixtures": {"m": {"aqaa": 1, "text": -1}}})
    with pytest.raises(UserError, match="no task is called 'aqqa': choose from continuation, "):
        cache_tasks.run(**cached[0] | {"extra_tasks": ["aqqa"]})
    with pytest.raises(UserError, match="train_vocabulary"):
        cache_tasks.run(model_dir=str(tmp_path), run_dir=str(tmp_path), mixtures=MIXTURES)
    (tmp_path / "stats.json").write_text("{")
    with pytest.raises(UserError, match="stats.json"):
        lm_reader.read_stats(str(tmp_path))
    with pytest.raises(UserError, match="no training example"):
        _without_answers(run_dir, tmp_path)


def _without_answers(run_dir, tmp_path):
    """A run whose questions are unknown: nothing can be joined."""
    shutil.copytree(f"{run_dir}/tokens", tmp_path / "run" / "tokens")
    shutil.copytree(f"{run_dir}/vocabulary", tmp_path / "run" / "vocabulary")
    path = tmp_path / "run" / "corpus" / "spoken_qa" / "questions.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"id": "other", "split": "train"}) + "\n")
    run = str(tmp_path / "run")
    cache_tasks.run(model_dir=f"{run}/tasks", run_dir=run, mixtures={"m": {"aqaa": 1}})
