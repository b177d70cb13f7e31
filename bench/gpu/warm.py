"""Compile ahead what the phases will run: ``python -m lcconformer.bench.gpu.warm kernels PHASE I/N``, or ``inductor``.

``kernels``: N processes make the calls of the phase, each with Triton's launcher replaced by one that compiles, without
launching, every N-th specialisation; so all that will be launched, and nothing else, is in Triton's cache afterwards.
``variants``: the same with all launch candidates of the kernels that are timed alone.
``inductor``: torch.compile of one layer for every N-th case, for the caches of Inductor and Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lcconformer.kernels import tuning

from lcconformer.doctor import check
from lcconformer.ops.samples import CALLS
from lcconformer.tune import LayerShape, calls

from ..core.case import Case
from ..providers.registry import build, choose
from ..runs.runner import Runner
from .cases import DOCTOR, layer_shapes, odd_shapes, timed

__all__ = ["Share", "specialisation"]


def specialisation(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What Triton compiles a kernel anew for: dtypes and alignment of tensors, ones and multiples of 16, constants."""

    def of(value: Any) -> object:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), value.data_ptr() % 16 == 0
        if type(value) is int:
            return 1 if value == 1 else "16" if value % 16 == 0 else "int"
        return type(value).__name__ if isinstance(value, float) else repr(value)

    # keyword arguments hold the constants, whose values count
    return f"{name} {[of(a) for a in args]} {sorted((k, v if type(v) is int else of(v)) for k, v in kwargs.items())}"


class Share:
    """Chooses every ``count``-th specialisation, the same in every process."""

    def __init__(self, text: str) -> None:
        self.index, self.count = map(int, text.split("/"))

    def mine(self, text: str) -> bool:
        return zlib.crc32(text.encode()) % self.count == self.index

    def some(self, items: Sequence[Any]) -> Sequence[Any]:
        return items[self.index :: self.count]


@contextlib.contextmanager
def compiling(share: Share) -> Iterator[None]:
    """Inside, launches of Triton kernels launch nothing: those of the share are compiled."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not share.mine(specialisation(self.__name__, args, kwargs)):
            return None
        run(self, *args, grid=grid, warmup=True, **kwargs)
        return None  # nothing that could be launched without Triton the next time

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


def _try(what: str, call: Callable[[], object]) -> None:
    """The other calls count too."""
    try:
        call()
    except Exception:
        print(f"not compiled ahead: {what}")
        traceback.print_exc()


def _every(call: Callable[[], object]) -> None:
    """Make a call with each launch candidate of each of its kernels."""
    with tuning.watched() as (seen, forced):
        call()
        for key, candidates in list(seen.items()):
            for config in candidates[1:]:
                forced[key] = config
                _try(f"{key} as {config}", call)
            forced.pop(key, None)


def _encoder(name: str, case: Case) -> None:
    (provider,) = choose(name)
    _try(f"{name} on {case}", lambda: Runner(provider, case, build(provider, case, None))())


def kernels(phase: int, share: Share) -> None:
    """Compile the share's Triton kernels of the encoders of phase 4 and of the kernels alone, or of phase 6."""
    with compiling(share):
        for one in timed(4 if phase == 1 else phase, False):
            for name in ("lcconformer:triton", "lcconformer:triton+loop"):
                _encoder(name, one.case.replace(layers=2, depth=2))
        if phase != 1:
            return
        for op in CALLS:
            _try(f"the doctor's {op}", lambda op=op: list(check(op, "cuda", DOCTOR, (torch.bfloat16,))))
        _layers([*layer_shapes(False), *odd_shapes(False)], lambda call: call())


def variants(phase: int, share: Share) -> None:
    """Compile the share's launch candidates of the kernels alone."""
    with compiling(share):
        _layers([layer for layer in layer_shapes(False) if layer.dropout], _every)


def _layers(layers: Sequence[LayerShape], visit: Callable[[Callable[[], object]], object]) -> None:
    for layer in layers:
        _try(f"kernels at {layer}", lambda layer=layer: [visit(call) for _, call in calls(layer, torch.device("cuda"))])


def inductor(phase: int, share: Share) -> None:
    """Compile one layer for the share's cases."""
    for one in share.some(timed(4 if phase == 1 else phase, False)):
        _encoder("compile:inductor", one.case.replace(layers=1, depth=1))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcconformer.bench.gpu.warm", description=__doc__)
    parser.add_argument("what", choices=("kernels", "variants", "inductor"))
    parser.add_argument("phase", type=int)
    parser.add_argument("share", type=Share, metavar="I/N")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    {"kernels": kernels, "variants": variants, "inductor": inductor}[args.what](args.phase, args.share)
    return 0


if __name__ == "__main__":
    sys.exit(main())
