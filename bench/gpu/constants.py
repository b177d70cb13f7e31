"""Measure constants of this machine: ``python -m lcconformer.bench.gpu.constants OUT REPO [--small]``.

They are the costs of launches, graph nodes, barriers and on-chip traffic (on a GPU, by constants.cu, if there is nvcc to
build it), of a phase of the cluster-resident loop (by cluster_phases.cu and the headers of REPO/csrc), and the rates of the
encoder's GEMMs at real shapes and of PyTorch's depthwise convolution.  Whatever cannot be measured is listed under ``missing``
with the reason.  OUT/machine.json is rewritten after each group, so that a run cut short keeps its results.  The ceilings that
the suite's percentages refer to are measured first and go to OUT/bench.json.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lcconformer.runtime import commit, write_atomically

from ..core.case import Case
from ..core.rows import Results, device_name, versions
from ..core.timing import Timing, time_once
from ..runs.suite import ceilings_of

__all__ = ["measure"]

SOURCE = Path(__file__).with_name("constants.cu")
CLUSTER_PHASES = Path(__file__).with_name("cluster_phases.cu")
# frames in a batch (rows of the GEMM), and (outputs, inputs) of the layer's GEMMs in units of d_model
TOKENS = (400, 3200, 12800, 48000)
PRODUCTS = {"ffn up": (4, 1), "ffn down": (1, 4), "qkv": (3, 1), "out": (1, 1), "pointwise1": (2, 1)}


def _median_ms(call: Callable[[], object], device: str, repeats: int = 10) -> float:
    call()
    return Timing.of([time_once(call, device) for _ in range(repeats)]).median


def _native(device: str, source: Path, *flags: str, only: int | None = None) -> dict[str, float]:
    """Compile and run a program that prints lines "name value".

    Args:
        flags: more of them for nvcc.
        only: the one major compute capability that it is for.

    Raises:
        RuntimeError: there is no GPU, or another one, or no nvcc, or it does not compile, or prints nothing.
        TimeoutExpired: it ran for more than a minute.
    """
    if device != "cuda":
        raise RuntimeError("needs a CUDA device")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise RuntimeError("needs nvcc on PATH")
    major, minor = torch.cuda.get_device_capability()
    if only is not None and major != only:
        raise RuntimeError(f"needs sm_{only}0, this GPU is sm_{major}{minor}")
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/{source.stem}"
        target = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
        build = [nvcc, "-O3", "-std=c++17", target, *flags, "-o", program, str(source)]
        built = subprocess.run(build, capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError(f"{source.name} did not compile: {built.stderr.strip()[-300:]}")
        done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    values = {name: float(value) for name, value in (line.split() for line in done.stdout.splitlines())}
    if done.returncode and not values:
        raise RuntimeError(f"{source.name} failed: {done.stderr.strip()[-300:]}")
    if done.returncode:
        print(f"{source.name} stopped early: {done.stderr.strip()}", file=sys.stderr)
    return values


def _launch(device: str) -> dict[str, float]:
    """Microseconds of one small eager operation, averaged over a sequence of 200."""
    x = torch.zeros(128, device=device)

    def row() -> None:
        for _ in range(200):
            x.add_(1.0)

    return {"eager_launch_us": _median_ms(row, device) * 1e3 / 200}


def _products(device: str, d_model: int, tokens: Sequence[int]) -> dict[str, float]:
    """TFLOP/s of the layer's GEMMs, by shape."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rates = {}
    for m in tokens:
        for name, (n, k) in PRODUCTS.items():
            x = torch.randn(m, k * d_model, device=device).to(dtype)
            w = torch.randn(n * d_model, k * d_model, device=device).to(dtype)
            ms = _median_ms(functools.partial(F.linear, x, w), device)
            rates[f"{name}, d={d_model}, {m} frames"] = 2 * m * n * k * d_model**2 / ms / 1e9
    return rates


def _depthwise(device: str, d_model: int, shape: tuple[int, int]) -> dict[str, float]:
    """GB/s of PyTorch's depthwise convolution of width 31, forward alone and with both gradients, by memory layout.

    An activation or its gradient counts each time it must be read or written.
    """
    b, t = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weight = torch.randn(d_model, 1, 31, device=device).to(dtype).requires_grad_()
    rates = {}
    for layout in ("channels first", "channels last"):
        x = torch.randn(b, d_model, t, device=device).to(dtype)
        if layout == "channels last":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        x.requires_grad_()

        def forward(x=x) -> torch.Tensor:
            return F.conv1d(x, weight, padding=15, groups=d_model)

        def both(x=x, forward=forward) -> object:
            y = forward()
            return torch.autograd.grad(y, [x, weight], y)

        moved = x.nbytes
        ms, both_ms = _median_ms(forward, device), _median_ms(both, device)
        rates[f"forward, {layout}, B={b} T={t} d={d_model}"] = 2 * moved / ms / 1e6
        rates[f"forward and backward, {layout}, B={b} T={t} d={d_model}"] = 5 * moved / both_ms / 1e6
    return rates


def measure(path: Path, repo: Path, device: str, small: bool) -> dict[str, Any]:
    """Measure what this machine can, write it to ``path`` and return it.

    Args:
        path: JSON file to write.
        repo: the checkout.
        device: ``"cpu"`` or ``"cuda"``.
        small: use tiny shapes, to try the code.
    """
    found: dict[str, Any] = {
        "device_name": device_name(device),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": versions(),
        "missing": {},
    }
    d_model, tokens, shape = (64, (16,), (1, 32)) if small else (256, TOKENS, (32, 400))
    wide = d_model if small else 512
    groups: dict[str, Callable[[], dict[str, float]]] = {
        "launch_and_chip": lambda: _native(device, SOURCE),
        "cluster_loop": lambda: _native(device, CLUSTER_PHASES, f"-I{repo / 'csrc'}", only=9),
        "eager": lambda: _launch(device),
        "matrix_products_tflops": lambda: _products(device, d_model, tokens) | _products(device, wide, tokens),
        "torch_depthwise_gb_per_s": lambda: _depthwise(device, wide, shape),
    }
    for name, group in groups.items():
        try:
            found[name] = group()
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            found["missing"][name] = str(error)
        write_atomically(path, json.dumps(found, indent=1) + "\n")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.gpu.constants", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("repo", type=Path, help="the checkout, whose csrc/ is measured")
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU, to try the code")
    args = parser.parse_args(argv)
    device, dtype = ("cpu", "float32") if args.small else ("cuda", "bfloat16")
    ceilings = ceilings_of(Case("inference", 1, 1, dtype=dtype, device=device), Results(args.out / "bench.json"))
    print(f"ceilings, {dtype}: GEMM {ceilings.gemm_tflops:.4g} TFLOP/s, copy {ceilings.copy_gb_s:.4g} GB/s", flush=True)
    found = measure(args.out / "machine.json", args.repo, device, args.small)
    for group, values in found.items():
        if isinstance(values, dict) and group not in ("versions", "missing"):
            for name, value in values.items():
                print(f"{group}: {name}: {value:.4g}")
    for name, reason in found["missing"].items():
        print(f"missing {name}: {reason}")
    if "phase_us" in found.get("cluster_loop", {}):
        us = found["cluster_loop"]["phase_us"]
        verdict = "may live" if found["cluster_loop"]["lives"] else "is to stop"
        print(
            f"a phase of the cluster-resident loop takes {us:.3g} us: at most 1.5 is asked for, so the design {verdict}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
