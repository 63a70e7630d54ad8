"""Checksums of a checkpoint: bits that change on the disk do not go unseen.

TensorStore checks its indices, not the chunks of the arrays: a flipped bit of a weight is another
weight. Here the words of each array are summed modulo 2^32, where the array is: nothing is copied,
and the sum is the same on any mesh. A change of one word is always found, of several all but once
in 2^32.
"""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp

FOLDER = "checksums"
"""Item of a checkpoint that holds those of the other items, as JSON: {item: {name: checksum}}."""


def of_items(items: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, int]]:
    """{item: {name: checksum}} of {item: {name: array}}."""
    sums = jax.device_get(_sums(items))
    return {item: {n: int(x) for n, x in totals.items()} for item, totals in sums.items()}


def of_json(value) -> dict[str, int]:
    """The checksum of an item that is JSON."""
    return {"json": zlib.crc32(json.dumps(value, sort_keys=True).encode())}


def difference(item: Path, found: dict[str, int]) -> str | None:
    """What is wrong with an item of a checkpoint in which these checksums were found; or None.

    A checkpoint without checksums is taken as it is.
    """
    folder = item.parent / FOLDER
    if not folder.exists():
        return None
    try:
        stored = json.loads((folder / "metadata").read_text())[item.name]
        changed = [name for name, value in found.items() if stored[name] != value]
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {FOLDER} are unreadable"
    return f"{changed[0]} is not what was saved" if changed else None


@jax.jit
def _sums(arrays):
    return jax.tree.map(lambda x: jnp.sum(_words(x).astype(jnp.uint32)), arrays)


def _words(x):
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return jax.lax.bitcast_convert_type(x, f"uint{min(jnp.finfo(x.dtype).bits, 32)}")
