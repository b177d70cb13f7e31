"""What the forward pass of the CUDA convolution costs beside Triton's, by a model, without a GPU: ``python csrc/costs.py``.

nvcc compiles it for elements of 16 bits (with aligned rows, the usual case), `lcconformer/kernels/cost.py` reads the code, as
it reads Triton's for bench/results/triton_cost.json. A row is a case of that file: norm, channels, architecture, batch and
frames, with the microseconds of Triton's kernels of that case beside it. Predictions rank kernels; they are never results.
`auto` takes the CUDA kernel where it is cheaper in every case (`costlier` in lcconformer/ops/glu_depthwise_conv/cuda.py).
bench/results/cuda_cost.json is what ``--out`` wrote.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import resources
import toolchain
from lcconformer.kernels.cost import MACHINES, Program, Work, parse, predict

CSRC = Path(__file__).resolve().parent
SOURCE = CSRC / "cuda/glu_depthwise_conv_products.cu"
TRITON = CSRC.parent / "bench/results/triton_cost.json"
ARCHS = (80, 90)
SHAPES = ((1, 100), (32, 400))
WIDTH = 31
# norm -> channels that Triton's costs are filed for, whether it is LayerNorm, Triton's name
CASES = {
    "none": ((256,), False, "glu_depthwise_conv.conv_fwd none"),
    "batch": ((256,), False, "glu_depthwise_conv.conv_fwd running"),
    "layer": ((256, 512, 1024), True, "glu_depthwise_conv.conv_fwd layer C={}"),
}


def disassembler(nvcc: toolchain.Nvcc) -> str | None:
    """nvdisasm of the toolkit, of PATH, or of Triton."""
    triton = importlib.util.find_spec("triton")
    places = [
        nvcc.root / "bin",
        *(Path(p) / "backends/nvidia/bin" for p in (triton and triton.submodule_search_locations) or ()),
    ]
    found = shutil.which("nvdisasm", path=str(nvcc.root / "bin")) or shutil.which("nvdisasm")
    return found or next((str(p / "nvdisasm") for p in places if (p / "nvdisasm").exists()), None)


def compiled(nvcc: toolchain.Nvcc, nvdisasm: str, arch: int) -> dict[bool, tuple[Program, int]]:
    """{with LayerNorm: (code, registers)} in bfloat16.

    Raises:
        RuntimeError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as tmp:
        flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}", *toolchain.gencode([str(arch)])]
        command = [nvcc.path, *flags, "-Xptxas=-v", "--cubin", SOURCE, "-o", f"{tmp}/kernels.cubin"]
        result = toolchain.run(command, timeout=600)
        if result.returncode:
            raise RuntimeError(f"{SOURCE.name} for sm_{arch}: {toolchain.first_error(result.stderr)}")
        listing = subprocess.run(
            [nvdisasm, "-c", "-hex", f"{tmp}/kernels.cubin"], check=True, capture_output=True, text=True
        )
    code = {part.split()[0]: part for part in re.split(r"^//-+ \.text\.", listing.stdout, flags=re.MULTILINE)[1:]}
    found = {}
    for layer in (False, True):
        kernel = f"productsI13__nv_bfloat16Lb{int(layer)}ELb1E"
        registers = re.search(rf"{kernel}.*?Used (\d+) registers", result.stderr, re.DOTALL)
        listed = next((part for name, part in code.items() if kernel in name), None)
        if registers is None or listed is None:
            raise RuntimeError(f"{SOURCE.name} for sm_{arch}: no {kernel}")
        found[layer] = parse(listed), int(registers[1])
    return found


