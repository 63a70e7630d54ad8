"""Collectives of a compiled program: who talks to whom, how much, and how long on the torus.

The model, with one-way bandwidth b of a link (after "How to Scale Your Model", chapters on TPUs and
on sharding): a collective runs rings along every axis of the torus that its group spans, both ways
where the axis is whole and closed, one way on a part of it. To gather or to scatter a whole of W
bytes among n takes W (n - 1) / n over all those links, an all-reduce twice that. In an all-to-all
of V bytes a device every axis carries n V / 8 over b, n V / 4 if it is open; the longest counts. A
permutation takes its bytes over b for every hop of its longest way. Between slices the network of
the data centre takes the ring's place. Every hop costs a microsecond. Modelled, not measured.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from t5x_audio.planning.chips import Chip
from t5x_audio.planning.hlo import Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
DCN_BANDWIDTH = 6.25e9
"""Bytes a second and chip between slices."""
_HOP_SECONDS = 1e-6


def kind_of(instruction: Instruction) -> str | None:
    """Which of KINDS an instruction is or starts, or None."""
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in KINDS else None


@dataclasses.dataclass(frozen=True)
class Torus:
    """Where the devices of a program sit.

    Attributes:
      coords: int [devices, axes], in the order of the program's mesh.
      shape: of the torus.
      closed: which axes have a link from end to end.
      slices: int [devices]; slices are joined by the network of the data centre.
    """

    coords: np.ndarray
    shape: tuple[int, ...]
    closed: tuple[bool, ...]
    slices: np.ndarray

    @classmethod
    def of(cls, devices: Sequence) -> "Torus":
        """From the devices of a JAX topology, in the order of the mesh."""
        coords = np.array([tuple(device.coords) for device in devices])
        slices = np.array([getattr(device, "slice_index", 0) or 0 for device in devices])
        shape = tuple(int(n) for n in coords.max(0) + 1)
        # v4, v5p and tpu7x close every axis made of whole cubes of 4 x 4 x 4; the flat ones, v5e
        # and v6e, only their axes of 16.
        flat = len(shape) < 3 or shape[2] == 1
        return cls(coords, shape, tuple(n == 16 if flat else n % 4 == 0 for n in shape), slices)

    def axes(self, group: Sequence[int]) -> list[tuple[int, bool]]:
        """(devices along it, whether they close a ring) of every axis that a group spans."""
        members = self.coords[list(group)]
        spans = [(len(set(members[:, axis])), axis) for axis in range(len(self.shape))]
        return [(n, n == self.shape[a] and self.closed[a]) for n, a in spans if n > 1]

    def crosses_slices(self, group: Sequence[int]) -> bool:
        """Whether the group has members in several slices."""
        return len(set(self.slices[list(group)].tolist())) > 1

    def hops(self, source: int, target: int) -> int:
        """Links on the shortest way."""
        total = 0
        for axis, size in enumerate(self.shape):
            away = abs(int(self.coords[source][axis] - self.coords[target][axis]))
            total += min(away, size - away) if self.closed[axis] else away
        return total


# mesh['a'=2,'b'=4] {'b'}, or mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}
_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[(?P<axes>[^\]]*)\]"
    r"(?:, device_ids=\(\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))?"
    r" \{(?P<chosen>[^}]*)\}"
)


def groups(instruction: Instruction) -> list[list[int]]:
    """The groups of a collective in numbers of devices; of a permutation its pairs."""
    if pairs := instruction.attribute("source_target_pairs"):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)]
    text = instruction.attribute("replica_groups") or ""
    if text.startswith("{"):
        return [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", text)]
    if iota := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _arranged(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2])).tolist()
    if named := _NAMED_GROUPS.search(instruction.attributes):
        axes = re.findall(r"'([^']+)'=(\d+)", named["axes"])
        inside = [i for i, (axis, _) in enumerate(axes) if f"'{axis}'" in named["chosen"]]
        outside = [i for i in range(len(axes)) if i not in inside]
        sizes = [int(n) for _, n in axes]
        order = _arranged(named["dims"] or ",".join(map(str, sizes)), named["order"])
        order = order.reshape(sizes).transpose(outside + inside)
        return order.reshape(-1, math.prod(sizes[i] for i in inside)).tolist()
    raise ValueError(f"{instruction.name}: cannot read its groups: {text[:80]!r}")


def _arranged(dims: str, order: str | None) -> np.ndarray:
    """Device numbers in an array of 'dims', its axes in another 'order'."""
    numbers = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def payload(instruction: Instruction, operand_bytes: int) -> int:
    """Bytes that count for its time: the whole that is gathered, reduced or scattered.

    Of an all-to-all or a permutation, what one device holds.
    """
    if kind_of(instruction) == "reduce-scatter":
        return operand_bytes
    if instruction.opcode.endswith("-start"):  # its results are source, target and flags
        return max(array.bytes for array in instruction.results)
    return instruction.result_bytes


def seconds(
    kind: str, size: int, members: Sequence[Sequence[int]], torus: Torus, chip: Chip
) -> float:
    """Modelled time of one collective; 0 where nobody has a partner.

    Args:
      kind: one of KINDS.
      size: of `payload`.
      members: of `groups`.
      torus, chip: where it runs.
    """
    if kind == "collective-permute":
        hops = max(torus.hops(*pair) for pair in members)
        return hops * (size / chip.link_bandwidth + _HOP_SECONDS)
    group = members[0]
    count = len(set(group))
    if count < 2:
        return 0.0
    rounds = 2 if kind == "all-reduce" else 1
    if torus.crosses_slices(group):
        return rounds * size * (count - 1) / count / DCN_BANDWIDTH
    axes = torus.axes(group)
    latency = rounds * _HOP_SECONDS * sum(n // 2 if ring else n - 1 for n, ring in axes)
    if kind == "all-to-all":
        longest = max(n / (8 if ring else 4) for n, ring in axes)
        return size * longest / chip.link_bandwidth + latency
    links = sum(2 if ring else 1 for _, ring in axes)
    return rounds * size * (count - 1) / count / (chip.link_bandwidth * links) + latency
