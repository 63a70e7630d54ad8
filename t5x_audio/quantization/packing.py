"""Weights as packed integers of 8, 4, 3 or 2 bits: how they lie on the disk and in memory.

Integers and scales are those of `fake_quant.quantize_weight`, so that a network trained to survive
quantisation is served as it was trained. With `group` each run of so many inputs has scales of its
own (GPTQ, arXiv 2210.17323, section 4), which a network that was not trained for it needs below 8
bits.

Choices:
- Eight integers of an output lie in `bits` bytes, one after the other from the lowest bit of the
  first byte on: 3 bits take 3 bits. Inputs are filled up with zeros to whole bytes and groups.
- Outputs stay the last axis, so that unpacking is shifts of whole rows and fuses into what reads
  the weight; stacks of layers keep their axes in front.
- Packing is NumPy's, some outputs at a time: beside a weight and its integers there is little else
  in memory.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from t5x_audio.errors import UserError

WIDTHS = (8, 4, 3, 2)
_TOGETHER = 8  # integers that fill whole bytes at every width
_AT_ONCE = 1 << 24  # weights that are rounded at once


@flax.struct.dataclass
class PackedWeight:
    """A matrix, or a stack of them.

    Attributes:
      packed: uint8 [..., bytes, outputs].
      scales: float32 [..., groups, outputs]; an integer stands for that many scales.
      bits: of an integer.
      inputs: rows of the matrix; the packed ones may be more.
    """

    packed: jax.Array | np.ndarray
    scales: jax.Array | np.ndarray
    bits: int = flax.struct.field(pytree_node=False)
    inputs: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for."""
        return (*self.packed.shape[:-2], self.inputs, self.packed.shape[-1])

    @property
    def nbytes(self) -> int:
        """Of integers and scales."""
        return self.packed.size + 4 * self.scales.size


