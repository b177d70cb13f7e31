"""The CUDA convolution, which serves the norms that no encoder of the suite has: none, and BatchNorm in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import lcconformer
from lcconformer import ops
from lcconformer.tune import DTYPES, LayerShape

__all__ = ["cuda_convolutions"]


def cuda_convolutions(layer: LayerShape, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward, and forward with backward, by norm."""
    b, t, c = layer.batch, layer.frames, layer.d_model

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(DTYPES[layer.dtype])

    x, weight, bias, g = make(b, t, 2 * c), make(c, layer.kernel_size), make(c), make(b, t, c)
    batch = {
        "norm_weight": make(c),
        "norm_bias": make(c),
        "running_mean": torch.zeros(c, device=device),
        "running_var": torch.ones(c, device=device),
    }
    for norm, state in (("none", {}), ("batch", batch)):

        def forward(norm=norm, state=state, x=x, weight=weight) -> torch.Tensor:
            with lcconformer.backend("cuda"):
                return ops.glu_depthwise_conv(x, weight, bias, norm=norm, **state)

        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()

        def both(forward=forward, leaves=leaves) -> object:
            return torch.autograd.grad(forward(x=leaves[0], weight=leaves[1]), leaves, g)

        yield f"glu_depthwise_conv cuda, norm {norm}, forward", forward
        yield f"glu_depthwise_conv cuda, norm {norm}, forward and backward", both
