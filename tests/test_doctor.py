"""``python -m lcconformer doctor``: what it finds right, what it finds wrong, and what it says of the rest."""

from __future__ import annotations

import pytest
import torch

from lcconformer import doctor, extension, ops
from lcconformer.__main__ import main
from lcconformer.ops.samples import CALLS, Sizes

SMALL = Sizes(batch=3, frames=9, d_model=32, heads=2, ffn_dim=48, kernel_size=5)


@pytest.mark.skipif(extension.why_missing() is not None, reason="no compiled extension")
@pytest.mark.parametrize("op", CALLS)
def test_the_cpu_kernels_pass(op):
    found = [f for f in doctor.check(op, "cpu", SMALL) if isinstance(f, doctor.Finding) and f.backend == "cpu"]
    assert [(f.dtype, f.of) for f in found] == [
        (dtype, of) for dtype in ("float32", "bfloat16") for of in ("output", "gradients")
    ]
    assert all(f.passed for f in found)
    # errors of float32 are not those of bfloat16, and neither are none
    assert all(1e-9 < f.error < 1e-5 for f in found[:2])
    assert all(1e-4 < f.error < 1e-1 for f in found[2:])


@pytest.mark.skipif(extension.why_missing() is not None, reason="no compiled extension")
@pytest.mark.parametrize("wrong", ["output", "gradient", "nan"])
def test_a_wrong_kernel_is_named(monkeypatch, capsys, wrong):
    plain = ops.residual_layer_norm

    def broken(x, y, weight, bias, **options):
        if wrong == "gradient":
            weight = weight + 0.02 * (weight - weight.detach())
        s, n = plain(x, y, weight, bias, **options)
        return s, {"output": n * 1.01, "gradient": n, "nan": n / 0}[wrong]

    monkeypatch.setattr(ops, "residual_layer_norm", broken)
    assert main(["doctor", "--device", "cpu", "--op", "residual_layer_norm", "--frames", "9"]) == 1
    printed = capsys.readouterr()
    assert "WRONG" in printed.out
    worst = "gradients, weight" if wrong == "gradient" else "output, output 1"
    assert f"residual_layer_norm by cpu on cpu in float32 is wrong: {worst}" in printed.err


def test_what_is_not_finite_never_passes():
    """Not even where plain PyTorch overflows, and so allows anything."""
    infinite = doctor.Finding(
        "op", "cpu", "cpu", "float16", "output", "output 0", float("inf"), float("inf"), float("inf")
    )
    assert not infinite.passed


def test_what_cannot_serve_is_said(capsys):
    assert main(["doctor", "--device", "cpu", "--op", "feed_forward", "--frames", "3"]) == 0
    out = capsys.readouterr().out
    assert "Not checked:" in out
    if not torch.cuda.is_available():
        assert "triton on cpu: the interpreter's bfloat16 is wrong (feed_forward; bfloat16)" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_bad_input(capsys):
    assert main(["doctor", "--device", "cuda"]) == 2
    assert "no GPU that torch can use" in capsys.readouterr().err
    assert main(["doctor", "--frames", "0"]) == 2
    assert "expected at least 1" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("op", CALLS)
def test_the_gpu_kernels_pass(op):
    found = [f for f in doctor.check(op, "cuda", SMALL) if isinstance(f, doctor.Finding)]
    assert {f.backend for f in found} >= {"triton"}
    assert [f for f in found if not f.passed] == []