def pack(weight: np.ndarray, bits: int, group: int | None = None) -> PackedWeight:
    """Rounds and packs a weight.

    Args:
      weight: float [..., inputs, outputs].
      bits: of WIDTHS.
      group: inputs that share a scale, a multiple of 8; None = all of them.

    Raises:
      UserError: no such width or group, fewer than two axes, or a weight that is not finite.
    """
    weight = np.asarray(weight)
    require_width(bits, group)
    if weight.ndim < 2 or not weight.size:
        raise UserError(f"a weight of shape {weight.shape} is no matrix; leave it unpacked")
    *stack, inputs, outputs = weight.shape
    count, groups = packed_sizes(inputs, bits, group)
    packed = np.empty((*stack, count, outputs), np.uint8)
    scales = np.empty((*stack, groups, outputs), np.float32)
    columns = max(1, _AT_ONCE * outputs // weight.size)
    for start in range(0, outputs, columns):
        some = (..., slice(start, start + columns))
        packed[some], scales[some] = _packed_columns(weight[some], bits, group)
    return PackedWeight(packed, scales, bits, inputs)


def _packed_columns(weight: np.ndarray, bits: int, group: int | None):
    """(bytes, scales) of some outputs."""
    weight = np.asarray(weight, np.float32)
    if not np.isfinite(weight).all():
        raise UserError("the weight has values that are not finite")
    rest = -weight.shape[-2] % (group or _TOGETHER)
    padded = np.pad(weight, [(0, 0)] * (weight.ndim - 2) + [(0, rest), (0, 0)])
    integers, scales = _rounded(padded, bits, group or padded.shape[-2])
    return _to_bytes(integers, bits), scales


def require_width(bits: int, group: int | None) -> None:
    """UserError unless weights can be packed so."""
    if bits not in WIDTHS:
        raise UserError(f"{bits} bits: weights are packed to {', '.join(map(str, WIDTHS))} bits")
    if group is not None and (group < _TOGETHER or group % _TOGETHER):
        raise UserError(f"group={group}: give a multiple of {_TOGETHER}, or None")


def packed_sizes(inputs: int, bits: int, group: int | None) -> tuple[int, int]:
    """(bytes, groups) of an output of so many inputs."""
    padded = inputs + -inputs % (group or _TOGETHER)
    return padded * bits // 8, padded // group if group else 1


def _rounded(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(int8 like `weight`, scales [..., groups, outputs])."""
    *stack, inputs, outputs = weight.shape
    grouped = weight.reshape(*stack, inputs // group, group, outputs)
    size = np.abs(grouped)
    largest = size.max(-2, keepdims=True)
    half = 2 ** (bits - 1)
    scales = largest / np.float32(half - 0.5)
    # The largest weight is a tie of the rounding, as in `fake_quant`.
    steps = np.where(
        size < largest, size / np.where(scales > 0, scales, 1.0), np.float32(half - 0.5)
    )
    steps = np.where(grouped < 0, -steps, np.where(scales > 0, steps, 0.0))
    integers = np.clip(np.rint(steps), -half, half - 1).astype(np.int8)
    return integers.reshape(weight.shape), scales[..., 0, :]


def _to_bytes(integers: np.ndarray, bits: int) -> np.ndarray:
    """int8 [..., 8 n, outputs] -> uint8 [..., bits n, outputs]."""
    if bits == 8:
        return integers.view(np.uint8)
    *stack, inputs, outputs = integers.shape
    words = np.zeros((*stack, inputs // _TOGETHER, outputs), np.uint32)
    eights = integers.reshape(*stack, inputs // _TOGETHER, _TOGETHER, outputs)
    for i in range(_TOGETHER):
        words |= (eights[..., i, :].astype(np.uint32) & (2**bits - 1)) << np.uint32(bits * i)
    made = np.stack([(words >> np.uint32(8 * i)) & 0xFF for i in range(bits)], axis=-2)
    return made.astype(np.uint8).reshape(*stack, -1, outputs)


def unpack(weight: PackedWeight, dtype=jnp.float32) -> jax.Array:
    """The matrix [..., inputs, outputs] that a packed weight stands for; pure and jittable."""
    integers = _to_integers(weight.packed, weight.bits)
    groups = weight.scales.shape[-2]
    *stack, inputs, outputs = integers.shape
    grouped = integers.reshape(*stack, groups, inputs // groups, outputs).astype(jnp.float32)
    wide = grouped * weight.scales[..., None, :]
    return wide.reshape(*stack, inputs, outputs)[..., : weight.inputs, :].astype(dtype)


def unpack_rows(weight: PackedWeight, rows: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Some rows of a matrix, which alone are unpacked: ints [...] -> [..., outputs]."""
    if weight.packed.ndim != 2:
        raise ValueError(f"rows of a stack of shape {weight.shape}; give one matrix")
    eights = jnp.asarray(weight.packed).reshape(-1, weight.bits, weight.packed.shape[-1])
    integers = _to_integers(eights[rows // _TOGETHER], weight.bits)
    if weight.bits == 8:  # bytes are integers one by one
        integers = integers.reshape(*rows.shape, _TOGETHER, -1)
    one = (rows % _TOGETHER)[..., None, None]
    integers = jnp.take_along_axis(integers, one, axis=-2)[..., 0, :]
    size = weight.packed.shape[0] * _TOGETHER // weight.bits // weight.scales.shape[0]
    return (integers * jnp.asarray(weight.scales)[rows // size]).astype(dtype)


def _to_integers(packed: jax.Array, bits: int) -> jax.Array:
    """uint8 [..., bits n, outputs] -> int8 or int32 [..., 8 n, outputs]."""
    if bits == 8:
        return jax.lax.bitcast_convert_type(jnp.asarray(packed), jnp.int8)
    *stack, count, outputs = packed.shape
    parts = jnp.asarray(packed).reshape(*stack, count // bits, bits, outputs).astype(jnp.uint32)
    words = sum(parts[..., i, :] << (8 * i) for i in range(bits))
    values = jnp.stack([words >> (bits * i) for i in range(_TOGETHER)], axis=-2)
    values = (values & (2**bits - 1)).astype(jnp.int32)
    half = 2 ** (bits - 1)
    return ((values ^ half) - half).reshape(*stack, -1, outputs)  # the highest bit is the sign
