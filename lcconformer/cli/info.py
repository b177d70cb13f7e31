"""``lcconformer info``: versions, devices, which backend each op uses here, which engine the loop uses, and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..info import collect
from ..ops.registry import OPS
from ..ops.samples import Sizes

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--evidence",
        action="store_true",
        help="show how far each kernel has been proven, in the six steps of CONTRIBUTING.md",
    )


def run(args: argparse.Namespace) -> None:
    if args.evidence:
        from lcconformer.bench.reports import evidence

        print(evidence.table())
        return
    info = collect()
    print(json.dumps(info, indent=2) if args.json else _text(info))


def _text(info: dict[str, Any]) -> str:
    lines: list[tuple[str, str]] = [(name, str(value)) for name, value in info["versions"].items() if value is not None]
    if info["versions"]["triton"] is None:
        lines.append(("triton", "not installed"))
    lines += [(name, value) for name, value in info["settings"].items()]
    extension = info["extension"]
    if extension["missing"]:
        lines.append(("extension", extension["missing"]))
    else:
        build = extension["build"]
        cuda = f"for {', '.join(build['cuda']['archs'])}" if build.get("cuda") else f"no ({build.get('cuda_note')})"
        lines.append(("extension", f"built with {build.get('compiler', 'an unknown compiler')}; CUDA kernels: {cuda}"))
    for device in info["devices"]:
        lines.append((device["device"], ", ".join(v for k, v in device.items() if k != "device")))
    width = max(len(line[0]) for line in lines)
    out = [f"{name:<{width}}  {value}" for name, value in lines]

    sizes = Sizes()  # those collect() asks about
    batch = f"{sizes.batch} utterances of {sizes.frames} frames, width {sizes.d_model}"
    out += ["", f"Backend of each op for a batch of {batch}:"]
    pairs = [info["ops"][i : i + 2] for i in range(0, len(info["ops"]), 2)]  # inference, training
    width = max(len(row["op"]) for row in info["ops"])
    for inference, training in pairs:
        same = all(inference[key] == training[key] for key in ("backend", "error", "against"))
        for row, mode in ((inference, "" if same else " inference"), (training, " training")):
            if row is training and same:
                continue
            where = f"{row['device']} {row['dtype']}{mode}"
            out.append(f"  {row['op']:<{width}}  {where}: {row['backend'] or 'none'}")
            if row["error"]:
                out.append(f"      {row['error']}")
            out += [f"      not {name}: {'; '.join(reasons)}" for name, reasons in row["against"].items()]
    on_request = ", ".join(f"{name} of {op.name}" for _, op in sorted(OPS.items()) for name in sorted(op.on_request))
    out += ["", f"Kernels that no GPU has measured serve on request, or where a model has them faster: {on_request}"]

    out += ["", "Engine of the loop for such a batch:"]
    for row in info["engines"]:
        mode = "training" if row["training"] else "inference"
        out.append(f"  {mode:<{width}}  {row['device']} {row['dtype']}: {row['engine'] or 'none'}")
        out += [f"      not loop: {'; '.join(row['against'])}"] if row["against"] else []
        if row["device"] != "cpu":
            cluster = row["against_cluster"] or [
                "on request only, until a GPU has measured it; LCCONFORMER_ENGINE=cluster forces it"
            ]
            out.append(f"      not cluster: {'; '.join(cluster)}")
    return "\n".join(out)
