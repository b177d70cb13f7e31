"""A static model of what a compiled kernel costs: ranks variants and notices regressions without a GPU.

SASS carries its own schedule: the upper bits of each 128-bit instruction hold the cycles to wait before the next one and the
scoreboards to set and to wait for (Jia et al. 2018, arXiv 1804.06826, section 2.1; the same layout from sm_70 to sm_120).
From ``nvdisasm -hex`` this module reads them, finds the loops, adds up what each unit of a multiprocessor does, walks one
warp through the code in order, and puts the two together: blocks that share a multiprocessor take as long as the slowest of
one block's latency, the busiest unit and the memory.

What it does not know: bank conflicts, branches taken (every instruction counts, predicated or not), caches beyond the bytes
that :mod:`.cost_shapes` states, clocks under load.  So its microseconds rank variants of a kernel; they are never a result.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "MACHINES",
    "Instruction",
    "Loop",
    "Machine",
    "Prediction",
    "Program",
    "Work",
    "blocks_per_sm",
    "parse",
    "predict",
]


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU; of one multiprocessor in a clock cycle unless they say otherwise.

    Attributes:
        sms, clock: multiprocessors; their frequency in GHz.
        shared, warps, blocks: bytes of shared memory; warps and blocks at once.
        fma, alu: lanes of float32 and of integer arithmetic.
        mma, wgmma: FLOPs in bfloat16 of mma.sync and of warpgroup products (0: there are none).
        dram, l2: bytes/s of the memory and of the L2 cache, both for the whole GPU.
        l2_fits: bytes of traffic of a kernel below which its operands are in the L2 cache.
    """

    name: str
    sms: int
    clock: float
    shared: int
    warps: int
    blocks: int
    fma: int
    alu: int
    mma: int
    wgmma: int
    dram: float
    l2: float
    l2_fits: float


# Datasheets, but: memory is at 90% of its datasheet rate, L2 of sm_90 at 5.5 TB/s (published: 5.5 to 7 on an H100), mma.sync
# at 62% of wgmma there, and clocks are what boards sustain: assumptions, to be replaced by the first profile
MACHINES = {
    80: Machine("A100", 108, 1.41, 164 << 10, 64, 32, 64, 64, 2048, 0, 1.75e12, 4.0e12, 16e6),
    86: Machine("A40", 84, 1.74, 100 << 10, 48, 16, 128, 64, 1024, 0, 0.62e12, 2.5e12, 3e6),
    89: Machine("L40S", 142, 2.52, 100 << 10, 48, 24, 128, 64, 1024, 0, 0.78e12, 4.5e12, 48e6),
    90: Machine("H200", 132, 1.75, 228 << 10, 64, 32, 128, 64, 2540, 4096, 4.3e12, 5.5e12, 25e6),
    120: Machine("RTX 5090", 170, 2.41, 100 << 10, 48, 24, 128, 128, 512, 0, 1.6e12, 5.0e12, 48e6),
}

# cycles from issue to result of what takes a scoreboard (published microbenchmarks of sm_80 and sm_90, rounded)
_LATENCY = {
    "LDS": 30, "LDSM": 33, "SHFL": 24, "MUFU": 24, "LDG": 300, "LDL": 40, "ATOMS": 60, "ATOMG": 600, "S2R": 20, "R2UR": 12,
    "POPC": 20, "F2F": 20, "LDC": 30, "I2F": 20, "F2I": 20, "LDGSTS": 300, "UTMALDG": 400,
}  # fmt: skip
_OTHER_LATENCY = 20
_READ_LATENCY = 12  # until operands have been read
_BARRIER = 25
_WGMMA_LATENCY = 40  # from the last product to its result

