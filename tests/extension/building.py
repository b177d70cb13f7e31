"""Compiles csrc for the CPU: the CUDA kernels emulated, under AddressSanitizer and UBSan.

``python3 tests/extension/building.py`` compiles the kernels beforehand, with nothing installed but g++; the tests find them.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).parent
FOLDER = ROOT / "build" / "emulation"

LANGUAGE = ("-std=c++17", "-fPIC", "-DLCC_EMULATION", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZE = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

Unit = tuple[Path, Sequence[str]]  # a source and its flags


def emulated_kernels() -> list[Unit]:
    return [(source, SANITIZE) for source in sorted(CSRC.glob("cuda/*.cu"))]


def compile_units(units: Sequence[Unit], gxx: str) -> list[str]:
    """Their objects; what a file and its headers say decides whether it is compiled again."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    objects, running = [], []
    for source, flags in units:
        key = hashlib.sha256(repr((LANGUAGE, sys.version, source, flags)).encode())
        for path in sorted(included(source)):
            key.update(path.read_bytes())
        out = FOLDER / f"{source.stem}-{key.hexdigest()[:16]}.o"
        objects.append(str(out))
        if not out.exists():
            command = [gxx, *LANGUAGE, *flags, f"-I{CSRC}", "-x", "c++", "-c", source, "-o", _part(out)]
            running.append((out, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    errors = "".join(process.communicate()[1] for _, process in running)
    assert not any(process.returncode for _, process in running), errors
    for out, _ in running:
        os.replace(_part(out), out)
    return objects


def build(name: str, units: Sequence[Unit], link: Sequence[str], gxx: str) -> Path:
    """Compile units and link them."""
    objects = compile_units(units, gxx)
    target = FOLDER / hashlib.sha256(repr((objects, link)).encode()).hexdigest()[:16] / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        subprocess.run([gxx, "-fsanitize=address,undefined", *objects, *link, "-o", _part(target)], check=True)
        os.replace(_part(target), target)
    return target


def included(source: Path) -> set[Path]:
    """The source and every header of ours that it includes, directly or not."""
    found, left = set(), [source]
    while left:
        path = left.pop()
        found.add(path)
        names = re.findall(r'^ *# *include "(.+)"', path.read_text(), re.MULTILINE)
        beside = [path.parent / name for name in names]
        headers = [near if near.exists() else CSRC / name for near, name in zip(beside, names)]
        left += [header for header in headers if header not in found]
    return found


def _part(out: Path) -> Path:
    """Where this process writes ``out`` before it is whole: others may build the same."""
    return out.with_name(f"{out.name}.{os.getpid()}")


if __name__ == "__main__":
    compile_units(emulated_kernels(), "g++")
