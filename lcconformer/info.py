"""Facts about this installation: versions, devices, the backend of each op and the engine of the loop, with reasons."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch

from . import __version__, extension, loop
from .config import ConformerConfig
from .encoder import ConformerEncoder
from .ops.registry import BACKENDS, OPS, forced_backend, strict
from .ops.samples import TRAITS, Sizes

__all__ = ["collect"]

_SIZES = Sizes()


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
    op, traits = OPS[name], TRAITS[name](device, dtype, _SIZES)
    choice = op.explain(traits)
    against = {}
    for other in BACKENDS:
        if other in (choice.backend, "torch"):
            continue
        if other == "cuda" and device.type != "cuda":
            against[other] = ["the tensors are not on a CUDA device"]
        elif other == "cpu" and device.type != "cpu":
            against[other] = ["the tensors are not on the CPU"]
        else:
            on_request = op.on_request[other](traits) if other in op.on_request else ""
            reason = f"{on_request or 'could serve'}; LCCONFORMER_BACKEND={other} forces it"
            against[other] = op.reasons(other, traits) or [reason]
    row = {"op": name, "device": str(device), "dtype": str(dtype).removeprefix("torch."), "training": training}
    return {**row, "backend": choice.backend, "error": choice.error, "against": against}


def _engine(device: torch.device, dtype: torch.dtype, training: bool) -> dict[str, Any]:
    b, t, d = _SIZES.batch, _SIZES.frames, _SIZES.d_model
    config = ConformerConfig(
        d_model=d, num_heads=_SIZES.heads, ffn_dim=_SIZES.ffn_dim, conv_kernel_size=_SIZES.kernel_size
    )
    encoder = ConformerEncoder(config).to(device, dtype).train(training)
    x = torch.zeros(b, t, d, device=device, dtype=dtype)
    with torch.set_grad_enabled(training):
        explanation = encoder.explain(x)
        with loop.engine("cluster"):
            cluster = list(encoder.explain(x).against)
    engine = "loop" if explanation.engine in ("training", "inference") else explanation.engine
    row = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "training": training}
    return {**row, "engine": engine, "against": list(explanation.against), "against_cluster": cluster}


def _instructions() -> str:
    """What the processor multiplies with, such as ``"AVX512, AVX512-BF16, AMX"``."""
    bfloat16, tiles = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *["AVX512-BF16"] * bfloat16, *["AMX"] * tiles])


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": f"{platform.machine()}, cores: {os.cpu_count()}, threads: {torch.get_num_threads()}",
            "vector": _instructions(),
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
    """Everything ``lcconformer info`` prints, as JSON types.

    Backends and engines are those that a batch of default :class:`~lcconformer.ops.samples.Sizes` gets.
    """
    missing = extension.why_missing()
    devices = _devices()
    rows, engines = [], []
    for device in devices:
        dtype = torch.float32 if device["device"] == "cpu" else torch.bfloat16
        for name in OPS:
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
        "extension": {"missing": missing, "build": None if missing else extension.build_info()},
        "devices": devices,
        "ops": rows,
        "engines": engines,
    }
