"""Predicted times of encoders on an H200 against the goals, without a GPU: ``python -m lcconformer.bench.reports.predicted``.

Ours is what the code launches (:mod:`..core.recording`), each Triton kernel by the static model of its compiled code
(:mod:`lcconformer.kernels.cost`), matrix products and PyTorch's kernels by :mod:`..core.gpu_model`, which also models eager
PyTorch and torch.compile; all of it in CUDA graphs.  Predictions rank variants and say where time goes; they are never
results.

Inference is a call of the graphs engine, T rounded up as it does; training is a step of the loop engine with dropout 0.1,
as if it were one graph.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from lcconformer.kernels import report
from lcconformer.kernels.common import TRITON_DTYPE, AotConfig
from lcconformer.kernels.cost import MACHINES, Work, parse, predict
from lcconformer.kernels.cost_shapes import Shape, work
from torch import Tensor

import lcconformer
from lcconformer import ConformerConfig, ConformerEncoder
from lcconformer.loop import graphs
from lcconformer.runtime import write_atomically

from ..core import gpu_model
from ..core.recording import Aten, Event, Triton, backward, record
from . import before_after
from .goals import GOALS, Goal
from .table import grid, number

__all__ = ["CASES", "Group", "Result", "inference", "main", "markdown", "predicted", "training"]

NOTE = "Predictions by a model, H200, bfloat16, 12 layers: they rank variants and say where time goes; they are never results."
LAYERS, ARCH = 12, 90
CASES = tuple(
    (mode, batch, frames, width)
    for mode, batch, frames in (
        ("inference", 1, 100), ("inference", 32, 400), ("inference", 32, 1500), ("training", 32, 400), ("training", 32, 1500),
    )
    for width in (256, 512, 768)
)  # fmt: skip


def _encoder(d: int, layers: int) -> ConformerEncoder:
    config = ConformerConfig(d_model=d, num_heads=d // 64, ffn_dim=4 * d, num_layers=layers, dropout=0.1)
    with torch.device("meta"):
        return ConformerEncoder(config).to(torch.bfloat16)


def inference(batch: int, frames: int, d: int) -> list[Event]:
    """Record a call of the graphs engine: what its graphs hold, and what surrounds them."""
    encoder = _encoder(d, LAYERS).eval()
    x = torch.empty(batch, frames, d, dtype=torch.bfloat16, device="meta")
    lengths = torch.empty(batch, dtype=torch.int64, device="meta")

    def call() -> None:
        with lcconformer.backend("triton"):
            graphs.run(encoder, x, lengths, LAYERS, False, record=lambda function: function)

    return record(call, ARCH)


def training(batch: int, frames: int, d: int) -> list[Event]:
    """Record a forward and a backward of all loops by the loop engine."""
    encoder = _encoder(d, LAYERS).train()
    x = torch.empty(batch, frames, d, dtype=torch.bfloat16, device="meta", requires_grad=True)
    lengths = torch.empty(batch, dtype=torch.int64, device="meta")

    def call() -> None:
        with lcconformer.backend("triton"), lcconformer.engine("loop"):
            backward(encoder(x, lengths)[0], [x, *encoder.parameters()])

    return record(call, ARCH)


# --- the times of what was recorded ------------------------------------------------------------------------------------


def _config(event: Triton) -> AotConfig:
    """Return the specialisation that Triton would compile for these arguments."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    divisible = set()
    for parameter in event.kernel.params:
        name = parameter.name
        value = event.arguments.get(name)
        if isinstance(value, Tensor):
            signature[name] = f"*{TRITON_DTYPE[value.dtype]}"
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            constexprs[name] = getattr(value, "value", value)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.add(name)
    float_type = next((t[1:] for t in signature.values() if t in ("*bf16", "*fp16")), "fp32")
    return AotConfig(
        name=_name(event, constexprs),
        kernel=event.kernel,
        signature=signature,
        constexprs=constexprs,
        dtype=float_type,
        launch=event.launch,
        divisible=frozenset(divisible),
    )


@functools.cache
def _shipped() -> list[AotConfig]:
    return [config for module in report.kernel_modules() for config in report.configs(module, ARCH)]


def _name(event: Triton, constexprs: dict[str, Any]) -> str:
    """Return the name, without its width, of the shipped configuration of this kernel that agrees in most constants."""
    own = [c for c in _shipped() if c.kernel is event.kernel]
    best = max(own, key=lambda c: sum(constexprs.get(n, ...) == v for n, v in c.constexprs.items()), default=None)
    return re.split(" [DCKM]=", best.name)[0] if best else event.kernel.__name__


