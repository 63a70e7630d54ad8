"""Softmax attention of encoders and estimators: every query sees all valid keys.

Choices, measured on XLA CPU (two cores): a product with two batch axes runs at a third of the speed
of one with one, and scores that outgrow the cache are read from memory three times. So a CPU takes
the heads of all rows in one axis and, where their scores are many, a few heads at a time in a loop,
whose memory is used again and again. Elsewhere one einsum is left to the compiler. The platform is
that of the lowering. Softmax is float32 whatever the type of the operands.
"""

import math

import jax
import jax.numpy as jnp

_MASKED = -1e30
_AT_ONCE = 1 << 20  # scores, or those of _HEADS heads; of a longer sequence twice as many
_HEADS = 2


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    valid: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """softmax(query key / sqrt(D) + bias) value over valid keys.

    Args:
      query: [B, T, H, D].
      key, value: [B, S, H, D].
      valid: bool [B, S]; a row without a valid key gets the mean of all values.
      bias: scores to add, [B, H or 1, T, S].

    Returns:
      [B, T, H, D] in the type of `value`.
    """
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    masked = jnp.where(valid, 0.0, _MASKED)[:, None, None]
    arrays = (query, key, value, masked if bias is None else bias + masked)
    return jax.lax.platform_dependent(*arrays, cpu=_by_heads, default=_at_once)


def _at_once(query, key, value, bias):
    scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(value.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, value)


def _by_heads(query, key, value, bias):
    batch, length, heads, _ = query.shape
    size = length * key.shape[1]
    rows = batch * heads
    most = max(_AT_ONCE // size, math.gcd(rows, _HEADS))
    together = max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)
    queries, keys, values = (
        x.swapaxes(1, 2).reshape(rows // together, together, *x.shape[1::2])
        for x in (query, key, value)
    )
    bias = jnp.broadcast_to(bias, (batch, heads, *bias.shape[2:]))
    bias = bias.reshape(rows // together, together, *bias.shape[2:])

    def some(arrays):
        return _heads(*arrays)

    arrays = (queries, keys, values, bias)
    if together == rows:
        mixed = some(jax.tree.map(lambda x: x[0], arrays))
    else:
        mixed = jax.lax.map(some, arrays)
    return mixed.reshape(batch, heads, length, -1).swapaxes(1, 2)


def _heads(query, key, value, bias):
    """[N, T, D], [N, S, D] twice, [N, T or 1, S] -> [N, T, D], a block of queries at a time."""
    length = query.shape[1]
    count = -(-len(query) * length * key.shape[1] // (2 * _AT_ONCE))
    block = -(-length // count)
    return jnp.concatenate(
        [
            _queries(
                query[:, start : start + block],
                key,
                value,
                bias if bias.shape[1] == 1 else bias[:, start : start + block],
            )
            for start in range(0, length, block)
        ],
        axis=1,
    )


def _queries(query, key, value, bias):
    scores = jnp.einsum("ntd,nsd->nts", query, key, preferred_element_type=jnp.float32) + bias
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    mixed = jnp.einsum(
        "nts,nsd->ntd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    return (mixed / total).astype(value.dtype)
