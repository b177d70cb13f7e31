"""No depthwise convolution runs in float16 on a CPU, where oneDNN's may never return: it is that of float32, rounded.

Run as a program, ``python test_half_convolution.py NAME``, it runs one user of the convolution at the shapes that hang on
processors with AVX512-FP16 or AMX (torch 2.13). On others they return, so the operator is refused.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

CHANNELS, FRAMES, TAPS = (2, 5), 67, 31
TESTS = Path(__file__).parents[1]


class Refuse(TorchDispatchMode):
    """Raise where a convolution or its gradient is about to run in float16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in func.name() and any(isinstance(a, Tensor) and a.dtype == torch.float16 for a in args):
            raise AssertionError(f"{func.name()} in float16 on a CPU")
        return func(*args, **(kwargs or {}))


def half(*shape: int) -> Tensor:
    return torch.randn(shape).half().requires_grad_()


def reference() -> None:
    from lcconformer.ops import glu_depthwise_conv
    from lcconformer.ops.glu_depthwise_conv import glu_depthwise_conv_reference

    for c in CHANNELS:
        for op in (glu_depthwise_conv, glu_depthwise_conv_reference):
            op(half(1, FRAMES, 2 * c), half(c, TAPS), half(c)).sum().backward()


def cuda_oracle() -> None:
    cases = runpy.run_path(str(TESTS / "extension" / "cases_glu_depthwise_conv.py"))
    for c in CHANNELS:
        inputs = cases["make_inputs"](1, FRAMES, c, TAPS, "float16", "none", True)
        cases["gradients"](inputs, torch.randn(1, FRAMES, c).half(), lambda leaves: cases["oracle"](leaves, None))


def triton_oracle() -> None:
    tests = runpy.run_path(str(TESTS / "kernels" / "test_glu_depthwise_conv.py"))
    for c in CHANNELS:
        inputs = tests["make_inputs"](1, FRAMES, c, TAPS, "none", torch.float16)
        tests["with_gradients"](inputs, torch.randn(1, FRAMES, c), [FRAMES], "none", 1, torch.float16)


def doctor() -> None:
    from lcconformer.doctor import check
    from lcconformer.ops.samples import Sizes

    for c in CHANNELS:
        assert list(check("glu_depthwise_conv", "cpu", Sizes(1, FRAMES, c, 1, 4 * c, TAPS)))


def baseline() -> None:
    from lcconformer.bench.providers.baselines import Convolution

    for c in CHANNELS:
        Convolution(c, TAPS, 0.0, "layer").half()(half(1, FRAMES, c)).sum().backward()


def gate() -> None:
    from lcconformer.bench.core.case import Case
    from lcconformer.bench.providers import registry
    from lcconformer.bench.runs.gate import Gate
    from lcconformer.bench.runs.runner import Runner

    for mode in ("training", "glu_depthwise_conv:training"):
        case = Case(mode, 1, FRAMES, d_model=2, layers=1, depth=1, dtype="float16", device="cpu", kernel=TAPS)
        for provider in registry.choose("eager:torch,lcconformer:torch"):
            g = Gate(case)
            assert g.check(Runner(provider, case, registry.build(provider, case, g.state(provider)))) <= 1.0


USERS = {f.__name__: f for f in (reference, cuda_oracle, triton_oracle, doctor, baseline, gate)}


@pytest.mark.parametrize("user", USERS)
def test_no_float16_convolution_runs_on_a_cpu(user):
    if user == "triton_oracle":
        pytest.importorskip("triton")
    # what hangs would hang this process as well; oracles follow the GPU where there is one
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, user]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def convolution(y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from lcconformer.ops.glu_depthwise_conv.reference import depthwise_conv1d

    return depthwise_conv1d(y, weight, bias)


def plain(y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    c, k = weight.shape
    return F.conv1d(y, weight[:, None], bias, padding=k // 2, groups=c)


@pytest.mark.parametrize("c", [*CHANNELS, 64])
def test_float16_is_float32_rounded(c):
    inputs = [torch.randn(2, c, FRAMES).half(), torch.randn(c, TAPS).half(), torch.randn(c).half()]
    want = plain(*(p.float() for p in inputs)).half()
    with Refuse():
        got = convolution(*inputs)
        with pytest.raises(AssertionError, match="convolution in float16"):
            plain(*inputs)
    assert torch.equal(got, want)


@pytest.mark.parametrize("c", CHANNELS)
def test_autocast_to_float16(c):
    inputs = [torch.randn(2, c, FRAMES), torch.randn(c, TAPS)]
    with Refuse(), torch.autocast("cpu", torch.float16):
        got = convolution(*inputs)
    assert torch.equal(got, plain(*inputs).half())


def test_other_dtypes_are_pytorchs_own():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        inputs = [torch.randn(2, 5, FRAMES, dtype=dtype), torch.randn(5, TAPS, dtype=dtype)]
        assert torch.equal(convolution(*inputs), plain(*inputs))
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float64):
            assert convolution(*inputs).dtype == dtype


def test_compiled_and_exported():
    inputs = half(2, 5, FRAMES), half(5, TAPS), half(5)
    want = convolution(*inputs)
    compiled = torch.compile(convolution, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), want)

    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return convolution(*given)

    with torch.no_grad():
        assert torch.equal(torch.export.export(Module(), inputs).module()(*inputs), want)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with Refuse():
        USERS[sys.argv[1]]()
