"""What the compiler makes of every shipped kernel configuration, without a GPU: `python -m lcconformer.kernels.report`.

One row per kernel, dtype, shape and architecture: registers a thread, bytes of stack (spills), shared memory a block,
instructions, and how many of them are tensor-core instructions. The exit status is 1 if a row breaks its budget.
bench/results/triton_resources.json holds the output of `--out` for all of them.

`--cost` predicts instead what a launch costs (`kernels/cost.py`): per kernel, architecture and shape (B, T) the instructions
and cycles of one trip of the main loop, then the cycles of each unit, the L2 cache and the memory for the whole launch, in
thousands; what binds, and microseconds. They rank variants and notice regressions; they are never results.
bench/results/triton_cost.json holds the output of `--cost --match bf16 --out`, on the Triton that it names; with
`--against` it the exit status is 1 where something got over 3% costlier.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lcconformer.architectures import SHARED_MEMORY
from lcconformer.runtime import read_json, write_atomically

from . import __name__ as PACKAGE
from . import __path__ as PACKAGE_PATH

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f'this report needs Triton ({error}): pip install "lcconformer[triton]"', file=sys.stderr)
    sys.exit(2)

from .common import INTERPRETED, AotConfig, divisible_by_16
from .cost import MACHINES, Prediction, parse, predict
from .cost_shapes import SHAPES, shape_of, work

__all__ = [
    "Binary", "Resources", "build", "compile_config", "configs", "cost", "costlier", "kernel_modules", "main", "predictions",
    "report", "resources", "violations", "write", "write_costs",
]  # fmt: skip

Job = TypeVar("Job")
Done = TypeVar("Done")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# HMMA: sm_80 ... 89 and sm_120; HGMMA: sm_90; UTCHMMA: sm_100
TENSOR_CORE = re.compile(r"\b(HGMMA|UTCHMMA|UTCQMMA|HMMA|QGMMA)\b")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses; memory in bytes."""

    registers: int
    stack: int
    shared: int
    instructions: int
    tensor_core: int
    tensor_core_kind: str
    serialized: bool


@dataclass(frozen=True)
class Binary:
    """One compiled kernel: its code as nvdisasm prints it; whether ptxas serialised its warpgroup products (C7515)."""

    sass: str
    registers: int
    stack: int
    shared: int
    serialized: bool


def kernel_modules() -> list[str]:
    """Names of the modules of this package that ship kernels."""
    names = sorted(m.name for m in pkgutil.iter_modules(PACKAGE_PATH))
    return [n for n in names if n not in ("common", "cost", "cost_shapes", "report", "tuning")]


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(TOOLS / name), *args], check=True, capture_output=True, text=True).stdout


def _serialized(ptx: str, arch: int, folder: Path) -> bool:
    """Whether ptxas warns C7515: registers of a product in flight are in use, so that it waits for each product at once."""
    if "wgmma" not in ptx:
        return False
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    command = [get_ptxas(arch).path, f"--gpu-name=sm_{arch}a", str(path), "-o", str(folder / "again.cubin")]
    return "C7515" in subprocess.run(command, check=True, capture_output=True, text=True).stderr


def build(config: AotConfig, arch: int) -> Binary:
    """Compile for compute capability `arch` (90 for sm_90).

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels cannot be compiled.
    """
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it")
    kernel, names = config.kernel, config.kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: config.signature.get(n, "constexpr") for n in names},
        constexprs=dict(config.constexprs),
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible_by_16(config)},
    )
    blocks = config.launch.blocks
    options = {k: v for k, v in config.launch.kwargs().items() if k not in blocks}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "--dump-resource-usage", str(cubin)))
        sass = _tool("nvdisasm", "-c", "-ndf", "-hex", str(cubin))  # without the analysis of its data flow
        serialized = _serialized(compiled.asm["ptx"], arch, folder)
    if usage is None:
        raise RuntimeError(f"{config.name}: cuobjdump printed no resource usage")
    return Binary(sass, int(usage.group(1)), int(usage.group(2)), compiled.metadata.shared, serialized)


