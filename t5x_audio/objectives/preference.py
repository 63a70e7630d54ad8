"""Audio-masked direct preference optimisation.

Step-Audio-AQAA (arXiv 2506.08967), equation 2: DPO (arXiv 2305.18290) with an indicator that drops
every audio token, because unmasked DPO made text and speech diverge. With
r(y) = sum_t w_t (log pi(y_t | .) - log pi_ref(y_t | .)), where the weights w of the batch are zero
on audio and on the prompt, the loss is -log sigmoid(beta (r(chosen) - r(rejected))). Audio tokens
stay in the context of the text that follows them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_audio.objectives.cross_entropy import row_log_probs


@dataclasses.dataclass(frozen=True)
class MaskedDpo:
    """objective(model, reference, batch, rng, train) for pairs of answers, one pair a row.

    The batch holds, prefixed by `chosen_` and `rejected_`: tokens, targets int32[B, S] (shifted),
    weights float32[B, S], segment_ids and positions int32[B, S].

    Attributes:
      beta: how closely the policy is held to the reference; the published value is unknown.
    """

    beta: float = 0.1

    def __call__(self, model, reference, batch, rng, train: bool):
        """-> (mean loss of the pairs, metrics)."""
        del rng, train
        margins = {}
        for side in ("chosen", "rejected"):
            policy = answer_log_probs(model, batch, f"{side}_")
            frozen = jax.lax.stop_gradient(answer_log_probs(reference, batch, f"{side}_"))
            margins[side] = policy - frozen
        # A row of padding alone, with which a last batch is filled up, is no pair.
        pairs = (batch["chosen_weights"].sum(-1) > 0).astype(jnp.float32)
        count = jnp.maximum(pairs.sum(), 1.0)
        margin = self.beta * (margins["chosen"] - margins["rejected"])
        losses = -jax.nn.log_sigmoid(margin)
        loss = jnp.sum(losses * pairs) / count
        return loss, {
            "loss": (jnp.sum(losses * pairs), pairs.sum()),
            "reward_accuracy": (jnp.sum((margin > 0) * pairs), pairs.sum()),
            "reward_margin": (jnp.sum(margin * pairs), pairs.sum()),
            "reward_chosen": (self.beta * jnp.sum(margins["chosen"] * pairs), pairs.sum()),
        }


def answer_log_probs(model, batch, prefix: str) -> jax.Array:
    """Weighted log-probability of each row's targets: float32[B].

    Args:
      model: with `hidden(tokens, positions, segment_ids)` and `head_kernel`.
      batch: see `MaskedDpo`.
      prefix: of the fields of the batch that are scored.
    """
    tokens, targets, weights, segment_ids, positions = (
        batch[prefix + field]
        for field in ("tokens", "targets", "weights", "segment_ids", "positions")
    )
    hidden, _ = model.hidden(tokens, positions, segment_ids)
    kernel = model.head_kernel.astype(hidden.dtype)
    return row_log_probs(hidden, kernel, targets, weights.astype(jnp.float32))
