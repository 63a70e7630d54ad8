"""Soft tokens stand at their placeholders, wherever packing has put them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5x_audio.data import lm_reader
from t5x_audio.data.records import RecordWriter
from t5x_audio.errors import UserError

PAD, IMAGE, WIDTH = 999, 500, 2
SIZES = {"size": 1024}


def write_cache(root, task, examples, split="train"):
    """Examples as (number of tokens, places of the placeholders or None); see `assert_placed`."""
    directory = root / "tasks" / task
    with RecordWriter(directory, split) as writer:
        for i, (length, places) in enumerate(examples):
            tokens = np.full(length, i, np.int32)
            record = {"tokens": tokens, "weights": np.ones(length, np.float32)}
            if places is not None:
                tokens[places] = IMAGE
                rows = [(i, at) for at in places]
                record["soft_embeddings"] = np.array(rows, np.float16).reshape(-1, WIDTH)
            writer.write(record)
    lengths = np.array([length for length, _ in examples], np.int32)
    np.save(lm_reader.lengths_path(str(directory), split), lengths)
    stats = {"vocabulary": SIZES, "pad": PAD}
    if any(places is not None for _, places in examples):
        most = max(len(places) for _, places in examples)
        stats["soft_embeddings"] = {"most": most, "width": WIDTH, "placeholder": IMAGE}
    (directory / "stats.json").write_text(json.dumps(stats))


def make(root, mixture, **kwargs):
    given = {"sequence_length": 24, "batch_size": 3, "open_rows": 6, "soft_width": WIDTH} | kwargs
    return lm_reader.PackedLmDataset(str(root), mixture, **given)


def assert_placed(batch):
    """The embedding of a placeholder names its example and its place in it, no other is named."""
    index, found = batch["soft_index"], 0
    assert index.dtype == np.int32 and batch["soft_embeddings"].dtype == np.float16
    np.testing.assert_array_equal(index >= 0, batch["tokens"] == IMAGE)
    for row, at in np.argwhere(index >= 0):
        example, place = batch["soft_embeddings"][row, index[row, at]]
        assert place == batch["positions"][row, at]
        segment = batch["segment_ids"][row] == batch["segment_ids"][row, at]
        others = batch["tokens"][row][segment & (index[row] < 0)]
        assert (others == example).all()
        found += 1
    return found


documents = st.integers(2, 24).flatmap(
    lambda length: st.tuples(
        st.just(length), st.lists(st.integers(0, length - 2), max_size=8, unique=True).map(sorted)
    )
)


@settings(max_examples=25)
@given(
    images=st.lists(documents, min_size=1, max_size=25),
    texts=st.lists(st.integers(2, 20), min_size=1, max_size=9),
    room=st.integers(8, 20),
)
def test_embeddings_follow_their_placeholders(tmp_path_factory, images, texts, room):
    root = tmp_path_factory.mktemp("any")
    write_cache(root, "images", images)
    write_cache(root, "texts", [(length, None) for length in texts])
    dataset = make(root, {"images": 2, "texts": 1}, soft_tokens=room, eval_split="train")
    batches = [batch for batches in dataset.eval_sets().values() for batch in batches]
    assert sum(map(assert_placed, batches)) == sum(len(places) for _, places in images)
    for _, batch in zip(range(4), dataset, strict=False):
        assert_placed(batch)
        assert batch["soft_embeddings"].shape == (3, room, WIDTH)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    examples = []
    for length in random.integers(6, 20, 40):
        places = np.sort(random.choice(length - 1, 4, replace=False))
        examples.append((int(length), places.tolist()))
    write_cache(root, "images", examples)
    write_cache(root, "texts", [(int(length), None) for length in random.integers(3, 20, 40)])
    return root


def test_resuming_is_exact(root):
    def fresh():
        return iter(make(root, {"images": 1, "texts": 1}, soft_tokens=8))

    reference = fresh()
    expected = [next(reference) for _ in range(25)]
    for stop in (0, 1, 11):
        iterator = fresh()
        for _ in range(stop):
            next(iterator)
        resumed = fresh()
        resumed.set_state(json.loads(json.dumps(iterator.get_state())))
        for wanted in expected[stop : stop + 10]:
            batch = next(resumed)
            assert batch.keys() == wanted.keys()
            for key, values in wanted.items():
                np.testing.assert_array_equal(batch[key], values)


def test_shapes_are_known_without_data(root):
    settings_ = {"sequence_length": 24, "batch_size": 3, "soft_tokens": 8, "soft_width": WIDTH}
    for mixture in ({"images": 1}, {"texts": 1}):  # the same, for one program serves both
        batch = next(iter(make(root, mixture, **settings_)))
        found = {name: (array.shape, array.dtype) for name, array in batch.items()}
        assert lm_reader.PackedLmDataset.batch_shapes(**settings_) == found
    assert (batch["soft_index"] == -1).all() and not batch["soft_embeddings"].any()


def test_without_room_nothing_is_added(root):
    plain = next(iter(make(root, {"texts": 1})))
    assert set(plain) == {"tokens", "targets", "weights", "segment_ids", "positions"}
    roomy = next(iter(make(root, {"texts": 1}, soft_tokens=8)))
    for key, values in plain.items():
        np.testing.assert_array_equal(values, roomy[key])


@pytest.mark.parametrize("room", [{}, {"soft_tokens": 3}, {"soft_tokens": 8, "soft_width": 5}])
def test_no_room_is_told_at_once(root, room):
    with pytest.raises(UserError, match="'images' has up to 4 soft tokens of width 2.*TOKENS=4"):
        make(root, {"images": 1, "texts": 1}, **room)


def test_a_cache_whose_placeholders_are_not_its_embeddings(tmp_path):
    write_cache(tmp_path, "images", [(9, [1, 2, 3])])
    stats = tmp_path / "tasks" / "images" / "stats.json"
    stats.write_text(stats.read_text().replace(str(IMAGE), "501"))
    with pytest.raises(UserError, match="cache_tasks again"):
        next(iter(make(tmp_path, {"images": 1}, soft_tokens=8)))
