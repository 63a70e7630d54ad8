"""A model of how long a compiled program takes on a pod, and of what it waits for.

The program is walked in the order of its schedule. Computation and communication run side by side:
an asynchronous collective occupies its links from its start and is waited for at its end, a
synchronous one stops everything. Two models of computation:
- hybrid: matrix products by the compiler's own cycles, Pallas kernels at half of the peak, all else
  by its traffic at 0.85 of HBM's bandwidth (the compiler's cycles for those are four times that);
- roofline: products at 0.92 of the peak, or their traffic if that is longer; else the same.
Against two published runs, Llama 2 70B on 512 and 128B on 256 v5p, hybrid was 7 and 8 % too slow,
roofline 4 % too fast and 5 % too slow. What neither knows: the host, the input, stragglers, and
what communication costs the computation beside it.
"""

import collections
import dataclasses
import re

from t5x_audio.planning import collectives
from t5x_audio.planning.chips import Chip
from t5x_audio.planning.collectives import Torus
from t5x_audio.planning.hlo import Computation, Instruction, Module

MODELS = ("hybrid", "roofline")
_HBM_EFFICIENCY, _PRODUCT_EFFICIENCY, _KERNEL_EFFICIENCY = 0.85, 0.92, 0.5
# Neither reads nor writes, or is hidden behind the computation (copies between HBM and VMEM).
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota"),
    *("copy-start", "copy-done", "slice-start", "slice-done", "opt-barrier", "partition-id"),
    # SparseCores work beside the TensorCores; their collectives are told apart before.
    *("call-start", "call-done", "custom-call-start", "custom-call-update", "custom-call-done"),
}


@dataclasses.dataclass
class Use:
    """All collectives of one kind and manner in a step.

    Attributes:
      count: how many.
      bytes: that a device deals with.
      seconds: on the links.
      exposed: seconds during which nothing else is done.
    """

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0
    exposed: float = 0.0

    def add(self, other: "Use", times: int = 1) -> None:
        """`other`, that many times."""
        self.count += times * other.count
        self.bytes += times * other.bytes
        self.seconds += times * other.seconds
        self.exposed += times * other.exposed


