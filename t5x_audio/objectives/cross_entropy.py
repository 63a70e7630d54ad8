"""Cross-entropy with a large vocabulary, which never holds the logits of all positions.

They (vocabulary x tokens) would be the largest array of a step, so they exist one chunk at a time;
where the gradient's weights are known they are formed together with the loss, while the chunk is
at hand. On a mesh every device works on its share of tokens and vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t5x_audio.backbone.mesh import BATCH_AXES, HEAD_AXIS, SEQUENCE_AXIS, present

_CHUNK = 512  # tokens a chunk: enough that the kernel's gradient costs more to form than to move


def cross_entropy(hidden, kernel, targets, weights, z_loss: float = 0.0):
    """sum(weights * (-log softmax(hidden @ kernel)[target] + z_loss * log_normaliser^2)).

    Differentiable in `hidden` and `kernel` through the sum only.

    Args:
      hidden: [B, S, E].
      kernel: [E, V].
      targets: int32[B, S].
      weights: float32[B, S].
      z_loss: coefficient.

    Returns:
      (float32 scalar, (cross-entropy float32[B, S] without z-loss, float32[B, S]: 1 where the
      target is the likeliest token)).
    """
    return _cross_entropy(hidden, kernel, targets, weights, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, kernel, targets, weights, z_loss):
    total, losses, correct = _over_mesh(_losses_only, hidden, kernel, targets, weights, z_loss)
    return total, (losses, correct)


def _forward(hidden, kernel, targets, weights, z_loss):
    """The loss and, chunk by chunk, its gradients."""
    total, losses, correct, d_hidden, d_kernel = _over_mesh(
        _with_gradients, hidden, kernel, targets, weights, z_loss
    )
    return (total, (losses, correct)), (d_hidden, d_kernel)


def _backward(z_loss, saved, cotangents):
    d_total = cotangents[0]
    return *((d_total * d).astype(d.dtype) for d in saved), None, None


_cross_entropy.defvjp(_forward, _backward)


@jax.custom_vjp
def row_log_probs(hidden, kernel, targets, weights):
    """sum over S of weights * log softmax(hidden @ kernel)[target], differentiable by row.

    Args:
      hidden, kernel, targets, weights: of `cross_entropy`; the last is a constant.

    Returns:
      float32[B].
    """
    _, losses, _ = _over_mesh(_losses_only, hidden, kernel, targets, weights, 0.0)
    return -jnp.sum(losses * weights, -1)


def _rows_forward(hidden, kernel, targets, weights):
    return row_log_probs(hidden, kernel, targets, weights), (hidden, kernel, targets, weights)


def _rows_backward(saved, d_rows):
    hidden, kernel, targets, weights = saved
    # What a row's gradient is multiplied with is known only now: the logits are formed once more.
    weights = -weights * d_rows[:, None]
    *_, d_hidden, d_kernel = _over_mesh(_with_gradients, hidden, kernel, targets, weights, 0.0)
    return d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype), None, None


row_log_probs.defvjp(_rows_forward, _rows_backward)


def _over_mesh(function, hidden, kernel, targets, weights, z_loss):
    """Runs `function` on every device's share of the tokens and of the vocabulary.

    Left to the partitioner, the kernel would be gathered and its gradient reduced for every chunk;
    so both happen once, around the loop over chunks.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def over(size: int, *names: str):
        found = present(mesh, *names)
        return () if size % math.prod(mesh.shape[name] for name in found) else found

    rows, tokens = over(hidden.shape[0], *BATCH_AXES), over(hidden.shape[1], SEQUENCE_AXIS)
    columns = over(kernel.shape[1], HEAD_AXIS)
    function = functools.partial(function, z_loss=z_loss, shares=rows + tokens, columns=columns)
    if not rows and not tokens and not columns:
        return function(hidden, kernel, targets, weights)
    by_token, by_column = P(rows or None, tokens or None), P(None, columns or None)
    outputs = (P(), by_token, by_token, by_token, by_column)
    return jax.shard_map(
        function,
        in_specs=(by_token, by_column, by_token, by_token),
        out_specs=outputs[:3] if function.func is _losses_only else outputs,
        check_vma=False,
    )(hidden, kernel, targets, weights)


