"""Batches for language models from the task caches: shuffled, mixed, packed, resumable.

Choices:
- Grain over ArrayRecord: an epoch is a permutation of indices drawn from the seed, so shuffling is
  global, resuming costs nothing and the state is a few integers. No TensorFlow.
- A fixed number of readers makes the rows of a batch, so that their order is the same on any number
  of hosts (readers.py); the mixture may change at given batches without tokenising anew.
- Tasks are mixed by their share of *tokens*, as the published mixtures are stated (Step-Audio,
  arXiv 2502.11946, section 4), not by examples: rate / mean length.
- Examples are packed by best fit into rows of a static length. Each keeps its own segment id
  (1, 2, ...; 0 is padding) and positions from 0, so attention and positional bias see one example.
- An example of L tokens gives L-1 positions: token t predicts target t+1 at the target's weight.
- What is longer than a row is left out when the dataset is made, counted and announced.
"""

import functools
import glob
import itertools
import json
import logging
import numbers
import os
import zlib
from collections.abc import Collection, Iterator, Mapping

import grain
import numpy as np

from t5x_audio.data import readers as reading
from t5x_audio.data import records
from t5x_audio.data.soft_embeddings import SoftEmbeddings
from t5x_audio.errors import UserError

STATS_FILE = "stats.json"
_EFFICIENCY_BATCHES = 16
BatchShapes = dict[str, tuple[tuple[int, ...], np.dtype]]
"""Field of a batch -> its shape and type."""
# Read by the thread that asks: the training loop prefetches, a second pool would only contend.
_READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_log = logging.getLogger(__name__)


