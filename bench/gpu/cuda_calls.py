"""The CUDA kernels, which serve on request: attention, and the convolution with the norms that no encoder of the suite has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import lcconformer
from lcconformer import ops
from lcconformer.ops.dropout import dropout_seed
from lcconformer.ops.relpos_attention import RelposAttention, Traits, cuda
from lcconformer.tune import DTYPES, LayerShape

__all__ = ["cuda_calls"]


def cuda_calls(
    layer: LayerShape, device: torch.device, convolutions: bool = True
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward, and forward with backward, of attention, and of the convolution by norm."""
    yield from _attention(layer, device)
    if convolutions:
        yield from _convolutions(layer, device)


def _attention(layer: LayerShape, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    b, t, h, d = layer.batch, layer.frames, layer.heads, layer.d_model // layer.heads

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(DTYPES[layer.dtype])

    inputs = (*make(b, t, 3, h, d).unbind(2), make(2 * t - 1, h, d), make(h, d), make(h, d))
    leaves, g = [x.clone().requires_grad_() for x in inputs], make(b, t, h, d)

    def forward(inputs=inputs) -> torch.Tensor:
        with lcconformer.backend("cuda"):
            return ops.relpos_attention(*inputs, dropout_p=layer.dropout)

    def both() -> object:
        return torch.autograd.grad(forward(leaves), leaves, g)

    def by_warps() -> object:
        seed = dropout_seed(inputs[0], layer.dropout)
        return cuda.forward(RelposAttention(*inputs, None, None, seed, layer.dropout), warpgroups=False)

    yield "relpos_attention cuda, forward", forward
    yield "relpos_attention cuda, forward and backward", both
    if not cuda.unsupported(Traits(device, inputs[0].dtype, d)) and cuda.by_warpgroups(device):
        yield "relpos_attention cuda, forward without warpgroups", by_warps


def _convolutions(layer: LayerShape, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
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
