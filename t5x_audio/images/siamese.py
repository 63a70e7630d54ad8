"""An encoder with the heads and the moving copy that Siamese self-supervision trains it by.

SimSiam (Chen and He, arXiv 2011.10566): projector and predictor. BYOL (Grill et al., arXiv
2006.07733): besides, targets from a moving average of encoder and projector. MoCo-v2 (Chen et al.,
arXiv 2003.04297): the moving average and a queue of its past keys, no predictor. Heads as in
megvii-research/SSQL-ECCV2022. After training only `encoder` counts; a checkpoint holds it under
`encoder/`.

Choices: the moving copy has its weights as `Ema` variables, which no optimiser sees; it is brought
up to date at the start of a training forward, which is behind the update before. It starts equal to
the online one. MoCo's shuffled batch norm has no counterpart: batch statistics are global here.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.images.resnet import ACTIVATIONS, WEIGHTS, ResnetConfig, batch_norm
from t5x_audio.tokenizers.vector_quantizer import normalize
from t5x_audio.vocoder.initialisers import fan_in

WEIGHT_RULES = (*((f"encoder/{pattern}", bits) for pattern, bits in WEIGHTS),
                ("projector/.*/kernel", 8))  # fmt: skip
ACTIVATION_RULES = tuple((f"encoder/{pattern}", bits) for pattern, bits in ACTIVATIONS)
"""Rules of `quantization.rules`: the projector's weights at 8 bits, the predictor left as it is."""


class Ema(nnx.Variable):
    """Variable type of moving averages of parameters: state, not trained by gradients."""


class Queue(nnx.Variable):
    """Variable type of past keys and of the place of the next."""


@dataclasses.dataclass(frozen=True)
class SiameseConfig:
    """Sizes; the defaults are those of SimSiam and SSQL with ResNet-18.

    Attributes:
      encoder: the network.
      projector: widths of its layers; empty = none.
      projector_norms: batch norm behind each of them, the last without gain and bias.
      predictor: width of its hidden layer; 0 = no predictor.
      momentum: of the moving copy, e.g. 0.99 for BYOL; None = no such copy.
      queue: past keys that are kept, for MoCo.
    """

    encoder: ResnetConfig = ResnetConfig()
    projector: tuple[int, ...] = (2048, 2048, 2048)
    projector_norms: bool = True
    predictor: int = 2048
    momentum: float | None = None
    queue: int = 0

    def __post_init__(self):
        if self.momentum is not None and not 0.0 <= self.momentum < 1.0:
            raise UserError(f"SiameseConfig.momentum={self.momentum}: give 0 to below 1, or None")
        if self.queue and self.momentum is None:
            raise UserError("SiameseConfig.queue: the keys are the moving copy's; give a momentum")

    @property
    def width(self) -> int:
        """Of the projection."""
        return self.projector[-1] if self.projector else self.encoder.width

    def make(self, rngs: nnx.Rngs) -> "Siamese":
        """Builds the model."""
        return Siamese(self, rngs)


def _linear(n_in: int, n_out: int, rngs: nnx.Rngs, use_bias: bool = False) -> nnx.Linear:
    return nnx.Linear(n_in, n_out, use_bias=use_bias, kernel_init=fan_in(), rngs=rngs)


class Head(nnx.Module):
    """Linear layers with ReLU between them, and batch norms if wanted.

    The last layer has a norm without gain and bias (`last_norm`) or a bias.
    """

    def __init__(self, n_in: int, widths, norms: bool, last_norm: bool, rngs: nnx.Rngs):
        layers, made = [], []
        for number, width in enumerate(widths, 1):
            last = number == len(widths)
            normed = last_norm if last else norms
            layers.append(_linear(n_in, width, rngs, use_bias=not normed))
            made.append(batch_norm(width, rngs, scale=not last) if normed else None)
            n_in = width
        self.layers, self.norms = nnx.List(layers), nnx.List(made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, in] -> [B, out]."""
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), 1):
            x = layer(x)
            x = x if norm is None else norm(x)
            x = x if number == len(self.layers) else jax.nn.relu(x)
        return x


class Siamese(nnx.Module):
    """See the module docstring.

    Attributes:
      encoder, projector, predictor: the online network; the predictor may be None.
      target_encoder, target_projector: the moving copy, or None.
      queue: [K, D] keys of unit length, with a queue; queue_place: int32 [], where the next go.
    """

    def __init__(self, config: SiameseConfig, rngs: nnx.Rngs):
        """Builds the model; the copy equals the online network."""
        self.config = config
        self.encoder = config.encoder.make(rngs)
        norms = config.projector_norms
        widths = config.encoder.width, config.projector
        self.projector = Head(*widths, norms, norms, rngs) if config.projector else None
        layers = config.predictor, config.width
        predicts = config.predictor > 0
        self.predictor = Head(config.width, layers, True, False, rngs) if predicts else None
        moves = config.momentum is not None
        self.target_encoder = moving_copy(self.encoder) if moves else None
        self.target_projector = moving_copy(self.projector) if moves else None
        if config.queue:
            keys = jax.random.normal(rngs.params(), (config.queue, config.width))
            self.queue = Queue(normalize(keys))
            self.queue_place = Queue(jnp.zeros((), jnp.int32))

    def project(self, images: jax.Array) -> jax.Array:
        """Normalised images [B, H, W, 3] -> z [B, D]."""
        features = self.encoder(images)
        return features if self.projector is None else self.projector(features)

    def predict(self, z: jax.Array) -> jax.Array:
        """z [B, D] -> p [B, D]; z itself without a predictor."""
        return z if self.predictor is None else self.predictor(z)

    def target(self, images: jax.Array) -> jax.Array:
        """As `project`, by the moving copy; no gradient."""
        features = self.target_encoder(images)
        if self.target_projector is not None:
            features = self.target_projector(features)
        return jax.lax.stop_gradient(features)

    def follow(self) -> None:
        """Moves the copy towards the online network."""
        momentum = self.config.momentum
        for moving, online in (
            (self.target_encoder, self.encoder),
            (self.target_projector, self.projector),
        ):
            averages = dict(_fields(moving, Ema))
            for name, parameter in _fields(online, nnx.Param):
                value = jax.lax.stop_gradient(parameter[...])
                average = averages[name]
                average[...] = momentum * average[...] + (1.0 - momentum) * value

    def enqueue(self, keys: jax.Array) -> None:
        """Puts unit keys [B, D] in place of the oldest. UserError unless B divides the queue."""
        size, count = self.queue.shape[0], keys.shape[0]
        if size % count:
            raise UserError(
                f"SiameseConfig.queue={size} is no multiple of the batch of {count}; change one"
            )
        place = self.queue_place[...]
        self.queue[...] = jax.lax.dynamic_update_slice(self.queue[...], keys, (place, 0))
        self.queue_place[...] = (place + count) % size


def moving_copy(module: nnx.Module | None) -> nnx.Module | None:
    """A copy whose parameters are `Ema` variables."""
    if module is None:
        return None
    copy = nnx.merge(*nnx.split(module))
    for _, node in list(nnx.iter_graph(copy)):
        if isinstance(node, nnx.Module):
            for field, value in list(vars(node).items()):
                if isinstance(value, nnx.Param):
                    setattr(node, field, Ema(jnp.copy(value[...])))
                elif isinstance(value, nnx.Variable):
                    setattr(node, field, value.replace(jnp.copy(value[...])))
    return copy


def _fields(module: nnx.Module | None, kind):
    """(path, variable) of every variable of a type."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, kind):
            yield path, node
