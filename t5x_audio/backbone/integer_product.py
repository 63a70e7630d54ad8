"""Products of 8-bit integers: weights as they are kept, activations rounded as they come.

Every row of activations has a scale of its own, of its largest value (dynamic, symmetric; LLM.int8,
arXiv 2208.07339, section 2.1, without its outliers). Rounding and product are Qwix's: integers are
summed in int32 and scaled behind it, which a TPU does in its matrix unit at twice the rate of
bfloat16.
"""

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

_CONTRACT_LAST = (((1,), (1,)), ((), ()))
_FEWEST_ROWS = 2  # with one, XLA's CPU compiler leaves the library's product for a slower loop


class Integers(nnx.Param):
    """A weight of a decoder, int8 [O, I], for `integer_product`."""


def integer_product(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., I] times an int8 kernel [O, I] with a scale [O] -> [..., O] in the type of x."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    count = len(rows)
    rows = jnp.pad(rows, ((0, max(_FEWEST_ROWS - count, 0)), (0, 0)))
    rows = qwix.quantize(rows, jnp.int8, channelwise_axes=(0,))
    weight = qwix.QArray(kernel, scale.astype(jnp.float32)[:, None])
    product = qwix.dot_general(weight, rows, _CONTRACT_LAST)[:, :count]
    return product.T.reshape(*x.shape[:-1], -1).astype(x.dtype)
