"""Runs compiled PTX on the CPU: numpy arrays over all threads of several blocks, one instruction at a time.

Threads that branch apart run in groups; the group with the lowest instruction goes on, so that groups meet again. Barriers,
mbarriers and asynchronous copies order the warps of a block by vector clocks. A byte of shared memory that two warps touch
(one of them writing) without such an order is a race. A copy lands when its thread or its mbarrier waits for it, and wgmma
reads its operands at its wait; what is still in flight must not be touched. Global accesses lie inside a tensor.

The first violation raises :class:`Fault` with the text of the instruction. Threads of one warp count as ordered.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .program import Fault, Program, dtype_of

__all__ = ["Fault", "Memory", "launch"]

Array = Any  # numpy array over threads, or a scalar
U8, U16, U32, U64, F32, F64 = np.uint8, np.uint16, np.uint32, np.uint64, np.float32, np.float64
WARP, GROUP = 32, 128
MAX_STEPS = 5_000_000
# instructions that order nothing in a run of one kernel whose every access is seen at once
HINTS = (
    "griddepcontrol",
    "setmaxnreg",
    "prefetch",
    "prefetchu",
    "membar",
    "nanosleep",
    "applypriority",
    "discard",
    "pmevent",
)
SPECIAL = {f"%{n}.{a}" for n in ("tid", "ntid", "ctaid", "nctaid") for a in "xyz"} | {"%laneid", "%warpid"}


def from_bf16(bits: Array) -> Array:
    return (bits.astype(U32) << U32(16)).view(F32)


def to_bf16(values: Array) -> Array:
    bits = np.asarray(values, F32).view(U32)
    rounded = ((bits.astype(U64) + U64(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U64(16)).astype(U16)
    return np.where(np.isnan(values), U16(0x7FFF), rounded)


def halves(bits: Array) -> Array:
    """[N] words -> [2, N] halves, low first."""
    return np.stack([(bits & U32(0xFFFF)).astype(U16), (bits >> U32(16)).astype(U16)])


def word(low: Array, high: Array) -> Array:
    return low.astype(U32) | (high.astype(U32) << U32(16))


def to_f16(values: Array) -> Array:
    return np.asarray(values, F32).astype(np.float16).view(U16)


# type -> (width of a register, bits -> values, values -> bits)
SMALL_FLOATS: dict[str, tuple[np.dtype, Callable, Callable]] = {
    "bf16": (np.dtype(U16), from_bf16, to_bf16),
    "f16": (np.dtype(U16), lambda b: b.view(np.float16).astype(F32), to_f16),
    "bf16x2": (np.dtype(U32), lambda b: from_bf16(halves(b)), lambda v: word(*to_bf16(v))),
    "f16x2": (np.dtype(U32), lambda b: halves(b).view(np.float16).astype(F32), lambda v: word(*to_f16(v))),
}
# numbers of a matrix operand -> float32
MATRIX = {
    "bf16": from_bf16,
    "f16": lambda b: b.view(np.float16).astype(F32),
    "tf32": lambda b: (b & U32(0xFFFFE000)).view(F32),  # the tensor core ignores the low 13 bits
}


class Memory:
    """Global memory: byte arrays at 64-bit addresses, with gaps between them."""

    def __init__(self) -> None:
        self.regions: list[tuple[int, np.ndarray]] = []
        self.next = 1 << 32

    def add(self, raw: np.ndarray, address: int | None = None) -> int:
        """Map a contiguous uint8 array, at ``address`` or wherever there is room."""
        base = self.next if address is None else address
        self.next = max(self.next, -(-(base + raw.nbytes + 4096) // 256) * 256)
        self.regions.append((base, raw))
        return base

    def split(self, addresses: Array, size: int, text: str) -> list[tuple[np.ndarray, Array, Array]]:
        """[(region, which of the addresses, offsets)] of accesses of ``size`` bytes."""
        if (addresses % U64(min(size, 16))).any():
            raise Fault(f"misaligned global access: {text}")
        low, high = int(addresses.min()), int(addresses.max()) + size
        found = []
        for base, raw in self.regions:
            if base <= low and high <= base + raw.nbytes:
                return [(raw, slice(None), (addresses - U64(base)).astype(np.int64))]
            inside = (addresses >= U64(base)) & (addresses <= U64(max(base + raw.nbytes - size, 0)))
            if raw.nbytes >= size and inside.any():
                found.append((raw, inside, (addresses[inside] - U64(base)).astype(np.int64)))
        if sum(which.sum() for _, which, _ in found) != len(addresses):
            raise Fault(f"global access outside of every tensor: {text}")
        return found

    @staticmethod
    def view(raw: np.ndarray, offsets: Array, unit: np.dtype, count: int) -> tuple[np.ndarray, Array]:
        typed = raw[: raw.nbytes // unit.itemsize * unit.itemsize].view(unit)
        return typed, (offsets // unit.itemsize)[:, None] + np.arange(count)

    def load(self, addresses: Array, unit: np.dtype, count: int, text: str) -> np.ndarray:
        """[n] addresses -> [n, count] of ``unit``."""
        out = np.zeros((len(addresses), count), unit)
        if len(addresses):
            for raw, which, offsets in self.split(addresses, unit.itemsize * count, text):
                typed, at = self.view(raw, offsets, unit, count)
                out[which] = typed[at]
        return out

    def store(self, addresses: Array, data: np.ndarray, text: str) -> None:
        if len(addresses):
            for raw, which, offsets in self.split(addresses, data.itemsize * data.shape[1], text):
                typed, at = self.view(raw, offsets, data.dtype, data.shape[1])
                typed[at] = data[which]


class Shared:
    """Shared memory of all blocks, and who touched each granule when: warps order themselves by vector clocks.

    ``known[w, v]`` is the clock of warp v of the block that warp w knows of; column ``warps`` is that of bulk copies.
    """

    def __init__(self, blocks: int, warps: int, size: int, granule: int):
        self.size, self.granule, self.warps = -(-size // 256) * 256, granule, warps
        self.per_block = self.size // granule
        n = blocks * self.per_block
        self.bytes = np.full(blocks * self.size, 0xFF, U8)
        self.written, self.generic, self.landing = (np.zeros(n, bool) for _ in range(3))
        self.in_use = np.zeros(n, np.int16)  # wgmma and bulk stores that still read it
        self.writer, self.write_clock = np.zeros(n, np.int8), np.zeros(n, np.int32)
        self.read_clock = np.zeros((n, warps), np.int32)
        self.known = np.zeros((blocks * warps, warps + 1), np.int32)
        self.known[np.arange(blocks * warps), np.arange(blocks * warps) % warps] = 1
        self.conflicts: dict[str, list[int]] = {}
        self.ambiguous: set[str] = set()
        self.unset_is_nan = False

    def places(self, offsets: Array, size: int, block: Array, text: str) -> Array:
        """Offsets [n] within each block -> bytes of ``self.bytes`` where the accesses begin, checked."""
        offsets = offsets.astype(np.int64)
        if len(offsets) and (offsets.min() < 0 or offsets.max() + size > self.size):
            raise Fault(f"shared memory out of bounds: {text}")
        if (offsets % min(size, 16)).any():
            raise Fault(f"misaligned shared access: {text}")
        return offsets + block * self.size

    def granules(self, places: Array, size: int) -> Array:
        return (places // self.granule)[:, None] + np.arange(max(1, size // self.granule))

    def read(self, granules: Array, warp: Array, text: str) -> None:
        """Warps [n] read granules [n, k]: each was written, by itself or by a warp that it has met since."""
        if not (self.unset_is_nan or self.written[granules].all()):
            raise Fault(f"shared memory read before anything was written: {text}")
        self._after_writes(granules, warp, "read", text)
        self.read_clock[granules, (warp % self.warps)[:, None]] = self.known[warp, warp % self.warps][:, None]

    def _after_writes(self, granules: Array, warp: Array, what: str, text: str) -> None:
        if self.landing[granules].any():
            raise Fault(f"race: {what} of shared memory that a copy is still on its way to: {text}")
        if (self.known[warp[:, None], self.writer[granules]] < self.write_clock[granules]).any():
            raise Fault(f"race: {what} of what another warp wrote, with no barrier between: {text}")

    def write(self, granules: Array, warp: Array, text: str) -> None:
        self._after_writes(granules, warp, "write", text)
        if self.in_use[granules].any():
            raise Fault(f"race: write to an operand that is still being read: {text}")
        if (self.read_clock[granules] > self.known[warp, : self.warps][:, None, :]).any():
            raise Fault(f"race: write of what another warp read, with no barrier between: {text}")
        self.written[granules] = self.generic[granules] = True
        self.writer[granules] = (warp % self.warps)[:, None]
        self.write_clock[granules] = self.known[warp, warp % self.warps][:, None]

    def tick(self, warp: Array) -> None:
        self.known[warp, warp % self.warps] += 1

    def meet(self, warp: Array, blocks: int) -> None:
        """The warps, which are whole blocks or parts of one, know all that any of them knew, and go on."""
        for block in np.unique(warp // self.warps) if len(warp) != blocks * self.warps else [slice(None)]:
            if isinstance(block, slice):
                shape = self.known.reshape(blocks, self.warps, -1)
                shape[:] = shape.max(1, keepdims=True)
            else:
                mine = warp[warp // self.warps == block]
                self.known[mine] = self.known[mine].max(0)
        self.tick(warp)

    def count(self, offsets: Array, size: int, text: str) -> None:
        """Count the passes over the banks that a warp's access takes, of its first four executions."""
        seen = self.conflicts.setdefault(text, [0, 0, 0])
        if seen[0] == 4:
            return
        seen[0] += 1
        lanes = WARP * 4 // max(size, 4)
        for start in range(0, len(offsets), lanes):
            words = np.unique(
                (offsets[start : start + lanes].astype(np.int64)[:, None] // 4) + np.arange(max(1, size // 4))
            )
            seen[1] += int(np.bincount(words % 32).max())
            seen[2] += -(-len(words) // 32)


class Machine:
    """So many blocks of a launch, in lockstep: ``run`` them until all their threads have returned, then the next."""

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        blocks: int,
        params: Sequence[bytes],
        memory: Memory,
        dynamic: int,
    ):
        self.program, self.memory, self.grid, self.blocks = program, memory, grid, blocks
        self.threads, self.dynamic, self.granule = program.threads, dynamic, granule_of(program)
        self.n = n = self.blocks * self.threads
        self.warps = -(-self.threads // WARP)
        if self.threads % WARP:
            raise Fault(f"{self.threads} threads are not whole warps")
        self.all, self.thread = np.arange(n), np.arange(n) % self.threads
        self.warp, self.block, self.lane = self.all // WARP, self.all // self.threads, self.all % WARP
        # parameters one behind the other, where `program` says
        self.params = np.zeros(program.param_bytes, U8)
        for (name, size), raw in zip(program.params, params, strict=True):
            self.params[program.param_at[name] :][:size] = np.frombuffer(raw, U8)
        # arrays of threads; an instruction puts a new one in a place and never writes into one
        self.R: list[Any] = []
        self.blank: list[Any] = []  # what the places hold before a run
        self.unset: dict[np.dtype, np.ndarray] = {}
        self.index: dict[Any, int] = {}
        for name in sorted(SPECIAL):
            self.index[name] = len(self.R)
            self.R.append(None)
            self.blank.append(None)
        # what runs each instruction, known once it has been reached
        self.code: list[tuple[Callable[[Any], Any], bool] | None] = [None] * len(program.code)

    def start(self, blocks: np.ndarray) -> None:
        """Before anything has run, in the blocks of these numbers."""
        n, x = self.n, self.grid[0]
        place = {"x": blocks % x, "y": blocks // x % self.grid[1], "z": blocks // (x * self.grid[1])}
        values: dict[str, Any] = {"%tid.x": self.thread, "%laneid": self.lane, "%warpid": self.thread // WARP}
        values |= {f"%ntid.{a}": np.full(n, self.threads if a == "x" else 1) for a in "xyz"}
        values |= {f"%ctaid.{a}": np.repeat(v, self.threads) for a, v in place.items()}
        values |= {f"%nctaid.{a}": np.full(n, v) for a, v in zip("xyz", self.grid)}
        self.R[:] = self.blank
        for name in SPECIAL:
            self.R[self.index[name]] = values[name].astype(U32) if name in values else np.zeros(n, U32)
        self.shared = Shared(self.blocks, self.warps, self.program.static + self.dynamic, self.granule)
        # copies and products on their way, [threads] or [warpgroups] each with the number of its group
        self.copies: list[dict[str, Any]] = []
        self.copy_group = np.zeros(n, np.int64)
        self.products: list[dict[str, Any]] = []
        self.product_group = np.zeros(max(1, n // GROUP), np.int64)
        self.accumulators: dict[tuple[str, ...], list[np.ndarray]] = {}
        self.bulk_stores: list[tuple[Array, Array]] = []
        self.mbarriers: dict[tuple[int, int], dict[str, Any]] = {}
        # threads that may go on, by the instruction they go on with; those at a barrier, and where they go on
        self.groups: dict[int, np.ndarray] = {0: np.ones(n, bool)}
        self.at_barrier: dict[int, tuple[np.ndarray, int | None]] = {}
        self.resume = np.zeros(n, np.int64)
        self.parked: dict[int, np.ndarray] = {}
        self.alive = np.ones(n, bool)
        self.steps = 0

    # --- running

    def add_group(self, pc: int, mask: np.ndarray) -> None:
        self.groups[pc] = self.groups[pc] | mask if pc in self.groups else mask

    def run(self) -> None:
        from .instructions import decode

        code, end, text = self.code, len(self.code), ""
        try:
            with np.errstate(all="ignore"):
                while self.groups or self.parked or self.at_barrier:
                    if not self.groups:
                        where = [self.program.code[pc].text for pc in self.parked] + [
                            f"barrier {n}" for n in self.at_barrier
                        ]
                        raise Fault(f"deadlock: threads wait for ever at {'; '.join(where)}")
                    pc = min(self.groups)
                    mask = self.groups.pop(pc)
                    limit = min(self.groups, default=end)
                    self.mask = mask
                    lanes = None if mask.all() else mask
                    # registers of threads that have returned may hold anything
                    inside = None if lanes is None or not (self.alive & ~mask).any() else mask
                    while pc < end:
                        self.pc, self.steps = pc, self.steps + 1
                        known = code[pc]
                        if known is None:
                            known = code[pc] = decode(self, self.program.code[pc])
                        step, beyond = known
                        moved = step(lanes if beyond else inside)
                        if moved is not None:  # a branch that all take: where to; a split: -1
                            pc = moved
                            if pc < 0:
                                break
                        else:
                            pc += 1
                        if pc >= limit or self.steps > MAX_STEPS:
                            self.add_group(pc, mask)
                            break
                    if self.steps > MAX_STEPS:
                        raise Fault(f"still running after {MAX_STEPS} instructions")
        except Fault:
            raise
        except Exception as error:
            text = self.program.code[self.pc].text
            raise Fault(f"{self.program.name}: {text}: {type(error).__name__}: {error}") from error
        if self.copies or self.products:
            raise Fault(f"{self.program.name}: returned with asynchronous copies or products that nobody waited for")

    # --- operands

    def slot(self, key: Any) -> int:
        if key not in self.index:
            self.index[key] = len(self.R)
            width = self.program.registers[key]
            # of what is never written, as of what only some threads write, the others read NaN
            if width not in self.unset:
                self.unset[width] = np.full(self.n, False if width.kind == "b" else ~width.type(0))
                self.unset[width].flags.writeable = False
            self.R.append(self.unset[width])
            self.blank.append(self.unset[width])
        return self.index[key]

    def find(self, name: str, scope: tuple[int, ...]) -> tuple[int, np.dtype] | None:
        """A register's place in ``R`` and its type; None if the name is none."""
        if name in SPECIAL:
            return self.index[name], np.dtype(U32)
        found = self.program.register(name, scope)
        return (self.slot(found[0]), found[1]) if found else None

    def reader(self, text: Any, kind: str, scope: tuple[int, ...]) -> Callable[[], Array]:
        """A function that returns an operand's values in type ``kind``."""
        negated = text.startswith("!")
        text = text.removeprefix("!")
        small = SMALL_FLOATS.get(kind)
        dtype = small[0] if small else dtype_of("b32" if kind == "tf32" else kind)
        R = self.R
        found = self.find(text, scope)
        if found is None:
            value = constant(self.program, text, dtype)
            value = small[1](np.full(1, value)) if small else value
            return lambda: value
        i, width = found
        if negated:
            return lambda: ~R[i]
        if small:
            return lambda: small[1](R[i])
        if width == dtype:
            return lambda: R[i]
        if width.itemsize == dtype.itemsize:
            return lambda: R[i].view(dtype)
        bits = np.dtype(f"u{dtype.itemsize}")
        return lambda: R[i].astype(bits).view(dtype)

    def writer(self, text: Any, kind: str, scope: tuple[int, ...]) -> Callable[[Array, Array | None], None]:
        """A function (values of type ``kind``, lanes) that sets a register; narrow integers are extended by their sign."""
        if text == "_":
            return lambda values, lanes: None
        found = self.find(text, scope)
        if found is None:
            raise Fault(f"no register {text}")
        i, width = found
        R, n = self.R, self.n
        small = SMALL_FLOATS.get(kind)

        def write(values: Array, lanes: Array | None) -> None:
            if small:
                values = small[2](values)
            values = np.asarray(values)
            if values.dtype != width:
                same = values.itemsize == width.itemsize and values.dtype != bool
                values = values.view(width) if same else values.astype(width)
            if lanes is not None:
                values = np.where(lanes, values, R[i])
            elif values.shape != (n,):
                values = np.broadcast_to(values, (n,)).copy()
            R[i] = values

        return write

    def address(self, text: Any, scope: tuple[int, ...]) -> Callable[[], Array]:
        """``[%rd1+16]`` -> addresses [N] of 64 bits."""
        base, offset = re.fullmatch(r"\[?([%\w$]+)(?:\+(-?\w+))?\]?", text).groups()  # type: ignore[union-attr]
        step = U64(int(offset or "0", 0) % (1 << 64))
        if base in self.program.shared or self.find(base, scope) is None:
            value = np.full(self.n, constant(self.program, base, np.dtype(U64)) + step)
            return lambda: value
        read = self.reader(base, "u64", scope)
        return lambda: read() + step

    # --- shared memory

    def load_shared(self, lanes: Array, offsets: Array, unit: np.dtype, count: int, text: str) -> np.ndarray:
        """[n, count] of ``unit`` for threads ``lanes`` [n] at ``offsets`` [n]."""
        size, shared = unit.itemsize * count, self.shared
        if not len(lanes):
            return np.zeros((0, count), unit)
        places = shared.places(offsets, size, self.block[lanes], text)
        shared.read(shared.granules(places, size), self.warp[lanes], text)
        shared.count(offsets[self.warp[lanes] == self.warp[lanes[0]]], size, text)
        return shared.bytes.view(unit)[(places // unit.itemsize)[:, None] + np.arange(count)]

    def store_shared(self, lanes: Array, offsets: Array, data: np.ndarray, text: str) -> None:
        if not len(lanes):
            return
        size, shared = data.itemsize * data.shape[1], self.shared
        places = shared.places(offsets, size, self.block[lanes], text)
        shared.write(shared.granules(places, size), self.warp[lanes], text)
        shared.count(offsets[self.warp[lanes] == self.warp[lanes[0]]], size, text)
        typed, at = shared.bytes.view(data.dtype), (places // data.itemsize)[:, None] + np.arange(data.shape[1])
        typed[at] = data
        lost = (typed[at] != data).any(1)
        if lost.any():
            # lanes of one warp may differ in the last bit of what the compiler takes for the same: one of them is written
            pairs = np.unique(np.stack([places, self.warp[lanes]])[:, np.isin(places, places[lost])], axis=1)[0]
            if len(np.unique(pairs)) < len(pairs):
                raise Fault(f"race: warps write different values to one place at once: {text}")
            shared.ambiguous.add(text)

    # --- barriers

    def barrier(self, number: int, count: int | None, lanes: Array | None, wait: bool) -> int | None:
        """Arrive at a barrier of the block, and wait for the others unless ``wait`` is false."""
        if lanes is None and count is None and wait and number not in self.at_barrier:
            self.shared.meet(np.arange(self.blocks * self.warps), self.blocks)
            return None
        arrived = np.ones(self.n, bool) if lanes is None else lanes
        # who only arrives goes on at once, and is not released
        self.resume[arrived] = self.pc + 1 if wait else -1
        # a barrier of some warps may be complete before all that arrive now have arrived
        for some in [arrived] if count is None else [arrived & (self.warp == w) for w in np.unique(self.warp[arrived])]:
            self.at_barrier.setdefault(number, (np.zeros(self.n, bool), count))
            self.at_barrier[number][0][some] = True
            self.release()
        return self.leave(arrived) if wait else None

    def release(self) -> None:
        """Let those go on whose barrier is complete."""
        for number, (waiting, count) in list(self.at_barrier.items()):
            here = waiting.reshape(self.blocks, -1)
            expected = self.alive.reshape(self.blocks, -1).sum(1) if count is None else count
            full = np.repeat((here.sum(1) >= expected) & here.any(1), self.threads) & waiting
            if full.any():
                self.shared.meet(np.unique(self.warp[full]), self.blocks)
                for pc in np.unique(self.resume[full]):
                    if pc >= 0:
                        self.add_group(int(pc), full & (self.resume == pc))
                waiting &= ~full
            if not waiting.any():
                del self.at_barrier[number]

    def leave(self, gone: Array) -> int:
        """These threads of the group have been put elsewhere; the others go on behind this instruction."""
        rest = self.mask & ~gone
        if rest.any():
            self.add_group(self.pc + 1, rest)
        return -1

    # --- what is on its way

    def land_copies(self, keep: int, lanes: Array | None) -> None:
        """The threads wait until at most ``keep`` of their groups of copies are on their way."""
        left = []
        for copy in self.copies:
            done = copy["group"] < self.copy_group[copy["lanes"]] - keep
            if lanes is not None:
                done &= lanes[copy["lanes"]]
            if done.any():
                some = {name: values[done] for name, values in copy.items() if name != "text"}
                self.shared.landing[self.shared.granules(some["places"], some["data"].shape[1])] = False
                self.store_shared(some["lanes"], some["offsets"], some["data"], copy["text"])
            if not done.all():
                left.append({name: v if name == "text" else v[~done] for name, v in copy.items()})
        self.copies = left

    def finish_products(self, keep: int, lanes: Array | None) -> None:
        """The warpgroups wait until at most ``keep`` of their groups of wgmma are on their way."""
        left = []
        for product in self.products:
            done = product["group"] < self.product_group[product["ids"]] - keep
            if lanes is not None:
                done &= lanes[product["ids"] * GROUP]
            if done.any():
                product["finish"]({n: v[done] for n, v in product.items() if isinstance(v, np.ndarray)})
            if not done.all():
                left.append({n: v[~done] if isinstance(v, np.ndarray) else v for n, v in product.items()})
        self.products = left


def constant(program: Program, text: str, dtype: np.dtype) -> Any:
    """An immediate, or the offset of a parameter or of an array in shared memory."""
    if text in program.shared or text in program.param_at:
        return dtype.type(program.shared[text] if text in program.shared else program.param_at[text])
    bits = np.dtype(f"u{dtype.itemsize}")
    if dtype.kind == "b":
        return np.bool_(text == "true" or int(text, 0) != 0)
    if text[:2] in ("0f", "0F"):
        return np.array(int(text[2:], 16), U32).astype(bits).view(dtype)[()]
    if text[:2] in ("0d", "0D"):
        return np.array(int(text[2:], 16), U64).view(F64).astype(dtype)[()]
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        raise Fault(f"no such operand: {text}")
    value = int(re.sub("^(-?)0+(?=[1-9])", r"\1", text.rstrip("U")), 0)
    return np.array(value % (1 << 8 * bits.itemsize), bits).view(dtype)[()]


def granule_of(program: Program) -> int:
    """The smallest access to shared memory in the kernel: what is watched as one."""
    smallest = 16
    for i in program.code:
        if i.op in ("st", "ld", "atom", "red") and any(p.startswith("shared") for p in i.parts):
            vector = next((int(p[1:]) for p in i.parts if re.fullmatch(r"v\d", p)), 1)
            smallest = min(smallest, vector * dtype_of(i.parts[-1].replace("bf16", "b16")).itemsize)
        elif i.op == "cp" and "async" in i.parts and "bulk" not in i.parts and len(i.operands) > 2:
            smallest = min(smallest, int(str(i.operands[2]), 0))
    return smallest


def launch(
    program: Program,
    grid: Sequence[int],
    params: Sequence[bytes],
    memory: Memory,
    dynamic: int,
    lanes: int = 2048,
    unset_is_nan: bool = False,
) -> dict[str, list[int]]:
    """Run a grid, as many blocks at once as have ``lanes`` threads.

    Args:
        program: what :func:`program.parse` read.
        grid: three numbers of blocks.
        params: the bytes of each parameter.
        memory: what the kernel may reach.
        unset_is_nan: shared memory that nobody wrote may be read, and is NaN; without, reading it is a fault.
        dynamic: bytes of dynamic shared memory.

    Returns:
        Shared-memory instruction -> [warps sampled, passes over the banks, passes without conflicts].

    Raises:
        Fault: the kernel did what it must not, or the interpreter does not know an instruction.
    """
    grid = [*grid, 1, 1][:3]
    total = grid[0] * grid[1] * grid[2]
    conflicts: dict[str, list[int]] = {}
    at_once = max(1, lanes // program.threads)
    machine = None
    for start in range(0, total, at_once):
        blocks = np.arange(start, min(start + at_once, total))
        if machine is None or machine.blocks != len(blocks):
            machine = Machine(program, grid, len(blocks), params, memory, dynamic)
        machine.start(blocks)
        machine.shared.unset_is_nan = unset_is_nan
        machine.run()
        for text, seen in machine.shared.conflicts.items():
            conflicts[text] = list(map(operator.add, conflicts.get(text, [0, 0, 0]), seen))
    return conflicts
