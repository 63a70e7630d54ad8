"""What a TPU chip can do, by generation.

Peak rates, HBM and bandwidths: Google's documentation of each generation and "How to Scale Your
Model" (jax-ml.github.io/scaling-book, chapter on TPUs). Operations a cycle follow from the matrix
units, 4 of 128 x 128 a core up to v5p and 2 of 256 x 256 from v6e; with the peak they give the
clock in which the compiler's estimates are counted.
"""

import dataclasses

from t5x_audio.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation; rates a second and chip.

    Attributes:
      platform: name in a topology ('v5p:8x8x16').
      kind: name of its devices ('TPU v5').
      flops: of bfloat16 matrix products.
      int8_ops: of int8 matrix products.
      hbm_bytes: what a program may fill, as its compiler counts.
      hbm_bandwidth: bytes.
      link_bandwidth: bytes one way on one link of the torus.
      dims: of the torus.
      flops_per_cycle: of all matrix units of what the compiler calls a device.
      devices: of the compiler, in one chip.
    """

    platform: str
    kind: str
    flops: float
    int8_ops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dims: int
    flops_per_cycle: int
    devices: int = 1

    @property
    def clock(self) -> float:
        """Cycles a second of a device."""
        return self.flops / self.devices / self.flops_per_cycle


_GIB = 2**30
CHIPS = {
    chip.platform: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, 275e12, 31.0 * _GIB, 1.23e12, 4.5e10, 3, 262144),
        Chip("v5e", "TPU v5 lite", 197e12, 394e12, 15.75 * _GIB, 8.1e11, 4.5e10, 2, 131072),
        Chip("v5p", "TPU v5", 459e12, 918e12, 95.0 * _GIB, 2.765e12, 9e10, 3, 262144),
        Chip("v6e", "TPU v6 lite", 918e12, 1836e12, 31.25 * _GIB, 1.64e12, 9e10, 2, 524288),
        Chip("tpu7x", "TPU7x", 2307e12, 4614e12, 188.0 * _GIB, 7.38e12, 9e10, 3, 524288, devices=2),
    )
}


def chip(platform: str) -> Chip:
    """The generation of that name. UserError when there is none."""
    if platform not in CHIPS:
        raise UserError(f"{platform}: no such TPU; there are {', '.join(CHIPS)}")
    return CHIPS[platform]


def of_device(kind: str) -> Chip | None:
    """The generation whose devices are of that kind; None for a CPU or GPU."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)
