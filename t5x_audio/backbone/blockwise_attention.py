"""Causal grouped-query attention with square-root ALiBi by XLA alone, in linear memory.

One path for training, prefill and decoding. A block of queries meets only the keys that can precede
it, its scores live once at a time, and the backward pass computes them again from the log-sum-exp
(arXiv 2205.14135).
Choices, measured on XLA CPU against the plain softmax(QK + bias)V and its automatic gradient (2.3
times slower):
- heads of a group are folded into the rows of one matrix product per group, so keys are never
  repeated;
- products whose *left* operand is contracted over its rows run at half speed: gradients of keys and
  values are formed transposed, [head_dim, keys], so that the small operand is the left one;
- the table of sqrt(i - j) is shared by all heads and kept out of their fusions (a square root costs
  more than a load).
Softmax is float32 whatever the type of the operands.
"""

import functools

import jax
import jax.numpy as jnp

from t5x_audio.backbone.alibi import sqrt_distance

_MAX_BLOCKS = 16


def _blocks(query, key, block_size, same_tokens):
    """(first query, behind the last query, keys that matter) of every block."""
    length = query.shape[3]
    block_size = max(block_size, -(-length // _MAX_BLOCKS))
    for start in range(0, length, block_size):
        stop = min(start + block_size, length)
        yield start, stop, stop if same_tokens else key.shape[2]


def _scores(query, key, places, slopes, start, stop, keys):
    """float32[B, K, G, n, keys] of queries start..stop, masked by -inf."""
    batch, groups, heads, _, _ = query.shape
    query_positions, query_segments, key_positions, key_segments = places
    distance = sqrt_distance(
        query_positions[:, start:stop],
        key_positions[:, :keys],
        query_segments[:, start:stop],
        key_segments[:, :keys],
        biased=slopes is not None,
    )
    distance = jax.lax.optimization_barrier(distance)[:, None, None]
    product = jnp.einsum(
        "bkqd,bktd->bkqt",
        _fold(query[:, :, :, start:stop]),
        key[:, :, :keys],
        preferred_element_type=jnp.float32,
    ).reshape(batch, groups, heads, stop - start, keys)
    if slopes is None:
        return product - distance
    slope = jnp.asarray(slopes, jnp.float32).reshape(1, groups, heads, 1, 1)
    return product - slope * distance


def _fold(x):
    """[B, K, G, n, C] -> [B, K, G * n, C]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def forward(query, key, value, places, slopes, block_size, same_tokens):
    """Attention of scaled queries.

    Args:
      query: [B, K, G, S, D], already scaled.
      key, value: [B, K, T, D].
      places: positions and segment ids of the queries, int32[B, S] each, then of the keys.
      slopes, same_tokens: see `attention.attention`.
      block_size: queries a block; long sequences take longer ones, at most 16 of them.

    Returns:
      (output [B, K, G, S, D] in the type of `value`, log-sum-exp float32[B, K, G, S]).
    """
    outputs, log_sums = [], []
    for start, stop, keys in _blocks(query, key, block_size, same_tokens):
        scores = _scores(query, key, places, slopes, start, stop, keys)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        mixed = jnp.einsum(
            "bkqt,bktd->bkqd",
            _fold(weights).astype(value.dtype),
            value[:, :, :keys],
            preferred_element_type=jnp.float32,
        ).reshape(*scores.shape[:-1], -1)
        outputs.append((mixed / total).astype(value.dtype))
        log_sums.append(top + jnp.log(total))
    return jnp.concatenate(outputs, 3), jnp.concatenate(log_sums, 3)[..., 0]


def backward(
    query, key, value, places, log_sum, correction, d_output, slopes, block_size, same_tokens
):  # fmt: skip
    """Gradients of `forward`'s output.

    Args:
      log_sum: of `forward`.
      correction: float32[B, K, G, S], the sum over D of output * d_output.
      d_output: [B, K, G, S, D].

    The other arguments are those of `forward`.

    Returns:
      (d_query, d_key, d_value) in the shapes and types of query, key and value.
    """
    d_query = []
    d_key = jnp.zeros(key.swapaxes(2, 3).shape, jnp.float32)  # [B, K, D, T], see above
    d_value = jnp.zeros_like(d_key)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for start, stop, keys in _blocks(query, key, block_size, same_tokens):
        rows = slice(start, stop)
        scores = _scores(query, key, places, slopes, start, stop, keys)
        weights = jnp.exp(scores - log_sum[:, :, :, rows, None])
        d_out = _fold(d_output[:, :, :, rows])
        d_weights = product("bkqd,bktd->bkqt", d_out, value[:, :, :keys]).reshape(weights.shape)
        d_scores = _fold(weights * (d_weights - correction[:, :, :, rows, None])).astype(key.dtype)
        weights = _fold(weights).astype(value.dtype)
        d_value = d_value.at[..., :keys].add(product("bkqd,bkqt->bkdt", d_out, weights))
        block = product("bkqt,bktd->bkqd", d_scores, key[:, :, :keys])
        d_query.append(block.reshape(query[:, :, :, rows].shape).astype(query.dtype))
        folded = _fold(query[:, :, :, rows])
        d_key = d_key.at[..., :keys].add(product("bkqd,bkqt->bkdt", folded, d_scores))
    d_key, d_value = (x.swapaxes(2, 3).astype(key.dtype) for x in (d_key, d_value))
    return jnp.concatenate(d_query, 3), d_key, d_value
