"""Arrays of a checkpoint that are never whole in memory: written and read part by part.

Orbax copies an array before it writes it, and reads it whole. Here it asks a handler of ours, which
goes through TensorStore with one part after another; what lies on disk is what Orbax would have
written in chunks of a part each. Small arrays are written together: each commit leaves a new list
of all arrays on the disk, which for a model of hundreds is more than the arrays.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore


@dataclasses.dataclass(frozen=True)
class PartwiseArray:
    """An array known by its parts; iteration yields (first row, part).

    Attributes:
      shape, dtype: of the whole.
      rows: of the first axis in each part; the last one may have fewer.
      read: first row of a part -> the part, [rows, ...].
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int
    read: Callable[[int], np.ndarray]

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        if not self.shape:
            yield 0, self.read(0)
            return
        for start in range(0, self.shape[0], self.rows):
            yield start, self.read(start)

    def whole(self) -> np.ndarray:
        """All parts together."""
        if not self.shape or self.rows >= self.shape[0]:
            return self.read(0)
        array = np.empty(self.shape, self.dtype)
        for start, part in self:
            array[start : start + len(part)] = part
        return array

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


_TOGETHER = 2**25  # bytes of small arrays that wait in memory for one commit


class _Handler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of PartwiseArrays, which are numpy arrays to any other reader."""

    async def serialize(self, values, infos, args=None):
        """Starts to write the arrays, one after another."""
        writing = self._write(values, infos)
        return [ocp.future.CommitFutureAwaitingContractedSignals(writing, name="partwise_arrays")]

    async def _write(self, values, infos):
        some, size = tensorstore.Transaction(), 0
        for value, info in zip(values, infos, strict=True):
            together = value.nbytes <= _TOGETHER
            if together and size + value.nbytes > _TOGETHER:
                await some.commit_async()
                some, size = tensorstore.Transaction(), 0
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=value.shape,
                local_shape=(value.rows, *value.shape[1:]) if value.shape else (),
                dtype=value.dtype,
                process_index=jax.process_index(),
            )
            store = await tensorstore.open(
                spec,
                create=True,
                open=True,
                context=info.ts_context,
                transaction=some if together else None,
            )
            size += value.nbytes if together else 0
            for start, part in value:
                rows = store[start : start + len(part)] if value.shape else store
                await rows.write(part)
        await some.commit_async()

    async def deserialize(self, infos, args=None):
        """Opens the arrays; a part is a row of TensorStore's chunks."""
        return [_opened(await self._open(info)) for info in infos]

    async def _open(self, info):
        spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
        return await tensorstore.open(spec, context=info.ts_context)


def _opened(store) -> PartwiseArray:
    rows = store.chunk_layout.read_chunk.shape[0] if store.shape else 1

    def read(start: int) -> np.ndarray:
        part = store[start : min(start + rows, store.shape[0])] if store.shape else store
        return part.read().result()

    return PartwiseArray(tuple(store.shape), store.dtype.numpy_dtype, rows, read)


def handler() -> ocp.PyTreeCheckpointHandler:
    """For a flat tree of PartwiseArrays and nothing else."""
    registry = ocp.type_handlers.create_type_handler_registry((PartwiseArray, _Handler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
