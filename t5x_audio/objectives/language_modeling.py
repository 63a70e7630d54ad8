"""Next-token cross-entropy in float32, chunk by chunk, with z-loss and a loss per stream.

Plain cross-entropy is what the published stages presumably minimise (no weighting is stated:
Step-Audio, arXiv 2502.11946, section 4); which targets count is said by the weights of the batch
(arXiv 2506.08967, eq. 1: the response). z-loss, z * log(sum exp logits)^2, keeps the logits'
scale from drifting (PaLM, arXiv 2204.02311, section 5); off by default.

A decoder that hears its own past speech can go on by rote and ignore the text that it should say.
Word dropout (Bowman et al., arXiv 1511.06349, section 3.1) makes the past less reliable; here a
dropped audio token becomes a random one of its stream. For small corpora; off by default.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError
from t5x_audio.objectives.cross_entropy import cross_entropy

STREAMS = ("text", "linguistic", "semantic")


@dataclasses.dataclass(frozen=True)
class LanguageModeling:
    """objective(model, batch, rng, train) for packed batches.

    The batch holds tokens, targets int32[B, S] (already shifted), weights float32[B, S],
    segment_ids and positions int32[B, S]; with images soft_embeddings [B, M, W] and soft_index
    int32[B, S], see `Transformer.hidden`.

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
        soft = {}
        if "soft_index" in batch:
            soft = {"soft": (batch["soft_embeddings"], batch["soft_index"])}
        hidden, _ = model.hidden(tokens, batch["positions"], batch["segment_ids"], **soft)
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

    def check_vocabulary(self, sizes: dict[str, int]) -> None:
        """UserError if the streams are not those of a vocabulary of these sizes."""
        for name in ("text_size", "linguistic_size", "semantic_size"):
            here, there = getattr(self, name), sizes.get(name)
            if here and there is not None and here != there:
                raise UserError(
                    f"LanguageModeling.{name}={here}, but the vocabulary of the data has {there}: "
                    "give its sizes, or make vocabulary and caches again with these"
                )

    def derived(self, values: dict[str, float]) -> dict[str, float]:
        """Perplexities of the losses that are there, of all targets and per stream."""
        names = {f"loss_{stream}": f"perplexity_{stream}" for stream in STREAMS}
        names["loss"] = "perplexity"
        # A loss beyond 100 nats is no likelihood any more, and exp of 710 overflows.
        return {
            new: math.exp(min(values[name], 100.0)) for name, new in names.items() if name in values
        }

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