def launches(compiler: str) -> dict[tuple[str, int, int, int], tuple[int, int, int]]:
    """{(norm, channels, batch, frames): (segments of a tile, warps, bytes of shared memory)}, as the header computes them."""
    cases = [(norm, c, b, t) for norm, (channels, _, _) in CASES.items() for c in channels for b, t in SHAPES]
    lines = "".join(
        f"print(tile({b}, {t}, {c}, {layer}), {layer});"
        for norm, c, b, t in cases
        for layer in (str(CASES[norm][1]).lower(),)
    )
    program = f"""
#include <cstdio>
#include "cuda/glu_depthwise_conv.h"
using namespace lcc::cuda;
constexpr auto tile = glu_depthwise_conv_products_tile;
void print(int segments, bool layer) {{
    std::printf("%d %d %zu\\n", segments, glu_depthwise_conv_products_warps(layer),
                glu_depthwise_conv_products_shared({WIDTH}, layer, segments));
}}
int main() {{ {lines} }}
"""
    with tempfile.TemporaryDirectory() as tmp:
        Path(tmp, "launches.cpp").write_text(program)
        command = [compiler, "-std=c++17", f"-I{CSRC}", f"{tmp}/launches.cpp", "-o", f"{tmp}/launches"]
        subprocess.run(command, check=True)
        out = subprocess.run([f"{tmp}/launches"], check=True, capture_output=True, text=True).stdout
    numbers = [tuple(map(int, line.split())) for line in out.splitlines()]
    return {case: (a, b, c) for case, (a, b, c) in zip(cases, numbers)}


def work(batch: int, frames: int, channels: int, layer: bool, segments: int, warps: int) -> Work:
    """Loops: the GLU of 64 frames; taps beyond the first 32 words; the products inside of eight segments, or of a chunk of
    channels with LayerNorm; its norm. A tile has its share of the segments, as the last one may be shorter.
    """

    def ceil(a: float, b: float) -> int:
        return int(-(-a // b))

    all_segments, steps = ceil(frames, 16), ceil(WIDTH + 15, 16)
    tiles = ceil(all_segments, segments)
    own = all_segments / tiles
    glu, more_taps, groups = (own + steps - 1) / 4, max(0, ceil(8 * steps + 4, 32) - 1), ceil(channels, 8 * warps)
    size = 3.0 * batch * frames * channels * 2
    if layer:
        return Work(batch * tiles, (groups, glu, more_taps, steps, groups), size + 2.0 * size / 3)
    return Work(batch * tiles * groups, (glu, more_taps, ceil(own, 8), steps), size)


def collect(nvcc: toolchain.Nvcc, nvdisasm: str, compiler: str) -> dict[str, object]:
    """The whole report."""
    filed = json.loads(TRITON.read_text())
    triton = {
        (k["name"], k["arch"], k["batch"], k["frames"]): k["microseconds"]
        for k in filed["kernels"]
        if k["dtype"] == "bf16"
    }
    launched = launches(compiler)
    rows = []
    for arch in ARCHS:
        code = compiled(nvcc, nvdisasm, arch)
        for (norm, c, b, t), (segments, warps, shared) in launched.items():
            _, layer, name = CASES[norm]
            program, registers = code[layer]
            p = predict(
                program,
                MACHINES[arch],
                work(b, t, c, layer, segments, warps),
                warps=warps,
                registers=registers,
                shared=shared,
            )
            rows.append(
                {
                    "norm": norm, "channels": c, "arch": arch, "batch": b, "frames": t, "segments": segments,
                    "registers": registers, "resident": p.resident, "slots": p.slots, "trip": p.trip, "bound": p.bound,
                    "kilocycles": {unit: float(f"{cycles / 1e3:.4g}") for unit, cycles in p.cycles.items()},
                    "microseconds": float(f"{p.microseconds:.4g}"),
                    "triton": triton[name.format(c), arch, b, t],
                }
            )  # fmt: skip
    return {"nvcc": nvcc.version, "triton": filed["triton"], "kernels": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report to this file (JSON)")
    args = parser.parse_args(argv)
    nvcc, compiler = toolchain.find_nvcc(), shutil.which("c++")
    if isinstance(nvcc, str) or compiler is None:
        parser.error(nvcc if isinstance(nvcc, str) else "no C++ compiler on PATH")
    nvdisasm = disassembler(nvcc)
    if nvdisasm is None:
        parser.error("no nvdisasm in the CUDA toolkit, on PATH or in Triton")
    report = collect(nvcc, nvdisasm, compiler)
    if args.out is not None:
        resources.write(report, args.out)
    print("Predictions by a static model, for ranking; never results. Cycles of the whole launch in thousands.\n")
    for row in report["kernels"]:
        units = ", ".join(f"{unit} {cycles:g}" for unit, cycles in row["kilocycles"].items() if cycles)
        print(
            "{norm:5} C={channels:<4} sm_{arch} ({batch}, {frames}): {microseconds} us, Triton {triton} us; {bound}; ".format(
                **row
            )
            + units
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