@dataclasses.dataclass
class Step:
    """What a program takes and does, per device.

    Attributes:
      seconds: in all.
      products, kernels, rest: seconds of matrix products, Pallas kernels and all else in it.
      product_flops, kernel_flops: operations; of kernels as they were declared.
      uses: (kind of collective, 'async' or 'sync') -> Use.
    """

    seconds: float = 0.0
    products: float = 0.0
    kernels: float = 0.0
    rest: float = 0.0
    product_flops: int = 0
    kernel_flops: int = 0
    uses: dict[tuple[str, str], Use] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(Use)
    )

    @property
    def compute(self) -> float:
        """Seconds of computation."""
        return self.products + self.kernels + self.rest

    @property
    def exposed(self) -> float:
        """Seconds of communication that nothing hides."""
        return sum(use.exposed for use in self.uses.values())

    def add(self, other: "Step", times: int = 1) -> None:
        """`other`, that many times, behind this."""
        for name in ("seconds", "products", "kernels", "rest", "product_flops", "kernel_flops"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for key, use in other.uses.items():
            self.uses[key].add(use, times)


class StepTime:
    """Models a program: `StepTime(module, chip, torus).step()`."""

    def __init__(self, module: Module, chip: Chip, torus: Torus, model: str = "hybrid"):
        """`model` is one of MODELS."""
        self._module, self._chip, self._torus, self._model = module, chip, torus, model
        self._known: dict[str, Step] = {}

    def step(self) -> Step:
        """The whole program."""
        return self._walk(self._module.entry)

    def _walk(self, computation: Computation) -> Step:
        if computation.name not in self._known:
            self._known[computation.name] = _Walk(self, computation).step
        return self._known[computation.name]

    def inner(self, name: str) -> Step:
        """One run of a body, branch or called computation."""
        return self._walk(self._module.computations[name])

    # ---- one instruction ---------------------------------------------------------------------

    def collective(self, instruction: Instruction, computation: Computation):
        """(kind, bytes, seconds, links it occupies)."""
        kind = collectives.kind_of(instruction)
        size = collectives.payload(
            instruction, self._module.operand_bytes(instruction, computation)
        )
        members = collectives.groups(instruction)
        seconds = collectives.seconds(kind, size, members, self._torus, self._chip)
        links = tuple(members[0]) if kind == "collective-permute" else "rings"
        return kind, size, seconds, links

    def inside(self, called: str) -> tuple[Instruction, Computation] | None:
        """The collective in a computation that a fusion or a SparseCore runs."""
        computation = self._module.computations[called]
        for instruction in computation.instructions.values():
            if collectives.kind_of(instruction):
                return instruction, computation
        return None

    def offloaded(
        self, instruction: Instruction, computation: Computation
    ) -> tuple[Instruction, Computation] | None:
        """The collective that a SparseCore begins here, where its operands are at hand."""
        start = instruction
        if instruction.opcode == "custom-call-update":
            start = computation.instructions[instruction.operands[0]]
        elif instruction.opcode != "call-start":
            return None
        called = re.search(r"(?:called_computations=\{|to_apply=)%([^\s,}]+)", start.attributes)
        return self.inside(called[1]) if called else None

    def compute(self, instruction: Instruction, computation: Computation) -> Step:
        """What an instruction that is no collective and calls nothing takes."""
        flops = self._module.product_flops(instruction, computation)
        if flops:
            return Step(products=self._product_seconds(instruction, computation, flops),
                        product_flops=flops)  # fmt: skip
        if flops := instruction.cost_estimate.get("flops", 0):
            seconds = flops / (_KERNEL_EFFICIENCY * self._chip.flops / self._chip.devices)
            return Step(kernels=seconds, kernel_flops=flops)
        if instruction.opcode in _FREE:
            return Step()
        return Step(rest=self._traffic_seconds(instruction, computation))

    def _product_seconds(self, instruction, computation, flops: int) -> float:
        if self._model == "hybrid" and instruction.estimated_cycles:
            return instruction.estimated_cycles / self._chip.clock
        peak = _PRODUCT_EFFICIENCY * self._chip.flops / self._chip.devices
        return max(flops / peak, self._traffic_seconds(instruction, computation))

    def _traffic_seconds(self, instruction, computation) -> float:
        bandwidth = _HBM_EFFICIENCY * self._chip.hbm_bandwidth / self._chip.devices
        return hbm_traffic(self._module, instruction, computation) / bandwidth


class _Walk:
    """One pass over a computation; `step` is the result."""

    def __init__(self, times: StepTime, computation: Computation):
        self._times, self._computation = times, computation
        self._free_at: dict[object, float] = collections.defaultdict(float)
        self._pending: dict[str, tuple[float, tuple[str, str]]] = {}
        self.step = Step()
        for instruction in computation.instructions.values():
            self._visit(instruction)

    def _visit(self, instruction: Instruction) -> None:
        module = self._times._module
        if inner := module.inner(instruction):
            for name, trips in inner:
                self.step.add(self._times.inner(name), trips)
        elif collectives.kind_of(instruction):
            begins = instruction.opcode.endswith("-start")
            key = instruction.name if begins else None
            self._communicate(instruction, self._computation, key)
        elif instruction.opcode.endswith("-done") and instruction.operands[0] in self._pending:
            self._wait(instruction.operands[0])
        elif instruction.opcode == "fusion" and (
            found := self._times.inside(instruction.called("calls"))
        ):
            self._fused(instruction, *found)
        elif found := self._times.offloaded(instruction, self._computation):
            self._communicate(*found, instruction.name)
        else:
            self._compute(instruction)

    def _fused(self, fusion: Instruction, inside: Instruction, computation: Computation) -> None:
        """A fusion with a collective: its start, its end, work that carries it on, or all of it."""
        chain = re.search(r'chain_id="(\d+)"', inside.attributes)
        key = f"chain {chain[1]}" if chain else None
        if fusion.name.startswith("async-collective-start"):
            self._communicate(inside, computation, key or fusion.name)
        elif fusion.name.startswith("async-collective-done"):
            if key in self._pending:
                self._wait(key)
        else:
            if key not in self._pending:
                scatters = fusion.called("calls").startswith("all-reduce-scatter")
                self._communicate(inside, computation, None, "reduce-scatter" if scatters else None)
            self._compute(fusion)

    def _compute(self, instruction: Instruction) -> None:
        one = self._times.compute(instruction, self._computation)
        one.seconds = one.compute
        self.step.add(one)

    def _communicate(self, instruction, computation, key: str | None, name: str | None = None):
        """Starts a collective; without a key, also waits for it."""
        kind, size, seconds, links = self._times.collective(instruction, computation)
        if name == "reduce-scatter" and kind == "all-reduce":
            seconds /= 2  # the second half of an all-reduce is left out
        use = (name or kind, "sync" if key is None else "async")
        self.step.uses[use].add(Use(1, size, seconds))
        ends = max(self.step.seconds, self._free_at[links]) + seconds
        self._free_at[links] = ends
        self._pending[key or ""] = (ends, use)
        if key is None:
            self._wait("")

    def _wait(self, key: str) -> None:
        ends, use = self._pending.pop(key)
        exposed = max(0.0, ends - self.step.seconds)
        self.step.uses[use].exposed += exposed
        self.step.seconds += exposed


def hbm_traffic(module: Module, instruction: Instruction, computation: Computation) -> int:
    """Bytes that an instruction reads from and writes to HBM.

    Of an array that is only sliced the slices count, of one that is updated in place the update.
    """
    operands = [computation.instructions[name] for name in instruction.operands]
    if instruction.opcode == "dynamic-slice":
        return 2 * instruction.hbm_bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1].hbm_bytes
    if instruction.opcode != "fusion":
        return instruction.hbm_bytes + sum(operand.hbm_bytes for operand in operands)
    inside = module.computations[instruction.called("calls")]
    total, updated = 0, 0
    for operand, parameter in zip(operands, inside.parameters, strict=False):
        if operand.hbm_bytes:
            total += _read(module, inside, parameter.name, operand.hbm_bytes)
            updated += _updated(inside, parameter.name, operand.hbm_bytes)
    return total + max(0, instruction.hbm_bytes - updated)


def _read(module: Module, inside: Computation, name: str, whole: int) -> int:
    """Bytes read of a value of `whole` bytes by its users, also inside of nested fusions."""
    total = 0
    for user, place in inside.users(name):
        if user.opcode == "dynamic-slice":
            total += user.result_bytes
        elif _in_place(user, place):
            total += 2 * inside.instructions[user.operands[1]].result_bytes
        elif user.opcode == "bitcast" or "output_to_operand_aliasing" in user.attributes:
            total += _read(module, inside, user.name, whole)
        elif user.opcode == "fusion":
            nested = module.computations[user.called("calls")]
            total += _read(module, nested, nested.parameters[place].name, whole)
        else:
            return whole
    return min(total, whole) or whole


def _updated(inside: Computation, name: str, whole: int) -> int:
    """Bytes of a result that is the operand but for its update."""
    users = inside.users(name)
    return whole if users and all(_in_place(user, place) for user, place in users) else 0


def _in_place(user: Instruction, place: int) -> bool:
    return user.opcode == "dynamic-update-slice" and place == 0
