"""SSQL: self-supervision whose network is trained to say the same when quantised, at any width.

Each step runs the same weights twice: as they are, which gives the targets and the ranges of the
activations, and quantised to bits drawn anew. The loss is the mean of both branches' losses against
the unquantised targets. Source: Cao et al., "Synergistic Self-supervised and Quantization Learning"
(arXiv 2207.05432) and megvii-research/SSQL-ECCV2022.

Choices:
- One pair of bits a step for the whole network and both views, from the step's key, so that all
  hosts draw the same. Bits are traced: the step compiles once.
- Ranges are those of this step's unquantised forward, over both views. On a mesh they are of the
  global batch; the reference takes each device's own.
- No gradient passes through the scales, see `quantization/fake_quant.py`.
- Every forward normalises by its own batch, and each updates the running statistics.
- `reverse` is the paper's control: the unquantised branch learns to predict quantised targets.
- The theory (section 3.3 there) says that the loss splits into the error between views, the error
  of quantisation and a cross term near 0; all three are logged, of unit projections.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError
from t5x_audio.images.siamese import ACTIVATION_RULES, WEIGHT_RULES
from t5x_audio.objectives.siamese import Siamese, spread
from t5x_audio.quantization import fake_quant
from t5x_audio.quantization.draw import draw_bits, require_bounds
from t5x_audio.quantization.rules import Rules
from t5x_audio.quantization.simulate import observing, quantized
from t5x_audio.tokenizers.vector_quantizer import normalize

REVERSE_MAX_BITS = 16


@dataclasses.dataclass(frozen=True)
class Ssql:
    """(model, batch, rng, train) -> (loss, Metrics); batches are those of `ssl`.

    Attributes:
      ssl: the objective that is made to survive quantisation.
      rules: what is quantised.
      weight_bits, activation_bits: (fewest, most), drawn evenly.
      reverse: see the module docstring; SimSiam only. Published with one draw from 4 to 16 bits for
        weights and activations alike, which `same_bits` asks for.
      same_bits: one draw, of `weight_bits`, for both.
    """

    ssl: Siamese = Siamese()
    rules: Rules = Rules(WEIGHT_RULES, ACTIVATION_RULES)
    weight_bits: tuple[int, int] = (2, 8)
    activation_bits: tuple[int, int] = (4, 8)
    reverse: bool = False
    same_bits: bool = False

    def __post_init__(self):
        most = REVERSE_MAX_BITS if self.reverse else fake_quant.MAX_BITS
        bounds = {name: getattr(self, name) for name in ("weight_bits", "activation_bits")}
        require_bounds("Ssql", bounds, most)
        if self.reverse and self.ssl.method != "simsiam":
            raise UserError("Ssql.reverse: its targets are SimSiam's; give ssl.method='simsiam'")

    def __call__(self, model, batch, rng: jax.Array, train: bool):
        """See the class; `rng` draws the views and the bits."""
        view_rng, bits_rng = jax.random.split(rng)
        views = self.ssl.views(model, batch, view_rng, train)
        with observing(model, self.rules) as ranges:
            online = self.ssl.online(model, views)
        targets = self.ssl.targets(model, online, views)
        bits = self.draw(bits_rng)
        with quantized(model, self.rules, ranges, bits):
            low = self.ssl.online(model, views)
        float_loss = self.ssl.loss(model, online, targets)
        quantized_loss = self.ssl.loss(model, low, targets)
        if self.reverse:
            loss = self.ssl.loss(model, online, self.ssl.targets(model, low, views))
        else:
            loss = 0.5 * (float_loss + quantized_loss)
        self.ssl.learnt(model, targets, train)
        values = {"ssl_loss": float_loss, "quantized_loss": quantized_loss}
        values |= decomposition(online.z, low.z, targets)
        values |= {"weight_bits": bits[0], "activation_bits": bits[1]}
        metrics = {name: (value, jnp.float32(1.0)) for name, value in values.items()}
        return loss, metrics | {"z_std": spread(online.z[0])}

    def draw(self, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(bits of weights, of activations), float32 scalars."""
        return draw_bits(rng, self.weight_bits, None if self.same_bits else self.activation_bits)


def decomposition(z, low, targets) -> dict[str, jax.Array]:
    """The terms into which |low - target|^2 splits, means over rows and views of unit vectors.

    Args:
      z: projections [B, D] of each view.
      low: the same of the quantised network.
      targets: [B, D], of the other view.

    Returns:
      ssl_error |z - target|^2, quantization_error |low - z|^2, and error_cosine, by which
      |low - target|^2 = ssl_error + quantization_error
      + 2 error_cosine sqrt(ssl_error quantization_error).
    """
    z, low, targets = (
        normalize(jnp.concatenate([jax.lax.stop_gradient(one) for one in some]))
        for some in (z, low, targets)
    )
    between, lost = z - targets, low - z
    ssl_error = jnp.mean(jnp.sum(jnp.square(between), axis=-1))
    quantization_error = jnp.mean(jnp.sum(jnp.square(lost), axis=-1))
    cross = jnp.mean(jnp.sum(between * lost, axis=-1))
    norm = jnp.sqrt(jnp.maximum(ssl_error * quantization_error, 1e-16))
    return {
        "ssl_error": ssl_error,
        "quantization_error": quantization_error,
        "error_cosine": cross / norm,
    }
