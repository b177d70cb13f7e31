"""What the compiler makes of every shipped kernel configuration, without a GPU: `python -m lcconformer.kernels.report`.

One row per kernel, dtype, shape and architecture: registers a thread, bytes of stack (spills), shared memory a block,
instructions, and how many of them are tensor-core instructions. The exit status is 1 if a row breaks its budget.
bench/results/triton_resources.json holds the output of `--out` for all of them.
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
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from lcconformer.architectures import SHARED_MEMORY
from lcconformer.runtime import write_atomically

from . import __name__ as PACKAGE
from . import __path__ as PACKAGE_PATH

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f'this report needs Triton ({error}): pip install "lcconformer[triton]"', file=sys.stderr)
    sys.exit(2)

from .common import INTERPRETED, AotConfig, divisible_by_16

__all__ = ["Resources", "compile_config", "configs", "kernel_modules", "main", "report", "violations", "write"]

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


def kernel_modules() -> list[str]:
    """Names of the modules of this package that ship kernels."""
    names = sorted(m.name for m in pkgutil.iter_modules(PACKAGE_PATH))
    return [n for n in names if n not in ("common", "report", "tuning")]


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(TOOLS / name), *args], check=True, capture_output=True, text=True).stdout


def compile_config(config: AotConfig, arch: int) -> Resources:
    """Compile for compute capability `arch` (90 for sm_90) and read the resources off the binary.

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
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "--dump-resource-usage", str(cubin)))
        sass = _tool("nvdisasm", "-c", str(cubin))
    if usage is None:
        raise RuntimeError(f"{config.name}: cuobjdump printed no resource usage")
    kinds = TENSOR_CORE.findall(sass)
    return Resources(
        registers=int(usage.group(1)),
        stack=int(usage.group(2)),
        shared=compiled.metadata.shared,
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/", sass)),
        tensor_core=len(kinds),
        tensor_core_kind=kinds[0] if kinds else "",
    )


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


def report(modules: Iterable[str], archs: Iterable[int], match: str = "", jobs: int = 1) -> Iterator[Row]:
    """Compile every configuration whose name contains `match`; rows come in a fixed order as they finish."""
    todo = [
        (module, arch, index)
        for module in modules
        for arch in archs
        for index, config in enumerate(configs(module, arch))
        if match in f"{config.name} {config.dtype}"
    ]
    if jobs == 1:
        yield from map(_work, todo)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(_work, todo)


def write(rows: Iterable[Row], path: Path) -> None:
    """Write the rows and the version of Triton atomically as JSON, one row per line."""
    flat = [{k: v for k, v in asdict(row).items() if k != "resources"} | asdict(row.resources) for row in rows]
    lines = ",\n  ".join(json.dumps(row) for row in flat)
    write_atomically(path, f'{{\n "triton": "{triton.__version__}",\n "kernels": [\n  {lines}\n ]\n}}\n')


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.kernels.report", description=__doc__)
    parser.add_argument("--op", choices=kernel_modules(), action="append", help="only this op (repeatable)")
    parser.add_argument("--arch", type=int, choices=sorted(SHARED_MEMORY), action="append", help="only this one")
    parser.add_argument("--match", default="", help="only configurations whose name and dtype contain this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="also write the rows to this file (JSON)")
    args = parser.parse_args(argv)
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
