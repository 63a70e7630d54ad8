"""Image batches: each epoch once through, resumed exactly, bad files named."""

import numpy as np
import pytest

from t5x_audio.data import image_reader
from t5x_audio.errors import UserError


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 10), ("test", 5)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
        arrays[f"{split}_labels"] = np.arange(count)
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return str(path)


def test_an_epoch_has_every_image_once_and_the_next_another_order(source):
    data = image_reader.ImageBatches(source, batch_size=5)
    batches = [data.batch(place) for place in range(4)]
    epochs = [np.concatenate([b["labels"] for b in batches[i : i + 2]]) for i in (0, 2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()
    images = data.images.train_images
    np.testing.assert_array_equal(batches[1]["images"], images[batches[1]["labels"]])


def test_a_restored_iterator_goes_on(source):
    data = image_reader.ImageBatches(source, batch_size=3, seed=4)
    iterator = iter(data)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    want = [next(iterator)["labels"] for _ in range(3)]
    other = iter(image_reader.ImageBatches(source, batch_size=3, seed=4))
    other.set_state(state)
    np.testing.assert_array_equal([next(other)["labels"] for _ in range(3)], want)


def test_the_test_split_comes_in_order(source):
    data = image_reader.ImageBatches(source, batch_size=2, max_eval_batches=None)
    labels = [batch["labels"].tolist() for batch in data.eval_sets()["test"]]
    assert labels == [[0, 1], [2, 3]]
    assert image_reader.ImageBatches(source, batch_size=9).eval_sets() == {}


def test_bad_sources_are_named(source, tmp_path):
    with pytest.raises(UserError, match="none.npz: no such file"):
        image_reader.load("none.npz")
    with pytest.raises(UserError, match="has but 10 images"):
        image_reader.ImageBatches(source, batch_size=11)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"no zip")
    with pytest.raises(UserError, match="broken.npz: unreadable"):
        image_reader.load(str(broken))
    arrays = dict(np.load(source))
    for change, message in (
        ({"train_images": arrays["train_images"] / 255}, "train_images is float64"),
        ({"test_labels": arrays["test_labels"][1:]}, "5 test_images, but 4 test_labels"),
    ):
        np.savez(broken, **(arrays | change))
        image_reader.load.cache_clear()
        with pytest.raises(UserError, match=message):
            image_reader.load(str(broken))
    del arrays["test_images"]
    np.savez(broken, **arrays)
    image_reader.load.cache_clear()
    with pytest.raises(UserError, match="has no array test_images"):
        image_reader.load(str(broken))