@dataclass
class _Model:
    """Predicts events; compiles each specialisation once."""

    shape: Shape
    programs: dict[Any, Any]
    times: dict[Any, float] = field(default_factory=dict)

    def __call__(self, event: Event) -> tuple[str, float]:
        """Return (what it is, seconds without the gap in front of it)."""
        if isinstance(event, Aten):
            if event.product:
                return "GEMM", gpu_model.product_seconds(event.product, event.bytes)
            return f"aten {event.name}", gpu_model.traffic_seconds(event.bytes)
        config = _config(event)
        given = {n: v for n, v in event.arguments.items() if isinstance(v, int)}
        stated = work(config, replace(self.shape, given=given))
        if stated is None:
            raise ValueError(f"{config.name} states no work: add it to WORK in kernels/cost_shapes.py")
        # a launch may be for a part of its tensors
        size = min(stated.bytes, event.bytes)
        return config.name, self._seconds(config, replace(stated, grid=math.prod(event.grid), bytes=size))

    def _seconds(self, config: AotConfig, launched: Work) -> float:
        own = (config.kernel.__name__, config.constexprs, config.signature, config.launch, sorted(config.divisible))
        key = str(own)
        if key not in self.programs:
            binary = report.build(config, ARCH)
            self.programs[key] = parse(binary.sass), binary.registers, binary.shared
        if (key, launched) not in self.times:
            program, registers, shared = self.programs[key]
            warps = config.launch.num_warps
            predicted = predict(program, MACHINES[ARCH], launched, warps=warps, registers=registers, shared=shared)
            self.times[key, launched] = predicted.microseconds * 1e-6
        return self.times[key, launched]


def _group(what: str) -> str:
    if what == "GEMM" or what.startswith(("feed_forward_products", "chain_products")):
        return "matrix products"
    if what.startswith("relpos_attention"):
        return "attention"
    if what.startswith(("glu_depthwise_conv", "chain_convolution")):
        return "convolution"
    if what.startswith("aten"):
        return "PyTorch's pointwise kernels and copies"
    return "norms, activations, residuals, sums"


@dataclass(frozen=True)
class Group:
    """Kernels of one name, of one layer: how many, and their microseconds together."""

    name: str
    kernels: float
    microseconds: float


@dataclass(frozen=True)
class Result:
    """One case: modelled milliseconds of ours and of the baselines, the goals, and what a layer consists of."""

    mode: str
    batch: int
    frames: int
    d_model: int
    ours: float
    eager: float
    compiled: float
    kernels: float
    groups: tuple[Group, ...]
    names: tuple[Group, ...]

    def goals(self) -> list[tuple[Goal, float]]:
        """(goal, predicted ratio) of this case."""
        found = [
            g
            for g in GOALS
            if g.device == "cuda"
            and not g.memory
            and (g.mode, g.batch, g.frames, g.d_model) == (self.mode, self.batch, self.frames, self.d_model)
        ]
        return [(g, (self.eager if g.against == "eager" else self.compiled) / self.ours) for g in found]

    def _least(self, group: str) -> float:
        """Microseconds a layer below which a term does not come: its products at the best rate of the model."""
        rows, tokens = self.batch * self.frames, self.batch * self.frames**2
        training = self.mode == "training"
        if group == "matrix products":
            return (3 if training else 1) * 46 * rows * self.d_model**2 / gpu_model.GEMM * 1e6
        if group == "attention":
            forward = 7 * tokens * self.d_model / gpu_model.ATTENTION
            return (forward + (23 * tokens * self.d_model / gpu_model.ATTENTION_BACKWARD if training else 0)) * 1e6
        return 0.0

    def forbids(self, goal: Goal) -> str:
        """Name the terms with most above their least, until the goal would be met without that."""
        allowed = (self.eager if goal.against == "eager" else self.compiled) / goal.factor
        over = left = (self.ours - allowed) * 1e3 / LAYERS  # microseconds a layer
        named = []
        for group in sorted(self.groups, key=lambda g: self._least(g.name) - g.microseconds):
            least = self._least(group.name)
            if left <= 0 or group.microseconds <= least:
                break
            named.append(f"{group.name} {group.microseconds:.0f}" + (f" (least {least:.0f})" if least else ""))
            left -= group.microseconds - least
        enough = "" if left <= 0 else "; that is not enough"
        return f"{over:.0f} us a layer too many: {', '.join(named)}{enough}"


