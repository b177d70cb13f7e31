"""Inference of short utterances on sm_90: all loops in one launch, the layer in the shared memory of a cluster of blocks.

An utterance of at most 16 frames has a cluster of 16 blocks to itself, which read the shared layer once, in bfloat16, keep it
for all loops, and exchange activations through distributed shared memory (csrc/cuda/cluster_loop.cuh).  The exit rule by the
normalised change is evaluated there, so that utterances stop on their own and nothing is read on the host.  Weights are read
where they are, at every call; the positions are projected ahead, by one product.

No GPU has measured it: it serves where ``engine("cluster")`` asks for it, and is not among those that ``auto`` takes.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lcconformer import extension
from lcconformer.depth import ExitRule
from lcconformer.layer import ConformerLayer
from lcconformer.ops.availability import cuda_reasons
from lcconformer.ops.native import i64, pointer
from lcconformer.ops.registry import Choice, note
from lcconformer.packing import Packing
from lcconformer.positions import relative_sinusoids
from lcconformer.stack import LayerStack

from .watch import watch

__all__ = ["FRAMES", "OP", "adaptive", "reasons", "run"]

OP = "shared_loop"
FRAMES = 16  # of an utterance at most
# of the config, as csrc/cuda/cluster_loop.h has them: a layer of these takes 184 KiB of the 227 of each block
_SIZES = {"d_model": 256, "num_heads": 4, "ffn_dim": 1024}
_SETTINGS = {
    "activation": ("silu",),
    "position": ("relative",),
    "conv_norm": ("layer", "batch", "none"),
    "conv_norm_statistics": ("shared",),
    "convolution_first": (False,),
    "weights": ("float",),
}


def _kernels() -> ModuleType:
    return extension.load().cuda


def _missing(device: torch.device) -> list[str]:
    """Return why the GPU cannot run the kernel."""
    found = cuda_reasons(device, torch.bfloat16)
    if found:
        return found
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return [f"the cluster-resident loop is made for sm_90, this GPU is sm_{major}{minor}"]
    if not _fits(device.index):
        return ["the GPU has no room for a cluster of 16 blocks with 227 KiB of shared memory each"]
    return []


@functools.cache
def _fits(device: int) -> bool:
    return _kernels().cluster_loop_fits(device)


def _whole(x: Tensor) -> bool:
    """Whether the kernel can read ``x`` sixteen bytes at a time."""
    return x.is_contiguous() and x.data_ptr() % 16 == 0


def reasons(stack: LayerStack, x: Tensor, *, records: bool, packed: bool = False) -> list[str]:
    """Return why the kernel cannot serve ``x [B, T, d_model]``; empty: it can.

    Args:
        records: autograd records the loops.
        packed: x is a packed batch, ``[1, total, d_model]``.
    """
    found = _missing(x.device)
    config, layers = stack.config, watch(stack)
    if records:
        found.append("autograd records the loops; run them under torch.no_grad()")
    if layers.trains():
        found.append("a module is in training mode")
    if torch.is_autocast_enabled(x.device.type):
        found.append("autocast is on")
    if packed:
        found.append("a packed batch has utterances of any length; pad it")
    if x.dtype != torch.bfloat16:
        found.append(f"the input is {x.dtype}, the kernel computes in torch.bfloat16")
    if not 1 <= x.shape[1] <= FRAMES:
        found.append(f"a cluster holds 1 to {FRAMES} frames, got {x.shape[1]}")
    for name, size in _SIZES.items():
        if getattr(config, name) != size:
            found.append(f"the layer that fits has {name} = {size}, got {getattr(config, name)}")
    for name, values in _SETTINGS.items():
        if getattr(config, name) not in values:
            found.append(f"{name}={getattr(config, name)!r} is left to the modules")
    if config.conditioning:
        found.append("conditioning is left to the modules")
    if len(stack.layers) > 1:
        found.append(f"one shared layer fits, the encoder has {len(stack.layers)}")
    found += layers.changed() or layers.unfit(x.dtype)
    tensors = layers.tensors()
    elsewhere = sorted({str(t.device) for t in tensors if t.device != x.device})
    if elsewhere:
        found.append(f"the input is on {x.device}, weights are on {', '.join(elsewhere)}")
    if not all(map(_whole, tensors)):
        found.append("a weight is not contiguous or does not start at a multiple of 16 bytes")
    if any(t.dtype != x.dtype for t in tensors if t.is_floating_point()):
        found.append(f"a parameter or statistic is not {x.dtype}")
    return found


@torch.no_grad()
def run(
    stack: LayerStack, x: Tensor, lengths: Tensor | Packing | None, depth: int, return_hidden_states: bool
) -> list[Tensor]:
    """Return the outputs ``[B, T, d_model]`` of each loop if ``return_hidden_states``, else of the last alone."""
    assert not isinstance(lengths, Packing)
    if return_hidden_states:
        states = _like(x, depth)
        _launch(stack, x, lengths, depth, states=states)
        return list(states)
    out = _like(x)
    _launch(stack, x, lengths, depth, out=out)
    return [out]


def _like(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty((*sizes, *x.shape))


@torch.no_grad()
def adaptive(stack: LayerStack, x: Tensor, lengths: Tensor | None, rule: ExitRule, depth: int) -> tuple[Tensor, Tensor]:
    """Run each utterance until ``rule``, of kind ``"fixed"`` or ``"change"``, stops it, at the latest after ``depth`` loops.

    Unlike the modules, which compute it in the dtype of x, the kernel computes the change in float32.

    Returns:
        ``(output [B, T, d_model], exit_depths [B] int64)``.
    """
    out, exit_depths = _like(x), torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    threshold = rule.threshold if rule.kind == "change" else 0.0
    _launch(stack, x, lengths, depth, threshold, rule.min_depth, out=out, exit_depths=exit_depths)
    return out, exit_depths


def _sinusoids(frames: int, d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # what is computed within a recording is there only at its replay
    recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return (_compute if recording else _kept)(frames, d, device, dtype)


def _compute(frames: int, d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return relative_sinusoids(frames, d, device=device, dtype=dtype)


_kept = functools.lru_cache(FRAMES)(_compute)


def _launch(
    stack: LayerStack,
    x: Tensor,
    lengths: Tensor | None,
    depth: int,
    threshold: float = 0.0,
    min_depth: int = 1,
    *,
    out: Tensor | None = None,
    states: Tensor | None = None,
    exit_depths: Tensor | None = None,
) -> None:
    note(Choice(OP, "cuda"))
    kernels, config, x = _kernels(), stack.config, x if _whole(x) else x.clone(memory_format=torch.contiguous_format)
    layer = cast(ConformerLayer, stack.layers[0])
    attention, conv = layer.attention, layer.conv
    batch, frames, d = x.shape
    pos = F.linear(_sinusoids(frames, d, x.device, x.dtype), attention.pos.weight)
    lengths = i64(lengths)

    def part(module: Any) -> Any:
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        return kernels.LoopPart(weight=pointer(weight), bias=pointer(bias))

    launch = kernels.ClusterLoop(
        batch=batch,
        frames=frames,
        depth=depth,
        min_depth=min_depth,
        threshold=threshold,
        x=pointer(x),
        lengths=pointer(lengths),
        masked=config.padding == "masked",
        ffn1_norm=part(layer.ffn1.norm),
        ffn1_up=part(layer.ffn1.up),
        ffn1_down=part(layer.ffn1.down),
        attention_norm=part(attention.norm),
        qkv=part(attention.qkv),
        attention_out=part(attention.out),
        pos=pointer(pos),
        u=pointer(attention.u),
        v_bias=pointer(attention.v_bias),
        conv_norm=part(conv.norm),
        pointwise1=part(conv.pointwise1),
        depthwise=part(conv.depthwise),
        pointwise2=part(conv.pointwise2),
        width=config.conv_kernel_size,
        depthwise_norm=part(conv.depthwise_norm),
        running_mean=pointer(getattr(conv.depthwise_norm, "running_mean", None)),
        running_var=pointer(getattr(conv.depthwise_norm, "running_var", None)),
        ffn2_norm=part(layer.ffn2.norm),
        ffn2_up=part(layer.ffn2.up),
        ffn2_down=part(layer.ffn2.down),
        norm=part(layer.norm),
        eps=config.layer_norm_eps,
        out=pointer(out),
        states=pointer(states),
        exit_depths=pointer(exit_depths),
        device=x.device.index or 0,
        stream=torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0,
    )
    kernels.cluster_loop(launch)