_TENSOR = {"HGMMA", "QGMMA", "HMMA", "QMMA", "IMMA"}
_SPECIAL = {"MUFU", "F2F", "I2F", "F2I", "POPC", "FRND"}  # 16 lanes
_FMA = {"FFMA", "FMUL", "FADD", "FFMA2", "FADD2", "FMUL2"}
_FMA_HALF = {"IMAD", "HFMA2", "HADD2", "HMUL2"}  # 64 lanes, of the same pipe
_ALU = {
    "LOP3", "LOP", "IADD3", "IADD", "VIADD", "PRMT", "SHF", "ISETP", "FSETP", "FMNMX", "FMNMX3", "SEL", "FSEL", "PLOP3",
    "IMNMX", "VIMNMX", "VIMNMX3", "VIADDMNMX", "LEA", "I2FP", "F2FP", "SGXT", "IABS", "BREV", "FLO", "P2R", "R2P", "HSETP2",
    "HMNMX2", "MOV", "CS2R", "BMSK", "VOTE",
}  # fmt: skip
_SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL", "LDGSTS", "ATOMS"}
_GLOBAL = {"LDG", "STG", "LD", "ST", "LDL", "STL", "ATOMG", "RED"}

_CODE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
_LABEL = re.compile(r"^\s*(\.L[\w$]*):")
_TARGET = re.compile(r"`\((\.L[\w$]*)\)")


