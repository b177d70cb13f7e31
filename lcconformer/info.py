"""``python -m lcconformer info``: versions, devices, which backend each op uses here, which engine the loop, and why."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import __version__, _extension, loop, ops
from .config import ConformerConfig
from .encoder import ConformerEncoder
from .ops._backend import BACKENDS, candidates_of, forced_backend, select, strict

__all__ = ["add_arguments", "collect", "run"]

# one batch of a base model: [B, T, D], heads, hidden width, kernel width
_B, _T, _D, _H, _F, _K = 8, 400, 256, 4, 1024, 31


def _relpos_attention(tensor: Callable[..., Tensor], lengths: Tensor) -> object:
    q, k, v = (tensor(_B, _T, _H, _D // _H) for _ in range(3))
    pos, u, v_bias = tensor(2 * _T - 1, _H, _D // _H), tensor(_H, _D // _H), tensor(_H, _D // _H)
    return ops.relpos_attention(q, k, v, pos, u, v_bias, lengths=lengths)


def _glu_depthwise_conv(tensor: Callable[..., Tensor], lengths: Tensor) -> object:
    x, weight, bias, scale, shift = tensor(_B, _T, 2 * _D), tensor(_D, _K), tensor(_D), tensor(_D), tensor(_D)
    return ops.glu_depthwise_conv(x, weight, bias, lengths=lengths, norm="layer", norm_weight=scale, norm_bias=shift)


def _feed_forward(tensor: Callable[..., Tensor], lengths: Tensor) -> object:
    weights = tensor(_D), tensor(_D), tensor(_F, _D), tensor(_F), tensor(_D, _F), tensor(_D)
    return ops.feed_forward(tensor(_B, _T, _D), *weights)


def _residual_layer_norm(tensor: Callable[..., Tensor], lengths: Tensor) -> object:
    return ops.residual_layer_norm(tensor(_B, _T, _D), tensor(_B, _T, _D), tensor(_D), tensor(_D))


_TYPICAL = {
    "relpos_attention": _relpos_attention,
    "glu_depthwise_conv": _glu_depthwise_conv,
    "feed_forward": _feed_forward,
    "residual_layer_norm": _residual_layer_norm,
}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Fallbacks are in the table; no need to log them too."""
    log = logging.getLogger("lcconformer")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def _op(name: str, device: torch.device, dtype: torch.dtype, training: bool) -> dict[str, Any]:
    def tensor(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype, requires_grad=training)

    lengths = torch.full((_B,), _T, device=device)
    candidates = candidates_of(lambda: _TYPICAL[name](tensor, lengths))
    backend: str | None
    try:
        with _silent():
            backend, error = select(name, device.type, candidates), None
    except NotImplementedError as refused:
        backend, error = None, str(refused)
    against = {}
    for other in BACKENDS:
        if other in (backend, "torch"):
            continue
        if other == "cuda" and device.type != "cuda":
            against[other] = ["the tensors are not on a CUDA device"]
        elif other == "cpu" and device.type != "cpu":
            against[other] = ["the tensors are not on the CPU"]
        elif other not in candidates:
            against[other] = ["no such kernel for this op"]
        else:
            against[other] = candidates[other]() or [f"could serve; LCCONFORMER_BACKEND={other} forces it"]
    row = {"op": name, "device": str(device), "dtype": str(dtype).removeprefix("torch."), "training": training}
    return {**row, "backend": backend, "error": error, "against": against}


def _engine(device: torch.device, dtype: torch.dtype, training: bool) -> dict[str, Any]:
    config = ConformerConfig(d_model=_D, num_heads=_H, ffn_dim=_F, conv_kernel_size=_K)
    encoder = ConformerEncoder(config).to(device, dtype).train(training)
    x, lengths = torch.zeros(_B, _T, _D, device=device, dtype=dtype), torch.full((_B,), _T, device=device)
    with _silent(), torch.set_grad_enabled(training):
        against = loop.reasons_against(encoder, x, lengths)
    engine: str | None = "modules" if against else "loop"
    if against and loop.forced_engine() == "loop":
        engine = None
    row = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "training": training}
    return {**row, "engine": engine, "against": against}


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": f"{platform.machine()}, cores: {os.cpu_count()}, threads: {torch.get_num_threads()}",
            "vector": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"sm_{properties.major}{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found.append({"device": f"cuda:{i}", "name": properties.name, "capability": capability, "memory": memory})
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Everything the command prints, as JSON types."""
    missing = _extension.why_missing()
    devices = _devices()
    rows, engines = [], []
    for device in devices:
        dtype = torch.float32 if device["device"] == "cpu" else torch.bfloat16
        for name in _TYPICAL:
            rows += [_op(name, torch.device(device["device"]), dtype, training) for training in (False, True)]
        engines += [_engine(torch.device(device["device"]), dtype, training) for training in (False, True)]
    return {
        "versions": {
            "lcconformer": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda,
            "triton": _version("triton"),
            "platform": platform.platform(),
        },
        "settings": {
            "LCCONFORMER_BACKEND": forced_backend(),
            "LCCONFORMER_ENGINE": loop.forced_engine(),
            "LCCONFORMER_STRICT": "1" if strict() else "0",
        },
        "extension": {"missing": missing, "build": None if missing else _extension.build_info()},
        "devices": devices,
        "ops": rows,
        "engines": engines,
    }


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

    out += ["", f"Backend of each op for a batch of {_B} utterances of {_T} frames, width {_D}:"]
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

    out += ["", "Engine of the loop for such a batch:"]
    for row in info["engines"]:
        mode = "training" if row["training"] else "inference"
        out.append(f"  {mode:<{width}}  {row['device']} {row['dtype']}: {row['engine'] or 'none'}")
        out += [f"      not loop: {'; '.join(row['against'])}"] if row["against"] else []
    return "\n".join(out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--evidence", action="store_true", help="how far each kernel has been proven (CONTRIBUTING.md: six steps)"
    )


def run(args: argparse.Namespace) -> None:
    if args.evidence:
        from lcconformer.bench import evidence

        print(evidence.table())
        return
    info = collect()
    print(json.dumps(info, indent=2) if args.json else _text(info))
