"""Layers shared by the conditioning encoder and the estimator of the flow: linear, norms, stacks.

Choices: norms compute in float32; group norm takes its statistics over valid frames only (the
published code counts padding in, which makes an utterance depend on its batch). Repeated layers are
stacked by `nnx.vmap` and run by `jax.lax.scan`, so compile time doesn't grow with depth.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_audio.vocoder.initialisers import fan_in


def linear(
    n_in: int,
    n_out: int,
    axes: tuple,
    *,
    dtype: str,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    stacked: int = 0,
    init=None,
) -> nnx.Linear:
    """`nnx.Linear` whose kernel carries logical `axes`, behind `stacked` 'layers' axes."""
    outer = ("layers",) * stacked
    init = init or fan_in()
    return nnx.Linear(
        n_in,
        n_out,
        use_bias=use_bias,
        kernel_init=nnx.with_metadata(init, logical_axes=(*outer, *axes)),
        bias_init=nnx.with_metadata(nnx.initializers.zeros_init(), logical_axes=(*outer, axes[-1])),
        dtype=jnp.dtype(dtype),
        rngs=rngs,
    )


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm in float32."""
    return nnx.LayerNorm(
        width, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )


class MaskedGroupNorm(nnx.Module):
    """Group norm over the valid frames of each utterance and the channels of each group."""

    def __init__(self, groups: int, channels: int, epsilon: float = 1e-5):
        """Affine parameters of [channels]; `groups` must divide `channels`."""
        self.groups, self.epsilon = groups, epsilon
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """[B, T, channels] with mask float32 [B, T, 1] -> float32, same shape."""
        batch, length, channels = x.shape
        grouped = x.astype(jnp.float32).reshape(batch, length, self.groups, -1)
        weight = mask[..., None]
        count = jnp.maximum(mask.sum(1), 1.0)[:, :, None, None] * (channels // self.groups)
        mean = (grouped * weight).sum((1, 3), keepdims=True) / count
        centred = grouped - mean
        variance = (jnp.square(centred) * weight).sum((1, 3), keepdims=True) / count
        normal = (centred * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return normal * self.scale[...] + self.bias[...]


def mish(x: jax.Array) -> jax.Array:
    """x * tanh(softplus(x)), written with one exponential: 3x faster on a CPU than the formula."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


def dropout(x: jax.Array, rate: float, rng: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity without a key."""
    if rng is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` layers of one kind as a module whose parameters have a leading layer axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return make(rngs)

    return build(rngs)


def run_stack(layers: nnx.Module, call, x: jax.Array, inputs=None) -> jax.Array:
    """x -> call(layer, x, inputs[i]) for each layer in turn; see `scan_stack`."""
    return scan_stack(layers, lambda *given: (call(*given), None), x, inputs)[0]


def scan_stack(layers: nnx.Module, call, x: jax.Array, inputs=None):
    """(x, output) = call(layer, x, inputs[i]) for each layer in turn, by one scan.

    What the layers sow (`nnx.Intermediate`) comes out stacked, here as in the other scans.

    Args:
      layers: of `stack`, or a list of such layers, as `cpu_weights.unstacked` makes it.
      call: (layer, x, input) -> (next x, output).
      x: what goes through the layers.
      inputs: a pytree with a leading axis of layers, or None.

    Returns:
      (x, outputs with a leading axis of layers)
    """
    if isinstance(layers, nnx.List):
        outputs = []
        for index, layer in enumerate(layers):
            x, output = call(layer, x, jax.tree.map(lambda a, i=index: a[i], inputs))
            outputs.append(output)
        return x, jax.tree.map(lambda *several: jnp.stack(several), *outputs)
    graphdef, state = nnx.split(layers)

    def body(x, layer):
        layer_state, layer_input = layer
        merged = nnx.merge(graphdef, layer_state)
        x, output = call(merged, x, layer_input)
        return x, (output, nnx.state(merged, nnx.Intermediate))

    x, (outputs, seen) = jax.lax.scan(body, x, (state, inputs))
    nnx.update(layers, seen)
    return x, outputs
