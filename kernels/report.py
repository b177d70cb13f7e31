"""What the compiler makes of every shipped kernel configuration, without a GPU: `python -m lcconformer.kernels.report`.

One row per kernel, dtype, shape and architecture: registers a thread, bytes of stack (spills), shared memory a block,
instructions, and how many of them are tensor-core instructions. The exit status is 1 if a row breaks its budget.
bench/results/triton_resources.json holds the output of `--out` for all of them.

`--cost` predicts instead what a launch costs (`kernels/cost.py`): per kernel, architecture and shape (B, T) the instructions
and cycles of one trip of the main loop, then the cycles of each unit, the L2 cache and the memory for the whole launch, in
thousands; what binds, and microseconds. They rank variants and notice regressions; they are never results.
bench/results/triton_cost.json holds the output of `--cost --match bf16 --out`, on the Triton that it names; with
`--against` it the exit status is 1 where something got over 3% costlier.

With `--changed FILE`, one of either, only the configurations whose code is not that of FILE are compiled. The code is what
Triton's frontend makes of a kernel, by its hash; from there on one Triton makes one binary of it. `--out` then has FILE's rows
for the others.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f'this report needs Triton ({error}): pip install "lcconformer[triton]"', file=sys.stderr)
    sys.exit(2)

from .common import INTERPRETED, AotConfig, divisible_by_16
from .cost import MACHINES, Prediction, parse, predict
from .cost_shapes import SHAPES, shape_of, work

__all__ = [
    "Binary", "Resources", "build", "code_of", "compile_config", "configs", "cost", "costlier", "first_ir", "jobs_of",
    "kernel_modules", "main", "predictions", "report", "resources", "unchanged", "violations", "write",
]  # fmt: skip

Job = tuple[str, int, int]
"""Module, architecture, and number of the configuration in what the module ships for it."""
Todo = TypeVar("Todo")
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


def _source(config: AotConfig) -> tuple[Any, dict[str, Any]]:
    """What Triton compiles, and the options of the launch; raises as `build` does."""
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
    return source, {k: v for k, v in config.launch.kwargs().items() if k not in blocks}


def code_of(config: AotConfig, arch: int) -> str:
    """Hash of Triton's IR of the kernel, before any pass, and of the options of the launch; raises as `build` does."""
    source, options = _source(config)
    text = first_ir(source, arch, options)[0].str_nodebug()
    return hashlib.sha256(f"{sorted(options.items())}\n{text}".encode()).hexdigest()[:16]