def resources(binary: Binary) -> Resources:
    """Read the resources off a binary."""
    kinds = TENSOR_CORE.findall(binary.sass)
    return Resources(
        registers=binary.registers,
        stack=binary.stack,
        shared=binary.shared,
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/", binary.sass)),
        tensor_core=len(kinds),
        tensor_core_kind=kinds[0] if kinds else "",
        serialized=binary.serialized,
    )


def compile_config(config: AotConfig, arch: int) -> Resources:
    """Compile for compute capability `arch` and read the resources off the binary; raises as `build` does."""
    return resources(build(config, arch))


def violations(config: AotConfig, arch: int, used: Resources) -> list[str]:
    """Return the budgets that this configuration breaks on this architecture."""
    found = []
    if used.shared > SHARED_MEMORY[arch]:
        found.append(f"shared memory {used.shared} > {SHARED_MEMORY[arch]}")
    if config.spill_budget is not None and used.stack > config.spill_budget:
        found.append(f"stack {used.stack} > {config.spill_budget}")
    if config.tensor_cores and not used.tensor_core:
        found.append("no tensor-core instructions")
    # a warpgroup's product has 64 rows
    wide = config.launch.blocks.get("BLOCK_M", 64) >= 64 and config.dtype in ("fp16", "bf16")
    if config.tensor_cores and arch == 90 and wide and used.tensor_core_kind != "HGMMA":
        found.append(f"{used.tensor_core_kind or 'nothing'} in place of HGMMA")
    if used.serialized and not config.may_serialize:
        found.append("products serialised (ptxas C7515)")
    return found


def configs(module: str, arch: int) -> list[AotConfig]:
    """Return what the module ships for an architecture."""
    return list(importlib.import_module(f"{PACKAGE}.{module}").aot_configs(arch))


@dataclass(frozen=True)
class Row:
    """One compiled configuration and what it breaks."""

    name: str
    dtype: str
    arch: int
    num_warps: int
    num_stages: int
    resources: Resources
    violations: tuple[str, ...]


def _work(job: tuple[str, int, int]) -> Row:
    module, arch, index = job
    config = configs(module, arch)[index]
    used = compile_config(config, arch)
    return Row(
        config.name,
        config.dtype,
        arch,
        config.launch.num_warps,
        config.launch.num_stages,
        used,
        tuple(violations(config, arch, used)),
    )


@dataclass(frozen=True)
class Cost:
    """One compiled configuration at one shape."""

    name: str
    dtype: str
    arch: int
    batch: int
    frames: int
    registers: int
    stack: int
    serialized: bool
    prediction: Prediction


def predictions(
    config: AotConfig, arch: int, shapes: Iterable[tuple[int, int]] = SHAPES, d_model: int = 256
) -> list[Cost]:
    """Compile and predict what a launch costs at shapes (B, T); nothing for a kernel that states no work.

    Raises:
        ValueError: `arch` is not modelled, or the loops of the code are not those that `cost_shapes` states.
    """
    if arch not in MACHINES:
        raise ValueError(f"sm_{arch} is not modelled; expected one of {', '.join(map(str, MACHINES))}")
    stated = [(b, t, work(config, shape_of(config, b, t, d_model))) for b, t in shapes]
    if all(own is None for _, _, own in stated):
        return []
    binary = build(config, arch)
    program = parse(binary.sass)
    found = []
    for batch, frames, own in stated:
        if own is None:
            continue
        try:
            predicted = predict(
                program,
                MACHINES[arch],
                own,
                warps=config.launch.num_warps,
                registers=binary.registers,
                shared=binary.shared,
            )
        except ValueError as error:
            raise ValueError(f"{config.name} {config.dtype} sm_{arch}: {error}") from error
        found.append(
            Cost(
                config.name,
                config.dtype,
                arch,
                batch,
                frames,
                binary.registers,
                binary.stack,
                binary.serialized,
                predicted,
            )
        )
    return found


