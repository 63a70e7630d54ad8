"""Bits drawn anew for each step of a training that is to serve every width."""

import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError
from t5x_audio.quantization import fake_quant

Bounds = tuple[int, int]


def require_bounds(owner: str, bounds: dict[str, Bounds], most: int = fake_quant.MAX_BITS) -> None:
    """UserError naming `owner` and the field unless bounds are (fewest, most) bits up to `most`."""
    for name, (low, high) in bounds.items():
        for bits in (low, high):
            fake_quant.require_bits(bits, f"{owner}.{name}", most)
        if low > high:
            raise UserError(f"{owner}.{name}=({low}, {high}): give the fewest first")


def draw_bits(rng: jax.Array, weights: Bounds, activations: Bounds | None) -> tuple:
    """(bits of weights, of activations), float32 scalars, each width as likely as the others.

    `activations` None = one draw for both.
    """
    rngs, bounds = jax.random.split(rng), (weights, activations)
    if activations is None:
        rngs, bounds = (rngs[0], rngs[0]), (weights, weights)
    return tuple(
        jax.random.randint(key, (), low, high + 1).astype(jnp.float32)
        for key, (low, high) in zip(rngs, bounds, strict=True)
    )
