"""Next-token cross-entropy in float32, chunk by chunk, with z-loss and a loss per stream.

Plain cross-entropy is what the published stages presumably minimise (no weighting is stated:
Step-Audio, arXiv 2502.11946, section 4); which targets count is said by the weights of the batch
(arXiv 2506.08967, eq. 1: the response). z-loss, z * log(sum exp logits)^2, keeps the logits'
scale from drifting (PaLM, arXiv 2204.02311, section 5); off by default.

A decoder that hears its own past speech can go on by rote and ignore the text that it should say.
Word dropout (Bowman et al., arXiv 1511.06349, section 3.1) makes the past less reliable; here a
dropped audio token becomes a random one of its stream. For small corpora; off by default.

Choice: the logits of all positions (vocabulary x tokens) are the largest array of a step, so they
exist one chunk at a time; where gradients are wanted they are formed together with the loss, while
the chunk is at hand.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t5x_audio.backbone.mesh import BATCH_AXES, HEAD_AXIS, SEQUENCE_AXIS, present
from t5x_audio.errors import UserError

STREAMS = ("text", "linguistic", "semantic")
_CHUNK = 512  # tokens a chunk: enough that the kernel's gradient costs more to form than to move


@dataclasses.dataclass(frozen=True)
class LanguageModeling:
    """objective(model, batch, rng, train) for packed batches.

    The batch holds tokens, targets int32[B, S] (already shifted), weights float32[B, S],
    segment_ids and positions int32[B, S].

    Attributes:
      z_loss: coefficient of the squared log-normaliser.
      text_size, linguistic_size, semantic_size: of the vocabulary, whose ids come in this order;
        metrics and word dropout depend on them; with text_size 0 there are no metrics per stream.
      word_dropout: chance that an audio token of the input (never of the targets) is replaced, in
        training only.
    """

    z_loss: float = 0.0
    word_dropout: float = 0.0
    text_size: int = 0
    linguistic_size: int = 0
    semantic_size: int = 0

    def __post_init__(self):
        if not 0.0 <= self.word_dropout < 1.0:
            raise UserError(f"LanguageModeling.word_dropout={self.word_dropout}: give 0 to below 1")
        if self.word_dropout and not (self.linguistic_size and self.semantic_size):
            raise UserError(
                "LanguageModeling.word_dropout drops audio tokens: give the vocabulary's "
                "text_size, linguistic_size and semantic_size too"
            )

    def __call__(self, model, batch, rng, train: bool):
        """-> (loss: weighted mean per token, metrics); `rng` draws the words to drop."""
        targets, weights = batch["targets"], batch["weights"].astype(jnp.float32)
        tokens = batch["tokens"]
        if train and self.word_dropout:
            tokens = self._drop_words(tokens, rng)
        hidden, _ = model.hidden(tokens, batch["positions"], batch["segment_ids"])
        count = weights.sum()
        share = weights / jnp.maximum(count, 1e-8)
        kernel = model.head_kernel.astype(hidden.dtype)
        loss, (losses, correct) = cross_entropy(hidden, kernel, targets, share, self.z_loss)
        metrics = {
            "loss": (jnp.sum(losses * weights), count),
            "accuracy": (jnp.sum(correct * weights), count),
            "tokens": (count, jnp.float32(1)),
        }
        for stream, inside in self._streams(targets).items():
            counted = weights * inside
            metrics[f"loss_{stream}"] = (jnp.sum(losses * counted), counted.sum())
        return loss, metrics

    def _ranges(self):
        """{stream: (its first id, number of ids)}."""
        sizes = (self.text_size, self.linguistic_size, self.semantic_size)
        starts = (0, sizes[0], sizes[0] + sizes[1])
        return dict(zip(STREAMS, zip(starts, sizes, strict=True), strict=True))

    def _streams(self, targets):
        """{stream: bool[B, S], whether a target belongs to it}."""
        return {
            stream: (targets >= start) & (targets < start + size)
            for stream, (start, size) in self._ranges().items()
            if self.text_size and size
        }

    def _drop_words(self, tokens, rng):
        """Int32[B, S]: some audio tokens replaced by others of their stream, evenly drawn."""
        ranges = self._ranges()
        drop_rng, *rngs = jax.random.split(rng, 3)
        dropped = jax.random.uniform(drop_rng, tokens.shape) < self.word_dropout
        for stream, draw in zip(STREAMS[1:], rngs, strict=True):
            start, size = ranges[stream]
            drawn = jax.random.randint(draw, tokens.shape, start, start + size)
            inside = (tokens >= start) & (tokens < start + size)
            tokens = jnp.where(dropped & inside, drawn, tokens)
        return tokens


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