def _jobs(modules: Iterable[str], archs: Iterable[int], match: str) -> list[tuple[str, int, int]]:
    return [
        (module, arch, index)
        for module in modules
        for arch in archs
        for index, config in enumerate(configs(module, arch))
        if match in f"{config.name} {config.dtype}"
    ]


def _costs_of(job: tuple[str, int, int, tuple[tuple[int, int], ...], int]) -> list[Cost] | ValueError:
    module, arch, index, shapes, d_model = job
    try:
        return predictions(configs(module, arch)[index], arch, shapes, d_model)
    except ValueError as error:
        return error


def cost(
    modules: Iterable[str],
    archs: Iterable[int],
    match: str = "",
    jobs: int = 1,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    d_model: int = 256,
) -> Iterator[Cost | ValueError]:
    """Predict what every configuration whose name contains `match` costs at each shape, in a fixed order, or say why not."""
    todo = [(*job, shapes, d_model) for job in _jobs(modules, archs, match)]
    for found in _mapped(_costs_of, todo, jobs):
        yield from [found] if isinstance(found, ValueError) else found


def _mapped(function: Callable[[Job], Done], todo: list[Job], jobs: int) -> Iterator[Done]:
    if jobs == 1:
        yield from map(function, todo)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(function, todo)


def report(modules: Iterable[str], archs: Iterable[int], match: str = "", jobs: int = 1) -> Iterator[Row]:
    """Compile every configuration whose name contains `match`; rows come in a fixed order as they finish."""
    yield from _mapped(_work, _jobs(modules, archs, match), jobs)


def write(rows: Iterable[Row], path: Path) -> None:
    """Write the rows and the version of Triton atomically as JSON, one row per line."""
    _write([{k: v for k, v in asdict(row).items() if k != "resources"} | asdict(row.resources) for row in rows], path)


def _flat(row: Cost) -> dict[str, Any]:
    p = row.prediction
    flat = {k: v for k, v in asdict(row).items() if k != "prediction"}
    flat |= {"resident": p.resident, "slots": p.slots, "mma": round(p.mma, 1), "trip": p.trip, "bound": p.bound}
    return flat | {
        "kilocycles": {u: _short(c / 1e3) for u, c in p.cycles.items()},
        "microseconds": _short(p.microseconds),
    }


def _short(x: float) -> float:
    """Four digits: more would make rows differ that are the same."""
    return float(f"{x:.4g}")


def write_costs(rows: Iterable[Cost], path: Path) -> None:
    """Write predictions and the version of Triton atomically as JSON, one row per line."""
    _write([_flat(row) for row in rows], path)


def _write(flat: list[dict[str, Any]], path: Path) -> None:
    lines = ",\n  ".join(json.dumps(row) for row in flat)
    write_atomically(path, f'{{\n "triton": "{triton.__version__}",\n "kernels": [\n  {lines}\n ]\n}}\n')


# what a kernel may become costlier unnoticed
TOLERANCE = 1.03


def costlier(rows: Iterable[Cost], path: Path) -> list[str]:
    """Say which predictions are over 3% above those in a file of `write_costs`, or have no counterpart there.

    Raises:
        ValueError: the file is of another version of Triton, whose code is another.
    """
    filed = read_json(path)
    if filed["triton"] != triton.__version__:
        raise ValueError(
            f"{path} is of Triton {filed['triton']}, this is {triton.__version__}: they compile differently"
        )
    keys = ("name", "dtype", "arch", "batch", "frames")
    before = {tuple(row[k] for k in keys): row for row in filed["kernels"]}
    found = []
    for row in map(_flat, rows):
        key = tuple(row[k] for k in keys)
        title = f"{row['name']} {row['dtype']} sm_{row['arch']} ({row['batch']}, {row['frames']})"
        old = before.get(key)
        if old is None:
            found.append(f"{title}: not in {path.name}")
            continue
        units = {"microseconds": (old["microseconds"], row["microseconds"])}
        units |= {u: (old["kilocycles"][u], row["kilocycles"][u]) for u in ("issue", "tensor")}
        found += [f"{title}: {u} {x:g} -> {y:g}" for u, (x, y) in units.items() if y > TOLERANCE * x]
    return found


