"""Which clips go into which batch: lengths sorted into a few static shapes, by arithmetic alone.

A compiled step wants few shapes and little padding, so clips are put into buckets by length and a
batch is drawn from one bucket, with so many rows that the samples of a batch are about constant.
The batch at place i follows from (seed, i) without any history: an epoch is a permutation drawn
from the seed and the epoch's number, so resuming at any place costs nothing.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from t5x_audio.errors import UserError


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Clips of similar length.

    Attributes:
      samples: length T that its batches are padded to.
      rows: clips a batch.
      members: indices of its clips.
    """

    samples: int
    rows: int
    members: np.ndarray


def make_buckets(
    lengths: Sequence[int],
    bucket_samples: Sequence[int],
    samples_per_batch: int,
    rows_multiple_of: int = 1,
) -> list[Bucket]:
    """Sorts clips into buckets; empty buckets and clips longer than the last are left out.

    Args:
      lengths: samples of each clip.
      bucket_samples: padded lengths, rising.
      samples_per_batch: about how many samples a batch has, padding included.
      rows_multiple_of: rows of a batch divide evenly over so many devices.

    Raises:
      UserError: the bucket lengths do not rise, or no clip fits.
    """
    edges = np.asarray(bucket_samples)
    if not len(edges) or edges[0] <= 0 or np.any(np.diff(edges) <= 0):
        raise UserError(f"bucket lengths must rise from above 0, not {tuple(bucket_samples)}")
    place = np.searchsorted(edges, np.asarray(lengths, np.int64), side="left")
    buckets = []
    for i, samples in enumerate(map(int, edges)):
        members = np.flatnonzero(place == i)
        rows = samples_per_batch // samples // rows_multiple_of * rows_multiple_of
        if len(members):
            buckets.append(Bucket(samples, max(rows, rows_multiple_of), members))
    if not buckets:
        raise UserError(f"no clip fits into {edges[-1]} samples; raise the longest bucket")
    return buckets


class BatchPlan:
    """Batches without end over buckets, each a pure function of its place.

    Every clip comes once an epoch; the last batch of a bucket is filled up with clips from the
    start of that bucket's order. Buckets are mixed in random order.
    """

    def __init__(self, buckets: Sequence[Bucket], seed: int = 0):
        self.buckets, self.seed = list(buckets), seed
        counts = [-(-len(bucket.members) // bucket.rows) for bucket in self.buckets]
        self._bucket_of = np.repeat(np.arange(len(counts)), counts)
        self._place_of = np.concatenate([np.arange(count) for count in counts])

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every clip comes at least once."""
        return len(self._bucket_of)

    def __getitem__(self, place: int) -> tuple[Bucket, np.ndarray]:
        """The bucket and the clip indices [rows] of batch `place` >= 0."""
        epoch, within = divmod(int(place), self.batches_per_epoch)
        order, members = self._epoch(epoch)
        return self._batch(order[within], members)

    def ordered(self, place: int) -> tuple[Bucket, np.ndarray]:
        """Batch `place` < batches_per_epoch of the unshuffled order."""
        return self._batch(place, [bucket.members for bucket in self.buckets])

    def _batch(self, batch: int, members: list[np.ndarray]) -> tuple[Bucket, np.ndarray]:
        bucket = self.buckets[self._bucket_of[batch]]
        first = self._place_of[batch] * bucket.rows
        chosen = members[self._bucket_of[batch]]
        return bucket, np.take(chosen, np.arange(first, first + bucket.rows), mode="wrap")

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a plan lives as long as the job
    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        rng = np.random.default_rng([self.seed, epoch])
        members = [rng.permutation(bucket.members) for bucket in self.buckets]
        return rng.permutation(self.batches_per_epoch), members
