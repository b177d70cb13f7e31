"""glu_depthwise_conv on the CUDA kernels of csrc/cuda: without a norm, or with an evaluation BatchNorm folded in."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lcconformer import _extension

__all__ = ["cuda_unsupported", "glu_depthwise_conv_cuda"]

_ELEMENTS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@torch.compiler.assume_constant_result
def _device_reasons(device_type: str, index: int | None) -> list[str]:
    if device_type != "cuda":
        return [f"the tensors are on device type {device_type!r}"]
    major, minor = torch.cuda.get_device_capability(index)
    return _extension.cuda_reasons(10 * major + minor)


def cuda_unsupported(x: Tensor, norm: str, training: bool, activation: str) -> list[str]:
    """Why the CUDA kernels cannot take these inputs; empty: they can."""
    reasons = list(_device_reasons(x.device.type, x.device.index))
    if x.dtype not in _ELEMENTS:
        reasons.append(f"dtype {x.dtype} is not one of float16, bfloat16, float32")
    if norm not in ("none", "batch") or (norm == "batch" and training):
        reasons.append(
            f"norm={norm!r}{' in training' if norm == 'batch' else ''} is not fused, only 'batch' in evaluation"
        )
    if activation != "silu":
        reasons.append(f"activation {activation!r} is not fused, only 'silu' is")
    return reasons


def glu_depthwise_conv_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
) -> Tensor:
    """``silu(norm(depthwise(mask(glu(x)))))``; the norm is that of the running statistics, or none if they are None.

    Args and result as in ``lcconformer.ops.glu_depthwise_conv``.
    """
    scale = shift = None
    if norm_weight is not None and norm_bias is not None and running_mean is not None and running_var is not None:
        scale = norm_weight.float() * torch.rsqrt(running_var.float() + eps)
        shift = norm_bias.float() - running_mean.float() * scale
    if lengths is not None:
        lengths = lengths.to(torch.int64)
    tensors = (x, weight, bias, lengths, scale, shift)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in tensors):
        return _Function.apply(*tensors)
    return torch.ops.lcconformer.glu_depthwise_conv_cuda_fwd(*tensors, False)[0]


torch.library.define(
    "lcconformer::glu_depthwise_conv_cuda_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? lengths, Tensor? scale, Tensor? shift, bool save) "
    "-> (Tensor y, Tensor conv)",
)
torch.library.define(
    "lcconformer::glu_depthwise_conv_cuda_bwd",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? lengths, Tensor? scale, Tensor? shift, Tensor conv) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor daffine)",
)


def _kernels() -> ModuleType:
    return _extension.load().cuda


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _dense_rows(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the channels."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else p.contiguous() for p in tensors]


def _operation(kernels, x, weight, bias, lengths, scale, shift):
    """Sizes and inputs of a launch; the caller keeps the tensors alive."""
    b, t, _ = x.shape
    c, k = weight.shape
    on_gpu = x.device.type == "cuda"
    return kernels.GluDepthwiseConv(
        element=getattr(kernels.Element, _ELEMENTS[x.dtype]),
        batch=b,
        frames=t,
        channels=c,
        width=k,
        x=_pointer(x),
        x_batch=x.stride(0),
        x_frame=x.stride(1),
        weight=_pointer(weight),
        bias=_pointer(bias),
        lengths=_pointer(lengths),
        scale=_pointer(scale),
        shift=_pointer(shift),
        device=x.device.index if on_gpu else 0,
        stream=torch.cuda.current_stream(x.device).cuda_stream if on_gpu else 0,
    )


# "CPU" is there for the emulated kernels of the tests; the dispatch never sends a CPU tensor here
@torch.library.impl("lcconformer::glu_depthwise_conv_cuda_fwd", ("CPU", "CUDA"))
def _fwd(x, weight, bias, lengths, scale, shift, save):
    kernels = _kernels()
    x = _dense_rows(x)
    given = _dense(weight, bias, lengths, scale, shift)
    shape = (*x.shape[:2], weight.shape[0])
    y = x.new_empty(shape)
    conv = x.new_empty(shape if save else (0,))
    op = _operation(kernels, x, *given)
    kernels.glu_depthwise_conv_forward(op, y=_pointer(y), conv=_pointer(conv) if save else 0)
    return y, conv


@torch.library.impl("lcconformer::glu_depthwise_conv_cuda_bwd", ("CPU", "CUDA"))
def _bwd(dy, x, weight, bias, lengths, scale, shift, conv):
    kernels = _kernels()
    x, dy = _dense_rows(x), _dense_rows(dy)
    given = _dense(weight, bias, lengths, scale, shift)
    b, t, _ = x.shape
    c, k = weight.shape
    dx = x.new_empty(x.shape)
    dweight = weight.new_empty((c, k))
    dbias = weight.new_empty((0 if bias is None else c,))
    daffine = x.new_empty((0 if scale is None else 2, c), dtype=torch.float32)  # of scale, of shift
    slots = kernels.glu_depthwise_conv_slots(b, t, c)
    partial = x.new_empty((slots, k + 2, c), dtype=torch.float32)
    op = _operation(kernels, x, *given)
    kernels.glu_depthwise_conv_backward(
        op,
        dy=_pointer(dy),
        dy_batch=dy.stride(0),
        dy_frame=dy.stride(1),
        conv=_pointer(conv),
        dx=_pointer(dx),
        dweight=_pointer(dweight),
        dbias=_pointer(dbias) if bias is not None else 0,
        dscale=_pointer(daffine[0]) if scale is not None else 0,
        dshift=_pointer(daffine[1]) if scale is not None else 0,
        partial=_pointer(partial),
        slots=slots,
    )
    return dx, dweight, dbias, daffine


@torch.library.register_fake("lcconformer::glu_depthwise_conv_cuda_fwd")
def _fwd_fake(x, weight, bias, lengths, scale, shift, save):
    shape = (*x.shape[:2], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save else (0,))


@torch.library.register_fake("lcconformer::glu_depthwise_conv_cuda_bwd")
def _bwd_fake(dy, x, weight, bias, lengths, scale, shift, conv):
    c = weight.shape[0]
    dbias = weight.new_empty((0 if bias is None else c,))
    daffine = x.new_empty((0 if scale is None else 2, c), dtype=torch.float32)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, daffine


class _Function(torch.autograd.Function):
    """Keeps the input and the convolution's output; the backward recomputes GLU and SiLU."""

    @staticmethod
    def forward(ctx, x, weight, bias, lengths, scale, shift):
        y, conv = torch.ops.lcconformer.glu_depthwise_conv_cuda_fwd(x, weight, bias, lengths, scale, shift, True)
        ctx.save_for_backward(x, weight, bias, lengths, scale, shift, conv)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx, dweight, dbias, daffine = torch.ops.lcconformer.glu_depthwise_conv_cuda_bwd(dy, *ctx.saved_tensors)
        dscale, dshift = daffine if daffine.numel() else (None, None)
        return dx, dweight, dbias if dbias.numel() else None, None, dscale, dshift
