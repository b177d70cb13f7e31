"""Moves a layer's weights between our names and a peer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["STATISTICS", "Key", "from_peer", "layer_keys", "to_peer", "use_peer_names", "weight_and_bias"]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of a BatchNorm."""


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


def weight_and_bias(ours: str, *theirs: str, pointwise: bool = False) -> tuple[Key, Key]:
    """Return both keys of a module; several of theirs are packed into one of ours."""
    return (
        Key(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), pointwise),
        Key(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs)),
    )


def layer_keys(
    *,
    norms: tuple[str, str, str, str, str],
    ffn1: tuple[str, str],
    qkv: tuple[str, str, str],
    out: str,
    positions: tuple[str, str, str],
    conv: tuple[str, str, str, str],
    ffn2: tuple[str, str],
    conv_bias: bool = True,
) -> tuple[Key, ...]:
    """Return the keys of a layer with relative positions and BatchNorm, from the peer's names of its modules.

    Args:
        norms: in front of the first feed-forward, attention, convolution and the second feed-forward, and the last one.
        ffn1, ffn2: the two projections of a feed-forward.
        qkv, out: projections of attention.
        positions: projection of the positions, and the two parameters that are added to queries.
        conv: pointwise, depthwise, BatchNorm, pointwise.
        conv_bias: the three convolutions may have biases.
    """
    pointwise1, depthwise, norm, pointwise2 = conv
    convolutions = (
        *weight_and_bias("conv.pointwise1", pointwise1, pointwise=True),
        *weight_and_bias("conv.depthwise", depthwise),
        *weight_and_bias("conv.pointwise2", pointwise2, pointwise=True),
    )
    return (
        *weight_and_bias("ffn1.norm", norms[0]),
        *weight_and_bias("ffn1.up", ffn1[0]),
        *weight_and_bias("ffn1.down", ffn1[1]),
        *weight_and_bias("attention.norm", norms[1]),
        *weight_and_bias("attention.qkv", *qkv),
        *weight_and_bias("attention.out", out),
        Key("attention.pos.weight", (f"{positions[0]}.weight",)),
        Key("attention.u", positions[1:2]),
        Key("attention.v_bias", positions[2:3]),
        *weight_and_bias("conv.norm", norms[2]),
        *(key for key in convolutions if conv_bias or not key.ours.endswith("bias")),
        *weight_and_bias("conv.depthwise_norm", norm),
        *(Key(f"conv.depthwise_norm.{s}", (f"{norm}.{s}",)) for s in STATISTICS),
        *weight_and_bias("ffn2.norm", norms[3]),
        *weight_and_bias("ffn2.up", ffn2[0]),
        *weight_and_bias("ffn2.down", ffn2[1]),
        *weight_and_bias("norm", norms[4]),
    )


def from_peer(keys: tuple[Key, ...], state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return our state dict of one layer from the peer's entries under ``prefix``; keys the peer lacks are left out."""
    out = {}
    for key in keys:
        parts = [state[prefix + name] for name in key.theirs if prefix + name in state]
        if len(parts) == len(key.theirs):
            value = parts[0] if len(parts) == 1 else torch.cat(parts)
            out[key.ours] = value.squeeze(-1) if key.pointwise else value
    return out


def to_peer(keys: tuple[Key, ...], state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the peer's entries, under ``prefix``, from our state dict of one layer."""
    out = {}
    for key in keys:
        if key.ours in state:
            value = state[key.ours]
            value = value.unsqueeze(-1) if key.pointwise else value
            parts = value.chunk(len(key.theirs)) if len(key.theirs) > 1 else (value,)
            out.update({prefix + name: part for name, part in zip(key.theirs, parts)})
    return out


@dataclass
class _PeerNames:
    keys: tuple[Key, ...]
    layers: dict[str, str]
    prefix: str = ""  # of the module within the model that is being loaded


def use_peer_names(module: nn.Module, keys: tuple[Key, ...], layers: Mapping[str, str]) -> None:
    """Make a module that holds our layers save and load the state dict of a peer, wherever it sits in a model.

    Args:
        module: the module.
        keys: keys of one layer.
        layers: where each layer is, ours -> theirs, as prefixes within ``module`` that end in a dot or are empty.
    """
    module._peer_names = _PeerNames(keys, dict(layers))  # type: ignore[assignment]
    # plain functions: bound methods cannot be hooks, and closures would not survive a deep copy
    module.register_state_dict_post_hook(_save)
    module.register_load_state_dict_pre_hook(_load)
    module.register_load_state_dict_post_hook(_name_missing)


def _save(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    names: Any = module._peer_names
    for ours, theirs in names.layers.items():
        held = [key.ours for key in names.keys if f"{prefix}{ours}{key.ours}" in state]
        layer = {name: state.pop(f"{prefix}{ours}{name}") for name in held}
        state.update(to_peer(names.keys, layer, prefix + theirs))


def _load(module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    names: Any = module._peer_names
    names.prefix = prefix
    for ours, theirs in names.layers.items():
        layer = from_peer(names.keys, state, prefix + theirs)
        for key in names.keys:
            if key.ours in layer:
                for name in key.theirs:
                    del state[prefix + theirs + name]
        state.update({f"{prefix}{ours}{name}": value for name, value in layer.items()})


def _name_missing(module: nn.Module, incompatible: Any) -> None:
    """Report missing keys under the peer's names, which are those in the user's file."""
    names: Any = module._peer_names
    missing = incompatible.missing_keys
    for ours, theirs in names.layers.items():
        for key in names.keys:
            name = f"{names.prefix}{ours}{key.ours}"
            if name in missing:
                at = missing.index(name)
                missing[at : at + 1] = [names.prefix + theirs + part for part in key.theirs]
