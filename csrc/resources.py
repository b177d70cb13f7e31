"""What nvcc makes of every CUDA kernel, without a GPU: ``python csrc/resources.py``.

One row per kernel, element type and architecture: registers a thread, bytes of stack and spills, static shared memory.
Dynamic shared memory depends on the kernel width, that of attention on the head dim, and is listed once. The exit status
is 1 if a row breaks its budget. bench/results/cuda_resources.json is what ``--out`` wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import toolchain

from lcconformer.architectures import SHARED_MEMORY

CSRC = Path(__file__).resolve().parent
# what is made for sm_90 alone, and what measures it: as what it is compiled
ON_90 = {CSRC / "cuda/cluster_loop.cu": "90", CSRC.parent / "bench/gpu/cluster_phases.cu": "90"}
ON_90 |= dict.fromkeys(toolchain.OF_90A, "90a")
WIDTHS = (3, 15, 31, 63)
HEAD_DIMS = (32, 64, 96, 128)
# registers at which four blocks of 128 threads, or two of 256, share a multiprocessor, as the launch bounds ask; backward
# attention has three blocks of 128, or six of 64; wide heads have all there are, and so have a block of a cluster and one of
# two warpgroups; nothing may spill
BUDGET = {"registers": 128, "stack": 0, "spills": 0}
ATTENTION_BACKWARD = ("rows", "keys", "positions")
CLUSTER = ("cluster_loop.loops", "cluster_phases.phases")
PRODUCTS = "glu_depthwise_conv_products.products"
REGISTERS = {f"relpos_attention.forward_{d}": 255 for d in HEAD_DIMS if d > 64} | dict.fromkeys(CLUSTER, 255)
REGISTERS |= {f"relpos_attention_warpgroups.warpgroups_{d}": 255 for d in HEAD_DIMS}
REGISTERS |= {
    f"relpos_attention_backward.{name}_{d}": 168 if d <= 64 else 255 for name in ATTENTION_BACKWARD for d in HEAD_DIMS
}
OTHERS = ("forward", "backward", "row_moments", "reduce", "products", "loops", "phases", "warpgroups")
NAMES = "|".join((*OTHERS, *ATTENTION_BACKWARD))
ELEMENTS = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16", None: "bfloat16"}  # None: no template


def kernels(nvcc: toolchain.Nvcc, source: Path, arch: int) -> list[dict[str, object]]:
    """Rows of one source for compute capability ``arch``.

    Raises:
        RuntimeError: it does not compile, products of warpgroups wait for one another, or ptxas prints something else.
    """
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}"]
        code = toolchain.gencode([ON_90.get(source, str(arch))])
        result = toolchain.run(
            [nvcc.path, *flags, *code, "-Xptxas=-v", "--cubin", source, "-o", f"{tmp}/kernels.cubin"], timeout=600
        )
    if result.returncode:
        raise RuntimeError(f"{source.name} for sm_{arch}: {toolchain.first_error(result.stderr)}")
    if "wgmma.mma_async instructions are serialized" in result.stderr:
        raise RuntimeError(f"{source.name} for sm_{arch}: ptxas serialises products of warpgroups:\n{result.stderr}")
    rows = []
    for part in result.stderr.split("Compiling entry function ")[1:]:
        symbol = re.match(r"'(\w+)'", part)
        used = re.search(r"Used (\d+) registers", part)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        # ..._GLOBAL__N__<hash of the file>7forwardI6__halfLb1EE...: a length, the name, of a template the element type, with
        # LayerNorm or the head dim, and whether rows are aligned
        name = re.search(rf"\d({NAMES})(?:I(\w+?)(L[bi]\d+E)?(Lb[01]E)?E)?E", symbol[1]) if symbol else None
        if used is None or stack is None or name is None:
            raise RuntimeError(f"{source.name} for sm_{arch}: cannot read what ptxas says: {part[:300]}")
        shared = re.search(r"(\d+) bytes smem", part)
        rows.append(
            {
                "kernel": f"{source.stem}.{name[1]}{variant(name[3], name[4])}",
                "element": ELEMENTS[name[2]],
                "arch": arch,
                "registers": int(used[1]),
                "stack": int(stack[1]),
                "spills": int(stack[2]) + int(stack[3]),
                "static_shared": int(shared[1]) if shared else 0,
            }
        )
    return sorted(rows, key=lambda row: (row["kernel"], row["element"]))


def variant(parameter: str | None, aligned: str | None) -> str:
    """What template parameters behind the element type, as mangled, add to a kernel's name."""
    of = f"_{parameter[2:-1]}" if parameter and parameter.startswith("Li") else "_layer" if parameter == "Lb1E" else ""
    return f"{of}_unaligned" if aligned == "Lb0E" else of