@dataclass(frozen=True)
class Instruction:
    """One instruction of SASS with its control bits.

    Attributes:
        opcode: with its modifiers, ``HGMMA.64x32x16.F32.BF16``.
        stall: cycles until the next instruction of the warp may be issued.
        yields: whether the scheduler is asked to switch to another warp.
        sets, reads: scoreboard released when the result is there, and when the operands have been read; None for none.
        waits: scoreboards to wait for.
    """

    opcode: str
    text: str
    stall: int
    yields: bool
    sets: int | None
    reads: int | None
    waits: tuple[int, ...]

    @property
    def op(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def never(self) -> bool:
        """Whether its predicate is the constant false: the compiler leaves such instructions for their control bits."""
        return self.text.startswith(("@!PT ", "@!UPT "))


def decode(text: str, high: int) -> Instruction:
    """Read an instruction and its control bits, 41 and up of the upper word.

    4 bits stall, 1 yield (0: yes), 3 + 3 scoreboards (7: none), 6 wait mask, 4 operand reuse.
    """
    control = high >> 41
    sets, reads, mask = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
    words = text.split()
    opcode = words[1] if text.startswith("@") else words[0]
    return Instruction(
        opcode=opcode.rstrip(","),
        text=text,
        stall=control & 15,
        yields=not control >> 4 & 1,
        sets=None if sets == 7 else sets,
        reads=None if reads == 7 else reads,
        waits=tuple(b for b in range(6) if mask >> b & 1),
    )


@dataclass
class Loop:
    """Instructions ``first`` to ``last``, the branch back, and the loops inside."""

    first: int
    last: int
    inner: list[Loop] = field(default_factory=list)


@dataclass(frozen=True)
class Program:
    """The code of a kernel and its loops, outermost first."""

    code: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def all_loops(self) -> Iterator[Loop]:
        """Yield the loops in the order in which they begin, an outer one before those inside."""
        stack = list(reversed(self.loops))
        while stack:
            loop = stack.pop()
            yield loop
            stack += reversed(loop.inner)


def parse(listing: str) -> Program:
    """Read the output of ``nvdisasm -c -hex``.

    Raises:
        ValueError: it holds no instructions.
    """
    lines = listing.splitlines()
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for number, line in enumerate(lines[:-1]):
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif (found := _CODE.match(line)) and (second := _SECOND.match(lines[number + 1])):
            code.append(decode(found[2], int(second[1], 16)))
    if not code:
        raise ValueError("no instructions in the listing; expected the output of nvdisasm -c -hex")
    ends: dict[int, int] = {}
    for at, instruction in enumerate(code):
        target = _TARGET.search(instruction.text)
        # a branch to itself is the trap behind the last EXIT
        if instruction.op == "BRA" and target and labels.get(target[1], at) < at:
            first = labels[target[1]]
            ends[first] = max(ends.get(first, 0), at)
    top: list[Loop] = []
    for first, last in sorted(ends.items()):
        level = top
        while level and level[-1].first < first and level[-1].last >= last:
            level = level[-1].inner
        level.append(Loop(first, last))
    return Program(tuple(code), tuple(top))


def _width(opcode: str) -> int:
    """Bytes a lane reads or writes."""
    for suffix, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if suffix in opcode:
            return size
    return 4


def _wavefronts(instruction: Instruction) -> float:
    """Passes of 128 bytes through shared memory, without bank conflicts."""
    if instruction.op in ("LDSM", "STSM"):
        return (
            4
            if "4" in instruction.opcode.rpartition(".")[2]
            else 2
            if "2" in instruction.opcode.rpartition(".")[2]
            else 1
        )
    return max(1, _width(instruction.opcode) / 4)


def _product(instruction: Instruction, machine: Machine) -> tuple[float, float]:
    """Return (cycles of the tensor cores of one quarter of a multiprocessor, wavefronts of operands) of a matrix product."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)|\.(16)(8)(\d+)|\.(8)(8)(\d+)", instruction.opcode)
    if shape is None:
        return 0.0, 0.0
    m, n, k = (int(g) for g in shape.groups() if g is not None)
    slow = 2 if "TF32" in instruction.opcode else 1
    if instruction.op in ("HGMMA", "QGMMA"):
        # four warps issue it together, each on its quarter; B is read from shared memory once, A where it is a descriptor too
        descriptors = len(re.findall(r"gdesc\[", instruction.text))
        both = descriptors > 1 or re.search(r"GMMA\S* R\d+, gdesc", instruction.text) is not None
        size = 4 if slow == 2 else 2
        return 2.0 * m * n * k * slow / machine.wgmma, (n + (m if both else 0)) * k * size / 128 / 4
    return 2.0 * m * n * k * slow / (machine.mma / 4), 0.0


def usage(code: Sequence[Instruction], machine: Machine) -> Counter[str]:
    """Cycles that one warp takes of each unit, if the units of one quarter of a multiprocessor were its own.

    ``issue, fma, alu, mufu, tensor`` count per quarter; ``shared`` (wavefronts) and ``global`` count per multiprocessor, and
    ``bytes`` are those that all lanes of the warp load from or store to global memory.
    """
    total: Counter[str] = Counter()
    for i in code:
        total["issue"] += 1
        if i.never:
            continue
        if i.op in _TENSOR:
            cycles, wavefronts = _product(i, machine)
            total["tensor"] += cycles
            total["shared"] += wavefronts
        elif i.op in _SPECIAL:
            total["mufu"] += 8
        elif i.op in _FMA:
            total["fma"] += 128 / machine.fma
        elif i.op in _FMA_HALF:
            total["fma"] += 2
        elif i.op in _ALU:
            total["alu"] += 128 / machine.alu
        if i.op in _SHARED:
            total["shared"] += _wavefronts(i)
        if i.op in _GLOBAL:
            total["global"] += max(1, _width(i.opcode) / 4)
        if i.op in ("LDG", "STG", "LD", "ST", "LDGSTS", "ATOMG", "RED"):
            total["bytes"] += 32 * _width(i.opcode)
    return total


class _Warp:
    """One warp alone: in order, with its scoreboards, its asynchronous copies and its products."""

    def __init__(self, machine: Machine, quarter_share: float) -> None:
        self.machine = machine
        self.share = quarter_share  # warps of the block on this quarter, which take turns
        self.now = 0.0
        self.scoreboards = [0.0] * 6
        self.copies: list[float] = []
        self.copying = 0.0
        self.products: list[float] = []
        self.tensor = 0.0

    def run(self, code: Sequence[Instruction]) -> float:
        """Walk through the code once; returns the cycles it took."""
        start = self.now
        for i in code:
            for board in i.waits:
                self.now = max(self.now, self.scoreboards[board])
            kept = int(found[1], 16) if (found := re.search(r"LE \w+, 0x([0-9a-f]+)", i.text)) else 0
            if i.op == "WARPGROUP" and "DEPBAR" in i.opcode:
                # in flight may stay as many groups as the instruction says
                done = self.products[: len(self.products) - kept]
                self.now = max([self.now, *done])
            elif i.op == "DEPBAR":
                done = self.copies[: len(self.copies) - kept]
                self.now = max([self.now, *done])
            elif i.op == "BAR" and not i.never:
                self.now += _BARRIER
            elif i.op in _TENSOR and not i.never:
                cycles = _product(i, self.machine)[0] * self.share
                self.tensor = max(self.tensor, self.now) + cycles
                if i.op not in ("HGMMA", "QGMMA"):
                    self.now = self.tensor - cycles
                elif "gsb" in i.text:
                    self.products = [*self.products[-7:], self.tensor + _WGMMA_LATENCY]
            elif i.op == "LDGSTS":
                self.copying = self.now + _LATENCY["LDGSTS"]
            elif i.op == "LDGDEPBAR":
                self.copies = [*self.copies[-7:], self.copying]
            latency = _LATENCY.get(i.op, _OTHER_LATENCY)
            if i.sets is not None:
                self.scoreboards[i.sets] = max(self.scoreboards[i.sets], self.now + latency)
            if i.reads is not None:
                self.scoreboards[i.reads] = max(self.scoreboards[i.reads], self.now + _READ_LATENCY)
            self.now += max(1, i.stall)
        return self.now - start


@dataclass(frozen=True)
class Work:
    """What one launch is, as :mod:`.cost_shapes` knows it from the shape.

    Attributes:
        grid: blocks.
        trips: how often a block runs each loop, in the order in which the loops begin, those inside per trip of the outer one;
            an average where blocks differ.
        bytes: read and written if every tensor crosses once.
        straight: share of the code outside of loops that a block runs, for a kernel of alternatives.
    """

    grid: int
    trips: tuple[float, ...]
    bytes: float
    straight: float = 1.0


@dataclass(frozen=True)
class Prediction:
    """Modelled cost of one launch.

    Attributes:
        grid, resident: blocks, and how many of them fit on a multiprocessor.
        slots, trip: instructions of the main loop (without those of loops inside; of the whole kernel where it has none), and
            cycles of one trip of a warp alone.
        mma: cycles of the tensor cores in one trip of the main loop of a block.
        latency: cycles of one block alone.
        cycles: of each unit, of the L2 cache and of the memory, for the whole launch.
        bound: what took longest.
        microseconds: never a result.
    """

    grid: int
    resident: int
    slots: int
    trip: float
    mma: float
    latency: float
    cycles: Mapping[str, float]
    bound: str
    microseconds: float


def blocks_per_sm(machine: Machine, warps: int, registers: int, shared: int) -> int:
    """Return how many blocks a multiprocessor holds; shared memory in bytes, 1 KiB of it taken by the system for each block.

    Registers are handed out by 256 a warp, from 16384 of each quarter.
    """
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = 16384 // of_warp * 4 // warps
    return min(by_registers, machine.shared // (shared + 1024), machine.warps // warps, machine.blocks)


def _segments(
    program: Program, trips: Sequence[float], straight: float
) -> list[tuple[Sequence[Instruction], float, int]]:
    """(instructions, times that a block runs them, loop they belong to or -1), in the order of the code."""
    found = list(program.all_loops())
    if len(found) != len(trips):
        raise ValueError(
            f"the code has {len(found)} loops, its trips are {tuple(trips)}; state one number for each loop"
        )
    index = {id(loop): n for n, loop in enumerate(found)}
    out: list[tuple[Sequence[Instruction], float, int]] = []

    def visit(first: int, last: int, loops: Sequence[Loop], times: float, own: int) -> None:
        at = first
        for loop in loops:
            out.append((program.code[at : loop.first], times, own))
            visit(loop.first, loop.last, loop.inner, times * trips[index[id(loop)]], index[id(loop)])
            at = loop.last + 1
        out.append((program.code[at : last + 1], times, own))

    # what stands behind the last EXIT is padding, or a slow path that is called
    exits = [n for n, i in enumerate(program.code) if i.op == "EXIT"]
    end = max([exits[-1] if exits else len(program.code) - 1, *(loop.last for loop in program.loops)])
    visit(0, end, program.loops, 1.0, -1)
    out = [(code, straight if own < 0 else times, own) for code, times, own in out]
    return [s for s in out if s[0]]


def predict(program: Program, machine: Machine, work: Work, *, warps: int, registers: int, shared: int) -> Prediction:
    """Model a launch of ``work``.

    Args:
        program: the code, from :func:`parse`.
        machine: the GPU, of :data:`MACHINES`.
        work: grid, trips and bytes.
        warps, registers, shared: warps of a block, registers of a thread, bytes of shared memory of a block.

    Raises:
        ValueError: the trips are not one for each loop, or not even one block fits on a multiprocessor.
    """
    resident = blocks_per_sm(machine, warps, registers, shared)
    if resident < 1:
        raise ValueError(f"no block of {warps} warps, {registers} registers, {shared} bytes fits on a {machine.name}")
    segments = _segments(program, work.trips, work.straight)
    per_quarter = warps / 4  # warps of a block on each quarter, on average
    warp = _Warp(machine, max(1.0, per_quarter))
    total: Counter[str] = Counter()
    latency, trip_cycles, tensor = 0.0, Counter[int](), Counter[int]()
    slots: Counter[int] = Counter()
    # copies ahead of a pipelined loop are those that its last trips leave out
    pipelined = any(i.op == "LDGSTS" for code, _, loop in segments if loop >= 0 for i in code)
    for code, times, loop in segments:
        own = usage([i for i in code if loop >= 0 or i.op != "LDGSTS"] if pipelined else code, machine)
        for unit, cycles in own.items():
            total[unit] += cycles * times
        first = warp.run(code)
        # once more: what the first trip found ready, the following wait for
        again = warp.run(code) if times > 1 and loop >= 0 else first
        latency += min(times, 1.0) * first + max(times - 1.0, 0.0) * again
        slots[loop] += len(code)
        trip_cycles[loop] += again
        tensor[loop] += own["tensor"] * per_quarter
    loops = [n for n in slots if n >= 0]
    # the loop with most products, else the longest
    main = max(loops, key=lambda n: (tensor[n], slots[n]), default=-1)

    # of one block, in cycles of a multiprocessor
    block = {u: total[u] * per_quarter for u in ("issue", "fma", "alu", "mufu", "tensor")}
    block["shared"] = total["shared"] * warps
    block["global"] = total["global"] * warps
    busiest = max(max(block.values()), block["shared"] + block["global"])
    each = -(-work.grid // machine.sms)
    full, rest = divmod(each, resident)
    waves = full * max(latency, resident * busiest) + (max(latency, rest * busiest) if rest else 0.0)
    per_second = machine.clock * 1e9
    l2 = total["bytes"] * warps * work.grid / machine.l2 * per_second
    dram = 0.0 if work.bytes < machine.l2_fits else work.bytes / machine.dram * per_second
    cycles = {u: c * work.grid / machine.sms for u, c in block.items()} | {"l2": l2, "dram": dram}
    ends = max(waves, l2, dram)
    if ends == waves:
        bound = "latency" if latency >= min(each, resident) * busiest else max(block, key=lambda u: block[u])
    else:
        bound = "dram" if ends == dram else "l2"
    return Prediction(
        grid=work.grid,
        resident=resident,
        slots=slots[main] if main in slots else sum(slots.values()),
        trip=round(trip_cycles[main], 1),
        mma=tensor[main],
        latency=latency,
        cycles=cycles,
        bound=bound,
        microseconds=ends / per_second * 1e6,
    )