def _shape(text: str) -> tuple[int, int]:
    batch, _, frames = text.partition("x")
    if not (batch.isdigit() and frames.isdigit() and int(batch) and int(frames)):
        raise argparse.ArgumentTypeError(f"expected BxT such as 32x400, got {text!r}")
    return int(batch), int(frames)


_UNITS = ("issue", "fma", "alu", "mufu", "tensor", "shared", "global", "l2", "dram")


def _print_costs(args: argparse.Namespace) -> int:
    archs = args.arch or [80, 90]
    shapes = tuple(args.shape or SHAPES)
    print(
        "Predictions by a static model, for ranking variants; never results. Cycles of the whole launch in thousands.\n"
    )
    print(
        f"| kernel | dtype | sm | B x T | regs | blocks/SM | slots | trip | mma | {' | '.join(_UNITS)} | bound | us | |"
    )
    print("|" + "---|" * (13 + len(_UNITS)))
    rows, wrong = [], 0
    for row in cost(args.op or kernel_modules(), archs, args.match, args.jobs, shapes, args.d_model):
        if isinstance(row, ValueError):
            print(row, file=sys.stderr)
            wrong += 1
            continue
        p = row.prediction
        rows.append(row)
        units = " | ".join(f"{p.cycles[u] / 1e3:.3g}" for u in _UNITS)
        notes = [f"stack {row.stack}"] * bool(row.stack) + ["serialised"] * row.serialized
        print(
            f"| {row.name} | {row.dtype} | {row.arch} | {row.batch}x{row.frames} | {row.registers} | {p.resident} | {p.slots} "
            f"| {p.trip:.0f} | {p.mma:.0f} | {units} | {p.bound} | {p.microseconds:.4g} | {', '.join(notes)} |",
            flush=True,
        )
    if args.out:
        write_costs(rows, args.out)
    if args.against:
        found = costlier(rows, args.against)
        for line in found:
            print(line, file=sys.stderr)
        if found:
            print(
                f"{len(found)} predictions are costlier; if that is meant, write the file again by --out",
                file=sys.stderr,
            )
        return int(bool(found))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.kernels.report", description=__doc__)
    parser.add_argument("--op", choices=kernel_modules(), action="append", help="only this op (repeatable)")
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_MEMORY), action="append", help="only this one")
    parser.add_argument("--match", default="", help="only configurations whose name and dtype contain this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="also write the rows to this file (JSON)")
    parser.add_argument(
        "--cost", action="store_true", help="predict what launches cost (sm_80 and sm_90 unless --arch)"
    )
    parser.add_argument(
        "--shape", type=_shape, action="append", metavar="BxT", help="with --cost: at this one (repeatable)"
    )
    parser.add_argument("--d-model", type=int, default=256, help="with --cost, for kernels that serve every width")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="with --cost: fail where over 3%% costlier than FILE"
    )
    args = parser.parse_args(argv)
    if args.cost:
        if unknown := set(args.arch or ()) - set(MACHINES):
            known = ", ".join(f"sm_{a}" for a in MACHINES)
            parser.error(f"--cost knows no sm_{min(unknown)}; give one of {known}")
        return _print_costs(args)
    print("| kernel | dtype | sm | warps | stages | registers | stack | shared KiB | instructions | tensor core | |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for row in report(args.op or kernel_modules(), args.arch or SHARED_MEMORY, args.match, args.jobs):
        r = row.resources
        rows.append(row)
        print(
            f"| {row.name} | {row.dtype} | {row.arch} | {row.num_warps} | {row.num_stages} | {r.registers} | {r.stack} "
            f"| {r.shared / 1024:.1f} | {r.instructions} | {r.tensor_core} {r.tensor_core_kind} "
            f"| {'; '.join(row.violations)} |",
            flush=True,
        )
    if args.out:
        write(rows, args.out)
    bad = sum(bool(row.violations) for row in rows)
    if bad:
        print(f"{bad} configurations break their budget", file=sys.stderr)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
