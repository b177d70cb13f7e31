"""Time each kernel alone, with its launch candidates: ``python -m lcconformer.bench.gpu.kernels OUT --phase 3``.

A call is captured in a CUDA graph, so that its time on the GPU stands apart from that of the host: ``warm_us`` is a call out
of a graph of many, ``cold_us`` one alone after the L2 cache was overwritten, ``host_us`` the launch from Python, and
``kernels`` what the profiler saw inside.  Without a GPU there is only ``host_us``, of the whole call.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from lcconformer.kernels import tuning

from lcconformer.runtime import read_json, write_atomically
from lcconformer.tune import LayerShape, calls

from ..core.timing import Timing, time_once
from .cases import layer_shapes
from .cuda_calls import cuda_calls
from .items import Items
from .profiles import kernels_of

__all__ = ["alone", "variants"]

COPIES, REPEATS = 10, 7
Call = Callable[[], object]
# one launch each of the kernels that a layer spends its time in, for ncu
SIX = (
    "relpos_attention forward", "relpos_attention backward", "glu_depthwise_conv forward",
    "glu_depthwise_conv backward", "feed_forward up", "residual_layer_norm forward",
)  # fmt: skip


def _graph(call: Call, copies: int) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(copies):
            call()
    return graph


def _warm_us(call: Call) -> float:
    graph = _graph(call, COPIES)
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for _ in range(REPEATS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / COPIES)
    return Timing.of(samples).median


def alone(call: Call, device: str) -> dict[str, Any]:
    """The times of one call in microseconds, and its kernels."""
    call()
    if device != "cuda":
        return {"host_us": time_once(call, device) * 1e3, "kernels": kernels_of(call, device, 1)[:8]}
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(COPIES):
        call()
    host = (time.perf_counter() - begin) / COPIES
    torch.cuda.synchronize()
    cold = _graph(call, 1)
    return {
        "warm_us": _warm_us(call),
        "cold_us": Timing.of([time_once(cold.replay, device) * 1e3 for _ in range(REPEATS)]).median,
        "host_us": host * 1e6,
        "kernels": kernels_of(call, device),
    }


def variants(call: Call, device: str, most: int | None = None) -> list[dict[str, Any]]:
    """The times of a call with each launch candidate of each of its kernels: ``{"key", "config", "us"}``.

    Args:
        most: candidates of a kernel; None for all.
    """
    found = []
    with tuning.watched() as (seen, forced):
        call()
        for key, candidates in list(seen.items()):
            for config in candidates[:most]:
                forced[key] = config
                try:
                    us = _warm_us(call) if device == "cuda" else time_once(call, device) * 1e3
                except triton.TritonError as error:  # more shared memory or registers than there are
                    found.append({"key": key, "config": str(config), "us": None, "error": str(error)[:100]})
                else:
                    found.append({"key": key, "config": str(config), "us": us})
            forced.pop(key, None)
    return found


def keep(out: Path, name: str, value: object) -> None:
    """Add an entry to OUT/kernels.json."""
    path = out / "kernels.json"
    known = read_json(path) if path.exists() else {}
    known[name] = value
    write_atomically(path, json.dumps(known, indent=1) + "\n")


def _shape(layer: LayerShape) -> str:
    return f"{layer.batch}x{layer.frames} d={layer.d_model} dropout {layer.dropout:g}"


def measure(layer: LayerShape, out: Path, device: torch.device, with_variants: bool, most: int | None) -> int:
    """Time all calls at one shape, each kept as it is finished; returns their number."""
    count = 0
    # the CUDA kernels have no variants, and the convolution no dropout
    own = device.type == "cuda" and not with_variants
    on_request = cuda_calls(layer, device, convolutions=not layer.dropout) if own else iter(())
    for name, call in itertools.chain(calls(layer, device), on_request):
        label = f"{name}, {_shape(layer)}"
        try:
            if with_variants:
                keep(out, f"variants of {label}", variants(call, device.type, most))
            else:
                result = alone(call, device.type)
                keep(out, label, {"layer": asdict(layer), **result})
                shown = ", ".join(f"{k} {v:.1f}" for k, v in result.items() if k != "kernels")
                print(f"{label}: {shown}", flush=True)
        except NotImplementedError as error:  # the extension was not built, say
            print(f"missing: {label}: {error}")
        count += 1
    return count


def once(device: torch.device) -> None:
    """Run :data:`SIX` once where ncu listens, after a run where it does not."""
    layer = layer_shapes(device.type == "cpu")[0]
    for name, call in calls(layer, device):
        if name in SIX:
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.gpu.kernels", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--phase", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU, to try the code")
    parser.add_argument("--once", action="store_true", help="run six kernels once, for ncu, and time nothing")
    args = parser.parse_args(argv)
    device = torch.device("cpu" if args.small else "cuda")
    if args.once:
        once(device)
        return 0
    most = 2 if args.small else None
    items = {
        f"{what}, {_shape(layer)}": functools.partial(measure, layer, args.out, device, what == "variants", most)
        for what in ("kernels", "variants")
        for layer in layer_shapes(args.small)
        if what == "kernels" or layer.dropout
    }
    return Items(args.out, args.phase).run(items)


if __name__ == "__main__":
    sys.exit(main())
