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
from jax.sharding import Mesh

from t5x_audio.errors import UserError
from t5x_audio.training import xla_flags

_FORMAT = b"t5x_audio executable 1\n"


def fingerprint(lowered, mesh: Mesh) -> str:
    """Of a lowered program, the devices it is for, the versions and flags that compile it."""
    flags = os.environ.get(xla_flags.VARIABLE, "")
    parts = (lowered.as_text(), mesh.devices.flat[0].platform, jax.__version__, flags)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def save(path: str | os.PathLike, compiled, lowered, mesh: Mesh) -> None:
    """Writes a compiled program; a file of that name is replaced only when all is written.

    ValueError while JAX's compilation cache is on (`plan` turns it off): of a program that came
    from there, a part of the functions would be missing in the file.
    """
    if jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir:
        raise ValueError("turn jax_enable_compilation_cache off before compiling what is saved")
    payload, _, _ = serialize_executable.serialize(compiled)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(_FORMAT)
        pickle.dump({"fingerprint": fingerprint(lowered, mesh), "payload": payload}, file)
    os.replace(temporary, path)


def load(path: str | os.PathLike, lowered, mesh: Mesh):
    """The compiled program of `save`, on the devices of this process.

    Args:
      path: of the file.
      lowered: the program that it must be of; batches of other shapes it does not take.
      mesh: where it runs.

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
    if content["fingerprint"] != fingerprint(lowered, mesh):
        raise UserError(
            f"{path}: compiled for another model, mesh, batch, device, jax or set of XLA flags; "
            "plan it again with the gin files of this run, or leave train.run.executable out"
        )
    return serialize_executable.deserialize_and_load(
        content["payload"], lowered.in_tree, lowered.out_tree
    )
