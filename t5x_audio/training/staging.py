"""Models put together array by array.

Arrays are files in the memory map until all are written; then they become a checkpoint, for which
Orbax takes memory of twice their size. Whatever goes wrong before leaves nothing behind.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from t5x_audio.errors import UserError
from t5x_audio.training import checkpoints

_FOLDER = ".staging"


@contextlib.contextmanager
def staged_model(
    model_dir: Path, config: Any, shapes: dict[str, tuple[int, ...]], types: dict[str, np.dtype]
) -> Iterator[dict[str, np.ndarray]]:
    """Parameters to be filled in; on leaving they are the model in `model_dir`.

    Args:
      model_dir: where it is saved; made if it is not there.
      config: of the model.
      shapes, types: by name of parameter ('layers/query').

    Raises:
      UserError: the disk cannot hold them.
    """
    existed = model_dir.exists()
    folder = model_dir / _FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        _require_space(folder, shapes, types)
        arrays = {
            name: np.memmap(folder / name.replace("/", "."), types[name], "w+", shape=shape)
            for name, shape in shapes.items()
        }
        yield arrays
        params = _nested({name: np.asarray(array) for name, array in arrays.items()})
        checkpoints.save_states(model_dir, {"model": config}, {"model": (params, {})})
    except BaseException:
        if not existed:
            shutil.rmtree(model_dir, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_space(folder: Path, shapes, types) -> None:
    """The files are sparse until they are written, and the checkpoint is a second copy."""
    size = sum(
        int(np.prod(shape, dtype=np.int64)) * types[n].itemsize for n, shape in shapes.items()
    )
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise UserError(
            f"{folder.parent}: needs {2 * size / 2**30:.1f} GiB of disk for a while, but only "
            f"{free / 2**30:.1f} are free"
        )


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """'a/b' -> value as {'a': {'b': value}}."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree
