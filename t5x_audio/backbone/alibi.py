"""Square-root ALiBi: the positional bias of Step-1.

score[i, j] += -slope_h * sqrt(i - j) for j <= i. The bias falls off more slowly than linear ALiBi,
so kernels that know only the linear form (FlashAttention, splash) do not compute it.
Source: modeling_step1.py of stepfun-ai/Step-Audio-Chat; the slope rule is that of ALiBi (arXiv
2108.12409, app. A) with a tail of its own for head counts that are no power of two (48 and 96 are
not).
"""

import math

import jax
import jax.numpy as jnp

from t5x_audio.errors import UserError


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Slopes of `num_heads` heads.

    With n = 2^floor(log2 num_heads): 2^(-8 i / n) for i = 1..n, and for the remaining heads
    2^(-4 k / n) for k = 1, 3, 5, ...
    """
    if num_heads < 1:
        raise UserError(f"num_heads = {num_heads}: a transformer needs at least one head.")
    n = 2 ** int(math.floor(math.log2(num_heads)))
    main = [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]
    tail = [2.0 ** (-4.0 * k / n) for k in range(1, 2 * (num_heads - n), 2)]
    return tuple(main + tail)


def interpolate_slopes(slopes: tuple[float, ...], ratio: float) -> tuple[float, ...]:
    """Slopes for a context `ratio` times as long: flat heads are flattened most.

    slope_h / ratio^(W_h / 2), where W_h goes from 0 at the steepest head to 1 at the flattest, in
    proportion to log2 of the slope (`max_pos_interp_ratio` of vLLM's step1.py).
    """
    logs = [math.log2(slope) for slope in slopes]
    span = max(logs) - min(logs)
    if not span:
        return tuple(slopes)
    weights = [(max(logs) - log) / span for log in logs]
    return tuple(s * ratio ** (-w / 2) for s, w in zip(slopes, weights, strict=True))


def sqrt_distance(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    biased: bool = True,
) -> jax.Array:
    """sqrt(i - j) where query i may see key j, +inf where it may not.

    A key is seen when it is of the same segment and not later. The bias of head h is -slope_h times
    this, so that one table serves the mask and every head. Not `biased`: 0 where it may see.

    Args:
      query_positions: int32[B, Q], positions counted inside each segment.
      key_positions: int32[B, K].
      query_segments: int32[B, Q], 0 = padding.
      key_segments: int32[B, K].

    Returns:
      float32[B, Q, K].
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = (query_segments[:, :, None] == key_segments[:, None, :]) & (distance >= 0)
    root = jnp.sqrt(jnp.maximum(distance, 0).astype(jnp.float32)) if biased else 0.0
    return jnp.where(seen, root, jnp.inf)
