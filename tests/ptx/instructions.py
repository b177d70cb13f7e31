"""What each PTX instruction does; a new one is a function under its name in ``HANDLERS``, or a line of ``ARITHMETIC``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .interpreter import (
    F32,
    F64,
    GROUP,
    HINTS,
    MATRIX,
    SMALL_FLOATS,
    U8,
    U16,
    U32,
    U64,
    WARP,
    Array,
    Machine,
    to_bf16,
    to_f16,
    word,
)
from .program import Fault, Instruction, dtype_of

Step = Callable[[Any], Any]  # lanes (None: all) -> None, or where to go on
HANDLERS: dict[str, Callable[[Machine, Instruction], Step]] = {}


def handles(*names: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


def decode(m: Machine, i: Instruction) -> tuple[Step, bool]:
    """(what runs the instruction, whether it reaches beyond registers), or what raises when the instruction is reached."""
    name = i.op if i.op in HANDLERS else "arithmetic"
    try:
        step = HANDLERS[name](m, i)
    except Fault as fault:
        return unknown(f"{i.text}: {fault}"), True
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        return unknown(f"no such instruction is known: {i.text} ({error!r})"), True
    beyond = name not in ("arithmetic", "setp", "selp", "cvt", "mov", "mul", "mad", "fma", "shl", "shr")
    if i.guard is None or i.op in ("bra", "ret", "exit"):
        return step, beyond
    guard = m.reader(("!" if i.guard[1] else "") + i.guard[0], "pred", i.scope)

    def guarded(lanes: Any) -> Any:
        chosen = guard() if lanes is None else guard() & lanes
        if chosen.any():
            return step(None if chosen.all() else chosen)
        return None

    return guarded, beyond


def unknown(message: str) -> Step:
    def step(lanes: Any) -> None:
        raise Fault(message)

    return step


def threads(m: Machine, lanes: Any) -> Array:
    return m.all if lanes is None else np.flatnonzero(lanes)


# --- arithmetic


def quotient(a: Array, b: Array) -> Array:
    """Integers round towards zero; by zero all bits are set."""
    whole = a // np.where(b == 0, 1, b)
    if a.dtype.kind == "i":
        whole = whole + ((whole < 0) & (whole * b != a))
    return np.where(b == 0, a.dtype.type(-1 if a.dtype.kind == "i" else ~a.dtype.type(0)), whole).astype(a.dtype)


def fused(a: Array, b: Array, c: Array) -> Array:
    return (np.asarray(a, F64) * b + c).astype(F32)


def fused_down(a: Array, b: Array, c: Array) -> Array:
    exact = np.asarray(a, F64) * b + c
    near = exact.astype(F32)
    return np.where(near > exact, np.nextafter(near, F32(-np.inf)), near)


def funnel(low: Array, high: Array, by: Array, left: bool) -> Array:
    both = low.astype(U64) | (high.astype(U64) << U64(32))
    by = by.astype(U64) & U64(31)
    return ((both << by) >> U64(32) if left else both >> by).astype(U32)


def lookup(a: Array, b: Array, c: Array, table: Array) -> Array:
    out = np.zeros_like(a | b | c)
    for bit in range(8):
        if int(table) >> bit & 1:
            out |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
    return out


def permute(a: Array, b: Array, selector: Array) -> Array:
    both, out = a.astype(U64) | (b.astype(U64) << U64(32)), np.zeros_like(a | selector)
    for byte in range(4):
        nibble = (selector >> U32(4 * byte)) & U32(15)
        value = (both >> ((nibble & U32(7)).astype(U64) * U64(8))) & U64(0xFF)
        value = np.where(nibble & U32(8), np.where(value & U64(0x80), U64(0xFF), U64(0)), value)
        out = out | (value.astype(U32) << U32(8 * byte))
    return out


def extract(a: Array, start: Array, count: Array) -> Array:
    start, count = start.astype(U32) & U32(255), np.minimum(count.astype(U32) & U32(255), U32(32))
    bits = np.where(start < 32, a.view(U32) >> np.minimum(start, U32(31)), U32(0)).astype(U64) & (
        (U64(1) << count.astype(U64)) - U64(1)
    )
    if a.dtype.kind == "i":
        up = U64(64) - np.maximum(count, 1).astype(U64)
        return np.where(count > 0, ((bits << up).view(np.int64) >> up.astype(np.int64)).astype(np.int32), 0).astype(
            np.int32
        )
    return bits.astype(U32)


def insert(a: Array, b: Array, start: Array, count: Array) -> Array:
    mask = ((((U64(1) << count.astype(U64)) - U64(1)) << start.astype(U64)) & U64(0xFFFFFFFF)).astype(U32)
    return (b & ~mask) | ((a.astype(U64) << start.astype(U64)).astype(U32) & mask)


def leading_zeros(a: Array) -> Array:
    return (a.dtype.itemsize * 8 - np.frexp(a.astype(F64))[1]).astype(U32)


ARITHMETIC: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "cnot": lambda a: (a == 0).astype(a.dtype),
    "neg": lambda a: -a,
    "abs": np.abs,
    "min": lambda a, b: np.fmin(a, b),
    "max": lambda a, b: np.fmax(a, b),
    "div": lambda a, b: quotient(a, b) if a.dtype.kind in "iu" else a / b,
    "rem": lambda a, b: np.where(b == 0, a, a - quotient(a, b) * b).astype(a.dtype),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: (1 / np.sqrt(a.astype(F64))).astype(a.dtype),
    "rcp": lambda a: 1 / a,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "prmt": permute,
    "bfi": insert,
    "bfe": extract,
    "lop3": lookup,
    "clz": leading_zeros,
    "popc": lambda a: np.bitwise_count(a).astype(U32),
    "brev": lambda a: sum(((a >> U32(k)) & U32(1)) << U32(31 - k) for k in range(32)),
    "copysign": lambda a, b: np.copysign(b, a),
}


def simple(m: Machine, i: Instruction, function: Callable, out: str, kinds: list[str]) -> Step:
    write = m.writer(i.operands[0], out, i.scope)
    read = [m.reader(o, k, i.scope) for o, k in zip(i.operands[1:], kinds, strict=True)]
    return lambda lanes: write(function(*[r() for r in read]), lanes)


@handles("arithmetic")
def arithmetic(m: Machine, i: Instruction) -> Step:
    if i.op in HINTS:
        return lambda lanes: None
    function, kind = ARITHMETIC[i.op], i.parts[-1]
    if i.op in ("min", "max") and "NaN" in i.parts:
        function = np.minimum if i.op == "min" else np.maximum
    if "sat" in i.parts and kind[0] in "fb":
        plain = function
        function = lambda *values: np.clip(np.nan_to_num(plain(*values)), 0, 1)  # noqa: E731
    out = "u32" if i.op in ("clz", "popc") else kind
    kinds = [kind] * (len(i.operands) - 1)
    if i.op in ("bfe", "bfi"):
        kinds[-2:] = ["u32", "u32"]
    if i.op == "prmt" and len(i.parts) > 1:
        raise Fault("prmt with a mode")
    return simple(m, i, function, out, kinds)


@handles("mul", "mad", "fma", "mul24", "mad24")
def multiply(m: Machine, i: Instruction) -> Step:
    kind, mode = i.parts[-1], i.parts[0]
    width = int(re.sub(r"\D", "", kind.split("x")[0]) or 0)
    more = [kind] if i.op != "mul" else []
    if kind[0] not in "us" or i.op == "fma":
        down = "rm" in i.parts
        one = (fused_down if down else fused) if kind == "f32" or kind in SMALL_FLOATS else lambda a, b, c: a * b + c
        return simple(m, i, one if more else lambda a, b: a * b, kind, [kind, kind, *more])
    if mode == "wide":
        out = f"{kind[0]}{2 * width}"
        big = dtype_of(out)
        product = lambda a, b: a.astype(big) * b.astype(big)  # noqa: E731
        more = [out] if more else []
    elif mode == "hi":
        out, big = kind, dtype_of(f"{kind[0]}64")
        product = lambda a, b: ((a.astype(big) * b.astype(big)) >> big.type(32)).astype(dtype_of(kind))  # noqa: E731
        if width != 32:
            as_objects = lambda x: np.asarray(x).astype(object)  # noqa: E731
            product = lambda a, b: np.asarray(as_objects(a) * as_objects(b) >> width).astype(dtype_of(kind))  # noqa: E731
    elif mode == "lo":
        out, product = kind, lambda a, b: a * b
    else:
        raise Fault(f"mode {mode}")
    return simple(m, i, (lambda a, b, c: product(a, b) + c) if more else product, out, [kind, kind, *more])


@handles("shl", "shr", "shf")
def shift(m: Machine, i: Instruction) -> Step:
    kind = i.parts[-1]
    if i.op == "shf":
        left, clamp = i.parts[0] == "l", i.parts[1] == "clamp"
        function = lambda a, b, by: funnel(a, b, np.minimum(by, 31) if clamp else by, left)  # noqa: E731
        return simple(m, i, function, kind, [kind, kind, "u32"])
    bits = dtype_of(kind).itemsize * 8

    def function_of(a: Array, by: Array) -> Array:
        inside = np.minimum(by, U32(bits - 1)).astype(a.dtype)
        if i.op == "shr" and kind[0] == "s":
            return a >> inside
        return np.where(by >= bits, a.dtype.type(0), a << inside if i.op == "shl" else a >> inside)

    return simple(m, i, function_of, kind, [kind, "u32"])


COMPARE: dict[str, Callable] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
COMPARE |= {"lo": COMPARE["lt"], "ls": COMPARE["le"], "hi": COMPARE["gt"], "hs": COMPARE["ge"]}
JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@handles("setp")
def compare(m: Machine, i: Instruction) -> Step:
    kind, test = i.parts[-1], COMPARE[i.parts[0]]
    join = JOIN.get(i.parts[1])
    targets = [m.writer(t, "pred", i.scope) for t in str(i.operands[0]).split("|")]
    a, b = (m.reader(o, kind, i.scope) for o in i.operands[1:3])
    c = m.reader(i.operands[3], "pred", i.scope) if join else None

    def step(lanes: Any) -> None:
        found = test(a(), b())
        for target, value in zip(targets, (found, ~found)):
            target(join(value, c()) if join and c else value, lanes)

    return step


@handles("selp")
def select(m: Machine, i: Instruction) -> Step:
    kind = i.parts[-1]
    return simple(m, i, lambda a, b, p: np.where(p, a, b), kind, [kind, kind, "pred"])


@handles("cvt", "cvta")
def convert(m: Machine, i: Instruction) -> Step:
    if i.op == "cvta":
        if i.parts[-2] not in ("global", "param"):
            raise Fault("generic addresses of shared memory")
        return simple(m, i, lambda a: a, i.parts[-1], [i.parts[-1]])
    out, kind = i.parts[-2:]
    if "satfinite" in i.parts or "relu" in i.parts:
        raise Fault("a saturation that is not known")
    if out in ("bf16x2", "f16x2"):
        narrow = to_bf16 if out == "bf16x2" else to_f16
        return simple(m, i, lambda high, low: word(narrow(low), narrow(high)), "b32", [kind, kind])
    if out == "tf32":
        return simple(m, i, lambda a: (a.view(U32) + U32(0x1000)) & U32(0xFFFFE000), "b32", ["f32"])
    rounding = next((r for r in ("rni", "rzi", "rmi", "rpi") if r in i.parts), None)
    whole = {None: lambda a: a, "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    if out in SMALL_FLOATS:
        return simple(m, i, lambda a: whole(a).astype(F32), out, [kind])
    target = dtype_of(out)

    def change(a: Array) -> Array:
        if target.kind == "f":
            a = whole(a).astype(target)
            return np.clip(np.nan_to_num(a), 0, 1).astype(target) if "sat" in i.parts else a
        if a.dtype.kind == "f":
            limits = np.iinfo(target)
            a = np.nan_to_num(whole(a.astype(F64)), nan=0.0)
            return np.where(
                a >= limits.max, limits.max, np.where(a <= limits.min, limits.min, a).astype(np.int64)
            ).astype(target)
        if "sat" in i.parts:
            raise Fault("a saturation that is not known")
        return a.astype(target)

    return simple(m, i, change, out, [kind])


@handles("mov")
def move(m: Machine, i: Instruction) -> Step:
    to, source = i.operands
    kind = i.parts[-1]
    if isinstance(to, tuple) or isinstance(source, tuple):
        many = to if isinstance(to, tuple) else source
        part = "b" + str(int(kind[1:]) // len(many))
        unit, whole = dtype_of(part), dtype_of(kind)
        if isinstance(to, tuple):
            read, writes = m.reader(source, kind, i.scope), [m.writer(t, part, i.scope) for t in to]

            def unpack(lanes: Any) -> None:
                pieces = np.ascontiguousarray(np.broadcast_to(read(), (m.n,))).view(unit).reshape(m.n, -1)
                for k, write in enumerate(writes):
                    write(pieces[:, k].copy(), lanes)

            return unpack
        reads, write = [m.reader(s, part, i.scope) for s in source], m.writer(to, kind, i.scope)
        return lambda lanes: write(
            np.stack([np.broadcast_to(r(), (m.n,)) for r in reads], 1).view(whole).reshape(m.n), lanes
        )
    if i.parts[-1] == "pred" or kind not in SMALL_FLOATS:
        return simple(m, i, lambda a: a, kind, [kind])
    return simple(m, i, lambda a: a, "b16", ["b16"])


# --- control


@handles("bra")
def branch(m: Machine, i: Instruction) -> Step:
    target = m.program.label(str(i.operands[-1]), i.scope)
    guard = m.reader(("!" if i.guard[1] else "") + i.guard[0], "pred", i.scope) if i.guard else None

    def step(lanes: Any) -> int | None:
        if guard is None:
            return target
        chosen = guard() & m.mask
        if not chosen.any():
            return None
        if (rest := m.mask & ~chosen).any():
            m.add_group(target, chosen)
            m.add_group(m.pc + 1, rest)
            return -1
        return target

    return step


@handles("ret", "exit")
def finish(m: Machine, i: Instruction) -> Step:
    guard = m.reader(("!" if i.guard[1] else "") + i.guard[0], "pred", i.scope) if i.guard else None

    def step(lanes: Any) -> int | None:
        gone = m.mask if guard is None else m.mask & guard()
        if not gone.any():
            return None
        m.alive &= ~gone
        m.release()
        return m.leave(gone)

    return step


@handles("trap")
def trap(m: Machine, i: Instruction) -> Step:
    return unknown("the kernel trapped")


@handles("bar", "barrier")
def barrier(m: Machine, i: Instruction) -> Step:
    if "warp" in i.parts:
        return lambda lanes: None
    if "cluster" in i.parts or "red" in i.parts:
        raise Fault("clusters and reductions")
    numbers = [m.reader(o, "u32", i.scope) for o in i.operands]

    def step(lanes: Any) -> int | None:
        number, *count = (int(np.broadcast_to(r(), (m.n,))[threads(m, lanes)[0]]) for r in numbers)
        return m.barrier(number, count[0] if count else None, lanes, "arrive" not in i.parts)

    return step


@handles("fence")
def fence(m: Machine, i: Instruction) -> Step:
    if "proxy" not in i.parts or not any(p.startswith("async") for p in i.parts):
        return lambda lanes: None

    def step(lanes: Any) -> None:
        shared = m.shared
        for warp in np.unique(m.warp[threads(m, lanes)]):
            mine = slice(warp // m.warps * shared.per_block, (warp // m.warps + 1) * shared.per_block)
            known = shared.known[warp, shared.writer[mine]] >= shared.write_clock[mine]
            shared.generic[mine] &= ~known

    return step


# --- memory


@handles("ld", "st")
def access(m: Machine, i: Instruction) -> Step:
    kind = i.parts[-1]
    unit = SMALL_FLOATS[kind][0] if kind in SMALL_FLOATS else dtype_of(kind)
    kind = "b16" if kind in SMALL_FLOATS else kind
    where, what = i.operands[:2] if i.op == "st" else i.operands[1::-1]
    pieces = what if isinstance(what, tuple) else (what,)
    space = next(
        (p.split("::")[0] for p in i.parts if p.split("::")[0] in ("param", "shared", "global", "local")), "global"
    )
    if space == "local" or (i.op == "st" and space == "param"):
        raise Fault(f"stores to {space} memory")
    if space == "param":
        place, writes = m.address(where, i.scope), [m.writer(p, kind, i.scope) for p in pieces]

        def load_param(lanes: Any) -> None:
            some = threads(m, lanes)
            starts = place()[some].astype(np.int64)
            if (starts == starts[0]).all():
                values = m.params[starts[0] : starts[0] + unit.itemsize * len(pieces)].view(unit)
                for write, value in zip(writes, values):
                    write(value, lanes)
                return
            # a pointer chosen among parameters: the address differs from lane to lane
            data = m.params[starts[:, None] + np.arange(unit.itemsize * len(pieces))].view(unit)
            for k, write in enumerate(writes):
                whole = np.zeros(m.n, unit)
                whole[some] = data[:, k]
                write(whole, lanes)

        return load_param
    address = m.address(where, i.scope)
    if i.op == "ld":
        writes = [m.writer(p, kind, i.scope) for p in pieces]

        def load(lanes: Any) -> None:
            some = threads(m, lanes)
            at = address()[some]
            if space == "shared":
                data = m.load_shared(some, at, unit, len(pieces), i.text)
            else:
                data = m.memory.load(at, unit, len(pieces), i.text)
            for k, write in enumerate(writes):
                column = np.ascontiguousarray(data[:, k])
                if lanes is not None:
                    whole = np.zeros(m.n, unit)
                    whole[some] = column
                    column = whole
                write(column, lanes)

        return load
    reads = [m.reader(p, f"b{unit.itemsize * 8}", i.scope) for p in pieces]

    def store(lanes: Any) -> None:
        some = threads(m, lanes)
        data = np.stack([np.broadcast_to(r(), (m.n,))[some] for r in reads], 1)
        if space == "shared":
            m.store_shared(some, address()[some], data, i.text)
        else:
            m.memory.store(address()[some], data, i.text)

    return store


UPDATE: dict[str, Callable] = {
    "add": lambda old, new: old + new, "min": min, "max": max, "exch": lambda old, new: new,
    "and": lambda old, new: old & new, "or": lambda old, new: old | new, "xor": lambda old, new: old ^ new,
    "cas": lambda old, new, other: other if old == new else old,
}  # fmt: skip


@handles("atom", "red")
def atomic(m: Machine, i: Instruction) -> Step:
    """One thread after another, in the order of their numbers: an order that the kernel must not rely on."""
    kind, update = i.parts[-1], UPDATE[next(p for p in i.parts if p in UPDATE)]
    small = SMALL_FLOATS.get(kind)
    unit = small[0] if small else dtype_of(kind)
    shared = any(p.startswith("shared") for p in i.parts)
    where, *values = i.operands[1:] if i.op == "atom" else i.operands
    if any(isinstance(v, tuple) for v in values):
        raise Fault("atomics of vectors")
    address = m.address(where, i.scope)
    reads = [m.reader(v, kind, i.scope) for v in values]
    write = m.writer(i.operands[0], f"b{unit.itemsize * 8}", i.scope) if i.op == "atom" else None

    def step(lanes: Any) -> None:
        at, given = address(), [np.asarray(r()) for r in reads]
        given = [np.broadcast_to(g, (*g.shape[:-1], m.n)) for g in given]
        before = np.zeros(m.n, np.dtype(f"u{unit.itemsize}"))
        for t in threads(m, lanes):
            if shared:
                place = m.shared.places(at[t : t + 1], unit.itemsize, m.block[t : t + 1], i.text)
                m.shared.written[m.shared.granules(place, unit.itemsize)] = True
                cell = m.shared.bytes.view(unit)[place[0] // unit.itemsize :][:1]
            else:
                raw, _, offset = m.memory.split(at[t : t + 1], unit.itemsize, i.text)[0]
                cell = raw[offset[0] : offset[0] + unit.itemsize].view(unit)
            before[t] = cell.view(before.dtype)[0]
            old = small[1](cell.copy())[..., 0] if small else cell[0]
            new = update(old, *(g[..., t] for g in given))
            cell[0] = small[2](np.asarray(new)[..., None])[0] if small else new
        if write:
            write(before, lanes)

    return step


# --- warps


@handles("shfl")
def shuffle(m: Machine, i: Instruction) -> Step:
    mode = i.parts[1]
    target, _, inside = str(i.operands[0]).partition("|")
    write, write_inside = m.writer(target, "b32", i.scope), m.writer(inside or "_", "pred", i.scope)
    a, b, c = (m.reader(o, "b32", i.scope) for o in i.operands[1:4])

    def step(lanes: Any) -> None:
        by, limits = (np.broadcast_to(r().astype(np.int64), (m.n,)) for r in (b, c))
        segment, clamp = limits >> 8 & 31, limits & 31
        low = m.lane & segment
        high = low | (clamp & ~segment)
        source = {"bfly": m.lane ^ by, "up": m.lane - by, "down": m.lane + by, "idx": low | (by & 31 & ~segment)}[mode]
        ok = source >= high if mode == "up" else source <= high
        source = np.where(ok, source, m.lane) + m.warp * WARP
        if lanes is not None and not lanes[source[lanes]].all():
            raise Fault(f"shuffle from a thread that is not there: {i.text}")
        write(np.broadcast_to(a(), (m.n,))[source], lanes)
        write_inside(ok, lanes)

    return step


@handles("vote", "activemask", "redux", "elect")
def vote(m: Machine, i: Instruction) -> Step:
    target, _, chosen = str(i.operands[0]).partition("|")
    mode = i.parts[1] if i.op in ("vote", "redux") else i.op
    kind = {"any": "pred", "all": "pred", "uni": "pred"}.get(mode, "u32" if i.op != "redux" else i.parts[-1])
    write = m.writer(target, kind, i.scope)
    write_chosen = m.writer(chosen or "_", "pred", i.scope)
    read = m.reader(i.operands[1], "pred" if i.op == "vote" else kind, i.scope) if i.op in ("vote", "redux") else None

    def step(lanes: Any) -> None:
        here = (np.ones(m.n, bool) if lanes is None else lanes).reshape(-1, WARP)
        first = here.argmax(1)[:, None]
        if i.op == "elect":
            write_chosen(((np.arange(WARP) == first) & here).reshape(-1), lanes)
            write(np.repeat(first.astype(U32), WARP), lanes)
            return
        values = here if read is None else np.broadcast_to(read(), (m.n,)).reshape(-1, WARP)
        if i.op == "redux":
            join = {
                "add": np.add,
                "min": np.minimum,
                "max": np.maximum,
                "and": np.bitwise_and,
                "or": np.bitwise_or,
                "xor": np.bitwise_xor,
            }[mode]
            found = np.stack([join.reduce(v[h], dtype=v.dtype) if h.any() else v[0] for v, h in zip(values, here)])
        elif mode in ("ballot", "activemask"):
            found = ((values & here).astype(U64) << np.arange(WARP, dtype=U64)).sum(1).astype(U32)
        else:
            found = {"any": (values & here).any(1), "all": (values | ~here).all(1)}[mode]
        write(np.repeat(found, WARP), lanes)

    return step


@handles("createpolicy")
def policy(m: Machine, i: Instruction) -> Step:
    write = m.writer(i.operands[0], "b64", i.scope)
    return lambda lanes: write(np.zeros(m.n, U64), lanes)


# --- matrices in shared memory and registers


@handles("ldmatrix", "stmatrix")
def matrix(m: Machine, i: Instruction) -> Step:
    """8 x 8 matrices of 16 bits: row r of matrix k at the address of lane 8 k + r; lane 4 r + q has columns 2 q, 2 q + 1."""
    loads, trans = i.op == "ldmatrix", "trans" in i.parts
    if i.parts[-1] != "b16":
        raise Fault("matrices of other than 16 bits")
    where, registers = i.operands[::-1] if loads else i.operands
    address = m.address(where, i.scope)
    names = registers if isinstance(registers, tuple) else (registers,)
    ports = [(m.writer if loads else m.reader)(r, "b32", i.scope) for r in names]

    def step(lanes: Any) -> None:
        warps = np.unique(m.warp[threads(m, lanes)])
        rows = warps[:, None] * WARP + np.arange(8)
        for k, port in enumerate(ports):
            source = (rows + 8 * k).reshape(-1)
            at = address()[source]
            if loads:
                data = m.load_shared(source, at, np.dtype(U16), 8, i.text).reshape(-1, 8, 8)
                values = np.zeros((m.n // WARP, WARP), U32)
                values[warps] = (
                    np.ascontiguousarray(data.transpose(0, 2, 1) if trans else data).view(U32).reshape(-1, WARP)
                )
                port(values.reshape(-1), lanes)
            else:
                data = np.ascontiguousarray(port().reshape(-1, WARP)[warps]).view(U16).reshape(-1, 8, 8)
                data = data.transpose(0, 2, 1) if trans else data
                m.store_shared(source, at, np.ascontiguousarray(data).reshape(-1, 8), i.text)

    return step


def fragment(kind: str, registers: list[Array], tall: int, wide: int) -> Array:
    """Registers of a matrix operand -> [warps, 8 tall, columns]; register r is block r % tall down, r // tall across."""
    values = np.stack([MATRIX[kind](r.view(U32 if kind == "tf32" else U16)) for r in registers])
    each = values.shape[1] * WARP // (values.shape[1] // (1 if kind == "tf32" else 2)) // WARP  # numbers a register
    blocks = values.reshape(wide, tall, -1, 8, 4, each)  # [across, down, warp, row, quad, number]
    return blocks.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 8 * tall, wide * 4 * each)


