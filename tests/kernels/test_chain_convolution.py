"""The depthwise convolution of the inference chain in Triton's interpreter against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from lcconformer.kernels import chain_convolution as convolution
from lcconformer.kernels import common

pytestmark = pytest.mark.skipif(not common.INTERPRETED, reason="kernels are compiled here")

EPS = 1e-5


def reference(x, depthwise, norm, lengths):
    real = torch.arange(x.shape[1]) < lengths[:, None]
    y = depthwise((x * real[..., None]).mT)
    y = norm(y) if isinstance(norm, nn.BatchNorm1d) else norm(y.mT).mT
    return nn.functional.silu(y.mT)


@torch.no_grad()
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize(("channels", "kernel", "frames"), [(16, 5, 7), (24, 15, 12), (24, 1, 1)])
def test_depthwise(channels, kernel, frames, norm, few, monkeypatch, assert_close):
    if not few:
        monkeypatch.setattr(convolution, "FEW_FRAMES", 0)
    x, lengths = torch.randn(2, frames, channels), torch.tensor([frames, frames // 2])
    depthwise = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=frames != 7)
    module = {"none": nn.Identity(), "batch": nn.BatchNorm1d(channels), "layer": nn.LayerNorm(channels)}[norm].eval()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    batch = (module.weight, module.bias, module.running_mean, module.running_var) if norm == "batch" else None
    taps = torch.full((convolution.tap_rows(kernel), channels), torch.nan)
    convolution.taps(depthwise.weight, depthwise.bias, batch, EPS, taps)
    out = torch.full_like(x, torch.nan)
    layer = (module.weight, module.bias) if norm == "layer" else None
    convolution.depthwise(x, taps, kernel, lengths, layer, EPS, out)
    low = reference(x, depthwise, module, lengths)
    ref = reference(x.double(), depthwise.double(), module.double(), lengths)
    assert_close(norm, out, ref, low, 2.0)
    if frames == 7:
        convolution.depthwise(x, taps, kernel, None, layer, EPS, out)
        ref = reference(x.double(), depthwise, module, torch.full((2,), frames))
        assert_close(f"{norm}, no lengths", out, ref, low, 2.0)
