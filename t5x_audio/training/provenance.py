"""What ran: the parameter table and the versions, written beside a run's output."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import jax
from flax import nnx

import t5x_audio

_PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("gin-config", "seqio", "tensorflow", "sentencepiece"),
)


def parameter_table(params) -> str:
    """One line per parameter: name, shape, size, logical axes, sharding; then the total.

    Args:
      params: {model name: nnx.State of arrays}, as in a TrainState.
    """
    rows, total = [], 0
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    for path, node in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_variable)[0]:
        for leaf in jax.tree.leaves(node):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            axes = ", ".join(str(axis) for axis in getattr(node, "logical_axes", None) or ())
            spec = getattr(leaf.sharding, "spec", None)
            rows.append((name, str(leaf.shape), f"{leaf.size:,}", f"({axes})", str(spec)))
            total += leaf.size
    header = ("parameter", "shape", "size", "logical axes", "sharding")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(t.ljust(w) for t, w in zip(r, widths, strict=True)) for r in [header, *rows]]
    return "\n".join(line.rstrip() for line in [*lines, f"total: {total:,} parameters"]) + "\n"


def versions() -> dict[str, str]:
    """Versions of what computes, and on what."""
    found = {"t5x_audio": t5x_audio.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    found["devices"] = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    return found


def write(directory: str | os.PathLike, state) -> None:
    """<directory>/model-info.txt and versions.json for a TrainState."""
    (Path(directory) / "model-info.txt").write_text(parameter_table(state.params))
    (Path(directory) / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
