"""What the adapters of all peers share: refusing what we cannot reproduce, and lengths out of masks."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import frame_mask
from ..ops.derivatives import transformed
from ..plain import altered, readable
from ..positions import relative_sinusoids
from .engine import Given

__all__ = [
    "NotPadding",
    "Unsupported",
    "activation_of",
    "check_activations",
    "check_convolutions",
    "check_norms",
    "lengths_of_padding",
    "lengths_of_scores_mask",
    "need",
    "relative_table",
    "untouched",
]


class Unsupported(Exception):
    """A layer that ours cannot stand in for; the message is the reason."""


def need(condition: object, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "ReLU": "relu",
}


def activation_of(module: nn.Module) -> str | None:
    """Return our name of the activation that a module computes; None: ours lack it."""
    known = None if getattr(module, "approximate", "none") != "none" else _ACTIVATIONS.get(type(module).__name__)
    return None if known is None or altered(module, "", (type(module),)) else known


def check_activations(*modules: nn.Module) -> None:
    """Require activations that ours have."""
    unknown = sorted({type(m).__name__ for m in modules if activation_of(m) is None})
    need(not unknown, f"activation {', '.join(unknown)}")


def untouched(modules: Iterable[tuple[nn.Module, type[nn.Module]]]) -> bool:
    """Return whether the modules are of these very classes and do what their class does, so that calling them adds nothing."""
    return readable(()) and not any(altered(module, "", (cls,)) for module, cls in modules)


def check_convolutions(pointwise1: Any, depthwise: Any, pointwise2: Any, *, padded: bool = False) -> None:
    """Check that the three convolutions are what their names say; the input of the depthwise one may come ``padded``."""
    for conv, name in ((pointwise1, "pointwise"), (depthwise, "depthwise"), (pointwise2, "pointwise")):
        (kernel,) = conv.kernel_size
        padding: set[Any] = {(0,)} if padded and name == "depthwise" else {(kernel // 2,), "same"}
        same = conv.stride == (1,) and conv.dilation == (1,) and conv.padding in padding and kernel % 2 == 1
        need(
            same and conv.padding_mode == "zeros",
            f"a {name} convolution is not one of stride 1 with 'same' zero padding",
        )
        if name == "depthwise":
            need(conv.groups == conv.in_channels == conv.out_channels, "the depthwise convolution is not depthwise")
            need(kernel <= 63, f"the depthwise convolution has a kernel of {kernel}; ours go up to 63")
        else:
            need(kernel == 1 and conv.groups == 1, "a pointwise convolution is not pointwise")


def check_norms(layer: nn.Module) -> None:
    """Require affine norms, and running statistics of a BatchNorm."""
    for name, norm in layer.named_modules():
        if isinstance(norm, nn.LayerNorm):
            need(norm.elementwise_affine and norm.bias is not None, f"{name} has no weight or no bias")
        elif isinstance(norm, nn.BatchNorm1d):
            usual = norm.affine and norm.track_running_stats
            need(usual, f"{name} is a BatchNorm with affine {norm.affine}, or without running statistics")


class NotPadding(Exception):
    """A mask that excludes anything but the last frames of each utterance."""


def _insist(condition: Tensor) -> None:
    if torch.compiler.is_compiling() or (condition.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch._assert_async(condition, "the attention mask is not that of padding at the end of each utterance")
    elif not condition:
        raise NotPadding


class _Latest(threading.local):
    """What was made of a tensor, for the next layer of a stack, which is given the same one."""

    def __init__(self) -> None:
        self._tensor: weakref.ref[Tensor] | None = None
        self._key: tuple[Any, ...] = ()
        self._value: Any = None

    def get(self, tensor: Tensor, kind: object, make: Callable[[], Any]) -> Any:
        """Return ``make()``, or what it returned for this tensor and ``kind`` if that was the latest call."""
        if torch.compiler.is_compiling() or tensor.is_inference() or tensor.requires_grad or transformed():
            return make()
        key = (kind, tensor._version)
        if self._tensor is None or self._tensor() is not tensor or self._key != key:
            self._tensor = None  # nothing is kept of a call that raises
            value = make()
            self._tensor, self._key, self._value = weakref.ref(tensor), key, value
        return self._value


_masks, _paddings, _tables = _Latest(), _Latest(), _Latest()


def lengths_of_padding(mask: Tensor, *, keep: bool = False) -> Tensor:
    """Return the lengths ``[B]`` int64 of ``mask [B, T]`` or ``[B, 1, T]``, true at padding, or elsewhere if ``keep``.

    Raises:
        NotPadding: anything but the last frames is padding, or the mask has another form.  While a compiler traces or a CUDA
            graph is captured it is an assertion on the device.
    """

    def find() -> Tensor:
        frames = mask[:, 0] if mask.dim() == 3 and mask.shape[1] == 1 else mask
        if frames.dim() != 2 or mask.is_floating_point():
            raise NotPadding
        real = frames.bool() if keep else ~frames.bool()
        lengths = real.sum(-1)
        _insist((real == frame_mask(lengths, frames.shape[1])).all())
        return lengths

    return _paddings.get(mask, keep, find)


def lengths_of_scores_mask(mask: Tensor, batch: int, *, queries: bool, keep: bool = True) -> Tensor:
    """Return the lengths ``[B]`` int64 of a mask of scores: bool or additive.

    Args:
        mask: ``[B or 1, 1, T or 1, T]`` or, without the axis of heads, ``[B or 1, T or 1, T]``.
        batch: B.
        queries: rows of padding frames are masked as well.
        keep: true in a bool mask means to attend, otherwise to leave out.

    Raises:
        NotPadding: as for :func:`lengths_of_padding`.
    """

    def find() -> Tensor:
        scores = mask[:, 0] if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1 else mask
        if not isinstance(scores, Tensor) or scores.dim() != 3 or scores.shape[0] not in (1, batch):
            raise NotPadding
        if scores.dtype == torch.bool:
            attended = scores if keep else ~scores
        else:
            attended = scores == 0
            # a bias that neither keeps nor excludes a score is no mask
            _insist((attended | (scores < -1e4)).all())
        lengths = attended.any(1).sum(-1)
        frames = frame_mask(lengths, attended.shape[-1])  # [B, T]
        expected = frames[:, None] & frames[:, :, None] if queries else frames[:, None]
        _insist((attended == expected).all())
        return lengths.expand(batch)

    return _masks.get(mask, ("scores", batch, queries, keep), find) if isinstance(mask, Tensor) else find()


def relative_table(table: Tensor) -> Given | None:
    """Return the relative positions ``table [B, 2T-1, D]``, alike for all utterances, as the engine takes them.

    None: they are those that the engine computes for itself, or it is not asked.
    """
    if torch.compiler.is_compiling() or table.device.type != "cpu" or table.dtype != torch.float32:
        return None
    return _tables.get(table, "", functools.partial(_relative_table, table[0]))


_sinusoids_of = functools.lru_cache(maxsize=1)(relative_sinusoids)


class _LatestGiven(threading.local):
    """The latest table that was no other: the engine keeps what it makes of one."""

    table: Given | None = None


_given = _LatestGiven()


def _relative_table(table: Tensor) -> Given | None:
    rows, width = table.shape
    ours = _sinusoids_of((rows + 1) // 2, width, device=table.device, dtype=table.dtype)
    if ours.shape == table.shape and bool((table - ours).abs().max() < 1e-5):
        return None
    if _given.table is None or not torch.equal(_given.table.rows, table):
        _given.table = Given(table.detach().clone(memory_format=torch.contiguous_format))
    return _given.table
