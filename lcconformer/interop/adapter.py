"""What the adapters of all peers share: reading a peer's settings, refusing what we cannot reproduce, and masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import ConformerConfig
from ..layer import ConformerLayer
from ..ops.checks import frame_mask, readable

__all__ = [
    "Described",
    "Dropouts",
    "Unsupported",
    "activation_of",
    "check_convolutions",
    "common_eps",
    "lengths_of_padding",
    "lengths_of_scores_mask",
    "need",
    "need_types",
]


class Unsupported(Exception):
    """A layer that ours cannot stand in for; the message is the reason."""


def need(condition: object, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


@dataclass(frozen=True)
class Dropouts:
    """Dropout probabilities of a peer's layer, one per place; tuples have one entry per feed-forward module."""

    ffn_inner: tuple[float, ...]
    ffn_outer: tuple[float, ...]
    weights: float
    attention: float
    conv: float

    def why_not(self) -> str | None:
        """Return why our layer cannot apply dropout in the same places, or None."""
        ffn = {*self.ffn_inner, *self.ffn_outer}
        if len(ffn) > 1:
            return f"dropout differs within the feed-forward modules ({', '.join(map(str, sorted(ffn)))})"
        if self.attention != self.conv:
            return f"dropout differs after attention ({self.attention}) and after the convolution ({self.conv})"
        return None

    def apply(self, layer: ConformerLayer) -> None:
        layer.ffn1.dropout = layer.ffn2.dropout = self.ffn_inner[0]
        layer.attention.dropout = self.weights
        layer.dropout = self.attention


@dataclass(frozen=True)
class Described:
    """Settings of a peer's layer.

    Attributes:
        config: settings of our layer.
        dropouts: dropout probabilities of the peer's layer.
        inference_only: why our layer would train differently, if it would.
    """

    config: ConformerConfig
    dropouts: Dropouts
    inference_only: str | None = None


def need_types(layer: nn.Module, types: Mapping[str, type[nn.Module]]) -> None:
    """Require submodules of exactly these classes: wrappers (LoRA, quantisation, parametrisation) compute something else."""
    for name, cls in types.items():
        found = type(layer.get_submodule(name))
        if cls is nn.Linear and found is nn.modules.linear.NonDynamicallyQuantizableLinear:
            continue
        need(found is cls, f"{name} is a {found.__module__}.{found.__qualname__}, not a {cls.__name__}")


def activation_of(*modules: nn.Module) -> str:
    """Return our name of the one activation that all modules compute."""
    names = {
        "SiLU": "silu",
        "SiLUActivation": "silu",
        "GELU": "gelu",
        "GELUActivation": "gelu",
        "ReLU": "relu",
    }
    found = {type(m).__name__ for m in modules}
    ours = {names.get(name) for name in found}
    approximate = any(getattr(m, "approximate", "none") != "none" for m in modules)
    need(len(ours) == 1 and None not in ours and not approximate, f"activation {', '.join(sorted(found))}")
    (activation,) = ours
    assert activation is not None
    return activation


def check_convolutions(layer: nn.Module, pointwise1: str, depthwise: str, pointwise2: str) -> int:
    """Check that the three convolutions are what their names say, and return the kernel size of the depthwise one."""
    for name in (pointwise1, depthwise, pointwise2):
        conv: nn.Conv1d = layer.get_submodule(name)  # type: ignore[assignment]
        (kernel,) = conv.kernel_size
        same = conv.stride == (1,) and conv.dilation == (1,) and conv.padding == (kernel // 2,) and kernel % 2 == 1
        need(same and conv.padding_mode == "zeros", f"{name} is not a stride-1 convolution with 'same' zero padding")
        if name == depthwise:
            need(conv.groups == conv.in_channels == conv.out_channels, f"{name} is not depthwise")
            need(kernel <= 63, f"{name} has a kernel of {kernel}; ours go up to 63")
            size = kernel
        else:
            need(kernel == 1 and conv.groups == 1, f"{name} is not pointwise")
    return size


def common_eps(layer: nn.Module) -> float:
    """Return the epsilon that all norms of the layer share."""
    norms = [m for m in layer.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm1d, nn.GroupNorm))]
    eps = {norm.eps for norm in norms}
    need(len(eps) == 1, f"norms differ in epsilon ({', '.join(map(str, sorted(eps)))})")
    for norm in norms:
        if isinstance(norm, nn.BatchNorm1d):
            usual = norm.affine and norm.track_running_stats
            need(usual, f"BatchNorm with affine {norm.affine}, or without running statistics")
    return eps.pop()


_MASK = (
    "the attention mask is not that of padding at the end of each utterance; call the model with right-padded input, "
    "or without lcconformer.accelerate"
)


def _insist(condition: Tensor) -> None:
    if readable(condition):
        if not condition:
            raise ValueError(_MASK)
    else:
        # on the device: reading the value here would stall every layer
        torch._assert_async(condition, _MASK)


def lengths_of_padding(mask: Tensor) -> Tensor:
    """Return the lengths ``[B]`` int64 of ``mask [B, T]`` bool, True at padding.

    Raises:
        ValueError: anything but the last frames is padding (on a CUDA device: an assertion there).
    """
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"the padding mask is {mask.dtype} {list(mask.shape)}; expected bool [B, T]")
    lengths = (~mask).sum(-1)
    _insist((mask != frame_mask(lengths, mask.shape[1])).all())
    return lengths


def lengths_of_scores_mask(mask: Tensor, *, queries: bool) -> Tensor:
    """Return the lengths ``[B]`` int64 of a mask of scores ``[B, 1, T or 1, T]``: bool (True: attend) or additive.

    Args:
        mask: the mask.
        queries: rows of padding frames are masked as well.

    Raises:
        ValueError: anything but padding at the end is masked (on a CUDA device: an assertion there).
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
        got = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(f"the attention mask is {got}; expected a tensor [B, 1, T, T] (eager or sdpa attention)")
    if mask.dtype == torch.bool:
        keep = mask[:, 0]
    else:
        keep = mask[:, 0] == 0
        # a bias that neither keeps nor excludes a score is no mask
        _insist((keep | (mask[:, 0] < -1e4)).all())
    lengths = keep.any(1).sum(-1)
    frames = frame_mask(lengths, keep.shape[-1])  # [B, T]
    expected = frames[:, None] & frames[:, :, None] if queries else frames[:, None]
    _insist((keep == expected).all())
    return lengths
