"""Encoders of speech that survive quantisation: SSQL carried over to what trains the tokenizers.

The same weights solve the same task twice, as they are and quantised to bits drawn anew; besides,
the features of the quantised forward are drawn to those of the plain one. The task is masked
prediction (`best_rq.BestRq`) or recognition (`ctc.LinguisticCtc`, `ctc.SemanticCtc`). After SSQL
(Cao et al., arXiv 2207.05432); nobody has published it for either.

Choices:
- Both branches see the same input, spans and augmentation: what differs is the quantisation alone.
  In SSQL the two views make the features agree; here the labels do, and the agreement term works
  directly. It is what a tokenizer is quantised for: codes are places in the space of its features.
- A codebook inside of the network follows the plain features alone.
- Agreement is the mean cosine of features over all valid places, the plain ones as constants.
- Ranges are those of the step's plain forward; bits are traced: the step compiles once.
- The first product that a recording meets has weights of 8 bits, as SSQL's stem; norms, softmax and
  the head are left as they are.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError
from t5x_audio.quantization.draw import draw_bits, require_bounds
from t5x_audio.quantization.rules import Rules
from t5x_audio.quantization.simulate import observing, quantized


def linguistic_rules(place: str = "tokenizer/") -> Rules:
    """For the SAN-M encoder of a linguistic tokenizer, which is `place` in the model."""
    layers = f"{place}encoder/(first|rest)"
    return Rules(
        weights=(
            (f"{place}encoder/first/qkv/kernel", 8),
            (f"{layers}/(qkv|out|up|down)/kernel", None),
        ),
        activations=((f"{layers}/(attention_norm|mlp_norm|up)", None),),
    )


def semantic_rules(place: str = "tokenizer/") -> Rules:
    """For the Whisper-type encoder of a semantic tokenizer, which is `place` in the model."""
    blocks = f"{place}blocks/stack"
    return Rules(
        weights=(
            (f"{place}conv1/kernel", 8),
            (f"{place}conv2/kernel|{blocks}/(query|key|value|out|up|down)/kernel", None),
        ),
        activations=(
            (f"{place}conv1", 8),
            (f"{place}conv2|{blocks}/(attention_norm|mlp_norm|up)", None),
        ),
    )


class EncoderTask(Protocol):
    """An objective whose forward can be made again by another version of the same model."""

    def prepare(self, model, batch, rng: jax.Array, train: bool):
        """What is to be solved; the draws are made here."""

    def predict(self, model, prepared, train: bool, first: bool = True):
        """(loss, metrics, features [B, M, D], which of them count: bool [B, M]).

        In a forward of a batch that is not the `first`, what the model learns by other means than
        gradients stays as it is.
        """


@dataclasses.dataclass(frozen=True)
class EncoderSsql:
    """(model, batch, rng, train) -> (loss, Metrics); model and batches are those of `task`.

    Attributes:
      rules: what is quantised, such as `linguistic_rules`.
      task: the objective that is made to survive quantisation.
      weight_bits, activation_bits: (fewest, most), drawn evenly.
      agreement_weight: of 1 - cosine of the features of both forwards.
    """

    rules: Rules
    task: EncoderTask
    weight_bits: tuple[int, int] = (2, 8)
    activation_bits: tuple[int, int] = (4, 8)
    agreement_weight: float = 1.0

    def __post_init__(self):
        bounds = {name: getattr(self, name) for name in ("weight_bits", "activation_bits")}
        require_bounds("EncoderSsql", bounds)
        if self.agreement_weight < 0.0:
            raise UserError(f"EncoderSsql.agreement_weight={self.agreement_weight}: give 0 or more")

    def __call__(self, model, batch, rng: jax.Array, train: bool):
        """See the class; `rng` draws what the task draws, and bits."""
        prepared = self.task.prepare(model, batch, rng, train)
        with observing(model, self.rules) as ranges:
            plain_loss, metrics, plain, valid = self.task.predict(model, prepared, train)
        bits = draw_bits(jax.random.fold_in(rng, 1), self.weight_bits, self.activation_bits)
        with quantized(model, self.rules, ranges, bits):
            low_loss, low_metrics, low, _ = self.task.predict(model, prepared, train, first=False)
        agreement, count = _cosine(low, jax.lax.stop_gradient(plain), valid)
        share = agreement / jnp.maximum(count, 1.0)
        loss = 0.5 * (plain_loss + low_loss) + self.agreement_weight * (1.0 - share)
        metrics |= {f"quantized_{name}": value for name, value in low_metrics.items()}
        metrics["agreement"] = (agreement, count)
        for name, value in zip(("weight_bits", "activation_bits"), bits, strict=True):
            metrics[name] = (value, jnp.float32(1.0))
        return loss, metrics


def _cosine(a, b, valid) -> tuple[jax.Array, jax.Array]:
    """(sum of the cosines of features [B, M, D] at valid places [B, M], number of those)."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    sizes = jnp.sum(jnp.square(a), -1) * jnp.sum(jnp.square(b), -1)
    cosines = jnp.sum(a * b, -1) * jax.lax.rsqrt(jnp.maximum(sizes, 1e-16))
    weights = valid.astype(jnp.float32)
    return jnp.sum(cosines * weights), jnp.sum(weights)
