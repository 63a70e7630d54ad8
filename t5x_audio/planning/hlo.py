"""Optimised HLO as XLA prints it: what is executed, how often, in what order, at what cost.

A reader of the text that `compiled.as_text()` gives, enough to cost a program that was compiled for
a pod but cannot be run: instructions with their shapes and attributes, loops with their trip
counts, and the operations of matrix products hidden in fusions. On TPU a matrix product is a
convolution whose padding and dilation may multiply zeros; only products within the operand count.
"""

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1, "s2": 1, "u2": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9][a-z]*)?)\[([0-9,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([^\s=]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .* \{$")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type, dimensions and memory space of one array; space 0 is HBM, 1 VMEM, others are small."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without padding of its layout; types of 8-bit floats and less count a byte."""
        return self.size * _BYTES.get(self.dtype, 0 if self.dtype == "token" else 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: as printed.
      results: its arrays, a tuple's flattened.
      operands: names of instructions of the same computation.
      attributes: the text behind the operands.
      literal: the text between the brackets, for constants and parameters.
      root: it is the computation's result.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str
    root: bool

    @property
    def result_bytes(self) -> int:
        """Of all its arrays."""
        return sum(array.bytes for array in self.results)

    @property
    def hbm_bytes(self) -> int:
        """Of those of its arrays that lie in HBM."""
        return sum(array.bytes for array in self.results if not array.space)

    def attribute(self, name: str) -> str | None:
        """The text of `name=...` up to the next top-level comma, or None."""
        found = re.search(rf"\b{name}=", self.attributes)
        return None if found is None else _until_comma(self.attributes[found.end() :])

    def called(self, name: str) -> str | None:
        """The computation that an attribute names."""
        value = self.attribute(name)
        return None if value is None else value.lstrip("%")

    @functools.cached_property
    def estimated_cycles(self) -> int:
        """The compiler's own estimate; 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
        return int(found[1]) if found else 0

    @functools.cached_property
    def cost_estimate(self) -> dict[str, int]:
        """What a Pallas kernel was said to cost: flops, transcendentals, bytes_accessed."""
        found = re.search(r'"cost_estimate":(\{[^{}]*\})', self.attributes)
        return {key: int(value) for key, value in json.loads(found[1]).items()} if found else {}


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions by name, in the order of the schedule."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Its parameters by number."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.literal))

    def users(self, name: str) -> list[tuple[Instruction, int]]:
        """(instruction, place among its operands) of every use of a value."""
        return self._users[name]

    @functools.cached_property
    def _users(self) -> dict[str, list[tuple[Instruction, int]]]:
        users = collections.defaultdict(list)
        for user in self.instructions.values():
            for place, name in enumerate(user.operands):
                users[name].append((user, place))
        return users


class Module:
    """All computations of a program.

    Attributes:
      computations: by name.
      entry: the one that is run.
    """

    def __init__(self, text: str):
        """Parses; ValueError when the text has no entry computation."""
        self.computations: dict[str, Computation] = {}
        entry, name, lines = None, None, {}
        for line in text.splitlines():
            if opened := _COMPUTATION.match(_COMMENT.sub("", line)):
                name, lines = opened[2], {}
                entry = name if opened[1] else entry
            elif line.startswith("}") and name is not None:
                self.computations[name] = Computation(name, lines)
                name = None
            elif name is not None and (instruction := _parse(line)):
                lines[instruction.name] = instruction
        if entry is None:
            raise ValueError("no ENTRY computation: not the text of an HLO module")
        self.entry = self.computations[entry]

    def executed(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """(instruction, its computation, how often it runs), in order of the schedule.

        Bodies of loops count by their trips, of a conditional every branch counts. What a fusion,
        a reduction or a collective calls belongs to it and is not listed.
        """
        yield from self._executed(self.entry, 1)

    def _executed(self, computation: Computation, times: int):
        for instruction in computation.instructions.values():
            yield instruction, computation, times
            for name, trips in self.inner(instruction):
                yield from self._executed(self.computations[name], times * trips)

    def inner(self, instruction: Instruction) -> list[tuple[str, int]]:
        """(computation, how often it runs each time) of a loop, a conditional or a call."""
        if instruction.opcode == "while":
            return [(instruction.called("body"), self.trip_count(instruction))]
        if instruction.opcode == "conditional":
            listed = instruction.attribute("branch_computations")
            names = re.findall(r"%([^\s,}]+)", listed or "") or [
                instruction.called("true_computation"), instruction.called("false_computation"),
            ]  # fmt: skip
            return [(name, 1) for name in names]
        if instruction.opcode == "call":
            return [(instruction.called("to_apply"), 1)]
        return []

    def trip_count(self, loop: Instruction) -> int:
        """How often the body of a while runs: from a start of 0 by its step to the limit.

        1 for a loop whose condition is no comparison with a constant; where there is another
        condition beside it, the most. XLA unrolls some loops and leaves the limit: hence the step
        of the induction variable is read from the body.
        """
        condition = self.computations[loop.called("condition")]
        if condition.root.opcode == "fusion":
            condition = self.computations[condition.root.called("calls")]
        root = condition.root
        names = root.operands if root.opcode == "and" else (root.name,)
        tests = [condition.instructions[name] for name in names]
        test = next((test for test in tests if test.opcode == "compare"), None)
        limit, index = None, None
        for name in test.operands if test else ():
            operand = condition.instructions[name]
            if operand.opcode == "constant" and re.fullmatch(r"-?\d+", operand.literal):
                limit = int(operand.literal)
            elif operand.opcode == "get-tuple-element":
                index = int(operand.attribute("index"))
        if limit is None or index is None:
            return 1
        step = self._step(self.computations[loop.called("body")], index)
        return max(1, -(-limit // step))

    def _step(self, body: Computation, index: int) -> int:
        """By how much element `index` of the loop's tuple grows in the body; 1 if unclear."""
        if body.root.opcode != "tuple":
            return 1
        value = body.instructions[body.root.operands[index]]
        computation = body
        if value.opcode == "fusion":
            computation = self.computations[value.called("calls")]
            value = computation.root
        if value.opcode != "add":
            return 1
        for name in value.operands:
            operand = computation.instructions[name]
            if operand.opcode == "constant" and operand.literal.isdigit():
                return int(operand.literal)
        return 1

    def product_flops(self, instruction: Instruction, computation: Computation) -> int:
        """Floating-point operations of the matrix products in an instruction or its fusion."""
        if instruction.opcode == "convolution":
            return _convolution_flops(instruction, computation)
        if instruction.opcode == "dot":
            return _dot_flops(instruction, computation)
        if instruction.opcode == "fusion":
            inside = self.computations[instruction.called("calls")]
            return sum(self.product_flops(i, inside) for i in inside.instructions.values())
        return 0

    def operand_bytes(self, instruction: Instruction, computation: Computation) -> int:
        """Of everything an instruction reads."""
        operands = (computation.instructions[n] for n in instruction.operands)
        return sum(operand.result_bytes for operand in operands)


def _parse(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(_COMMENT.sub("", line))
    if not found:
        return None
    text = found[3]
    end = _closing(text, 0) if text.startswith("(") else text.index(" ") - 1
    shape, text = text[: end + 1], text[end + 1 :].lstrip()
    opcode, _, rest = text.partition("(")
    end = _closing("(" + rest, 0) - 1
    inside, attributes = rest[:end], rest[end + 1 :]
    return Instruction(
        name=found[2],
        opcode=opcode.strip(),
        results=tuple(_array(*found) for found in _SHAPE.findall(shape)),
        operands=tuple(re.findall(r"%([^\s,()]+)", inside)),
        attributes=attributes,
        literal=inside.strip(),
        root=bool(found[1]),
    )


def _array(dtype: str, dims: str, layout: str) -> Array:
    space = re.search(r"S\((\d+)\)", layout)
    numbers = tuple(int(n) for n in dims.split(",") if n)
    return Array(dtype, numbers, int(space[1]) if space else 0)


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if not depth:
            return i
    raise ValueError(f"unbalanced brackets in HLO: {text[start : start + 80]}")


def _until_comma(text: str) -> str:
    depth = 0
    for i, character in enumerate(text):
        if character == "," and not depth:
            return text[:i]
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return text[:i]
    return text


# ---- matrix products -------------------------------------------------------------------------


def _dot_flops(instruction: Instruction, computation: Computation) -> int:
    left = computation.instructions[instruction.operands[0]].results[0]
    contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
    return 2 * instruction.results[0].size * math.prod(left.dims[int(d)] for d in contracted)


def _convolution_flops(instruction: Instruction, computation: Computation) -> int:
    left, right = (computation.instructions[n].results[0] for n in instruction.operands[:2])
    result = instruction.results[0]
    left_labels, right_labels, out_labels = re.match(
        r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels")
    ).groups()
    flops = 2 * result.dims[out_labels.index("b")] * result.dims[out_labels.index("f")]
    flops *= right.dims[right_labels.index("i")]
    window = _window(instruction.attribute("window"))
    for axis in sorted(set(out_labels) - {"b", "f"}):
        place = sorted(set(out_labels) - {"b", "f"}).index(axis)
        flops *= _pairs(
            left.dims[left_labels.index(axis)],
            right.dims[right_labels.index(axis)],
            result.dims[out_labels.index(axis)],
            **{key: values[place] for key, values in window.items()},
        )
    return flops


def _window(text: str | None) -> dict[str, dict[int, object]]:
    """The fields of window={...}, each a list over spatial axes with defaults."""
    fields = dict(re.findall(r"(\w+)=([^\s}]+)", text or ""))
    count = len(fields.get("size", "1").split("x"))

    def numbers(name, default):
        return [int(n) for n in fields.get(name, "x".join([default] * count)).split("x")]

    pads = fields.get("pad", "x".join(["0_0"] * count)).split("x")
    return {
        "stride": numbers("stride", "1"),
        "before": [int(pad.split("_")[0]) for pad in pads],
        "left_dilation": numbers("lhs_dilate", "1"),
        "right_dilation": numbers("rhs_dilate", "1"),
    }


def _pairs(
    left: int, taps: int, outputs: int, *, stride: int, before: int, left_dilation: int,
    right_dilation: int,
) -> int:  # fmt: skip
    """(output, tap) pairs along one axis that meet an element of the operand, not padding.

    Output o and tap t meet place o * stride + t * right_dilation - before of the operand with
    left_dilation - 1 zeros between its elements.
    """
    # Over the shorter side one by one, along the longer in closed form: places go up by `step`.
    few, few_step, many, step = taps, right_dilation, outputs, stride
    if outputs < taps:
        few, few_step, many, step = outputs, stride, taps, right_dilation
    last = (left - 1) * left_dilation
    period = left_dilation // math.gcd(step, left_dilation)
    total = 0
    for one in range(few):
        offset = one * few_step - before
        low, high = max(0, -(offset // step)), min(many - 1, (last - offset) // step)
        for first in range(low, min(low + period, high + 1)):
            if (offset + first * step) % left_dilation == 0:
                total += (high - first) // period + 1
                break
    return total
