"""Batches of labelled images, from TensorFlow Datasets by name or from an .npz file.

Choices: the whole set is held in memory as uint8 (CIFAR is 180 MB). As in audio_reader.py, item i
of the source is batch i of an endless plan, so that the state of an iterator is one integer: each
epoch is a permutation drawn from (seed, epoch), and what does not fill a batch is left out.
Augmentation is the objective's. TensorFlow is loaded only where a set has to be prepared by it.
"""

import dataclasses
import functools
import os
import sys
import zipfile
from collections.abc import Iterator

import grain
import numpy as np

from t5x_audio.errors import UserError

_READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # the loop prefetches
_ARRAYS = tuple(f"{split}_{kind}" for split in ("train", "test") for kind in ("images", "labels"))


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Attributes: images uint8 [N, H, W, 3] and labels int32 [N] of each split."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def num_classes(self) -> int:
        """One more than the largest label of training."""
        return int(self.train_labels.max()) + 1


@functools.lru_cache(maxsize=2)
def load(source: str, data_dir: str | None = None) -> ImageSet:
    """The images of `source`.

    Args:
      source: a file .npz with train_images, train_labels, test_images and test_labels, or the name
        of a TFDS set with splits train and test ('cifar10', 'cifar100').
      data_dir: where TFDS keeps its sets; None = its default.

    UserError if there is no such file or set, or its arrays are not what they should be.
    """
    arrays = _read_npz(source) if source.endswith(".npz") else _read_tfds(source, data_dir)
    for name in _ARRAYS:
        array, images = arrays[name], name.endswith("images")
        right = array.ndim == (4 if images else 1) and len(array) > 0
        right &= array.dtype == np.uint8 and array.shape[-1] == 3 if images else True
        if not right:
            want = "uint8 [N, H, W, 3]" if images else "whole numbers [N]"
            raise UserError(f"{source}: {name} is {array.dtype} {array.shape}, not {want}")
    for split in ("train", "test"):
        images, labels = (len(arrays[f"{split}_{kind}"]) for kind in ("images", "labels"))
        if images != labels:
            raise UserError(f"{source}: {images} {split}_images, but {labels} {split}_labels")
    labels = {n: a.astype(np.int32) for n, a in arrays.items() if n.endswith("labels")}
    return ImageSet(**(arrays | labels))


def _read_npz(path: str) -> dict[str, np.ndarray]:
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        with np.load(path) as file:
            missing = [name for name in _ARRAYS if name not in file]
            if missing:
                raise UserError(f"{path}: has no array {missing[0]}; it needs {', '.join(_ARRAYS)}")
            return {name: file[name] for name in _ARRAYS}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: unreadable ({error})") from error


def _read_tfds(name: str, data_dir: str | None) -> dict[str, np.ndarray]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"{name}: tensorflow_datasets is not installed; give an .npz") from error
    try:
        sets = tfds.as_numpy(tfds.load(name, data_dir=data_dir, batch_size=-1))
        return {
            f"{split}_{kind}s": sets[split][kind]
            for split in ("train", "test")
            for kind in ("image", "label")
        }
    except Exception as error:  # TFDS has no common error class; it downloads, too.
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{name}: TFDS cannot give it ({line}); give an .npz or its name"
        ) from error


class ImageBatches:
    """Endless batches: images uint8 [B, H, W, 3], labels int32 [B]."""

    def __init__(
        self,
        source: str,
        batch_size: int = 512,
        seed: int = 0,
        data_dir: str | None = None,
        max_eval_batches: int | None = 4,
    ):
        """Reads the set; see `load`. UserError if it does not fill a batch.

        Args:
          source, data_dir: see `load`.
          batch_size: images of a batch.
          seed: of the order.
          max_eval_batches: batches of the split test that a validation takes; None = all.
        """
        self.images, self.batch_size, self.seed = load(source, data_dir), batch_size, seed
        self.max_eval_batches = max_eval_batches
        self.batches_per_epoch = len(self.images.train_images) // batch_size
        if not self.batches_per_epoch:
            raise UserError(
                f"ImageBatches.batch_size={batch_size}: {source} has but "
                f"{len(self.images.train_images)} images to train on"
            )

    def __iter__(self) -> grain.DatasetIterator:
        return iter(grain.MapDataset.source(_Places(self)).to_iter_dataset(_READ))

    def batch(self, place: int) -> dict[str, np.ndarray]:
        """Training batch `place`: the same whenever it is asked for."""
        epoch, index = divmod(place, self.batches_per_epoch)
        chosen = self._order(epoch)[index * self.batch_size :][: self.batch_size]
        train = self.images.train_images, self.images.train_labels
        return {"images": train[0][chosen], "labels": train[1][chosen]}

    def _order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        return rng.permutation(len(self.images.train_images))

    def eval_sets(self) -> dict[str, Iterator[dict[str, np.ndarray]]]:
        """'test' -> its whole batches, in order; {} if it does not fill one."""
        count = len(self.images.test_images) // self.batch_size
        if not count:
            return {}
        count = count if self.max_eval_batches is None else min(count, self.max_eval_batches)
        return {"test": self._test(count)}

    def _test(self, count: int):
        for start in range(0, count * self.batch_size, self.batch_size):
            chosen = slice(start, start + self.batch_size)
            images, labels = self.images.test_images[chosen], self.images.test_labels[chosen]
            yield {"images": images, "labels": labels}


class _Places:
    """A source for Grain: item i is batch i."""

    def __init__(self, dataset: ImageBatches):
        self._dataset = dataset

    def __len__(self) -> int:
        return min(sys.maxsize, 2**40)

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        return self._dataset.batch(int(place))
