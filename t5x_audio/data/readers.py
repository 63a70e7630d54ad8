"""One order of batches for any number of hosts.

A global batch is put together from the rows of a fixed number of *readers*, each of which reads a
share of the examples of its own. A host runs the readers whose rows its devices want, be it all of
them or one: which example stands in which row depends on the number of readers alone, and so does
the state, {reader: position}, of which every host takes its part.

What is read may change at given batches: each such phase is an iterator of its own, which begins
where the phases before have got to.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import grain
import numpy as np

from t5x_audio.errors import UserError

Batch = dict[str, np.ndarray]


def share_of_rows(batch_size: int, readers: int) -> int:
    """Rows of a reader. UserError where readers do not divide the batch."""
    if readers < 1 or batch_size % readers:
        raise UserError(
            f"readers={readers} does not divide batch_size={batch_size}: give a divisor of it, at "
            "least one reader a host"
        )
    return batch_size // readers


class GlobalBatches:
    """Iterates the rows of global batches that some readers make.

    Args:
      make: (reader, phase) -> Grain's iterator of that reader's part of the batches of a phase.
      starts: batch at which each phase begins, rising, the first at 0.
      batch_size, readers: of the whole.
      rows: rows of the global batch that are wanted; None for all. UserError if they are fewer than
        those of a reader.

    Attributes:
      rows: int[n], the rows of the global batch that are in a batch here: whole readers.
      batch_size: rows of a global batch.
    """

    def __init__(
        self,
        make: Callable[[int, int], grain.DatasetIterator],
        starts: Sequence[int],
        batch_size: int,
        readers: int,
        rows: Collection[int] | None = None,
    ):
        share = share_of_rows(batch_size, readers)
        wanted = range(batch_size) if rows is None else rows
        if len(set(wanted)) * readers < batch_size:
            raise UserError(
                f"readers={readers}: a host wants {len(set(wanted))} rows of batch_size="
                f"{batch_size}, a reader makes {share}, most for nothing; give as many readers as "
                "hosts"
            )
        chosen = sorted({row // share for row in wanted})
        self.batch_size = batch_size
        self.rows = np.concatenate([np.arange(r * share, (r + 1) * share) for r in chosen])
        self._readers = {reader: _Phases(reader, make, tuple(starts)) for reader in chosen}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        parts = [next(reader) for reader in self._readers.values()]
        if len(parts) == 1:
            return parts[0]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def get_state(self) -> dict[str, dict]:
        """{reader: its position}, of the readers that run here."""
        return {str(number): reader.get_state() for number, reader in self._readers.items()}

    def set_state(self, state: dict[str, dict]) -> None:
        """Goes on from the states of all readers. UserError if some are missing."""
        missing = [number for number in self._readers if str(number) not in state]
        if missing:
            raise UserError(
                f"the checkpoint has the positions of {len(state)} readers, none of reader "
                f"{missing[0]}: go on with as many readers as before"
            )
        for number, reader in self._readers.items():
            reader.set_state(state[str(number)])


class _Phases:
    """The batches of one reader through all phases."""

    def __init__(self, reader, make, starts: tuple[int, ...]):
        self._reader, self._make, self._starts = reader, make, starts
        self._batch, self._phase, self._iterator = 0, -1, None

    def _enter(self) -> None:
        """Makes the iterator of the phase to which the next batch belongs, if it is another."""
        phase = sum(start <= self._batch for start in self._starts) - 1
        if phase != self._phase:
            self._iterator, self._phase = self._make(self._reader, phase), phase

    def __next__(self) -> Batch:
        self._enter()
        batch = next(self._iterator)
        self._batch += 1
        return batch

    def get_state(self) -> dict:
        self._enter()
        return {"batch": self._batch, "phase": self._iterator.get_state()}

    def set_state(self, state: dict) -> None:
        self._batch, self._phase = int(state["batch"]), -1
        self._enter()
        self._iterator.set_state(state["phase"])
