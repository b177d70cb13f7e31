"""Moving a layer's weights between our names and a peer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Key", "from_peer", "to_peer"]


@dataclass(frozen=True)
class Key:
    """One of our tensors and where a peer keeps it.

    Attributes:
        ours: name within :class:`~lcconformer.ConformerLayer`.
        theirs: name within the peer's layer; several are concatenated along the first axis (packed projections).
        pointwise: the peer stores a linear map as a convolution of width 1, ``[out, in, 1]``.
    """

    ours: str
    theirs: tuple[str, ...]
    pointwise: bool = False


def from_peer(keys: tuple[Key, ...], state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Our state dict of one layer from the peer's entries under ``prefix``; keys the peer lacks are left out."""
    out = {}
    for key in keys:
        parts = [state[prefix + name] for name in key.theirs if prefix + name in state]
        if len(parts) == len(key.theirs):
            value = parts[0] if len(parts) == 1 else torch.cat(parts)
            out[key.ours] = value.squeeze(-1) if key.pointwise else value
    return out


def to_peer(keys: tuple[Key, ...], state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The peer's entries, under ``prefix``, from our state dict of one layer."""
    out = {}
    for key in keys:
        if key.ours in state:
            value = state[key.ours]
            value = value.unsqueeze(-1) if key.pointwise else value
            parts = value.chunk(len(key.theirs)) if len(key.theirs) > 1 else (value,)
            out.update({prefix + name: part for name, part in zip(key.theirs, parts)})
    return out
