"""Reads a compiled program's text: what one device multiplies, moves and sends in a run of it.

XLA's own cost analysis counts the body of a loop once, however often it runs. Here every computation has a multiplicity, the
product of the trip counts of the loops around it, and products of matrices, collectives and memory traffic are counted as often
as they run. Products are counted as XLA's HloCostAnalysis counts them (a multiply and an add; of a convolution, which is what a
TPU makes of a product, only the positions that meet data), so that a program without loops gives the same number.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_NAME = r"%?([\w.\-]+)"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# What moves nothing through memory by itself.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "iota"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "async-done", "copy-done", "add-dependency"}


@dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool  # S(n) in a TPU's layout names an on-chip memory

    @property
    def bytes(self) -> float:
        width = _BYTES.get(self.dtype)
        if width is None:
            digits = re.search(r"\d+", self.dtype)
            width = max(int(digits[0]), 8) / 8 if digits else 4
        return math.prod(self.shape) * width


@dataclass
class Instruction:
    name: str
    type: str
    opcode: str
    operands: list[str]
    literal: str  # what stands in the parentheses
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> list[Array]:
        return [
            Array(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size), "S(" not in (layout or ""))
            for dtype, sizes, layout in _ARRAY.findall(self.type)
        ]

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found[1] if found else ""

    def numbers(self, name: str) -> list[int]:
        return [int(number) for number in re.findall(r"-?\d+", self.attribute(name))]


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions.values() if i.is_root), list(self.instructions.values())[-1])

    def operand_arrays(self, instruction: Instruction) -> list[Array]:
        known = (self.instructions[name] for name in instruction.operands if name in self.instructions)
        return [array for operand in known for array in operand.arrays]


@dataclass(frozen=True)
class Collective:
    """One collective instruction: `bytes` of operands on one device, in groups of device numbers, run `times` a step."""

    kind: str
    bytes: float
    group: tuple[int, ...]
    times: int
    name: str
    op_name: str

    @property
    def full_bytes(self) -> float:
        """The array before it is scattered, or after it is gathered."""
        return self.bytes * (len(self.group) if self.kind == "all-gather" else 1)

    @property
    def wire_bytes(self) -> float:
        """What one device sends in one run, by a ring: (n - 1) / n of the full array, twice that for an all-reduce."""
        size = max(len(self.group), 1)
        if self.kind == "collective-permute":
            return self.bytes
        return self.full_bytes * (size - 1) / size * (2 if self.kind == "all-reduce" else 1)


@dataclass
class Program:
    """A compiled module. `unread` names loops whose trip count could not be read; they count once."""

    computations: dict[str, Computation]
    entry: str
    times: dict[str, int] = field(default_factory=dict)  # of every computation that runs, those of fusions too
    inside_fusion: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)

    def running(self) -> Iterator[tuple[Computation, Instruction, int]]:
        for name, times in self.times.items():
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, times

    def matmul_flops(self, with_loops: bool = True) -> float:
        """FLOPs of products of matrices on one device; `with_loops=False` counts each loop's body once."""
        return sum(
            product_flops(computation, instruction) * (times if with_loops else 1)
            for computation, instruction, times in self.running()
            if instruction.opcode in ("dot", "convolution")
        )

    def kernel_flops(self, with_loops: bool = True) -> float:
        """FLOPs of the attention kernels' products, of which the compiler knows nothing, with the whole T x T square counted."""
        return sum(
            _kernel_flops(computation, instruction) * (times if with_loops else 1)
            for computation, instruction, times in self.running()
        )

    def collectives(self) -> list[Collective]:
        found = []
        for computation, instruction, times in self.running():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # a TPU's is a fusion of an all-reduce and a slice, sent as what it is
            moved = sum(array.bytes for array in computation.operand_arrays(instruction))
            op_name = re.search(r'op_name="([^"]*)"', instruction.attributes)
            group = first_group(instruction.attributes)
            found.append(Collective(kind, moved, group, times, instruction.name, op_name[1] if op_name else ""))
        return [collective for collective in found if len(collective.group) > 1 or collective.kind == "collective-permute"]

    def work(self) -> Iterator[tuple[float, float, int]]:
        """(FLOPs of matrix products, bytes through the device's memory, runs) of each instruction that is no collective."""
        for computation, instruction, times in self.running():
            opcode = instruction.opcode
            if computation.name in self.inside_fusion or opcode in _FREE or opcode.endswith("-done"):
                continue
            if opcode.removesuffix("-start") in COLLECTIVES or "all-reduce-scatter" in instruction.attribute("calls"):
                continue
            yield self._flops(computation, instruction), self._traffic(computation, instruction), times

    def _flops(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.opcode in ("dot", "convolution"):
            return product_flops(computation, instruction)
        if instruction.opcode == "custom-call":  # blocks above the diagonal are skipped
            return _kernel_flops(computation, instruction) / 2
        body = self.computations.get(instruction.attribute("calls").lstrip("%")) if instruction.opcode == "fusion" else None
        return sum(self._flops(body, inner) for inner in body.instructions.values()) if body else 0.0

    def _read(self, body: Computation, parameter: int) -> float:
        """Bytes that a fusion reads of one of its parameters: the slices, where it only slices; all, by any other use."""
        source = next((i for i in body.instructions.values() if i.opcode == "parameter" and i.literal == str(parameter)), None)
        return self._read_of(body, source) if source else math.inf

    def _read_of(self, body: Computation, source: Instruction) -> float:
        total = 0.0
        for use in body.instructions.values():
            if source.name not in use.operands:
                continue
            place = use.operands.index(source.name)
            inner = self.computations.get(use.attribute("calls").lstrip("%")) if use.opcode == "fusion" else None
            if use.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += sum(array.bytes for array in use.arrays)
            elif use.opcode in ("bitcast", "reshape", "get-tuple-element"):
                total += self._read_of(body, use)
            elif inner is not None:
                total += self._read(inner, place)
            elif use.opcode != "dynamic-update-slice" or place != 0:
                return math.inf
        return total

    def kernels(self) -> list[str]:
        """Custom calls to hand-written kernels, whose FLOPs the compiler does not know."""
        targets = (i.attribute("custom_call_target").strip('"') for _, i, _ in self.running() if i.opcode == "custom-call")
        return sorted({target for target in targets if target in ("tpu_custom_call", "__gpu$xla.gpu.triton")})

    def _traffic(self, computation: Computation, instruction: Instruction) -> float:
        results = instruction.arrays[:1] if instruction.opcode == "copy-start" else instruction.arrays
        operands = [computation.instructions.get(name) for name in instruction.operands]
        whole = [sum(a.bytes for a in operand.arrays if a.in_hbm) if operand else 0.0 for operand in operands]
        written = sum(array.bytes for array in results if array.in_hbm)
        if instruction.opcode == "fusion":
            body = self.computations.get(instruction.attribute("calls").lstrip("%"))
            if body:
                read = sum(min(size, self._read(body, place)) for place, size in enumerate(whole))
                return read + _written(body, written)
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * written
        if instruction.opcode == "dynamic-update-slice":
            return 2 * whole[1]
        return sum(whole) + written


def _written(body: Computation, written: float) -> float:
    """Bytes that a fusion writes: of results that are updated in place, only the updates."""
    for instruction in body.instructions.values():
        if instruction.opcode == "dynamic-update-slice" and written:
            update = body.instructions.get(instruction.operands[1])
            part = sum(array.bytes for array in update.arrays) if update else 0.0
            written = max(0.0, written - sum(array.bytes for array in instruction.arrays)) + part
    return written


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """2 * (elements of the result) * (length of the contraction), for `dot` and `convolution`."""
    left, right = (computation.instructions[name].arrays[0] for name in instruction.operands[:2])
    result = instruction.arrays[0]
    if instruction.opcode == "dot":
        contracted = math.prod(left.shape[axis] for axis in instruction.numbers("lhs_contracting_dims"))
        return 2.0 * math.prod(result.shape) * contracted
    lhs, rest = instruction.attribute("dim_labels").split("_")
    rhs, out = rest.split("->")
    groups = (instruction.numbers("feature_group_count") or [1])[0] * (instruction.numbers("batch_group_count") or [1])[0]
    window = re.search(r"\bwindow=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    positions = 1
    for place in range(len(rhs) - 2):
        label = str(place)
        positions *= _valid_positions(
            size=left.shape[lhs.index(label)],
            kernel=right.shape[rhs.index(label)],
            out=result.shape[out.index(label)],
            stride=_window(fields, "stride", place, "1")[0],
            low=_window(fields, "pad", place, "0_0")[0],
            lhs_dilate=_window(fields, "lhs_dilate", place, "1")[0],
            rhs_dilate=_window(fields, "rhs_dilate", place, "1")[0],
        )
    return 2.0 * left.shape[lhs.index("f")] * right.shape[rhs.index("o")] * left.shape[lhs.index("b")] * positions / groups


def _window(fields: dict[str, str], name: str, place: int, default: str) -> list[int]:
    parts = fields[name].split("x") if name in fields else []
    return [int(number) for number in (parts[place] if parts else default).split("_")]


def _valid_positions(size: int, kernel: int, out: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs (output, kernel position) that meet an element of the input, neither padding nor a hole."""
    if stride == lhs_dilate == rhs_dilate == 1 and low == 0 and out + kernel - 1 <= size:
        return out * kernel
    count = 0
    for position in range(kernel):
        for index in range(out):
            place = index * stride - low + position * rhs_dilate
            count += place >= 0 and place % lhs_dilate == 0 and place // lhs_dilate < size
    return count


def first_group(attributes: str) -> tuple[int, ...]:
    """Device numbers of the first replica group, in each of the forms in which XLA prints them; () where there is none."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return (int(pairs[1]), int(pairs[2]))
    explicit = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if explicit:
        return tuple(int(number) for number in explicit[1].split(",") if number)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        sizes, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        order = [int(n) for n in iota[3].split(",")] if iota[3] else list(range(len(dims)))
        return tuple(_transposed(dims, order)[: sizes[-1]])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\([^)]*\)|\([^)]*\))? ?\{([^}]*)\}", attributes)
    if not named:
        return ()
    axes = [(name, int(size)) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", named[1])]
    taken = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[2])
    return _mesh_group(axes, taken)


