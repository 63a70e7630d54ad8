"""The state of a data iterator as JSON: one for the whole run, valid on any number of hosts."""

import base64
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def of_all_hosts(state) -> Any:
    """JSON values of an iterator's state, put together from what every host has of it.

    Args:
      state: bytes, or nested dicts and lists of numbers, strings and arrays. Hosts may have other
        entries of a dict: readers of their own.
    """
    encoded = _encode(state)
    if jax.process_count() == 1 or not isinstance(state, dict):
        return encoded
    text = np.frombuffer(json.dumps(encoded["dict"]).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, int(sizes.max()) - len(text)))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    entries = {}
    for row, size in zip(rows, sizes, strict=True):
        entries |= dict(json.loads(row[:size].tobytes()))
    return {"dict": sorted(entries.items())}


def _encode(state) -> Any:
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    if isinstance(state, dict):
        return {"dict": [[key, _encode(value)] for key, value in state.items()]}
    if isinstance(state, (list, tuple)):
        return {"list": [_encode(value) for value in state]}
    if isinstance(state, np.ndarray):
        array = np.ascontiguousarray(state)
        data = base64.b64encode(array.tobytes()).decode()
        return {"array": data, "dtype": array.dtype.str, "shape": list(array.shape)}
    return state.item() if isinstance(state, np.generic) else state


def decode(value) -> Any:
    """The state that `of_all_hosts` made these JSON values of."""
    if not isinstance(value, dict):
        return value
    if "base64" in value:
        return base64.b64decode(value["base64"])
    if "dict" in value:
        return {key: decode(item) for key, item in value["dict"]}
    if "list" in value:
        return [decode(item) for item in value["list"]]
    data = base64.b64decode(value["array"])
    return np.frombuffer(data, value["dtype"]).reshape(value["shape"]).copy()
