"""What a decoder remembers: keys and values of the tokens so far, as they are or in 8 bits.

`int8` keeps a float32 scale for each token and group beside its integers (symmetric, rounded to
nearest): a token is quantised once, when it is written, and nothing before it changes. At 8 bits
scales per token do for keys as for values; fewer bits would want them per channel for keys (KIVI,
arXiv 2402.02750, section 3). A layer's slots are widened when they are read, one layer at a time.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError

KINDS = ("int8",)


@flax.struct.dataclass
class KVCache:
    """What a decoder remembers of T slots of B rows.

    Slots are filled from the left, all rows alike: a row of fewer tokens has padding (segment 0)
    among its slots. Per layer and stacked [layers, ...] or a tuple over layers, as the model is.
    In a tuple a single row's axis is left out: XLA's CPU compiler would drop it to read the cache,
    and then writes to a copy instead of in place.

    Attributes:
      keys, values: [B, kv_heads, T, head_dim] of every layer, in the compute type, or `Int8Slots`.
      positions, segment_ids: int32[B, T].
      length: int32 [], slots filled.
    """

    keys: Any
    values: Any
    positions: jax.Array
    segment_ids: jax.Array
    length: jax.Array


@flax.struct.dataclass
class Int8Slots:
    """Keys or values: int8 [..., T, head_dim] times float32 [..., T, 1]."""

    integers: jax.Array
    scales: jax.Array


def require_kind(kind: str | None) -> None:
    """UserError unless a cache can be kept so."""
    if kind is not None and kind not in KINDS:
        raise UserError(f"cache={kind!r}: use None or {', '.join(KINDS)}")


def empty(shape: tuple[int, ...], dtype, kind: str | None):
    """Slots [..., T, head_dim] of zeros."""
    if kind is None:
        return jnp.zeros(shape, dtype)
    return Int8Slots(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32))


def written(slots, new: jax.Array, index, slot):
    """A layer's slots, or layer `index` of a stack, with `new` [B, K, S, D] from `slot` on."""
    if isinstance(slots, Int8Slots):
        parts = _quantized(new)
        return jax.tree.map(lambda old, part: written(old, part, index, slot), slots, parts)
    if index is None:
        streams = slots.shape[:-2]
        new = new.reshape(*streams, *new.shape[-2:])
        return jax.lax.dynamic_update_slice(slots, new, (*(0 for _ in streams), slot, 0))
    return jax.lax.dynamic_update_slice(slots, new[None], (index, 0, 0, slot, 0))


def read(slots, batch: int, index, dtype) -> jax.Array:
    """[B, K, T, D] of a layer's slots, or of layer `index` of a stack."""
    if isinstance(slots, Int8Slots):
        integers, scales = (
            read(part, batch, index, part.dtype) for part in (slots.integers, slots.scales)
        )
        return (integers * scales).astype(dtype)
    layer = slots if index is None else jax.lax.dynamic_index_in_dim(slots, index, 0, False)
    return layer.reshape(batch, -1, *layer.shape[-2:])


def _quantized(new: jax.Array) -> Int8Slots:
    wide = new.astype(jnp.float32)
    largest = jnp.abs(wide).max(-1, keepdims=True)
    scales = jnp.where(largest > 0, largest, 1.0) / 127.0
    return Int8Slots(jnp.round(wide / scales).astype(jnp.int8), scales)