def dynamic_shared(compiler: str) -> dict[str, dict[str, int]]:
    """{kernel: {width or head dim: bytes}}, as the headers compute it."""
    calls = {
        "glu_depthwise_conv.forward": ("glu_depthwise_conv_forward_shared({}, false)", WIDTHS),
        "glu_depthwise_conv.forward_layer": ("glu_depthwise_conv_forward_shared({}, true)", WIDTHS),
        "glu_depthwise_conv.backward": ("glu_depthwise_conv_backward_shared({})", WIDTHS),
        "glu_depthwise_conv.backward_layer": ("glu_depthwise_conv_backward_shared({})", WIDTHS),
        **{
            f"{PRODUCTS}{layer}{rows}": (f"glu_depthwise_conv_products_shared({{}}, {value}, {segments})", WIDTHS)
            for layer, value, segments in (("", "false", 16), ("_layer", "true", 7))
            for rows in ("", "_unaligned")
        },
        **{f"relpos_attention.forward_{d}": ("relpos_attention_shared({})", (d,)) for d in HEAD_DIMS},
        **{
            f"relpos_attention_warpgroups.warpgroups_{d}": ("relpos_attention_warpgroups_shared({})", (d,))
            for d in HEAD_DIMS
        },
        **{name: ("cluster_loop_shared()", (256,)) for name in CLUSTER},
        **{
            f"relpos_attention_backward.{name}_{d}": (f"relpos_attention_{call}", (d,))
            for name, call in zip(ATTENTION_BACKWARD, ("rows_shared({})", "keys_shared({})", "columns_shared({}, 1)"))
            for d in HEAD_DIMS
        },
    }
    prints = "".join(
        f'std::printf("{name} {size} %zu\\n", lcc::cuda::{call.replace("{}", str(size))});'
        for name, (call, given) in calls.items()
        for size in given
    )
    names = ("cluster_loop", "glu_depthwise_conv", "relpos_attention")
    headers = "".join(f'#include "cuda/{name}.h"\n' for name in names)
    program = f"#include <cstdio>\n{headers}int main() {{ {prints} }}\n"
    with tempfile.TemporaryDirectory() as tmp:
        Path(tmp, "shared.cpp").write_text(program)
        command = [compiler, "-std=c++17", f"-I{CSRC}", f"{tmp}/shared.cpp", "-o", f"{tmp}/shared"]
        subprocess.run(command, check=True)
        lines = subprocess.run([f"{tmp}/shared"], check=True, capture_output=True, text=True).stdout.split("\n")
    sizes: dict[str, dict[str, int]] = {name: {} for name in calls}
    for name, size, count in (line.split() for line in lines if line):
        sizes[name][size] = int(count)
    return sizes


def collect(nvcc: toolchain.Nvcc, compiler: str, archs: list[int]) -> dict[str, object]:
    """The whole report."""
    sources = sorted({*CSRC.glob("cuda/*.cu"), *ON_90})
    rows = [
        row
        for source in sources
        for arch in archs
        if source not in ON_90 or arch == 90
        for row in kernels(nvcc, source, arch)
    ]
    return {"nvcc": nvcc.version, "kernels": rows, "dynamic_shared": dynamic_shared(compiler)}


def violations(report: dict) -> list[str]:
    """The budgets that the report breaks, in words."""
    found = []
    for row in report["kernels"]:
        where = f"{row['kernel']} {row['element']} sm_{row['arch']}"
        budget = BUDGET | {"registers": REGISTERS.get(row["kernel"], BUDGET["registers"])}
        found += [f"{where}: {row[key]} {key} > {limit}" for key, limit in budget.items() if row[key] > limit]
        for width, size in report["dynamic_shared"].get(row["kernel"], {}).items():
            total, limit = size + row["static_shared"], SHARED_MEMORY[row["arch"]]
            if total > limit:
                found.append(f"{where}: {total} bytes of shared memory at {width} > {limit}")
    return found


def check_replaceable(path: Path) -> None:
    """Only an older report may be overwritten.

    Raises:
        ValueError: ``path`` exists and is not a report in JSON.
    """
    if not (path.exists() or path.is_symlink()):
        return
    try:
        report = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is there and not JSON ({error}); it was left as it is: choose another file"
        ) from error
    if not isinstance(report, dict) or not report.keys() >= {"nvcc", "kernels", "dynamic_shared"}:
        raise ValueError(f"{path} is JSON but not a report of this script; it was left as it is: choose another file")


def write(report: dict, path: Path) -> None:
    """The report as JSON, a row a line, atomically."""
    rows = ",\n  ".join(json.dumps(row) for row in report["kernels"])
    head = {key: value for key, value in report.items() if key != "kernels"}
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "kernels": [\n  {rows}\n ]\n}}\n')
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report to this file (JSON)")
    args = parser.parse_args(argv)
    if args.out is not None:
        try:
            check_replaceable(args.out)
        except ValueError as error:
            parser.error(str(error))
    nvcc, compiler = toolchain.find_nvcc(), shutil.which("c++")
    if isinstance(nvcc, str) or compiler is None:
        parser.error(nvcc if isinstance(nvcc, str) else "no C++ compiler on PATH")
    report = collect(nvcc, compiler, sorted(SHARED_MEMORY))
    if args.out is not None:
        write(report, args.out)
    for row in report["kernels"]:
        print("{kernel:41} {element:9} sm_{arch:<4} {registers:3} registers, {spills} bytes spilled".format(**row))
    broken = violations(report)
    for line in broken:
        print(line, file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