def predicted(mode: str, batch: int, frames: int, d: int, programs: dict[Any, Any] | None = None) -> Result:
    """Predict one case; ``programs`` keeps what was compiled from call to call."""
    run: Callable[[int, int, int], list[Event]] = inference if mode == "inference" else training
    events = run(batch, frames, d)
    own_frames = -(-frames // graphs.BUCKET) * graphs.BUCKET if mode == "inference" else frames
    model = _Model(Shape(batch, own_frames, d), {} if programs is None else programs)
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    gaps = 0.0
    for event in events:
        what, time = model(event)
        seconds[what] += time
        counts[what] += 1
        # Triton's kernels are modelled with their fill
        dependent = isinstance(event, Triton) and bool(event.launch.kwargs().get("launch_pdl"))
        gaps += gpu_model.gap_seconds(dependent=dependent, filled=isinstance(event, Triton))
    groups: Counter[str] = Counter({"launch gaps": gaps})
    for what, time in seconds.items():
        groups[_group(what)] += time
    of_group: Counter[str] = Counter({"launch gaps": len(events)})
    for what, n in counts.items():
        of_group[_group(what)] += n
    e = gpu_model.Encoder(batch, frames, d, LAYERS)
    train = mode == "training"
    return Result(
        mode=mode,
        batch=batch,
        frames=frames,
        d_model=d,
        ours=sum(groups.values()) * 1e3,
        eager=gpu_model.baseline_seconds(e, training=train, compiled=False) * 1e3,
        compiled=gpu_model.baseline_seconds(e, training=train, compiled=True) * 1e3,
        kernels=len(events) / LAYERS,
        groups=tuple(_groups(groups, of_group)),
        names=tuple(_groups(seconds, counts)),
    )


def _groups(seconds: Counter[str], counts: Counter[str]) -> Iterable[Group]:
    for name, time in seconds.most_common():
        yield Group(name, counts[name] / LAYERS, time * 1e6 / LAYERS)


# --- output ------------------------------------------------------------------------------------------------------------


def markdown(results: Sequence[Result]) -> str:
    """Return the goals, the terms of each layer, its kernels, and what was before the review as Markdown."""
    goals, terms, kernels = [], [], []
    for r in results:
        case = f"{r.mode} ({r.batch},{r.frames}) d={r.d_model}"
        for goal, ratio in r.goals():
            met = goal.met(ratio)
            goals.append([
                case, f"{number(r.ours)} ms", goal.against, f"{number(ratio)}x", f"{number(goal.factor)}x",
                "" if met else r.forbids(goal),
            ])  # fmt: skip
        of = {g.name: g for g in r.groups}
        terms.append([case, number(r.kernels), *(number(of[n].microseconds if n in of else 0.0) for n in _TERMS)])
        kernels += [[case, g.name, number(g.kernels), number(g.microseconds)] for g in r.names if g.microseconds >= 1]
    tables = (
        ("Against the goals", ["case", "ours", "against", "predicted", "goal", "what forbids it"], goals),
        ("A layer, microseconds", ["case", "kernels", *_TERMS], terms),
        ("Kernels of a layer, microseconds", ["case", "kernel", "times", "together"], kernels),
    )
    parts = [f"# {title}\n\n```\n{grid(header, lines)}\n```\n" for title, header, lines in tables]
    return (
        f"{NOTE}\nTriton {triton.__version__}; made by python -m lcconformer.bench.reports.predicted.\n\n"
        + "\n".join((*parts, before_after.tables(_rows(results))))
    )


_TERMS = (
    "matrix products", "attention", "convolution", "norms, activations, residuals, sums",
    "PyTorch's pointwise kernels and copies", "launch gaps",
)  # fmt: skip


def _rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [
        {
            "mode": r.mode, "batch": r.batch, "frames": r.frames, "d_model": r.d_model, "ours_ms": round(r.ours, 4),
            "eager_ms": round(r.eager, 4), "compile_ms": round(r.compiled, 4), "kernels_a_layer": round(r.kernels, 2),
            "layer_us": {g.name: round(g.microseconds, 2) for g in r.groups},
            "kernels_us": {g.name: [round(g.kernels, 2), round(g.microseconds, 2)] for g in r.names},
        }
        for r in results
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.reports.predicted", description=__doc__)
    parser.add_argument("--mode", choices=("inference", "training"), help="only this one")
    parser.add_argument("--d-model", type=int, choices=(256, 512, 768), help="only this width")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json, such as bench/results/predicted")
    args = parser.parse_args(argv)
    if report.INTERPRETED:
        print("bench.predicted: kernels are not compiled under TRITON_INTERPRET=1; unset it", file=sys.stderr)
        return 2
    programs: dict[Any, Any] = {}
    results = []
    for mode, batch, frames, d in CASES:
        if args.mode in (None, mode) and args.d_model in (None, d):
            results.append(predicted(mode, batch, frames, d, programs))
    text = markdown(results)
    print(text)
    if args.out:
        write_atomically(args.out.with_suffix(".md"), text)
        data = {"note": NOTE, "triton": triton.__version__, "cases": _rows(results)}
        write_atomically(args.out.with_suffix(".json"), json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
