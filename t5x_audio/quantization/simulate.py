"""Runs a model as if quantised: its ranges are observed in one forward, used in the next.

    with observing(model, rules) as ranges:
        z = model(x)
    with quantized(model, rules, ranges, bits=(4, 4)):
        z_q = model(x)

Choices:
- Both are contexts around forward calls of a live module, inside or outside of a compiled
  function. What they change is undone at the end: parameters have their own values and paths at
  all times outside, so a model trained this way is the plain model, in checkpoints too.
- Weights: each parameter holds its quantised value meanwhile. A gradient flows through it.
- Activations: the module's class is exchanged for one whose call ends with the quantiser; of a
  tuple the first array is meant. Attributes, isinstance and paths stay as they were.
- Ranges are plain arrays by path, [2] (smallest, largest) or [layers, 2]. They come out of a scan
  over stacked layers where its body hands on what the layers saw (`nnx.Intermediate`); otherwise
  UserError.
- All that passes in one `observing` shares a range: both views of a Siamese step, or all batches of
  a calibration. On a mesh the range is that of the global batch.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

from t5x_audio.errors import UserError
from t5x_audio.quantization import fake_quant
from t5x_audio.quantization.rules import Output, Rules, find

Ranges = dict[str, jax.Array]


class Seen(nnx.Intermediate):
    """Smallest and largest value of an output so far."""


class Given(nnx.Variable):
    """Range and bits by which an output is quantised."""


@contextlib.contextmanager
def observing(model: nnx.Module, rules: Rules) -> Iterator[Ranges]:
    """Notes the ranges of the activations that `rules` quantise.

    Yields:
      a dict that holds them when the context ends: {path: float32 [2] or [layers, 2]}.
    """
    outputs = find(model, rules)[1]
    ranges: Ranges = {}
    start = jnp.array([jnp.inf, -jnp.inf], float)  # float32, or 64 where that is enabled
    with _exchanged(outputs, _observer):
        for output in outputs.values():
            output.module.quantizer_seen = Seen(jnp.broadcast_to(start, (*output.stack, 2)))
        try:
            yield ranges
            for name, output in outputs.items():
                ranges[name] = output.module.quantizer_seen[...]
        finally:
            for output in outputs.values():
                del output.module.quantizer_seen


@contextlib.contextmanager
def quantized(model: nnx.Module, rules: Rules, ranges: Ranges, bits) -> Iterator[None]:
    """Forwards inside are those of the quantised model.

    Args:
      model: the live module.
      rules: what is quantised.
      ranges: of `observing` or `calibrate`, by the same rules.
      bits: (of weights, of activations) where a rule has None; numbers from 2 to 8, or traced.

    UserError for numbers out of bounds and for a layer without a range, or, where the ranges are
    not traced, with one that is a point or not finite.
    """
    weight_bits, activation_bits = (_checked(b, n) for b, n in zip(bits, _NAMES, strict=True))
    weights, outputs = find(model, rules)
    if missing := outputs.keys() - ranges.keys():
        raise UserError(f"{min(missing)}: has no range; calibrate with the same rules first")
    check_ranges({n: ranges[n] for n in outputs if not isinstance(ranges[n], jax.core.Tracer)})
    own = {name: weight.variable[...] for name, weight in weights.items()}
    with _exchanged(outputs, _quantizer):
        try:
            for name, weight in weights.items():
                asked = weight_bits if weight.bits is None else weight.bits
                weight.variable[...] = fake_quant.quantize_weight(
                    own[name], asked, weight.channel_axes
                )
            for name, output in outputs.items():
                asked = activation_bits if output.bits is None else output.bits
                asked = jnp.broadcast_to(jnp.asarray(asked, jnp.float32), output.stack)
                output.module.quantizer_range = Given(jax.lax.stop_gradient(ranges[name]))
                output.module.quantizer_bits = Given(asked)
            yield
        finally:
            for name, weight in weights.items():
                weight.variable[...] = own[name]
            for output in outputs.values():
                for field in ("quantizer_range", "quantizer_bits"):
                    if hasattr(output.module, field):
                        delattr(output.module, field)


_NAMES = ("bits of weights", "bits of activations")


def _checked(bits, name: str):
    if isinstance(bits, int | np.integer):
        fake_quant.require_bits(int(bits), name)
    return bits


def calibrate(
    model: nnx.Module,
    rules: Rules,
    batches: Iterable,
    forward: Callable | None = None,
) -> Ranges:
    """Ranges over some batches, outside of any compiled function.

    Args:
      model: the live module, set to evaluate.
      rules: what is quantised.
      batches: inputs, of one shape or few.
      forward: (model, batch) -> anything; None calls the model.

    Raises:
      UserError: no batch at all, or an activation that is constant or not finite.
    """
    graphdef, state = nnx.split(model)

    @jax.jit
    def seen(state, batch):
        live = nnx.merge(graphdef, state)
        with observing(live, rules) as ranges:
            live(batch) if forward is None else forward(live, batch)
        return ranges

    total = None
    for batch in batches:
        ranges = seen(state, batch)
        total = ranges if total is None else {n: joined(total[n], r) for n, r in ranges.items()}
    if total is None:
        raise UserError("calibration: there are no data to take ranges from")
    check_ranges(total)
    return total


def joined(a: jax.Array, b: jax.Array) -> jax.Array:
    """The range [..., 2] that holds both."""
    return jnp.stack([jnp.minimum(a[..., 0], b[..., 0]), jnp.maximum(a[..., 1], b[..., 1])], -1)


def check_ranges(ranges: Ranges) -> None:
    """UserError naming the first layer whose range is a point or not finite."""
    for name, bounds in jax.device_get(ranges).items():
        if np.isinf(bounds).any() and (bounds[..., 0] > bounds[..., 1]).any():
            raise UserError(
                f"{name}: nothing was observed of this layer; it was not called, or the scan that "
                "runs it does not hand on what its layers saw"
            )
        if not np.isfinite(bounds).all():
            raise UserError(f"{name}: its activations are not finite; calibrate with other data")
        if (bounds[..., 0] == bounds[..., 1]).any():
            raise UserError(f"{name}: its activations are constant; calibrate with other data")


# ---- exchanged classes ------------------------------------------------------------------------


@contextlib.contextmanager
def _exchanged(outputs: dict[str, Output], subclass) -> Iterator[None]:
    kinds = [(output.module, type(output.module)) for output in outputs.values()]
    try:
        for module, kind in kinds:
            object.__setattr__(module, "__class__", subclass(kind))
        yield
    finally:
        for module, kind in kinds:
            object.__setattr__(module, "__class__", kind)


def _first(output, change):
    """`output` with its array, or the first of a tuple, changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)


@functools.cache
def _observer(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass whose calls note the range of what they return."""

    def call(self, *args, **kwargs):
        def note(x):
            wide = jax.lax.stop_gradient(x).astype(fake_quant.wide_type(x))
            seen = jnp.stack([jnp.min(wide), jnp.max(wide)])
            self.quantizer_seen[...] = joined(self.quantizer_seen[...], seen)
            return x

        return _first(kind.__call__(self, *args, **kwargs), note)

    return type(kind.__name__, (kind,), {"__call__": call, "__doc__": kind.__doc__})


@functools.cache
def _quantizer(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass whose calls quantise what they return."""

    def call(self, *args, **kwargs):
        bounds, bits = self.quantizer_range[...], self.quantizer_bits[...]
        return _first(
            kind.__call__(self, *args, **kwargs),
            lambda x: fake_quant.quantize_activation(x, bounds, bits),
        )

    return type(kind.__name__, (kind,), {"__call__": call, "__doc__": kind.__doc__})
