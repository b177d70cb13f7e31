"""Whether the numbers are right: ``python -m lcconformer.bench.gpu.checks OUT --phase 2``.

Phase 2: the doctor's errors in bfloat16, the same bits from run to run, and from a CUDA graph what its recording computed.
Phase 8: the same bits thirty times, and the launch configurations that this GPU is fastest with.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lcconformer import doctor
from lcconformer.ops.samples import CALLS, Sizes
from lcconformer.tolerance import relative_error
from lcconformer.tune import OPS, LayerShape, tune_gpu

from ..core.case import Case
from ..providers.registry import build, choose
from ..runs.gate import Gate
from ..runs.runner import Runner
from .cases import DOCTOR
from .items import Items

__all__ = ["errors", "replayed", "same_bits"]

# a replay runs the kernels of its recording; GEMMs may be others than outside of it
REPLAY_TOLERANCE = {"bfloat16": 0.03, "float32": 1e-4}


def errors(op: str, small: bool) -> dict[str, float]:
    """Check an op by the doctor; returns error over allowed by backend and direction.

    Raises:
        RuntimeError: a backend is wrong.
    """
    # the interpreter's bfloat16 is wrong
    device, dtype, sizes = (
        ("cpu", torch.float32, Sizes(2, 9, 32, 1, 64, 7)) if small else ("cuda", torch.bfloat16, DOCTOR)
    )
    found = {}
    for finding in doctor.check(op, device, sizes, (dtype,)):
        if isinstance(finding, doctor.Refusal):
            print(f"{op} by {finding.backend}: not checked: {finding.reason}")
            continue
        name = f"{finding.backend} {finding.of}"
        found[name] = finding.error / finding.allowed
        print(f"{op} by {name}: {finding.worst} {finding.error:.1e} of {finding.allowed:.1e} allowed", flush=True)
        if not finding.passed:
            raise RuntimeError(f"{op} by {name} is wrong: {finding.worst} is off by {finding.error:.1e}")
    return found


def _runner(name: str, case: Case) -> Runner:
    (provider,) = choose(name)
    return Runner(provider, case, build(provider, case, Gate(case).state(provider)))


def same_bits(name: str, case: Case, times: int) -> int:
    """Run a provider from the same seed again and again, with dropout in training; returns how often.

    Raises:
        RuntimeError: outputs or gradients differ in a bit.
    """
    runner = _runner(name, case)
    first: list[torch.Tensor] = []
    for i in range(times):
        torch.manual_seed(5)
        tensors = [t.detach().clone() for group in runner() for t in group]
        different = [k for k, (a, b) in enumerate(zip(first, tensors)) if not torch.equal(a, b)]
        if different:
            raise RuntimeError(f"{name} on {case}: run {i} differs in {len(different)} of {len(tensors)} tensors")
        first = first or tensors
    print(f"{name} on {case}: the same bits {times} times", flush=True)
    return times


def replayed(name: str, case: Case) -> dict[str, float]:
    """Compare the replay of a CUDA graph with the same call outside of it, without dropout; returns the largest error.

    With dropout, two replays must differ.

    Raises:
        RuntimeError: they do not agree, or two replays draw the same dropout.
    """
    runner = _runner(name, case.replace(dropout=0.0))
    plain = [t.detach().clone() for group in runner() for t in group]
    runner.prepare()
    graph = [t.detach().clone() for group in runner() for t in group]
    worst = max(relative_error(g, p) for g, p in zip(graph, plain))
    print(f"{name} on {case}: replay off by {worst:.1e}", flush=True)
    if not worst <= REPLAY_TOLERANCE[case.dtype]:
        raise RuntimeError(f"{name} on {case}: the replay is off by {worst:.1e} of the largest value")
    if case.backward:
        runner = _runner(name, case)
        runner.prepare()
        first, second = (runner()[0][0].detach().clone() for _ in range(2))
        if torch.equal(first, second):
            raise RuntimeError(f"{name} on {case}: two replays drew the same dropout")
    return {"error": worst}


def _tuned(layer: LayerShape, ops: Sequence[str], out: Path) -> int:
    path, count = tune_gpu(layer, ops, out)
    print(f"{count} configurations: {path}")
    return count


def _items(phase: int, out: Path, small: bool) -> dict[str, Callable[[], object]]:
    tiny = Case("inference", 2, 8, d_model=32, layers=2, depth=2, kernel=7)
    case = tiny if small else Case("inference", 32, 400, dtype="bfloat16", device="cuda")
    training = case.replace(mode="training")
    items: dict[str, Callable[[], object]] = {}
    names = ("lcconformer:triton", "lcconformer:triton+loop")
    if phase == 2:
        items |= {f"errors of {op}": functools.partial(errors, op, small) for op in CALLS}
    times = 2 if small else 3 if phase == 2 else 30
    cases = [training, case] if phase == 2 or small else [training, case, training.replace(batch=8, frames=203)]
    for one in cases:
        for name in names:
            # the interpreter takes no graphs, and so no loop engine in inference
            if not (small and one is case and name.endswith("loop")):
                items[f"same bits, {name}, {one}"] = functools.partial(same_bits, name, one, times)
    if phase == 2 and not small:
        for name, one in (("triton+graphs", case), ("triton+graphs", training), ("triton+loop+graphs", training)):
            items[f"replay, {name}, {one}"] = functools.partial(replayed, f"lcconformer:{name}", one)
    if phase == 8 and not small:
        for b, t, ops in ((32, 400, OPS[:1]), (1, 100, OPS[:1]), (8, 400, OPS[:1]), (32, 400, OPS[1:])):
            items[f"tune {', '.join(ops)}, {b}x{t}"] = functools.partial(_tuned, LayerShape(b, t), ops, out)
    return items


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.gpu.checks", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--phase", type=int, choices=(2, 8), required=True)
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU, to try the code")
    args = parser.parse_args(argv)
    return Items(args.out, args.phase).run(_items(args.phase, args.out, args.small))


if __name__ == "__main__":
    sys.exit(main())
