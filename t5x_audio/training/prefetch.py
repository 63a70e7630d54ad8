"""The next batches, read and placed on the devices by a thread while a step computes.

Each batch comes with the iterator's state right after it, so that a checkpoint continues behind
the last batch that was trained on, not behind the last that was read ahead.
"""

import copy
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

_END = object()


class Prefetch:
    """Iterates (placed batch, host batch, iterator state).

    Args:
      iterator: has `get_state()`, like Grain's dataset iterators.
      place: numpy batch -> arrays on devices.
      depth: batches to hold ready.

    What `iterator` or `place` raises comes out of the iteration. Close it when done.
    """

    def __init__(self, iterator, place: Callable[[Any], Any], depth: int = 2):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(iterator, place), daemon=True)
        self._thread.start()

    def _read(self, iterator, place):
        try:
            for batch in iterator:
                # A copy: some iterators change their state object in place.
                if not self._offer((place(batch), batch, copy.deepcopy(iterator.get_state()))):
                    return
            self._offer(_END)
        except BaseException as error:
            self._offer(error)

    def _offer(self, item) -> bool:
        """Whether there was room before `close`."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        item = self._queue.get()
        if item is _END:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops the thread."""
        self._stop.set()
        self._thread.join()