def read_stats(directory: str) -> dict:
    """stats.json of a task cache. UserError, naming the job that makes it, when there is none."""
    path = os.path.join(directory, STATS_FILE)
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        root, task = os.path.split(os.path.normpath(directory))
        found = ", ".join(sorted(os.path.basename(os.path.dirname(p)) for p in _all_stats(root)))
        raise UserError(
            f"no cache of task {task!r} in {root}, which has {found or 'none'}: "
            "run t5x_audio.cache_tasks or choose from these"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: delete it and run t5x_audio.cache_tasks") from error


def _all_stats(root: str) -> list[str]:
    return glob.glob(os.path.join(glob.escape(root), "*", STATS_FILE))


def lengths_path(directory: str, split: str) -> str:
    """int32[examples] .npy beside the shards: tokens of each example, in stored order."""
    return os.path.join(directory, f"{split}-lengths.npy")


class CachedTask:
    """The examples of one split of a task cache that fit a row, by index.

    Attributes:
      lengths: int32[N], tokens of each example that is kept.
      dropped: number of examples that are too long.
      stats: stats.json of the task.
    """

    def __init__(self, directory: str, split: str, sequence_length: int):
        """UserError when the cache is missing or damaged, or when nothing fits."""
        self.stats = read_stats(directory)
        self._records = records.open_records(directory, split)
        path = lengths_path(directory, split)
        try:
            lengths = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is missing or damaged: run t5x_audio.cache_tasks") from error
        if len(lengths) != len(self._records):
            raise UserError(f"{path} is not of these shards: run t5x_audio.cache_tasks again")
        fits = lengths <= sequence_length + 1
        self.dropped = int(len(lengths) - np.count_nonzero(fits))
        self._kept = np.flatnonzero(fits) if self.dropped else None
        self.lengths = lengths[self._kept] if self.dropped else lengths
        name = f"{os.path.basename(directory)}/{split}"
        if not len(self.lengths):
            raise UserError(f"{name}: no example fits sequence_length={sequence_length}")
        if self.dropped:
            share = 100 * self.dropped / len(lengths)
            _log.warning(
                "%s: left out %d of %d examples (%.1f %%), longer than sequence_length=%d",
                *(name, self.dropped, len(lengths), share, sequence_length),
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict:
        return self._records[index if self._kept is None else int(self._kept[index])]


class PackedLmDataset:
    """Endless packed batches over a mixture of tasks; see the module docstring.

    A batch: tokens, targets, segment_ids, positions int32[B, S]; weights float32[B, S]; and
    what soft_embeddings.py adds where there is room for soft tokens.
    `iter()` gives an iterator with `get_state()` and `set_state(state)`, which are exact.

    Attributes:
      mixture: task -> share of the tokens, before any change.
      dropped: task -> examples that are too long for a row.
      vocabulary_sizes: sizes of the vocabulary that the caches were made with.
    """

    def __init__(
        self,
        run_dir: str,
        mixture: Mapping[str, float],
        split: str = "train",
        sequence_length: int = 512,
        batch_size: int = 8,
        seed: int = 0,
        eval_split: str = "validation",
        max_eval_batches: int | None = None,
        open_rows: int = 64,
        readers: int = 1,
        changes: Mapping[int, Mapping[str, float]] | None = None,
        soft_tokens: int = 0,
        soft_width: int = 0,
    ):
        """Opens the caches under `<run_dir>/tasks`.

        Args:
          run_dir: the run.
          mixture: task -> share of the tokens; need not sum to 1, a share of 0 leaves a task out.
          split: what `iter()` reads.
          sequence_length: S.
          batch_size: B, rows, of all hosts together.
          seed: of the order of the examples.
          eval_split: what `eval_sets` reads; tasks without it are passed over.
          max_eval_batches: at most so many of them, of all tasks; None = all.
          open_rows: rows that a reader fills side by side (at least its rows of a batch): more of
            them leave less padding, but more examples are read before the first batch and again on
            resuming.
          readers: of which every host runs its share; a divisor of B and, for each to run one, no
            fewer than hosts. The order of the examples depends on it.
          changes: batch -> the mixture from that batch on.
          soft_tokens, soft_width: M and W, room for the embeddings of images in a row.

        Raises:
          UserError: a cache is missing or damaged, the rates are unusable, the tasks were cached
            with different vocabularies, or there is no room for a task's embeddings.
        """
        self._phases = _phases(mixture, changes or {})
        self.mixture = self._phases[0][1]
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self._root = os.path.join(run_dir, "tasks")
        self._eval_split, self._max_eval_batches = eval_split, max_eval_batches
        self._readers, share = readers, reading.share_of_rows(batch_size, readers)
        self._open_rows = -(-max(open_rows, share) // share) * share
        self._tasks = self._open(split)
        self.dropped = {name: task.dropped for name, task in self._tasks.items()}
        self.vocabulary_sizes = _common_vocabulary(self._tasks)
        self._pad = next(iter(self._tasks.values())).stats["pad"]
        self._soft = SoftEmbeddings(soft_tokens, soft_width).of_tasks(
            {name: task.stats for name, task in self._tasks.items()}
        )

    @staticmethod
    def batch_shapes(
        sequence_length: int = 512, batch_size: int = 8, soft_tokens: int = 0, soft_width: int = 0
    ) -> BatchShapes:
        """Of a batch with these settings of the constructor; no data is needed."""
        shapes = _shapes(("tokens", "targets", "segment_ids", "positions"), ("weights",),
                         batch_size, sequence_length)  # fmt: skip
        return shapes | SoftEmbeddings(soft_tokens, soft_width).shapes(batch_size, sequence_length)

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for _, mixture in self._phases for name in mixture))

    def _open(self, split: str) -> dict[str, CachedTask]:
        return {
            name: CachedTask(os.path.join(self._root, name), split, self.sequence_length)
            for name in self._names()
        }

    def _mixed(self, reader: int, phase: int) -> grain.MapDataset:
        """The examples of a reader in a phase."""
        datasets, rates = [], []
        begun = self._read_before(phase)
        for name, share in self._phases[phase][1].items():
            task = self._tasks[name]
            seed = zlib.crc32(f"{self.seed}/{name}".encode())
            examples = grain.MapDataset.source(task).seed(seed).shuffle().repeat()
            if self._readers > 1 or begun[name]:
                examples = examples[begun[name] + reader :: self._readers]
            datasets.append(examples)
            rates.append(share / _mean_length(task))
        weights = [rate / sum(rates) for rate in rates]
        return grain.MapDataset.mix(datasets, weights)

    def _read_before(self, phase: int) -> dict[str, int]:
        """Examples of each task that the phases before have used, by their shares: padding and
        the luck of packing leave a little to be read again, or left out.
        """
        begun = dict.fromkeys(self._tasks, 0)
        for (start, mixture), (end, _) in itertools.pairwise(self._phases[: phase + 1]):
            tokens = (end - start) * self.batch_size * self.sequence_length
            for name, share in mixture.items():
                used = tokens * share / sum(mixture.values())
                begun[name] += int(used / _mean_length(self._tasks[name]))
        return begun

    def _pack(self, examples: grain.MapDataset) -> grain.IterDataset:
        """Rows of length S, in an order that the seed and the examples determine."""
        rows = grain.experimental.BestFitPackIterDataset(
            examples.map(lambda e: _columns(e) | self._soft.columns(e)).to_iter_dataset(_READ),
            length_struct={"columns": self.sequence_length} | self._soft.lengths,
            padding_struct={"columns": np.array([self._pad, self._pad, 0], np.int32)}
            | self._soft.padding,
            num_packing_bins=self._open_rows,
            seed=self.seed,
        )
        return rows.map(self._fields)

    def _fields(self, row: dict) -> dict:
        named = _named(row)
        return named | self._soft.fields(row, named["tokens"])

    def __iter__(self) -> reading.GlobalBatches:
        return self.iterator()

    def iterator(self, rows: Collection[int] | None = None) -> reading.GlobalBatches:
        """The readers that make these rows of the batch; None for all."""
        share = reading.share_of_rows(self.batch_size, self._readers)

        def make(reader: int, phase: int) -> grain.DatasetIterator:
            packed = self._pack(self._mixed(reader, phase))
            return iter(packed.batch(share, drop_remainder=True))

        starts = [start for start, _ in self._phases]
        return reading.GlobalBatches(make, starts, self.batch_size, self._readers, rows)

    def eval_sets(self) -> dict[str, Iterator[dict[str, np.ndarray]]]:
        """Task -> every validation example once, packed; its last batch is filled with empty rows.

        Of `max_eval_batches` a task gets its part by tokens, but one batch at least.
        """
        root, split = self._root, self._eval_split
        tasks = {
            name: CachedTask(os.path.join(root, name), split, self.sequence_length)
            for name in self._names()
            if records.has_split(os.path.join(root, name), split)
        }
        tokens = {name: int(task.lengths.sum()) for name, task in tasks.items()}
        sets = {}
        for name, task in tasks.items():
            rows = iter(self._pack(grain.MapDataset.source(task)))
            batches = map(self._whole, _chunks(rows, self.batch_size))
            if (most := self._max_eval_batches) is not None:
                most = max(1, round(most * tokens[name] / sum(tokens.values())))
            sets[name] = itertools.islice(batches, most)
        return sets

    def _whole(self, rows: list[dict]) -> dict[str, np.ndarray]:
        empty = {key: np.zeros_like(value) for key, value in rows[0].items()}
        for key in ("tokens", "targets"):
            empty[key] += self._pad
        if "soft_index" in empty:
            empty["soft_index"] -= 1
        rows = rows + [empty] * (self.batch_size - len(rows))
        return {key: np.stack([row[key] for row in rows]) for key in empty}

    @functools.cached_property
    def packing_efficiency(self) -> float:
        """Share of the positions of the first batches that hold a token, in (0, 1]."""
        batches = itertools.islice(iter(self), _EFFICIENCY_BATCHES)
        return float(np.mean([np.mean(batch["segment_ids"] > 0) for batch in batches]))


def _mean_length(task: CachedTask) -> float:
    """Positions that an example takes."""
    return float(np.mean(task.lengths)) - 1


def _phases(mixture, changes) -> list[tuple[int, dict[str, float]]]:
    """(first batch, shares) of every phase. UserError for shares or batches that cannot be."""
    bad = [batch for batch in changes if int(batch) != batch or batch < 1]
    if bad:
        raise UserError(f"changes: {bad[0]!r} is no batch; a mixture changes at batch 1 or later")
    later = sorted((int(batch), positive_rates(shares)) for batch, shares in changes.items())
    return [(0, positive_rates(mixture)), *later]


def _shapes(integers, floats, *shape: int) -> BatchShapes:
    kinds = [(integers, np.dtype(np.int32)), (floats, np.dtype(np.float32))]
    return {name: (shape, dtype) for names, dtype in kinds for name in names}


class PreferenceDataset:
    """Endless batches of (chosen, rejected) answers, one example a row, for DPO.

    A batch: {chosen,rejected}_{tokens,targets,segment_ids,positions} int32[B, S] and
    {chosen,rejected}_weights float32[B, S], which are 0 on the prompt and on audio.
    """

    def __init__(
        self,
        run_dir: str,
        task: str = "aqaa_preference",
        split: str = "train",
        sequence_length: int = 512,
        batch_size: int = 4,
        seed: int = 0,
        eval_split: str = "validation",
        max_eval_batches: int | None = None,
    ):
        """Opens the cache `<run_dir>/tasks/<task>`; arguments and errors as `PackedLmDataset`."""
        self._directory = os.path.join(run_dir, "tasks", task)
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self._eval_split, self._max_eval_batches = eval_split, max_eval_batches
        self._task = CachedTask(self._directory, split, sequence_length)
        self.dropped = {task: self._task.dropped}
        self.vocabulary_sizes = self._task.stats["vocabulary"]
        self._row = functools.partial(
            _preference_row, length=sequence_length, pad=self._task.stats["pad"]
        )

    @staticmethod
    def batch_shapes(sequence_length: int = 512, batch_size: int = 4) -> BatchShapes:
        """Of a batch with these settings of the constructor; no data is needed."""
        answers = ("chosen", "rejected")
        fields = ("tokens", "targets", "segment_ids", "positions")
        return _shapes([f"{a}_{f}" for a in answers for f in fields],
                       [f"{a}_weights" for a in answers], batch_size, sequence_length)  # fmt: skip

    def __iter__(self) -> grain.DatasetIterator:
        examples = grain.MapDataset.source(self._task).seed(self.seed).shuffle().repeat()
        rows = examples.map(self._row).to_iter_dataset(_READ)
        return iter(rows.batch(self.batch_size, drop_remainder=True))

    def eval_sets(self) -> dict[str, Iterator[dict[str, np.ndarray]]]:
        """The task's name -> whole batches of validation pairs, each pair at most once."""
        if not records.has_split(self._directory, self._eval_split):
            return {}
        task = CachedTask(self._directory, self._eval_split, self.sequence_length)
        rows = (self._row(task[i]) for i in range(len(task)))
        batches = (
            {key: np.stack([row[key] for row in chunk]) for key in chunk[0]}
            for chunk in _chunks(rows, self.batch_size)
            if len(chunk) == self.batch_size
        )
        name = os.path.basename(self._directory)
        return {name: itertools.islice(batches, self._max_eval_batches)}


def _columns(example: dict) -> dict:
    """Token, target and the bits of the weight side by side, int32[L-1, 3], packed in one go."""
    tokens, weights = example["tokens"], example["weights"]
    bits = weights[1:].view(np.int32)
    return {"columns": np.stack([tokens[:-1], tokens[1:], bits], axis=1)}


def _named(row: dict) -> dict:
    tokens, targets, bits = np.ascontiguousarray(row["columns"].T)
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": bits.view(np.float32),
        "segment_ids": row["columns_segment_ids"],
        "positions": row["columns_positions"],
    }


