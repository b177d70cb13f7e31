"""Encoders of other packages against themselves under ``accelerate``: errors and times."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lcconformer
from lcconformer.interop.accelerated import AcceleratedLayer
from lcconformer.ops.registry import record
from lcconformer.runtime import commit, read_json
from lcconformer.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, allowed_error, passes

from ..core.case import Case
from ..core.rows import add_row, device_name, versions
from ..core.timing import time_interleaved
from ..providers.accelerated import PEERS, Peer
from ..reports.table import grid, number
from .gate import GateError

__all__ = ["AcceleratedRow", "accelerated", "measure", "read_rows"]

_IDENTITY = ("peer", "mode", "batch", "frames", "d_model", "layers", "device_name", "commit")


@dataclass(frozen=True)
class AcceleratedRow:
    """One peer on one case.

    Attributes:
        peer, package, version: the model, and the distribution that it came from.
        layer: class of its layers.
        engine: ``"packed weights"`` where the inference engine ran the layers, else ``"ops"``.
        mode, batch, frames, d_model, layers, dropout: see :class:`~lcconformer.bench.core.case.Case`.
        error, own_error: the largest error of outputs, in training also of gradients, to the peer in float64 over the largest
            value: of the accelerated model, and of the peer in float32.
        original_ms, accelerated_ms: median of interleaved rounds.
        p20_ms, p80_ms: of both, original first.
        speedup: ratio of the medians.
        device_name, versions, commit: as in the rows of the suite.
    """

    peer: str
    package: str
    version: str
    layer: str
    engine: str
    mode: str
    batch: int
    frames: int
    d_model: int
    layers: int
    dropout: float
    error: float
    own_error: float
    original_ms: float
    accelerated_ms: float
    p20_ms: list[float]
    p80_ms: list[float]
    speedup: float
    device_name: str
    versions: dict[str, str]
    commit: str


def read_rows(path: Path) -> list[AcceleratedRow]:
    """Read the rows of a file that :func:`accelerated` wrote."""
    return [AcceleratedRow(**row) for row in read_json(path)["rows"]]


def _pair(peer: Peer, case: Case) -> tuple[nn.Module, nn.Module]:
    """Build the peer with nothing at its initial value, and a copy of it under ``accelerate``."""
    torch.manual_seed(1)
    original = peer.build(case)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ours = copy.deepcopy(original)
    lcconformer.accelerate(ours, strict=True)
    return original, ours


def _step(model: nn.Module, x: Tensor, backward: bool, weight: Tensor) -> tuple[Tensor, ...]:
    """Output and, in training, gradients of the input and of the parameters that the output depends on."""
    if not backward:
        with torch.no_grad():
            return (model(x),)
    x = x.detach().requires_grad_()
    out = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(out, wanted, weight.to(out.dtype), allow_unused=True)
    return out.detach(), *(g for g in gradients if g is not None)


def _errors(peer: Peer, case: Case) -> tuple[float, float]:
    """Errors of the accelerated peer and of the peer, on two utterances, without dropout.

    Raises:
        GateError: the first is larger than the rule allows.
    """
    original, ours = (m.train(case.backward) for m in _pair(peer, case.replace(dropout=0.0)))
    x = case.replace(batch=min(case.batch, 2)).input().detach()
    weight = torch.randn_like(x)
    exact, low, found = (
        _step(m, x.to(dtype), case.backward, weight)
        for m, dtype in ((copy.deepcopy(original).double(), torch.float64), (original, x.dtype), (ours, x.dtype))
    )
    worst = {"low": 0.0, "ours": 0.0}
    for kind, factor in ((slice(0, 1), OUTPUT_FACTOR), (slice(1, None), GRADIENT_FACTOR)):
        if not exact[kind]:
            continue
        # of one scale: a gradient may be zero
        scale = max(float(value.abs().max()) for value in exact[kind])
        errors = {
            name: max(float((v - e).abs().max()) / scale for v, e in zip(values[kind], exact[kind], strict=True))
            for name, values in (("low", low), ("ours", found))
        }
        allowed = allowed_error(errors["low"], factor, x.dtype)
        if not passes(errors["ours"], allowed):
            raise GateError(f"{peer.name}, {case}: off by {errors['ours']:.2e}; at most {allowed:.2e} is allowed")
        worst = {name: max(worst[name], error) for name, error in errors.items()}
    return worst["ours"], worst["low"]


def measure(peer: Peer, case: Case, seconds: float, rounds: int | None = None) -> AcceleratedRow:
    """Check and time one peer on one case.

    Raises:
        GateError: its numbers are wrong.
    """
    error, own_error = _errors(peer, case)
    models = dict(zip(("original", "accelerated"), (m.train(case.backward) for m in _pair(peer, case))))
    x = case.input().detach()
    weight = torch.randn_like(x)

    def call(model: nn.Module) -> Callable[[], object]:
        return lambda: _step(model, x, case.backward, weight)

    calls = {name: call(model) for name, model in models.items()}
    with record() as served:
        calls["accelerated"]()
    for warm in (*calls.values(), *calls.values()):
        warm()
    timings = time_interleaved(calls, case.device, seconds, rounds)
    layers = {type(m).__name__ for m in models["accelerated"].modules() if isinstance(m, AcceleratedLayer)}
    old, new = timings["original"], timings["accelerated"]
    return AcceleratedRow(
        peer=peer.name,
        package=peer.package,
        version=importlib.metadata.version(peer.package),
        layer=", ".join(sorted(layers)),
        engine="packed weights" if "shared_loop" in served else "ops",
        mode=case.mode,
        batch=case.batch,
        frames=case.frames,
        d_model=case.d_model,
        layers=case.layers,
        dropout=case.dropout if case.backward else 0.0,
        error=error,
        own_error=own_error,
        original_ms=old.median,
        accelerated_ms=new.median,
        p20_ms=[old.p20, new.p20],
        p80_ms=[old.p80, new.p80],
        speedup=old.median / new.median,
        device_name=device_name(case.device),
        versions=versions(),
        commit=commit(),
    )


def _chosen(names: str | None) -> list[Peer]:
    known: Mapping[str, Peer] = {peer.name.lower(): peer for peer in PEERS}
    if names is None:
        return list(known.values())
    unknown = [name for name in names.split(",") if name.lower() not in known]
    if unknown:
        raise ValueError(f"bench --accelerated: no peer {unknown[0]!r}; use some of {', '.join(p.name for p in PEERS)}")
    return [known[name.lower()] for name in names.split(",")]


def accelerated(
    cases: Sequence[Case], names: str | None, path: Path | None, seconds: float | None, rounds: int | None
) -> int:
    """Print peers against themselves under ``accelerate``, and add a row for each to the file ``path``.

    Raises:
        ValueError: the cases are ops, or a name is unknown.
        GateError: an accelerated peer is wrong.
    """
    if cases[0].op:
        raise ValueError("bench --accelerated: mode is ops; use --mode inference or training")
    print(f"{device_name(cases[0].device)}; commit {commit()}")
    found: list[AcceleratedRow] = []
    for peer in _chosen(names):
        why = peer.missing()
        if why is not None:
            print(f"skipped  {peer.name}: {why}")
            continue
        for case in cases:
            row = measure(peer, case, seconds or 3.0, rounds)
            found.append(row)
            if path is not None:
                add_row(path, row, _IDENTITY)
    lines: list[Any] = [
        [r.peer, f"{r.mode} {r.batch}x{r.frames}", r.engine, f"{r.error:.1e}", f"{r.own_error:.1e}",
         number(r.original_ms), number(r.accelerated_ms), f"{r.speedup:.2f}x"]
        for r in found
    ]  # fmt: skip
    print(grid(["peer", "case", "runs on", "error", "its own", "ms", "accelerated", "speedup"], lines, left=3))
    print(
        "\nerror: the largest of outputs, in training also of gradients, to the peer in float64 over the largest value; "
        "its own: of the peer in float32"
    )
    return 0 if found else 1
