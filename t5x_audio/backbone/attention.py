"""Causal grouped-query attention with square-root ALiBi: the entrance for training and decoding.

A sequence that attends to itself (training) takes the Pallas kernels of flash_attention.py where
the program is lowered for a TPU, and the XLA path of blockwise_attention.py elsewhere; a cache
(prefill, decoding) takes the latter everywhere. The platform is that of the lowering, not of the
process, so that a program compiled here for a pod is the pod's. Forward and backward save the same
things, the output and the log-sum-exp of the scores, whichever path runs.

On a mesh the kernels, and both paths where sequences lie over several devices, run under shard_map
on every device's share: see context_parallel.py.
Equations: modeling_step1.py of stepfun-ai/Step-Audio-Chat.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t5x_audio.backbone import blockwise_attention, context_parallel, flash_attention
from t5x_audio.backbone.mesh import BATCH_AXES, HEAD_AXIS, SEQUENCE_AXIS, present
from t5x_audio.backbone.remat import named

_KERNEL_HEAD_DIMS = (64, 128, 256)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_place: tuple[jax.Array, jax.Array],
    key_place: tuple[jax.Array, jax.Array],
    slopes: tuple[float, ...] | None,
    block_size: int = 128,
    same_tokens: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(D) - slope sqrt(i - j)) v over the keys a query may see.

    Args:
      query: [B, K, G, S, D], K groups of G heads each.
      key, value: [B, K, T, D].
      query_place: (positions, segment ids), int32[B, S] each.
      key_place: the same of the keys, int32[B, T].
      slopes: of the K * G heads, groups outermost, each above 0; None = no bias.
      block_size: queries a block of the XLA path; long sequences take longer blocks.
      same_tokens: queries and keys are the same tokens, at consecutive positions inside each
        segment, so keys behind a block's last query can be left out. Where the mesh has a
        `sequence` axis they are in the order of `context_parallel.balance`.

    Returns:
      [B, K, G, S, D] in the type of `value`. A query that sees no key at all is not allowed;
      padding sees padding.
    """
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    places = (*query_place, *key_place)
    return _attention(query, key, value, places, slopes, block_size, same_tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(query, key, value, places, slopes, block_size, same_tokens):
    return _forward(query, key, value, places, slopes, block_size, same_tokens)[0]


def _forward(query, key, value, places, slopes, block_size, same_tokens):
    query, key, value = (
        named(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    arrays = (query, key, value, places)
    if not same_tokens:
        output, log_sum = blockwise_attention.forward(*arrays, slopes, block_size, same_tokens)
    else:
        output, log_sum = _on_platform(
            flash_forward, blockwise_forward, arrays, slopes=slopes, block_size=block_size
        )
    output, log_sum = named(output, "mixed"), named(log_sum, "log_sum")
    return output, (*arrays, output, log_sum)


def _backward(slopes, block_size, same_tokens, saved, d_output):
    query, key, value, places, output, log_sum = saved
    correction = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1)
    arrays = (query, key, value, places, log_sum, correction, d_output)
    if not same_tokens:
        gradients = blockwise_attention.backward(*arrays, slopes, block_size, same_tokens)
    else:
        gradients = _on_platform(
            flash_backward, blockwise_backward, arrays, slopes=slopes, block_size=block_size
        )
    return *gradients, None


_attention.defvjp(_forward, _backward)


def _on_platform(kernel, path, arrays, *, slopes, block_size: int):
    """`kernel` where it is lowered for a TPU and can serve, else `path`."""
    query = arrays[0]
    path = functools.partial(path, slopes=slopes, block_size=block_size)
    chunk = query.shape[3] // (2 * context_parallel.parts())
    whole_blocks = context_parallel.parts() == 1 or chunk % flash_attention.LANES == 0
    if query.shape[-1] not in _KERNEL_HEAD_DIMS or not whole_blocks:
        return path(*arrays)
    kernel = functools.partial(kernel, slopes=slopes)
    return jax.lax.platform_dependent(*arrays, tpu=kernel, default=path)


# ---- a sequence that attends to itself, on every device's share -------------------------------


def flash_forward(query, key, value, places, *, slopes, **options):
    """`flash_attention.forward` on every device's share of batch, groups and queries."""

    def run(query, key, value, segments, slopes):
        key, value, key_segments = _whole(key, value, segments)
        where = _starts(query)
        return flash_attention.forward(
            query, key, value, (segments, key_segments), slopes, starts=where, **options
        )

    operands = (query, key, value, places[1], _by_group(slopes, query))
    return _sharded(run, operands, "qkksg", "qr")


def flash_backward(
    query, key, value, places, log_sum, correction, d_output, *, slopes, **options
):  # fmt: skip
    """`flash_attention.backward` on every device's share of batch, groups and queries."""

    def run(query, key, value, segments, log_sum, correction, d_output, slopes):
        key, value, key_segments = _whole(key, value, segments)
        d_query, d_key, d_value = flash_attention.backward(
            query, key, value, (segments, key_segments), log_sum, correction, d_output, slopes,
            starts=_starts(query), **options,
        )  # fmt: skip
        return d_query, *_shares(d_key, d_value)

    operands = (query, key, value, places[1], log_sum, correction, d_output)
    return _sharded(run, (*operands, _by_group(slopes, query)), "qkksrrqg", "qkk")


def blockwise_forward(query, key, value, places, *, slopes, block_size: int):
    """`blockwise_attention.forward`; XLA's partitioner splits it, except along sequences."""
    if context_parallel.parts() == 1:
        return blockwise_attention.forward(query, key, value, places, slopes, block_size, True)

    def run(query, key, value, positions, segments, slopes):
        key, value, *key_places = _whole(key, value, positions, segments)
        places = (positions, segments, *key_places)
        return blockwise_attention.forward(query, key, value, places, slopes, block_size, False)

    operands = (query, key, value, *places[:2], _by_group(slopes, query))
    return _sharded(run, operands, "qkkssg", "qr")


def blockwise_backward(
    query, key, value, places, log_sum, correction, d_output, *, slopes, block_size: int
):  # fmt: skip
    """`blockwise_attention.backward`, as `blockwise_forward`."""
    saved = (log_sum, correction, d_output)
    if context_parallel.parts() == 1:
        arrays = (query, key, value, places, *saved)
        return blockwise_attention.backward(*arrays, slopes, block_size, True)

    def run(query, key, value, positions, segments, log_sum, correction, d_output, slopes):
        key, value, *key_places = _whole(key, value, positions, segments)
        d_query, d_key, d_value = blockwise_attention.backward(
            query, key, value, (positions, segments, *key_places), log_sum, correction, d_output,
            slopes, block_size, False,
        )  # fmt: skip
        return d_query, *_shares(d_key, d_value)

    operands = (query, key, value, *places[:2], *saved, _by_group(slopes, query))
    return _sharded(run, operands, "qkkssrrqg", "qkk")


def _whole(key, value, *places):
    """Keys, values and their places, of a device's share those of whole sequences."""
    if context_parallel.parts() == 1:
        return key, value, *places
    gather = context_parallel.gather
    return gather(key, 2), gather(value, 2), *(gather(place, 1) for place in places)


def _shares(*gradients):
    """Gradients of whole sequences, summed, of which each device keeps its share."""
    if context_parallel.parts() == 1:
        return gradients
    return tuple(context_parallel.sum_and_scatter(x, 2) for x in gradients)


def _starts(query):
    """Where a device's chunks of queries stand; None for whole sequences."""
    return None if context_parallel.parts() == 1 else context_parallel.starts(query.shape[3])


def _by_group(slopes, query):
    """Float32[K, G]; None stays None, an empty tree."""
    return slopes and jnp.asarray(slopes, jnp.float32).reshape(query.shape[1:3])


def _sharded(function, operands, kinds: str, results: str):
    """Runs `function` under shard_map where there is a mesh of more than one device.

    Kinds: q [B, K, G, S, D], k [B, K, S, D], r [B, K, G, S], s [B, S], g [K, G].
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch = present(mesh, *BATCH_AXES) or None
    heads = present(mesh, HEAD_AXIS) or None
    tokens = present(mesh, SEQUENCE_AXIS) or None
    if not batch and not heads and not tokens:
        return function(*operands)
    specs = {
        "q": P(batch, heads, None, tokens), "k": P(batch, heads, tokens),
        "r": P(batch, heads, None, tokens), "s": P(batch, tokens), "g": P(heads),
    }  # fmt: skip
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(specs[kind] for kind in kinds),
        out_specs=tuple(specs[kind] for kind in results),
        check_vma=False,
    )(*operands)