def _mesh_group(axes: list[tuple[str, int]], taken: list[tuple[str, str, str]]) -> tuple[int, ...]:
    """Devices that share a group with device 0 along some axes of a mesh, an axis or its part `:(before)size`."""
    strides, stride = {}, 1
    for name, size in reversed(axes):
        strides[name] = (stride, size)
        stride *= size
    group = [0]
    for name, before, part in taken:
        step, size = strides[name]
        if part:
            step, size = step * (size // (int(before) * int(part))), int(part)
        group = [base + step * place for base in group for place in range(size)]
    return tuple(sorted(group))


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    """iota(prod(dims)).reshape(dims).transpose(order).flatten()"""
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    flat = [0]
    for axis in order:
        flat = [base + strides[axis] * place for base in flat for place in range(dims[axis])]
    return flat


# How many products of queries and keys, or as large, the kernels of splash attention make.
_SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}


def _kernel_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a splash attention kernel from its first two arrays of 4 dimensions, queries [B, N, T, H] and keys [B, K, S, H];
    0 for any other instruction.
    """
    products = next((number for name, number in _SPLASH_PRODUCTS.items() if instruction.name.startswith(name)), 0)
    if not products or instruction.opcode != "custom-call":
        return 0.0
    (batch, heads, length, width), (_, _, keys, _) = [
        array.shape for array in computation.operand_arrays(instruction) if len(array.shape) == 4
    ][:2]
    return 2.0 * products * batch * heads * length * keys * width


# --- reading ---------------------------------------------------------------------------------


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`. Raises `ValueError` where it has no entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _whole_lines(text):
        if line == "}":
            current = None
        elif (
            not line.startswith((" ", "\t"))
            and line.rstrip().endswith("{")
            and (head := re.match(rf"(ENTRY )?{_NAME} ?\(", line))
        ):
            current = computations.setdefault(head[2], Computation(head[2]))
            entry = head[2] if head[1] else entry
        elif current is not None and (instruction := _instruction(line)):
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the text holds no ENTRY computation of an HLO module")
    program = Program(computations, entry)
    _visit(program, entry, 1, False)
    return program


def _whole_lines(text: str) -> Iterator[str]:
    """Lines of a module's text, those joined that belong to one instruction: the description of a kernel may be broken into
    several, which begin with no blank.
    """
    held = ""
    for line in text.splitlines():
        goes_on = (
            held.startswith((" ", "\t")) and line.strip() not in ("", "}") and not line.startswith((" ", "\t", "%", "ENTRY"))
        )
        if goes_on:
            held += " " + line
            continue
        yield held
        held = line
    yield held


def _instruction(line: str) -> Instruction | None:
    head = re.match(rf"\s+(ROOT )?{_NAME} = ", line)
    if not head:
        return None
    start = head.end()
    end = _close(line, start) if line[start] == "(" else line.find(" ", start)
    opcode = re.match(r"\s*([\w\-]+)\(", line[end:])
    if not opcode:
        return None
    begin = end + opcode.end() - 1
    close = _close(line, begin)
    inside = line[begin + 1 : close - 1]
    operands = re.findall(r"%([\w.\-]+)", inside)
    return Instruction(head[2], line[start:end], opcode[1], operands, inside, line[close:], bool(head[1]))


def _close(line: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(line)):
        depth += (line[place] == "(") - (line[place] == ")")
        if depth == 0:
            return place + 1
    return len(line)


def _visit(program: Program, name: str, times: int, in_fusion: bool) -> None:
    """Adds `times` runs to a computation and to those that it calls. A conditional's branches all count: the run that updates."""
    program.times[name] = program.times.get(name, 0) + times
    if in_fusion:
        program.inside_fusion.add(name)
    computation = program.computations[name]
    for instruction in computation.instructions.values():
        opcode, factor = instruction.opcode, 1
        if opcode == "while":
            called = [instruction.attribute("body")]
            count = trip_count(program, computation, instruction)
            if count is None:
                program.unread.append(instruction.name)
            factor = 1 if count is None else count
        elif opcode == "conditional":
            branches = instruction.attribute("branch_computations").strip("{}").split(",")
            called = [*branches, instruction.attribute("true_computation"), instruction.attribute("false_computation")]
        elif opcode == "call":
            called = [instruction.attribute("to_apply")]
        elif opcode in ("fusion", "async-start", "custom-call"):
            called = instruction.attribute("calls").strip("{}").split(",")
        else:
            continue
        for target in (part.strip().lstrip("%") for part in called):
            if target in program.computations:
                _visit(program, target, times * factor, in_fusion or opcode == "fusion")


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop's body runs: as the compiler notes it, or else from its condition, `i < constant` counting up by one."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if noted:
        return int(noted[1])
    condition = program.computations.get(loop.attribute("condition").lstrip("%"))
    compare = _through(condition, condition.root) if condition else None
    if condition is None or compare is None or compare.opcode != "compare" or compare.attribute("direction") != "LT":
        return None
    left, right = (condition.instructions.get(name) for name in compare.operands)
    if left is None or right is None or right.opcode != "constant" or left.opcode != "get-tuple-element":
        return None
    first = _initial(computation, loop, left.numbers("index")[0])
    return None if first is None else max(0, int(right.literal) - first)


def _through(computation: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode in ("copy", "bitcast") and instruction.operands[0] in computation.instructions:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _initial(computation: Computation, loop: Instruction, index: int) -> int | None:
    """The constant that a loop's counter starts from; None where it is none."""
    start = computation.instructions.get(loop.operands[0])
    if start is None or start.opcode != "tuple":
        return None
    counter = computation.instructions.get(start.operands[index])
    counter = _through(computation, counter) if counter else None
    return int(counter.literal) if counter is not None and counter.opcode == "constant" else None
