"""Reads the text of a PTX kernel: parameters, registers, shared memory, labels and instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import numpy as np

# type of an instruction -> how numpy holds it; bfloat16, TF32 and packed pairs have converters in interpreter.py
KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
RANGE = re.compile(r"(%\w+?)<(\d+)>")


class Fault(Exception):
    """What a GPU might not survive: a race, an access out of bounds, a deadlock, an instruction nobody taught us."""


def dtype_of(kind: str) -> np.dtype:
    """``s32`` -> int32, ``b16`` -> uint16, ``pred`` -> bool."""
    if kind == "pred":
        return np.dtype(bool)
    found = re.fullmatch(r"([busf])(\d+)", kind)
    if not found:
        raise Fault(f"unknown type {kind}")
    return np.dtype(f"{KINDS[found[1]]}{int(found[2]) // 8}")


@dataclass
class Instruction:
    """One instruction; operands are texts, groups in braces split into tuples, brackets kept."""

    text: str
    op: str
    parts: list[str]
    operands: list[str | tuple[str, ...]]
    guard: tuple[str, bool] | None  # predicate, and whether it is negated
    scope: tuple[int, ...]


@dataclass
class Program:
    """A parsed kernel; ``shared`` maps the names of shared arrays to their offsets, ``static`` is the bytes they take."""

    name: str
    params: list[tuple[str, int]]
    threads: int
    code: list[Instruction] = field(default_factory=list)
    labels: dict[tuple[str, int], int] = field(default_factory=dict)
    registers: dict[tuple[str, int], np.dtype] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    static: int = 0

    @cached_property
    def param_at(self) -> dict[str, int]:
        """Where each parameter begins when they lie one behind the other, 16 bytes aligned."""
        ends = list(accumulate(-(-size // 16) * 16 for _, size in self.params))
        return {name: end for (name, _), end in zip(self.params, [0, *ends])}

    @property
    def param_bytes(self) -> int:
        return sum(-(-size // 16) * 16 for _, size in self.params)

    def label(self, name: str, scope: tuple[int, ...]) -> int:
        for number in reversed(scope):
            if (name, number) in self.labels:
                return self.labels[name, number]
        raise Fault(f"no label {name}")

    def register(self, name: str, scope: tuple[int, ...]) -> tuple[tuple[str, int], np.dtype] | None:
        for number in reversed(scope):
            if (name, number) in self.registers:
                return (name, number), self.registers[name, number]
        return None


def split_operands(text: str) -> list[str | tuple[str, ...]]:
    found: list[str | tuple[str, ...]] = []
    for piece in OPERAND.findall(text):
        if piece.startswith("{"):
            found.append(tuple(p.strip() for p in piece[1:-1].split(",")))
        elif piece.startswith("["):
            found.append("[" + re.sub(r"\s+", "", piece[1:-1]) + "]")
        else:
            found.append(piece)
    return found


def kernels(text: str) -> dict[str, str]:
    """Name of each kernel in the text -> its text from ``.entry`` to its closing brace."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    found = {}
    for start in re.finditer(r"\.entry\s+([\w$]+)", text):
        depth, at = 0, text.index("{", start.start())
        for brace in re.finditer(r"[{}]", text[at:]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                found[start[1]] = text[start.start() : at + brace.end()]
                break
    return found


def parse(text: str, name: str | None = None, threads: int = 0) -> Program:
    """Read kernel ``name`` of a PTX file, by default its only one; ``threads`` a block, where the text does not say."""
    found = kernels(text)
    name = name or next(iter(found))
    head, _, body = found[name].partition("{")
    fixed = re.search(r"\.(?:req|max)ntid\s+(\d+)", head)
    sized = r"\.param\s+(?:\.align\s+\d+\s+)?\.[busf](\d+)(?:(?:\s+\.\w+(?:\s+\d+)?)*)\s+([\w$]+)(?:\[(\d+)\])?"
    params = [(m[2], int(m[1]) // 8 * int(m[3] or 1)) for m in re.finditer(sized, head)]
    program = Program(name, params, threads or int(fixed[1] if fixed else 0))
    if not program.threads:
        raise Fault(f"{name}: the text does not say how many threads a block has")
    outside = re.sub(r"\.(loc|file|pragma|section)\b[^\n]*", "", re.sub(r"//[^\n]*", "", text[: text.index(".entry")]))
    for array in re.finditer(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", outside + body):
        program.static = -(-program.static // int(array[1])) * int(array[1])
        program.shared[array[2]] = program.static
        program.static += int(array[3] or 0)
    # dynamic shared memory starts behind the arrays of known size
    for array in re.finditer(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[\]", outside):
        program.shared[array[2]] = program.static = -(-program.static // 16) * 16
    _body(program, re.sub(r"^\s*(?:\.(?:loc|file|pragma|section)\b|\}?\s*//)[^\n]*$", "", body, flags=re.MULTILINE))
    return program


def _body(program: Program, body: str) -> None:
    scope, scopes, at = (0,), 1, 0
    statement = re.compile(
        r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[$\w]+):(?!:)|(?P<text>[^;{}]*(?:\{[^}]*\}[^;{}]*)*);)"
    )
    while found := statement.match(body, at):
        at = found.end()
        if found["open"]:
            scope, scopes = (*scope, scopes), scopes + 1
        elif found["close"]:
            scope = scope[:-1]
        elif found["label"]:
            program.labels[found["label"], scope[-1]] = len(program.code)
        elif found["text"].strip():
            _statement(program, " ".join(found["text"].split()), scope)
    if body[at:].strip(" \n\t}"):
        raise Fault(f"{program.name}: cannot read {body[at : at + 80]!r}")


def _statement(program: Program, text: str, scope: tuple[int, ...]) -> None:
    if text.startswith(".reg"):
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()  # type: ignore[union-attr]
        for name in names.replace(" ", "").split(","):
            many = RANGE.fullmatch(name)
            for register in [f"{many[1]}{i}" for i in range(int(many[2]) + 1)] if many else [name]:
                program.registers[register, scope[-1]] = dtype_of(re.sub("^[sf](?=[0-9])", "u", kind))
        return
    if text.startswith("."):
        return
    guard = re.match(r"@(!?)\s*([%\w$]+)\s+", text)
    rest = text[guard.end() :] if guard else text
    op, _, operands = rest.partition(" ")
    program.code.append(
        Instruction(
            text, op.split(".")[0], op.split(".")[1:], split_operands(operands),
            (guard[2], guard[1] == "!") if guard else None, scope,
        )
    )  # fmt: skip
