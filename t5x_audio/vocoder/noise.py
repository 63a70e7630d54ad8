"""Noise that belongs to frames: a frame's draw depends on its number, not on what is around it.

Padding doesn't change it then, nor where a window of a stream begins, so that a stream starts from
the noise of the whole.
"""

import jax


def frame_noise(rng: jax.Array, frames: jax.Array, width: int) -> jax.Array:
    """Standard normal draws float32 [F, width] of the frames with the numbers int32 [F]."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, frames)
    return jax.vmap(lambda key: jax.random.normal(key, (width,)))(keys)
