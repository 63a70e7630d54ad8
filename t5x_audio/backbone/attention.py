"""Causal grouped-query attention with square-root ALiBi: the entrance for training and decoding.

A sequence that attends to itself (training) takes the Pallas kernels of flash_attention.py where
the program is lowered for a TPU, and the XLA path of blockwise_attention.py elsewhere; a cache
(prefill, decoding) takes the latter everywhere. The platform is that of the lowering, not of the
process, so that a program compiled here for a pod is the pod's. Forward and backward save the same
things, the output and the log-sum-exp of the scores, whichever path runs.
Equations: modeling_step1.py of stepfun-ai/Step-Audio-Chat.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t5x_audio.backbone import blockwise_attention, flash_attention
from t5x_audio.backbone.mesh import BATCH_AXES, HEAD_AXIS, present
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
        segment, so keys behind a block's last query can be left out.

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
    path = functools.partial(
        blockwise_attention.forward, slopes=slopes, block_size=block_size, same_tokens=same_tokens
    )
    kernel = functools.partial(flash_forward, slopes=slopes)
    query, key, value = (
        named(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    output, log_sum = _on_platform(kernel, path, same_tokens)(query, key, value, places)
    output, log_sum = named(output, "mixed"), named(log_sum, "log_sum")
    return output, (query, key, value, places, output, log_sum)


def _backward(slopes, block_size, same_tokens, saved, d_output):
    query, key, value, places, output, log_sum = saved
    correction = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1)
    path = functools.partial(
        blockwise_attention.backward, slopes=slopes, block_size=block_size, same_tokens=same_tokens
    )
    kernel = functools.partial(flash_backward, slopes=slopes)
    run = _on_platform(kernel, path, same_tokens)
    return *run(query, key, value, places, log_sum, correction, d_output), None


_attention.defvjp(_forward, _backward)


def _on_platform(kernel, path, same_tokens: bool):
    """`kernel` where it is lowered for a TPU and can serve, else `path`."""

    def run(query, *arrays):
        if not same_tokens or query.shape[-1] not in _KERNEL_HEAD_DIMS:
            return path(query, *arrays)
        return jax.lax.platform_dependent(query, *arrays, tpu=kernel, default=path)

    return run


def flash_forward(query, key, value, places, slopes, **options):
    """`flash_attention.forward` on every device's share of batch and groups."""
    operands = (query, key, value, places[1], _slopes(query, slopes))
    return _sharded(flash_attention.forward, operands, "qkksg", "qr", options)


def flash_backward(
    query, key, value, places, log_sum, correction, d_output, slopes, **options
):  # fmt: skip
    """`flash_attention.backward` on every device's share of batch and groups."""
    operands = (query, key, value, places[1], log_sum, correction, d_output)
    operands = (*operands, _slopes(query, slopes))
    return _sharded(flash_attention.backward, operands, "qkksrrqg", "qkk", options)


def _slopes(query, slopes):
    """Float32[K, G]; None stays None, an empty tree."""
    return slopes and jnp.asarray(slopes, jnp.float32).reshape(query.shape[1:3])


def _sharded(function, operands, kinds: str, results: str, options):
    """Runs a kernel under shard_map where there is a mesh of more than one device.

    Kinds: q [B, K, G, S, D], k [B, K, S, D], r [B, K, G, S], s [B, S], g [K, G]. Sequences lie
    whole on a device.
    """
    function = functools.partial(function, **options)
    mesh = jax.sharding.get_abstract_mesh()
    batch = present(mesh, *BATCH_AXES) or None
    heads = present(mesh, HEAD_AXIS) or None
    if not batch and not heads:
        return function(*operands)
    specs = {
        "q": P(batch, heads), "k": P(batch, heads), "r": P(batch, heads), "s": P(batch),
        "g": P(heads),
    }  # fmt: skip
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(specs[kind] for kind in kinds),
        out_specs=tuple(specs[kind] for kind in results),
        check_vma=False,
    )(*operands)