def first_ir(source: Any, arch: int, options: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """(Triton's IR of a kernel before any pass, which owns its context; the backend; the options as it reads them)."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    helpers = backend.get_codegen_implementation(parsed), backend.get_module_map()
    return source.make_ir(target, parsed, *helpers, context), backend, parsed


def build(config: AotConfig, arch: int) -> Binary:
    """Compile for compute capability `arch` (90 for sm_90).

    Raises:
        RuntimeError: under TRITON_INTERPRET=1, where kernels cannot be compiled.
    """
    source, options = _source(config)
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
    code: str
    resources: Resources
    violations: tuple[str, ...]

    def flat(self) -> dict[str, Any]:
        """As a file has it."""
        return {k: v for k, v in asdict(self).items() if k != "resources"} | asdict(self.resources)


def _work(job: Job) -> Row:
    module, arch, index = job
    config = configs(module, arch)[index]
    used = compile_config(config, arch)
    return Row(
        config.name,
        config.dtype,
        arch,
        config.launch.num_warps,
        config.launch.num_stages,
        code_of(config, arch),
        used,
        tuple(violations(config, arch, used)),
    )


@dataclass(frozen=True)
class Cost:
    """One compiled configuration at one shape."""

    name: str
    dtype: str
    arch: int
    code: str
    batch: int
    frames: int
    registers: int
    stack: int
    serialized: bool
    prediction: Prediction

    def flat(self) -> dict[str, Any]:
        """As a file has it: four digits, as more would make rows differ that are the same."""
        p = self.prediction
        flat = {k: v for k, v in asdict(self).items() if k != "prediction"}
        flat |= {"resident": p.resident, "slots": p.slots, "mma": round(p.mma, 1), "trip": p.trip, "bound": p.bound}
        return flat | {
            "kilocycles": {u: _short(c / 1e3) for u, c in p.cycles.items()},
            "microseconds": _short(p.microseconds),
        }


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
    binary, code = build(config, arch), code_of(config, arch)
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
                code,
                batch,
                frames,
                binary.registers,
                binary.stack,
                binary.serialized,
                predicted,
            )
        )
    return found


def jobs_of(modules: Iterable[str], archs: Iterable[int], match: str = "") -> list[Job]:
    """Every configuration whose name and dtype contain `match`, in a fixed order."""
    return [
        (module, arch, index)
        for module in modules
        for arch in archs
        for index, config in enumerate(configs(module, arch))
        if match in f"{config.name} {config.dtype}"
    ]


def unchanged(todo: Collection[Job], path: Path, jobs: int = 1) -> dict[Job, list[dict[str, Any]]]:
    """The configurations whose code is that of a file of `write`, with their rows there.

    Raises:
        ValueError: the file is of another version of Triton, whose code is another.
    """
    filed: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in _filed(path):
        filed.setdefault(tuple(row[k] for k in ("name", "dtype", "arch", "code")), []).append(row)
    found = zip(todo, _mapped(_key_of, list(todo), jobs))
    return {job: filed[key] for job, key in found if key in filed}


def _key_of(job: Job) -> tuple[str, str, int, str]:
    module, arch, index = job
    config = configs(module, arch)[index]
    return config.name, config.dtype, arch, code_of(config, arch)


def _filed(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; raises as `unchanged` does."""
    filed = read_json(path)
    if filed["triton"] != triton.__version__:
        raise ValueError(
            f"{path} is of Triton {filed['triton']}, this is {triton.__version__}: they compile differently"
        )
    return list(filed["kernels"])


def _costs_of(todo: tuple[Job, tuple[tuple[int, int], ...], int]) -> list[Cost] | ValueError:
    (module, arch, index), shapes, d_model = todo
    try:
        return predictions(configs(module, arch)[index], arch, shapes, d_model)
    except ValueError as error:
        return error


def cost(
    todo: Iterable[Job], jobs: int = 1, shapes: tuple[tuple[int, int], ...] = SHAPES, d_model: int = 256
) -> Iterator[list[Cost] | ValueError]:
    """Predict what each configuration costs at each shape, or say why not; in order, as they finish."""
    yield from _mapped(_costs_of, [(job, shapes, d_model) for job in todo], jobs)


def _mapped(function: Callable[[Todo], Done], todo: list[Todo], jobs: int) -> Iterator[Done]:
    if jobs == 1:
        yield from map(function, todo)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(function, todo)


def report(todo: Iterable[Job], jobs: int = 1) -> Iterator[Row]:
    """Compile each configuration; rows come in order as they finish."""
    yield from _mapped(_work, list(todo), jobs)


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def write(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write flat rows and the version of Triton atomically as JSON, one row per line."""
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    write_atomically(path, f'{{\n "triton": "{triton.__version__}",\n "kernels": [\n  {lines}\n ]\n}}\n')


# what a kernel may become costlier unnoticed
TOLERANCE = 1.03


def costlier(rows: Iterable[Cost], path: Path) -> list[str]:
    """Say which predictions are over 3% above those in a file of `write`, or have no counterpart there.

    Raises:
        ValueError: the file is of another version of Triton, whose code is another.
    """
    keys = ("name", "dtype", "arch", "batch", "frames")
    before = {tuple(row[k] for k in keys): row for row in _filed(path)}
    found = []
    for row in (row.flat() for row in rows):
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
    todo, kept = _todo(args, archs)
    made: dict[Job, list[dict[str, Any]]] = {}
    rows, wrong = [], 0
    left = [job for job in todo if job not in kept]
    for job, found in zip(left, cost(left, args.jobs, shapes, args.d_model)):
        if isinstance(found, ValueError):
            print(found, file=sys.stderr)
            wrong += 1
            continue
        rows += found
        made[job] = [row.flat() for row in found]
        for row in found:
            p = row.prediction
            units = " | ".join(f"{p.cycles[u] / 1e3:.3g}" for u in _UNITS)
            notes = [f"stack {row.stack}"] * bool(row.stack) + ["serialised"] * row.serialized
            print(
                f"| {row.name} | {row.dtype} | {row.arch} | {row.batch}x{row.frames} | {row.registers} | {p.resident} "
                f"| {p.slots} | {p.trip:.0f} | {p.mma:.0f} | {units} | {p.bound} | {p.microseconds:.4g} "
                f"| {', '.join(notes)} |",
                flush=True,
            )
    if args.out:
        made |= kept
        write((row for job in todo for row in made.get(job, ())), args.out)
    costly = costlier(rows, args.against) if args.against else []
    for line in costly:
        print(line, file=sys.stderr)
    if costly:
        print(
            f"{len(costly)} predictions are costlier; if that is meant, write the file again by --out", file=sys.stderr
        )
    return int(bool(wrong or costly))


def _todo(args: argparse.Namespace, archs: Iterable[int]) -> tuple[list[Job], dict[Job, list[dict[str, Any]]]]:
    """What is asked for, and the rows of `--changed` for what is in that file already."""
    todo = jobs_of(args.op or kernel_modules(), archs, args.match)
    if not args.changed:
        return todo, {}
    kept = unchanged(todo, args.changed, args.jobs)
    print(f"{len(kept)} of {len(todo)} configurations are as in {args.changed}; not compiled", file=sys.stderr)
    return todo, kept


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.kernels.report", description=__doc__)
    parser.add_argument("--op", choices=kernel_modules(), action="append", help="only this op (repeatable)")
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_MEMORY), action="append", help="only this one")
    parser.add_argument("--match", default="", help="only configurations whose name and dtype contain this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="also write the rows to this file (JSON)")
    parser.add_argument(
        "--changed", type=Path, metavar="FILE", help="compile only what is not in FILE, as --out wrote it, already"
    )
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
    todo, kept = _todo(args, args.arch or SHARED_MEMORY)
    left = [job for job in todo if job not in kept]
    rows = []
    for row in report(left, args.jobs):
        r = row.resources
        rows.append(row)
        print(
            f"| {row.name} | {row.dtype} | {row.arch} | {row.num_warps} | {row.num_stages} | {r.registers} | {r.stack} "
            f"| {r.shared / 1024:.1f} | {r.instructions} | {r.tensor_core} {r.tensor_core_kind} "
            f"| {'; '.join(row.violations)} |",
            flush=True,
        )
    if args.out:
        made = kept | {job: [row.flat()] for job, row in zip(left, rows)}
        write((row for job in todo for row in made[job]), args.out)
    bad = sum(bool(row.violations) for row in rows)
    if bad:
        print(f"{bad} configurations break their budget", file=sys.stderr)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
