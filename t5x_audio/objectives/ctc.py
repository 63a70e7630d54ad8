"""Connectionist temporal classification: how both tokenizers learn from transcribed speech.

The linguistic encoder is an ordinary CTC recogniser; the semantic tokenizer has its quantiser in
the middle, so its loss adds the commitment of the features to their codes. Text units are what the
batches hold, SentencePiece ids or bytes (nearer to the sounds that a code can hold, for when there
is little speech to learn from); the blank is 0 (<unk>, which CTC never has to emit). Source: Graves
et al., "Connectionist Temporal Classification" (ICML 2006); loss by optax.

Choices: the loss is per text unit. An example with more units (and forced blanks between equal
neighbours) than frames has no alignment: it is left out and counted. The token error rate is a true
edit distance, computed in the compiled evaluation.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from t5x_audio.objectives.augmentation import Noise, SpecAugment, encoder_features
from t5x_audio.tokenizers.semantic import valid_frames

BLANK = 0


@flax.struct.dataclass
class SpokenBatch:
    """What the encoder takes, and what was said.

    Attributes:
      features: [B, N, D].
      lengths: int32 [B], true frames of it.
      text: the batch's text_ids int32 [B, U] and text_lengths int32 [B].
      rng: of the codebook.
    """

    features: jax.Array
    lengths: jax.Array
    text: dict[str, jax.Array]
    rng: jax.Array


@dataclasses.dataclass(frozen=True)
class LinguisticCtc:
    """CTC on the linguistic encoder; see `__call__`.

    Attributes:
      spec_augment, noise: augmentation for training; None = off.
    """

    spec_augment: SpecAugment | None = None
    noise: Noise | None = None

    def __call__(self, model, batch, rng: jax.Array, train: bool):
        """Loss and metrics of an audio batch.

        Args:
          model: a `LinguisticTokenizer`.
          batch: audio f32 [B, T], audio_lengths int32 [B], text_ids int32 [B, U], text_lengths [B].
          rng: of the augmentation.
          train: gather feature statistics and augment; otherwise add the token error rate.

        Returns:
          (mean loss per text unit, metrics).
        """
        return self.predict(model, self.prepare(model, batch, rng, train), train)[:2]

    def prepare(self, model, batch, rng: jax.Array, train: bool) -> SpokenBatch:
        """What the encoder takes and what was said; arguments as of a call."""
        return _prepared(self, model, batch, rng, rng, train)

    def predict(self, model, prepared: SpokenBatch, train: bool, first: bool = True):
        """One forward: (loss, metrics, features [B, M, D], which count: bool [B, M])."""
        del first
        hidden, lengths = model.hidden(prepared.features, prepared.lengths)
        logits = model.logits(hidden, lengths)
        loss, metrics = ctc(logits, lengths, prepared.text, with_errors=not train)
        return loss, metrics, hidden, valid_frames(lengths, hidden.shape[1])


@dataclasses.dataclass(frozen=True)
class SemanticCtc:
    """CTC through the quantiser of the semantic tokenizer; see `__call__`.

    Attributes:
      spec_augment, noise: augmentation for training; None = off.
      commitment_weight: of the commitment loss, once quantisation has set in.
    """

    spec_augment: SpecAugment | None = None
    noise: Noise | None = None
    commitment_weight: float = 0.25

    def __call__(self, model, batch, rng: jax.Array, train: bool):
        """As `LinguisticCtc`, for a `SemanticTokenizer`; with metrics of the codebook."""
        return self.predict(model, self.prepare(model, batch, rng, train), train)[:2]

    def prepare(self, model, batch, rng: jax.Array, train: bool) -> SpokenBatch:
        """As `LinguisticCtc.prepare`."""
        return _prepared(self, model, batch, *jax.random.split(rng), train)

    def predict(self, model, prepared: SpokenBatch, train: bool, first: bool = True):
        """As `LinguisticCtc.predict`; the codebook learns from the first forward of a batch."""
        hidden, lengths = model.hidden(prepared.features, prepared.lengths)
        valid = valid_frames(lengths, hidden.shape[1])
        # No pull towards codes that the network does not use yet.
        weight = self.commitment_weight * model.quantizer.share_quantised()
        quantised, codes, commitment = model.quantizer(hidden, valid, prepared.rng, train, first)
        logits = model.logits(quantised, lengths)
        loss, metrics = ctc(logits, lengths, prepared.text, with_errors=not train)
        metrics |= codebook_metrics(codes, valid, model.config.codebook_size)
        metrics["commitment"] = (commitment, jnp.float32(1))
        return loss + weight * commitment, metrics, hidden, valid


def _prepared(objective, model, batch, augment_rng, codebook_rng, train: bool) -> SpokenBatch:
    features, lengths = encoder_features(
        model, batch, augment_rng, train, objective.noise, objective.spec_augment
    )
    text = {name: batch[name] for name in ("text_ids", "text_lengths")}
    return SpokenBatch(features, lengths, text, codebook_rng)


def ctc(logits: jax.Array, lengths: jax.Array, batch, with_errors: bool):
    """CTC loss of logits [B, N, V] with frame counts [B] against the batch's text.

    Returns:
      (loss per text unit [], metrics): 'ctc_loss' per unit; 'skipped', the share of examples
      without an alignment; with `with_errors` also 'token_error_rate'.
    """
    labels, label_lengths = batch["text_ids"], batch["text_lengths"]
    padding = (jnp.arange(logits.shape[1]) >= lengths[:, None]).astype(jnp.float32)
    label_padding = (jnp.arange(labels.shape[1]) >= label_lengths[:, None]).astype(jnp.float32)
    losses = optax.ctc_loss(logits, padding, labels, label_padding, blank_id=BLANK)
    present = (lengths > 0) & (label_lengths > 0)
    possible = present & (required_frames(labels, label_lengths) <= lengths)
    units = jnp.sum(jnp.where(possible, label_lengths, 0)).astype(jnp.float32)
    total = jnp.sum(jnp.where(possible, losses, 0.0))
    metrics = {
        "ctc_loss": (total, units),
        "skipped": (
            jnp.sum(present & ~possible).astype(jnp.float32),
            jnp.sum(present).astype(jnp.float32),
        ),
    }
    if with_errors:
        hypotheses, hypothesis_lengths = greedy(logits, lengths)
        errors = edit_distance(hypotheses, hypothesis_lengths, labels, label_lengths)
        metrics["token_error_rate"] = (
            jnp.sum(jnp.where(present, errors, 0)).astype(jnp.float32),
            jnp.sum(jnp.where(present, label_lengths, 0)).astype(jnp.float32),
        )
    return total / jnp.maximum(units, 1.0), metrics


def required_frames(labels: jax.Array, label_lengths: jax.Array) -> jax.Array:
    """Fewest frames [B] that spell labels [B, U]: one each, one between equal neighbours."""
    inside = jnp.arange(1, labels.shape[1]) < label_lengths[:, None]
    repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1)
    return label_lengths + repeats


def greedy(logits: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Best-path decoding of [B, N, V]: (ids int32 [B, N] followed by zeros, counts [B])."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    before = jnp.pad(best[:, :-1], ((0, 0), (1, 0)), constant_values=BLANK)
    inside = jnp.arange(best.shape[1]) < lengths[:, None]
    keep = inside & (best != BLANK) & (best != before)
    order = jnp.argsort(~keep, axis=1, stable=True)
    counts = jnp.sum(keep, axis=1).astype(jnp.int32)
    ids = jnp.take_along_axis(best, order, axis=1)
    return jnp.where(jnp.arange(ids.shape[1]) < counts[:, None], ids, 0), counts


def edit_distance(hypotheses, hypothesis_lengths, references, reference_lengths) -> jax.Array:
    """Levenshtein distance int32 [B] of ids [B, N] (counts [B]) to ids [B, U] (counts [B]).

    A row of the table depends on itself only through insertions, whose running minimum is a
    cumulative minimum; so the scan is over hypothesis ids alone.
    """
    columns = jnp.arange(references.shape[1] + 1)

    def row(previous, step):
        ids, index = step
        substituted = previous[:, :-1] + (references != ids[:, None])
        best = jnp.minimum(previous[:, 1:] + 1, substituted)
        best = jnp.concatenate([previous[:, :1] + 1, best], axis=1)
        best = jax.lax.cummin(best - columns, axis=1) + columns
        return jnp.where((index < hypothesis_lengths)[:, None], best, previous), None

    start = jnp.broadcast_to(columns, (references.shape[0], len(columns))).astype(jnp.int32)
    steps = (hypotheses.swapaxes(0, 1), jnp.arange(hypotheses.shape[1]))
    table, _ = jax.lax.scan(row, start, steps)
    return jnp.take_along_axis(table, reference_lengths[:, None], axis=1)[:, 0]


def codebook_metrics(codes: jax.Array, valid: jax.Array, size: int) -> dict:
    """Share of codes used by codes [B, M] where valid [B, M], and the perplexity of the batch."""
    counts = jax.ops.segment_sum(valid.astype(jnp.float32).reshape(-1), codes.reshape(-1), size)
    share = counts / jnp.maximum(jnp.sum(counts), 1.0)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0))
    one = jnp.float32(1)
    return {
        "codebook_usage": (jnp.mean(counts > 0).astype(jnp.float32), one),
        "codebook_perplexity": (jnp.exp(entropy), one),
    }