def _preference_row(example: dict, length: int, pad: int) -> dict:
    row = {}
    for prefix in ("chosen_", "rejected_"):
        tokens, weights = example[prefix + "tokens"], example[prefix + "weights"]
        used = len(tokens) - 1
        for name, values, fill in (
            ("tokens", tokens[:-1], pad),
            ("targets", tokens[1:], pad),
            ("weights", weights[1:], 0),
            ("segment_ids", np.ones(used, np.int32), 0),
            ("positions", np.arange(used, dtype=np.int32), 0),
        ):
            row[prefix + name] = np.pad(values, (0, length - used), constant_values=fill)
    return row


def _chunks(rows: Iterator[dict], size: int) -> Iterator[list[dict]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def positive_rates(mixture: Mapping[str, float]) -> dict[str, float]:
    """The tasks of a mixture that have a share. UserError for one that cannot be mixed."""
    if not isinstance(mixture, Mapping):
        raise UserError(f"mixture {mixture!r}: give {{task: share}}")

    def usable(rate):
        return isinstance(rate, numbers.Real) and 0 <= rate < float("inf")

    bad = [name for name, rate in mixture.items() if not usable(rate)]
    if bad:
        raise UserError(f"mixture: the share of {bad[0]!r} is {mixture[bad[0]]}, not a number >= 0")
    rates = {name: float(rate) for name, rate in mixture.items() if rate > 0}
    if not rates:
        raise UserError(f"mixture {dict(mixture)}: the shares sum to zero")
    return rates


def _common_vocabulary(tasks: Mapping[str, CachedTask]) -> dict:
    first, *others = tasks
    sizes = tasks[first].stats["vocabulary"]
    for other in others:
        if tasks[other].stats["vocabulary"] != sizes:
            raise UserError(
                f"tasks {first!r} and {other!r} were cached with different vocabularies: "
                "run t5x_audio.cache_tasks again"
            )
    return sizes
