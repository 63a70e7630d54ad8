"""Rotary position embeddings, for text models that are grown into audio models.

Dimension i of a head's first half turns together with dimension i of the second, as in the
checkpoints of Llama, Qwen2 and Qwen3 on Hugging Face (the published RoPE, arXiv 2104.09864, turns
neighbours: the same up to an order of the dimensions). Frequencies may be stretched as in Llama 3.1
(modeling_rope_utils.py of transformers, `llama3`).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Slow turns are stretched by `factor`, fast ones kept, those between blended.

    Attributes:
      factor: how many times longer the context is.
      low_freq_factor, high_freq_factor: turns within `original_length` below which a frequency is
        slow, and above which it is fast.
      original_length: the context the model was first trained with.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


def frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None = None) -> np.ndarray:
    """Radians a position, float32[head_dim / 2]."""
    turns = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        within = scaling.original_length * turns / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((within - scaling.low_freq_factor) / span, 0.0, 1.0)
        turns = turns * (keep + (1.0 - keep) / scaling.factor)
    return turns.astype(np.float32)


def rotation(positions: jax.Array, turns: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(cosine, sine) float32[B, S, D / 2] at int32 positions [B, S]."""
    angles = positions[..., None].astype(jnp.float32) * turns
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, turned: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the heads of x [B, H, S, D] by `rotation`; computed in float32, in the type of x."""
    cosine, sine = (part[:, None] for part in turned)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    turned_x = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(turned_x, -1).astype(x.dtype)
