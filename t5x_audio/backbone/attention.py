"""Causal grouped-query attention with square-root ALiBi, by blocks of queries, in linear memory.

One function for training, prefill and decoding. A block of queries meets only the keys that can
precede it, its scores live once at a time, and the backward pass computes them again from the
log-sum-exp (arXiv 2205.14135).
Choices, measured on XLA CPU against the plain softmax(QK + bias)V and its automatic gradient (2.3
times slower):
- heads of a group are folded into the rows of one matrix product per group, so keys are never
  repeated;
- products whose *left* operand is contracted over its rows run at half speed: gradients of keys and
  values are formed transposed, [head_dim, keys], so that the small operand is the left one;
- the table of sqrt(i - j) is shared by all heads and kept out of their fusions (a square root costs
  more than a load).
Softmax is float32 whatever the type of the operands. Equations: modeling_step1.py of
stepfun-ai/Step-Audio-Chat.
"""

import functools

import jax
import jax.numpy as jnp

from t5x_audio.backbone.alibi import sqrt_distance

_MAX_BLOCKS = 16


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_place: tuple[jax.Array, jax.Array],
    key_place: tuple[jax.Array, jax.Array],
    slopes: tuple[float, ...],
    block_size: int = 128,
    same_tokens: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(D) - slope sqrt(i - j)) v over the keys a query may see.

    Args:
      query: [B, K, G, S, D], K groups of G heads each.
      key, value: [B, K, T, D].
      query_place: (positions, segment ids), int32[B, S] each.
      key_place: the same of the keys, int32[B, T].
      slopes: of the K * G heads, groups outermost.
      block_size: queries a block; long sequences take longer blocks, at most 16 of them.
      same_tokens: queries and keys are the same tokens in order of position inside each segment,
        so keys behind a block's last query can be left out.

    Returns:
      [B, K, G, S, D] in the type of `value`. A query that sees no key at all is not allowed;
      padding sees padding.
    """
    length = query.shape[3]
    block_size = max(block_size, -(-length // _MAX_BLOCKS))
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    places = (*query_place, *key_place)
    return _attention(query, key, value, places, slopes, block_size, same_tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(query, key, value, places, slopes, block_size, same_tokens):
    return _forward(query, key, value, places, slopes, block_size, same_tokens)[0]


def _blocks(query, key, block_size, same_tokens):
    """(first query, behind the last query, keys that matter) of every block."""
    length = query.shape[3]
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
    )
    distance = jax.lax.optimization_barrier(distance)[:, None, None]
    product = jnp.einsum(
        "bkqd,bktd->bkqt",
        _fold(query[:, :, :, start:stop]),
        key[:, :, :keys],
        preferred_element_type=jnp.float32,
    ).reshape(batch, groups, heads, stop - start, keys)
    slope = jnp.asarray(slopes, jnp.float32).reshape(1, groups, heads, 1, 1)
    return product - slope * distance


def _fold(x):
    """[B, K, G, n, C] -> [B, K, G * n, C]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _forward(query, key, value, places, slopes, block_size, same_tokens):
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
    output = jnp.concatenate(outputs, 3)
    log_sum = jnp.concatenate(log_sums, 3)
    return output, (query, key, value, places, output, log_sum)


def _backward(slopes, block_size, same_tokens, saved, d_output):
    query, key, value, places, output, log_sum = saved
    correction = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1, keepdims=True)
    d_query = []
    d_key = jnp.zeros(key.swapaxes(2, 3).shape, jnp.float32)  # [B, K, D, T], see above
    d_value = jnp.zeros_like(d_key)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for start, stop, keys in _blocks(query, key, block_size, same_tokens):
        rows = slice(start, stop)
        scores = _scores(query, key, places, slopes, start, stop, keys)
        weights = jnp.exp(scores - log_sum[:, :, :, rows])
        d_out = _fold(d_output[:, :, :, rows])
        d_weights = product("bkqd,bktd->bkqt", d_out, value[:, :, :keys]).reshape(weights.shape)
        d_scores = _fold(weights * (d_weights - correction[:, :, :, rows])).astype(key.dtype)
        weights = _fold(weights).astype(value.dtype)
        d_value = d_value.at[..., :keys].add(product("bkqd,bkqt->bkdt", d_out, weights))
        block = product("bkqt,bktd->bkqd", d_scores, key[:, :, :keys])
        d_query.append(block.reshape(query[:, :, :, rows].shape).astype(query.dtype))
        folded = _fold(query[:, :, :, rows])
        d_key = d_key.at[..., :keys].add(product("bkqd,bkqt->bkdt", folded, d_scores))
    d_key, d_value = (x.swapaxes(2, 3).astype(key.dtype) for x in (d_key, d_value))
    return jnp.concatenate(d_query, 3), d_key, d_value, None


_attention.defvjp(_forward, _backward)
