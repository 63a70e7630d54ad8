"""A compiled training step as a file: compiled by `plan` without a device, run by `train` on a pod.

The file holds what `jax.experimental.serialize_executable` makes of the step, and the fingerprint
of the program before compilation, so that it is used for that program alone: the same model, mesh,
batch, versions and flags of XLA. It is unpickled when it is read: read only your own.
"""

import hashlib
import os
import pickle
from pathlib import Path

import jax
from jax.experimental import serialize_executable

from t5x_audio.errors import UserError
from t5x_audio.training import xla_flags

_FORMAT = b"t5x_audio executable 1\n"


def fingerprint(lowered) -> str:
    """Of a lowered program, the versions and the flags that compile it."""
    parts = (lowered.as_text(), jax.__version__, os.environ.get(xla_flags.VARIABLE, ""))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def save(path: str | os.PathLike, compiled, lowered) -> None:
    """Writes a compiled program; a file of that name is replaced only when all is written."""
    payload, _, _ = serialize_executable.serialize(compiled)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(_FORMAT)
        pickle.dump({"fingerprint": fingerprint(lowered), "payload": payload}, file)
    os.replace(temporary, path)


def load(path: str | os.PathLike, lowered):
    """The compiled program of `save`, on the devices of this process.

    Args:
      path: of the file.
      lowered: the program that it must be of.

    Raises:
      UserError: no such file, one of something else, or of another program.
    """
    try:
        with Path(path).open("rb") as file:
            known = file.readline() == _FORMAT
            content = pickle.load(file) if known else None
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cannot be read ({error}); plan it again") from error
    if content is None:
        raise UserError(f"{path}: is no executable of `plan --save_executable`")
    if content["fingerprint"] != fingerprint(lowered):
        raise UserError(
            f"{path}: compiled for another program: model, mesh, batch, jax or XLA flags differ; "
            "plan it again with the gin files of this run, or leave train.run.executable out"
        )
    return serialize_executable.deserialize_and_load(
        content["payload"], lowered.in_tree, lowered.out_tree
    )
