"""Images as soft tokens: a frozen vision transformer (ViT), an embedding for every patch.

Step-Omni attaches a pretrained image encoder and keeps it frozen (Step-Audio, arXiv 2502.11946,
section 4); which one is not published. Here it is CLIP's vision tower (arXiv 2103.00020) as LLaVA
takes it (arXiv 2304.08485): the patches behind the last layer but one, without class token and
final norm. Weights are drawn from a seed, for tests and trials, or read by `interop.clip`.

The layers are Whisper's but for the activation. Its keys have no bias and CLIP's have: one vector
added to every key adds the same to all scores of a query, which softmax does not see.
"""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_audio.errors import UserError
from t5x_audio.tokenizers.whisper import ACTIVATIONS, BlockConfig, Blocks

# Of CLIP's training images, red, green and blue in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig:
    """Sizes; the defaults are those of CLIP ViT-L/14 without its last layer.

    Attributes:
      image_size, patch_size: sides in pixels; images are squares of whole patches.
      width, num_layers, num_heads, mlp_dim: of the transformer.
      activation: 'quick_gelu' or 'gelu'.
      dtype: type of activations and matrix products.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    num_layers: int = 23
    num_heads: int = 16
    mlp_dim: int = 4096
    activation: str = "quick_gelu"
    dtype: str = "float32"

    def __post_init__(self):
        if self.image_size % self.patch_size or self.width % self.num_heads:
            raise UserError(
                f"ImageEncoderConfig: image_size={self.image_size} must be a multiple of "
                f"patch_size={self.patch_size}, width={self.width} of num_heads={self.num_heads}"
            )
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"ImageEncoderConfig: activation={self.activation!r}: one of {known}")

    @property
    def tokens(self) -> int:
        """Soft tokens of an image: its patches."""
        return (self.image_size // self.patch_size) ** 2

    def make(self, rngs: nnx.Rngs) -> "ImageEncoder":
        """Builds the encoder with fresh weights."""
        return ImageEncoder(self, rngs)


class ImageEncoder(nnx.Module):
    """Pixels in, an embedding of every patch out."""

    def __init__(self, config: ImageEncoderConfig, rngs: nnx.Rngs):
        """Weights as a ViT starts."""
        self.config = config
        width, inputs = config.width, 3 * config.patch_size**2

        def normal(shape, std):
            return nnx.Param(std * jax.random.normal(rngs.params(), shape))

        self.patches = normal((inputs, width), inputs**-0.5)
        self.class_token = normal((width,), 0.02)
        self.positions = normal((config.tokens + 1, width), 0.02)
        self.norm = nnx.LayerNorm(
            width, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
        )
        block = BlockConfig(
            width, config.num_heads, config.mlp_dim, config.dtype, activation=config.activation
        )
        self.blocks = Blocks(config.num_layers, block, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """uint8 [N, image_size, image_size, 3] -> float32 [N, tokens, width], row by row."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        count, size, side = len(images), config.patch_size, config.image_size // config.patch_size
        pixels = (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
        pixels = pixels.reshape(count, side, size, side, size, 3).swapaxes(2, 3)
        x = pixels.reshape(count, side * side, -1).astype(dtype) @ self.patches[...].astype(dtype)
        first = jnp.broadcast_to(self.class_token[...].astype(dtype), (count, 1, config.width))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...].astype(dtype)
        x = self.norm(x).astype(dtype)
        x = self.blocks(x, jnp.ones(x.shape[:2], bool))
        return x[:, 1:].astype(jnp.float32)


class FrozenImageEncoder:
    """An encoder as the jobs call it; anything else with these members serves as well.

    Attributes:
      image_size: side of the images in pixels.
      name: differs where the weights do.
    """

    def __init__(self, encoder: ImageEncoder):
        """`encoder` must not change any more."""
        graphdef, state = nnx.split(encoder)
        self.image_size = encoder.config.image_size
        digest = hashlib.sha256(repr(encoder.config).encode())
        for leaf in jax.tree.leaves(state):
            digest.update(np.asarray(leaf).tobytes())
        self.name = f"vit-{digest.hexdigest()[:12]}"
        run = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))
        self._run = lambda images: run(state, images)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, image_size, image_size, 3] -> float32 [N, k, width]."""
        return np.asarray(self._run(images))


def random_image_encoder(config: ImageEncoderConfig, seed: int = 0) -> FrozenImageEncoder:
    """An encoder that has seen nothing: its patches still tell images apart."""
    return FrozenImageEncoder(jax.jit(lambda: config.make(nnx.Rngs(seed)))())