def _losses_only(hidden, kernel, targets, weights, *, z_loss, shares, columns):
    """-> (weighted sum, cross-entropy [B, S], correct [B, S])."""
    places = _place_of(targets, kernel, columns)

    def body(_, chunk):
        hidden, places, weights = chunk
        return _, _losses(_logits(hidden, kernel), places, weights, z_loss, columns)[:3]

    chunks, merge = _chunked(hidden, places, weights)
    _, (total, losses, correct) = jax.lax.scan(body, None, chunks)
    return jax.lax.psum(total.sum(), shares), merge(losses), merge(correct)


def _with_gradients(hidden, kernel, targets, weights, *, z_loss, shares, columns):
    """As `_losses_only`, and the gradients of the weighted sum by hidden and kernel."""
    places = _place_of(targets, kernel, columns)

    def body(d_kernel, chunk):
        hidden, places, weights = chunk
        logits = _logits(hidden, kernel)
        total, losses, correct, normaliser = _losses(logits, places, weights, z_loss, columns)
        # d/dlogits of w (lse - logit[target] + z lse^2) = w ((1 + 2 z lse) softmax - onehot)
        scale = (weights * (1.0 + 2.0 * z_loss * normaliser))[..., None]
        hit = jnp.arange(logits.shape[-1]) == places[..., None]
        d_logits = scale * jnp.exp(logits - normaliser[..., None]) - weights[..., None] * hit
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jax.lax.psum(jnp.einsum("bsv,ev->bse", d_logits, kernel), columns)
        d_kernel += jnp.einsum("bse,bsv->ev", hidden, d_logits, preferred_element_type=jnp.float32)
        return d_kernel, (total, losses, correct, d_hidden)

    chunks, merge = _chunked(hidden, places, weights)
    start = jnp.zeros(kernel.shape, jnp.float32)
    d_kernel, (total, losses, correct, d_hidden) = jax.lax.scan(body, start, chunks)
    d_kernel = jax.lax.psum(d_kernel.astype(kernel.dtype), shares)
    return jax.lax.psum(total.sum(), shares), *map(merge, (losses, correct, d_hidden)), d_kernel


def _place_of(targets, kernel, columns):
    """Where the targets stand among this device's columns; outside of them elsewhere."""
    return targets - jax.lax.axis_index(columns) * kernel.shape[1] if columns else targets


def _logits(hidden, kernel):
    return jnp.einsum("bse,ev->bsv", hidden, kernel, preferred_element_type=jnp.float32)


def _losses(logits, places, weights, z_loss, columns):
    """-> (weighted sum, cross-entropy, correct, log-normaliser) of one chunk of logits."""
    likeliest = jax.lax.pmax(logits.max(-1), columns)
    exponentials = jnp.exp(logits - likeliest[..., None]).sum(-1)
    normaliser = likeliest + jnp.log(jax.lax.psum(exponentials, columns))
    here = (places >= 0) & (places < logits.shape[-1])
    found = jnp.take_along_axis(logits, jnp.where(here, places, 0)[..., None], -1)[..., 0]
    of_target = jax.lax.psum(jnp.where(here, found, 0.0), columns)
    losses = normaliser - of_target
    correct = (of_target >= likeliest).astype(jnp.float32)
    total = jnp.sum(weights * (losses + z_loss * normaliser**2))
    return total, losses, correct, normaliser


def _chunked(*arrays):
    """Cuts [B, S, ...] into [chunks, B, S / chunks, ...]; and how to undo it."""
    batch, length = arrays[0].shape[:2]
    # Whole rows stay together: a batch sharded over devices is cut without communication.
    most = max(1, batch * length // _CHUNK)
    count = next(n for n in range(min(most, length), 0, -1) if length % n == 0)

    def cut(x):
        return x.reshape(batch, count, length // count, *x.shape[2:]).swapaxes(0, 1)

    def merge(x):
        return x.swapaxes(0, 1).reshape(batch, length, *x.shape[3:])

    return tuple(cut(x) for x in arrays), merge
