"""How the vocoder's weights start: uniform, of a stated standard deviation, from an integer hash.

Choice, measured on a CPU: each threefry draw of a new shape costs 0.5 s of compile time (the
vocoder has a hundred), the hash 0.04 s. It is a function of key and position alone, so the weights
are the same on every backend and under every sharding. The mixer is the 32-bit "lowbias" one of C.
Wellons (hash-prospector). Noise and dropout in training use JAX's own generator.
"""

import functools
import math

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


@functools.partial(jax.jit, static_argnums=(1, 2))  # traced once for each shape
def hashed_uniform(key: jax.Array, shape, standard_deviation: float) -> jax.Array:
    """Float32 of `shape`, uniform around 0 with the given standard deviation."""
    words = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(_GOLDEN)
    for i in range(words.shape[0]):
        bits = _mix(bits ^ words[i])
    unit = (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1.0
    return (unit * (standard_deviation * math.sqrt(3.0))).reshape(shape)


def fan_in(gain: float = 1.0):
    """Initialiser of variance gain / inputs, for kernels [..., in, out]: 1 LeCun, 2 He."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        deviation = math.sqrt(gain / math.prod(shape[:-1]))
        return hashed_uniform(key, shape, deviation).astype(dtype)

    return init


def spread(standard_deviation: float):
    """Initialiser of one standard deviation whatever the shape."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return hashed_uniform(key, shape, standard_deviation).astype(dtype)

    return init


def interpolating(stride: int, standard_deviation: float):
    """Initialiser of an up-sampling kernel [K, in, out]: channels mixed at random, time linear.

    Independent taps would give each of the `stride` output phases another weight, a tone at the
    input's frame rate from the first step on (checkerboard artefacts; Aitken et al. 2017,
    arXiv 1707.02937). A triangle over time has none. The deviation is that of the mixture.
    """

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        taps = jnp.arange(shape[0]) - (shape[0] - 1) / 2.0
        triangle = jnp.maximum(1.0 - jnp.abs(taps) / stride, 0.0)
        mixture = hashed_uniform(key, shape[1:], standard_deviation)
        return (triangle[:, None, None] * mixture).astype(dtype)

    return init


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
