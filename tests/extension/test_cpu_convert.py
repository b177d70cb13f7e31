"""Copies between float32 and bfloat16 on the threads of the kernels."""

from __future__ import annotations

import pytest
import torch

from lcconformer.loop.inference import convert

from .cpu_kernels import CPU, LEVELS, kernels

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [1, 7, 63, 16384, 40001])
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("of", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_sizes_and_threads(of, to, n, level):
    """As PyTorch rounds, in memory of its own, to the last element."""
    x = (torch.randn(n) * 10.0 ** torch.randint(-30, 30, (n,))).to(of)
    x[n // 3 :: 5] = torch.tensor(float("nan"), dtype=of)
    with kernels(level, 3):
        found = convert(x, to)
    assert found.dtype == to
    assert found.data_ptr() != x.data_ptr()
    assert torch.equal(found.nan_to_num(3.0), x.to(to).nan_to_num(3.0))


def test_any_strides():
    x = torch.randn(3, 5, 8).transpose(1, 2)
    found = convert(x, torch.bfloat16)
    assert found.is_contiguous()
    assert torch.equal(found, x.bfloat16())


def test_float16_is_refused():
    x = torch.zeros(4)
    args = {"size": 4, "threads": 1, "from_": x.data_ptr(), "to": x.data_ptr()}
    for element, to in (("float16", "float32"), ("float32", "float16")):
        with pytest.raises(ValueError, match="is float16; expected float32 or bfloat16"):
            CPU.convert(CPU.Convert(element=getattr(CPU.Element, element), to_element=getattr(CPU.Element, to), **args))