@handles("mma")
def mma(m: Machine, i: Instruction) -> Step:
    found = re.search(r"m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32", i.text)
    if not found:
        raise Fault("another shape or type")
    kind, across = found[2], int(found[1]) // (4 if found[2] == "tf32" else 8)
    d, a, b, c = (o if isinstance(o, tuple) else (o,) for o in i.operands)
    writes = [m.writer(x, "f32", i.scope) for x in d]
    left, right, add = ([m.reader(x, t, i.scope) for x in xs] for xs, t in ((a, "b32"), (b, "b32"), (c, "f32")))

    def step(lanes: Any) -> None:
        x = fragment(kind, [np.ascontiguousarray(np.broadcast_to(r(), (m.n,))) for r in left], 2, across)
        y = fragment(kind, [np.ascontiguousarray(np.broadcast_to(r(), (m.n,))) for r in right], 1, across)
        product = np.matmul(x, y.transpose(0, 2, 1)).reshape(-1, 2, 8, 4, 2)  # [warp, down, row, quad, number]
        for k, (write, r) in enumerate(zip(writes, add)):
            write(product[:, k // 2, :, :, k % 2].reshape(-1) + r(), lanes)

    return step


def operand_places(descriptor: int, rows: int, columns: int, width: int, transposed: bool) -> np.ndarray:
    """Bytes where the numbers [rows, columns] of a wgmma operand begin, by its descriptor (PTX ISA, "Matrix descriptor")."""
    start, lead, stride = ((descriptor >> s & 0x3FFF) << 4 for s in (0, 16, 32))
    line = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]  # bytes of a swizzled row
    if descriptor >> 49 & 7:
        raise Fault("a descriptor with a base offset")
    r, c = np.arange(rows)[:, None], np.arange(columns)[None, :]
    if transposed:
        r, c = c, r  # c runs along the rows of memory
        per = line // width
        at = start + c // per * lead + r // 8 * stride + r % 8 * line + c % per * width
        if line == 16:
            raise Fault("a transposed operand without swizzle")
    elif line == 16:
        at = start + r // 8 * stride + c * width // 16 * lead + r % 8 * 16 + c * width % 16
    else:
        at = start + r // 8 * stride + r % 8 * line + c * width
    return at ^ ((at >> 7 & (line // 16 - 1)) << 4)


@handles("wgmma")
def wgmma(m: Machine, i: Instruction) -> Step:
    action = i.parts[0]
    if action == "fence":
        return lambda lanes: None
    if action == "commit_group":

        def commit(lanes: Any) -> None:
            m.product_group[np.unique(threads(m, lanes) // GROUP)] += 1

        return commit
    if action == "wait_group":
        keep = int(str(i.operands[0]))
        return lambda lanes: m.finish_products(keep, lanes)
    found = re.search(r"m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3", i.text)
    if not found:
        raise Fault("another shape or type")
    n, k, kind = int(found[1]), int(found[2]), found[3]
    unit = np.dtype(U32 if kind == "tf32" else U16)
    d, a, b = i.operands[:3]
    flags = [int(str(f)) for f in i.operands[4:]]
    if flags[:2] != [1, 1]:
        raise Fault("negated operands")
    keeps = m.reader(i.operands[3], "pred", i.scope)
    places = [m.find(x, i.scope)[0] for x in d]  # type: ignore[index]
    left = [m.reader(x, "b32", i.scope) for x in a] if isinstance(a, tuple) else m.reader(a, "u64", i.scope)
    right = m.reader(b, "u64", i.scope)
    # tf32 is never transposed, and a from registers neither
    trans_a, trans_b = {2: (0, 0), 3: (0, flags[-1]), 4: (flags[-2], flags[-1])}[len(flags)]

    def where(read: Callable[[], Array], ids: Array, rows: int, trans: int) -> Array:
        """Where the operand of each warpgroup is: bytes of its block's shared memory [ids, rows, k]."""
        descriptors = np.broadcast_to(read(), (m.n,)).reshape(-1, GROUP)[ids]
        if (descriptors != descriptors[:, :1]).any():
            raise Fault(f"the threads of a warpgroup have different descriptors: {i.text}")
        each = {
            int(x): operand_places(int(x), rows, k, unit.itemsize, bool(trans)) for x in np.unique(descriptors[:, 0])
        }
        return np.stack([each[int(x)] for x in descriptors[:, 0]])

    def issue(lanes: Any) -> None:
        some = threads(m, lanes)
        ids = np.unique(some // GROUP)
        if len(ids) * GROUP != len(some) or m.threads % GROUP:
            raise Fault(f"a warpgroup is not whole: {i.text}")
        block, operands = ids * GROUP // m.threads, {}
        for name, read, rows, trans in (("a", left, 64, trans_a), ("b", right, n, trans_b)):
            if isinstance(read, list):
                operands[name] = fragment_of_group(m, kind, read, ids)
                continue
            at = where(read, ids, rows, trans)
            if at.max() + unit.itemsize > m.shared.size:
                raise Fault(f"a descriptor reaches beyond shared memory: {i.text}")
            at = at + (block * m.shared.size)[:, None, None]
            granules = np.stack([np.unique(g // m.shared.granule) for g in at])
            if m.shared.generic[granules].any():
                raise Fault(f"race: no fence.proxy.async between the write of an operand and {i.text}")
            warp = ids * (GROUP // WARP)
            m.shared.read(granules, warp, i.text)
            np.add.at(m.shared.in_use, granules, 1)
            operands[name], operands[f"{name}_granules"] = at, granules
        key = tuple(places)
        if key not in m.accumulators:
            if any(set(key) & set(other) for other in m.accumulators):
                raise Fault(f"accumulators that overlap others on their way: {i.text}")
            m.accumulators[key] = [np.zeros((len(d), m.n), F32), np.zeros(m.n // GROUP, np.int64)]
        values, count = m.accumulators[key]
        first = np.repeat(count == 0, GROUP) & np.isin(m.all // GROUP, ids)
        if first.any():
            for row, p in enumerate(places):
                old = m.R[p]
                values[row, first] = old[first].view(F32)
                # who reads the accumulator before the wait finds NaN
                m.R[p] = np.where(first, U32(0xFFFFFFFF), old)
        count[ids] += 1
        accumulate = np.broadcast_to(keeps(), (m.n,)).reshape(-1, GROUP)[ids, 0].copy()
        product = {"ids": ids, "group": m.product_group[ids], "accumulate": accumulate, **operands}

        def complete(mine: dict[str, Array]) -> None:
            numbers = {}
            for name in "ab":
                numbers[name] = mine[name]
                if f"{name}_granules" in mine:
                    np.add.at(m.shared.in_use, mine[f"{name}_granules"], -1)
                    m.shared.read(mine[f"{name}_granules"], mine["ids"] * (GROUP // WARP), i.text)
                    numbers[name] = MATRIX[kind](m.shared.bytes.view(unit)[mine[name] // unit.itemsize])
            c = np.matmul(numbers["a"], numbers["b"].transpose(0, 2, 1)).reshape(-1, 4, 2, 8, n // 8, 4, 2)
            # [group, warp, down, row, across, quad, number] -> [register, thread]
            c = c.transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
            lanes_of = (mine["ids"][:, None] * GROUP + np.arange(GROUP)).reshape(-1)
            kept = np.repeat(mine["accumulate"], GROUP)
            values[:, lanes_of] = np.where(kept, values[:, lanes_of], F32(0)) + c
            count[mine["ids"]] -= 1
            over = np.repeat(count == 0, GROUP) & np.isin(m.all // GROUP, mine["ids"])
            if over.any():
                for row, p in enumerate(places):
                    m.R[p] = np.where(over, values[row].view(U32), m.R[p])
            if not count.any():
                m.accumulators.pop(key, None)

        m.products.append({**product, "finish": complete})

    return issue


def fragment_of_group(m: Machine, kind: str, read: list[Callable], ids: Array) -> Array:
    """Operand a from registers: [ids, 64, k]."""
    registers = [np.ascontiguousarray(np.broadcast_to(r(), (m.n,))) for r in read]
    whole = fragment(kind, registers, 2, len(read) // 2)
    return whole.reshape(-1, 64, whole.shape[-1])[ids]


# --- copies


@handles("cp")
def copy(m: Machine, i: Instruction) -> Step:
    if "bulk" in i.parts:
        return bulk(m, i)
    if "commit_group" in i.parts:

        def commit(lanes: Any) -> None:
            m.copy_group[threads(m, lanes)] += 1

        return commit
    if "wait_group" in i.parts:
        keep = int(str(i.operands[0]))
        return lambda lanes: m.land_copies(keep, lanes)
    if "wait_all" in i.parts:

        def wait(lanes: Any) -> None:
            m.copy_group[threads(m, lanes)] += 1
            m.land_copies(0, lanes)

        return wait
    if "mbarrier" in i.parts:
        raise Fault("copies that arrive at an mbarrier")
    size = int(str(i.operands[2]), 0)
    to, source = (m.address(o, i.scope) for o in i.operands[:2])
    hinted = any("cache_hint" in p for p in i.parts)
    given = i.operands[3 : -1 if hinted else None]
    real = m.reader(given[0], "u32", i.scope) if given else None

    def step(lanes: Any) -> None:
        some = threads(m, lanes)
        offsets, at = to()[some], source()[some]
        data = np.zeros((len(some), size), U8)
        count = np.full(len(some), size) if real is None else np.broadcast_to(real(), (m.n,))[some]
        for c in np.unique(count):
            if c:
                data[count == c, :c] = m.memory.load(at[count == c], np.dtype(U8), int(c), i.text)
        if (at[count > 0] % U64(size)).any():
            raise Fault(f"misaligned copy: {i.text}")
        places = m.shared.places(offsets, size, m.block[some], i.text)
        granules = m.shared.granules(places, size)
        m.shared.write(granules, m.warp[some], i.text)
        m.shared.bytes[places[:, None] + np.arange(size)] = 0xFF
        m.shared.landing[granules] = True
        group = m.copy_group[some].copy()
        m.copies.append(
            {"lanes": some, "offsets": offsets, "places": places, "data": data, "group": group, "text": i.text}
        )

    return step


def bulk(m: Machine, i: Instruction) -> Step:
    """One thread copies bytes from global to shared memory, which an mbarrier counts, or back, in groups."""
    if "commit_group" in i.parts:
        return lambda lanes: None
    if "wait_group" in i.parts:

        def wait(lanes: Any) -> None:
            for thread, granules in m.bulk_stores:
                m.shared.in_use[granules] -= 1
                m.shared.read(granules, m.warp[thread : thread + 1], i.text)
            m.bulk_stores.clear()

        return wait
    if "tensor" in i.parts or "reduce" in i.parts or "multicast::cluster" in i.parts:
        raise Fault("tensor maps, reductions and multicasts")
    load = i.parts[2].startswith("shared")
    to, source = (m.address(o, i.scope) for o in i.operands[:2])
    length = m.reader(i.operands[2], "u32", i.scope)
    barrier_at = m.address(i.operands[3], i.scope) if load else None

    def step(lanes: Any) -> None:
        for t in threads(m, lanes):
            size = int(np.broadcast_to(length(), (m.n,))[t])
            shared_at, global_at = (to()[t], source()[t]) if load else (source()[t], to()[t])
            if size % 16 or int(shared_at) % 16 or int(global_at) % 16:
                raise Fault(f"misaligned bulk copy: {i.text}")
            place = m.shared.places(np.array([shared_at]), size, m.block[t : t + 1], i.text)
            granules = m.shared.granules(place, size)
            warp = m.warp[t : t + 1]
            if barrier_at is None:
                if m.shared.generic[granules].any():
                    raise Fault(f"race: no fence.proxy.async before {i.text}")
                m.shared.read(granules, warp, i.text)
                m.shared.in_use[granules] += 1
                m.memory.store(np.array([global_at]), m.shared.bytes[place[0] : place[0] + size][None], i.text)
                m.bulk_stores.append((t, granules))
                continue
            data = m.memory.load(np.array([global_at]), np.dtype(U8), size, i.text)[0]
            m.shared.write(granules, warp, i.text)
            m.shared.bytes[place[0] : place[0] + size] = 0xFF
            m.shared.landing[granules] = True
            state = mbarrier_state(m, t, barrier_at()[t], i.text)
            state["copies"].append((place[0], granules, data))
            state["bytes"] += size
            settle(m, state)

    return step


def mbarrier_state(m: Machine, thread: int, offset: Array, text: str) -> dict[str, Any]:
    state = m.mbarriers.get((int(m.block[thread]), int(offset)))
    if state is None:
        raise Fault(f"an mbarrier that was not initialised: {text}")
    return state


def settle(m: Machine, state: dict[str, Any]) -> None:
    """End the phase if all have arrived and all bytes are there; then the copies land, and who waits goes on."""
    if state["left"] or state["bytes"] != state["expected"]:
        return
    shared, block = m.shared, state["block"]
    warps = slice(block * m.warps, (block + 1) * m.warps)
    for place, granules, data in state["copies"]:
        shared.bytes[place : place + len(data)] = data
        shared.landing[granules], shared.generic[granules] = False, False
        shared.writer[granules] = m.warps
        state["clock"] += 1
        shared.write_clock[granules] = state["clock"]
        state["known"][m.warps] = state["clock"]
    state.update(left=state["count"], bytes=0, expected=0, copies=[], phase=state["phase"] + 1)
    state["released"] = np.maximum(state["released"], state["known"])
    assert shared.known[warps].shape[1] == len(state["known"])
    for pc, mask in m.parked.items():
        m.add_group(pc, mask)
    m.parked.clear()


@handles("mbarrier")
def mbarrier(m: Machine, i: Instruction) -> Step:
    action = i.parts[0]
    if action not in ("init", "inval", "arrive", "expect_tx", "try_wait", "test_wait"):
        raise Fault("another action")
    waits = action in ("try_wait", "test_wait")
    if waits and "parity" not in i.parts:
        raise Fault("waits by state")
    at = next(k for k, o in enumerate(i.operands) if str(o).startswith("["))
    address = m.address(i.operands[at], i.scope)
    values = [m.reader(o, "u32", i.scope) for o in i.operands[at + 1 :]]
    result = m.writer(i.operands[0], "pred" if waits else "b64", i.scope) if at else None

    def step(lanes: Any) -> int | None:
        some, offsets = threads(m, lanes), address()
        given = [np.broadcast_to(v(), (m.n,)) for v in values]
        if action in ("init", "inval"):
            for t in some:
                key = int(m.block[t]), int(offsets[t])
                m.mbarriers.pop(key, None)
                if action == "init":
                    count = int(given[0][t])
                    known = np.zeros(m.warps + 1, np.int32)
                    m.mbarriers[key] = {
                        "block": key[0], "count": count, "left": count, "bytes": 0, "expected": 0, "copies": [],
                        "phase": 0, "clock": 0, "known": known, "released": known.copy(),
                    }  # fmt: skip
            return None
        if waits:
            passed = np.zeros(m.n, bool)
            for t in some:
                state = mbarrier_state(m, t, offsets[t], i.text)
                # the phase of this parity is over
                passed[t] = state["phase"] % 2 != int(given[0][t]) % 2
                if passed[t]:
                    mine = m.shared.known[m.warp[t]]
                    np.maximum(mine, state["released"], out=mine)
            assert result is not None
            if passed[some].any() or action == "test_wait":
                done = passed if action == "try_wait" else (np.ones(m.n, bool) if lanes is None else lanes)
                result(passed, done)
            blocked = (
                np.zeros(m.n, bool)
                if action == "test_wait"
                else ~passed & (np.ones(m.n, bool) if lanes is None else lanes)
            )
            if blocked.any():  # until a phase ends
                m.parked[m.pc] = m.parked.get(m.pc, np.zeros(m.n, bool)) | blocked
                return m.leave(blocked)
            return None
        for t in some:
            state = mbarrier_state(m, t, offsets[t], i.text)
            state["known"] = np.maximum(state["known"], m.shared.known[m.warp[t]])
            if "expect_tx" in i.parts:
                state["expected"] += int(given[0][t])
            if action == "arrive":
                state["left"] -= int(given[0][t]) if given and "expect_tx" not in i.parts else 1
                if state["left"] < 0:
                    raise Fault(f"more arrivals than the mbarrier expects: {i.text}")
            settle(m, state)
        m.shared.tick(np.unique(m.warp[some]))
        if result:
            result(np.zeros(m.n, U64), lanes)
        return None

    return step
