"""Two views of an image, as SimSiam and SSQL see CIFAR: crop, colour, grey, flip, blur.

Source: megvii-research/SSQL-ECCV2022 (torchvision's RandomResizedCrop(0.2 to 1), ColorJitter(0.4,
0.4, 0.4, 0.1) with a chance of 0.8, grey 0.2, horizontal flip 0.5; Gaussian blur on ImageNet only).

Choices: part of the compiled step, so that a batch is uint8 pixels. Resizing is bilinear by two
matrix products an image. torchvision draws the order of the four colour changes for each image;
here one order holds for a view of the whole batch, so that each change is computed once. A crop
that would not fit is clipped to the image, where torchvision draws again.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclasses.dataclass(frozen=True)
class ImageAugmentation:
    """See the module docstring.

    Attributes:
      min_area: smallest crop, a share of the image's area.
      max_ratio: of the sides of a crop, either way.
      brightness, contrast, saturation, hue: strengths of the changes of colour.
      colour_probability, grey_probability, blur_probability: chances.
      blur_sigma: bounds, in pixels.
      mean, std: of the normalisation, of red, green and blue in [0, 1].
    """

    min_area: float = 0.2
    max_ratio: float = 4 / 3
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    colour_probability: float = 0.8
    grey_probability: float = 0.2
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2023, 0.1994, 0.2010)

    def __post_init__(self):
        if not 0.0 < self.min_area <= 1.0:
            raise UserError(f"ImageAugmentation.min_area={self.min_area}: give above 0 and up to 1")
        for name in ("colour_probability", "grey_probability", "blur_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"ImageAugmentation.{name}={getattr(self, name)}: give 0 to 1")

    def normalize(self, images: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] -> float32, as the networks take them."""
        return self._standard(images.astype(jnp.float32) / 255.0)

    def __call__(self, rng: jax.Array, images: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] -> one view of each, normalised float32 of the same shape."""
        rngs = jax.random.split(rng, 5)
        rows = (len(images), 1, 1, 1)
        x = self.crop(rngs[0], images.astype(jnp.float32) / 255.0)
        coloured = self.jitter(rngs[1], x)
        x = jnp.where(jax.random.uniform(rngs[2], rows) < self.colour_probability, coloured, x)
        x = jnp.where(jax.random.uniform(rngs[3], rows) < self.grey_probability, grey(x), x)
        if self.blur_probability:
            x = self.blur(rngs[4], x)
        return self._standard(x)

    def _standard(self, x):
        return (x - jnp.array(self.mean)) / jnp.array(self.std)

    def crop(self, rng: jax.Array, images: jax.Array) -> jax.Array:
        """Random resized crops [B, H, W, 3], every second one mirrored."""
        area_rng, ratio_rng, place_rng, flip_rng = jax.random.split(rng, 4)
        count, height, width, _ = images.shape
        area = jax.random.uniform(area_rng, (count,), minval=self.min_area) * height * width
        bound = jnp.log(self.max_ratio)
        ratio = jnp.exp(jax.random.uniform(ratio_rng, (count,), minval=-bound, maxval=bound))
        sizes = jnp.stack(
            [
                jnp.minimum(jnp.sqrt(area / ratio), height),
                jnp.minimum(jnp.sqrt(area * ratio), width),
            ],
            axis=-1,
        )
        sizes = jnp.maximum(jnp.round(sizes), 1.0)
        free = jnp.array([height, width]) - sizes
        starts = jnp.floor(jax.random.uniform(place_rng, (count, 2)) * (free + 1.0))
        flip = jax.random.bernoulli(flip_rng, 0.5, (count,))
        down = resize_matrix(starts[:, 0], sizes[:, 0], height, jnp.zeros(count, bool))
        across = resize_matrix(starts[:, 1], sizes[:, 1], width, flip)
        return jnp.einsum("byh,bhwc,bxw->byxc", down, images, across)

    def jitter(self, rng: jax.Array, x: jax.Array) -> jax.Array:
        """Brightness, contrast, saturation and hue [B, H, W, 3], in a random order."""
        order_rng, rng = jax.random.split(rng)
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        draws = jax.random.uniform(rng, (4, len(x), 1, 1, 1), minval=-1.0)
        amounts = [draw * strength for draw, strength in zip(draws, strengths, strict=True)]

        def mixed(other, amount):
            return lambda x: jnp.clip(other(x) + (1.0 + amount) * (x - other(x)), 0.0, 1.0)

        changes = (
            mixed(jnp.zeros_like, amounts[0]),
            mixed(lambda x: jnp.mean(grey(x), axis=(1, 2), keepdims=True), amounts[1]),
            mixed(grey, amounts[2]),
            lambda x: turn_hue(x, amounts[3]),
        )
        for which in jax.random.permutation(order_rng, 4):
            x = jax.lax.switch(which, changes, x)
        return x

    def blur(self, rng: jax.Array, x: jax.Array) -> jax.Array:
        """Gaussian blur of some images [B, H, W, 3]."""
        sigma_rng, rng = jax.random.split(rng)
        low, high = self.blur_sigma
        sigma = jax.random.uniform(sigma_rng, (len(x), 1, 1), minval=low, maxval=high)

        def matrix(size):
            places = jnp.arange(size)
            distance = (places[:, None] - places)[None]
            weights = jnp.exp(-0.5 * jnp.square(distance / sigma))
            return weights / weights.sum(-1, keepdims=True)

        blurred = jnp.einsum("byh,bhwc,bxw->byxc", matrix(x.shape[1]), x, matrix(x.shape[2]))
        chosen = jax.random.uniform(rng, (len(x), 1, 1, 1)) < self.blur_probability
        return jnp.where(chosen, blurred, x)


def resize_matrix(start: jax.Array, length: jax.Array, size: int, mirrored: jax.Array):
    """Bilinear interpolation of `length` [B] pixels from `start` [B] on to `size`: [B, size, size].

    Rows are outputs, in reverse where `mirrored`; pixels outside of the crop are not read.
    """
    places = jnp.arange(size, dtype=jnp.float32)
    places = jnp.where(mirrored[:, None], size - 1.0 - places, places)
    offset = (places + 0.5) * length[:, None] / size - 0.5
    source = start[:, None] + jnp.clip(offset, 0.0, length[:, None] - 1.0)
    return jnp.maximum(0.0, 1.0 - jnp.abs(source[..., None] - jnp.arange(size)))


def grey(x: jax.Array) -> jax.Array:
    """[..., 3] -> luma in all three channels."""
    return jnp.broadcast_to(jnp.sum(x * jnp.array(GREY), axis=-1, keepdims=True), x.shape)


def turn_hue(x: jax.Array, amount: jax.Array) -> jax.Array:
    """Moves the hue of [..., 3] in [0, 1] by `amount` turns, in HSV."""
    value = jnp.max(x, axis=-1, keepdims=True)
    chroma = value - jnp.min(x, axis=-1, keepdims=True)
    red, green, blue = jnp.split(x, 3, axis=-1)
    safe = jnp.where(chroma > 0.0, chroma, 1.0)
    sixth = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    # HSV to RGB without branches: channel n is v - c * clip(min(k, 4 - k), 0, 1), k = n + 6 h.
    k = (jnp.array([5.0, 3.0, 1.0]) + sixth + 6.0 * amount) % 6.0
    return value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)
