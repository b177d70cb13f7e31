"""torchaudio's Conformer layer: its weights under our names, its settings, and our layer behind its call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..config import ConformerConfig
from ..layer import ConformerLayer
from .adapter import Described, Dropouts, check_convolutions, common_eps, lengths_of_padding, need, need_types
from .keys import STATISTICS, Key, use_peer_names, weight_and_bias

__all__ = ["LAYER_KEYS", "TorchaudioConformerLayer", "describe"]


def _ffn(name: str) -> tuple[Key, ...]:
    return (
        *weight_and_bias(f"{name}.norm", f"{name}.sequential.0"),
        *weight_and_bias(f"{name}.up", f"{name}.sequential.1"),
        *weight_and_bias(f"{name}.down", f"{name}.sequential.4"),
    )


LAYER_KEYS: tuple[Key, ...] = (
    *_ffn("ffn1"),
    *weight_and_bias("attention.norm", "self_attn_layer_norm"),
    Key("attention.qkv.weight", ("self_attn.in_proj_weight",)),
    Key("attention.qkv.bias", ("self_attn.in_proj_bias",)),
    *weight_and_bias("attention.out", "self_attn.out_proj"),
    *weight_and_bias("conv.norm", "conv_module.layer_norm"),
    *weight_and_bias("conv.pointwise1", "conv_module.sequential.0", pointwise=True),
    *weight_and_bias("conv.depthwise", "conv_module.sequential.2"),
    *weight_and_bias("conv.depthwise_norm", "conv_module.sequential.3"),
    *(Key(f"conv.depthwise_norm.{s}", (f"conv_module.sequential.3.{s}",)) for s in STATISTICS),
    *weight_and_bias("conv.pointwise2", "conv_module.sequential.5", pointwise=True),
    *_ffn("ffn2"),
    *weight_and_bias("norm", "final_layer_norm"),
)


def describe(layer: Any) -> Described:
    """Return the settings of a ``torchaudio.models.conformer.ConformerLayer``."""
    ffn = (nn.LayerNorm, nn.Linear, nn.SiLU, nn.Dropout, nn.Linear, nn.Dropout)
    get = layer.get_submodule
    norm = get("conv_module.sequential.3")
    group = isinstance(norm, nn.GroupNorm)
    need_types(layer, {f"{name}.sequential.{i}": cls for name in ("ffn1", "ffn2") for i, cls in enumerate(ffn)})
    convolution = (
        nn.Conv1d,
        nn.GLU,
        nn.Conv1d,
        nn.GroupNorm if group else nn.BatchNorm1d,
        nn.SiLU,
        nn.Conv1d,
        nn.Dropout,
    )
    need_types(layer, {f"conv_module.sequential.{i}": cls for i, cls in enumerate(convolution)})
    need_types(layer, {"self_attn": nn.MultiheadAttention, "self_attn_dropout": nn.Dropout})
    attention = get("self_attn")
    plain = attention.bias_k is None and attention.bias_v is None and not attention.add_zero_attn
    need(plain, "self_attn has added keys (add_bias_kv or add_zero_attn)")
    need(attention._qkv_same_embed_dim and not attention.batch_first, "self_attn has another layout")
    kernel = check_convolutions(
        layer, "conv_module.sequential.0", "conv_module.sequential.2", "conv_module.sequential.5"
    )
    config = ConformerConfig(
        d_model=attention.embed_dim,
        num_heads=attention.num_heads,
        ffn_dim=get("ffn1.sequential.1").out_features,
        num_layers=1,
        conv_kernel_size=kernel,
        dropout=0.0,
        position="none",
        conv_norm="group" if group else "batch",
        conv_norm_groups=norm.num_groups if isinstance(norm, nn.GroupNorm) else 1,
        attention_bias=attention.in_proj_bias is not None,
        convolution_first=bool(layer.convolution_first),
        layer_norm_eps=common_eps(layer),
        padding="peer",
    )
    dropouts = Dropouts(
        ffn_inner=tuple(get(f"{name}.sequential.3").p for name in ("ffn1", "ffn2")),
        ffn_outer=tuple(get(f"{name}.sequential.5").p for name in ("ffn1", "ffn2")),
        weights=attention.dropout,
        attention=get("self_attn_dropout").p,
        conv=get("conv_module.sequential.6").p,
    )
    return Described(config, dropouts)


class TorchaudioConformerLayer(nn.Module):
    """Our layer behind torchaudio's call: ``(input [T, B, D], key_padding_mask [B, T] bool or None) -> [T, B, D]``."""

    def __init__(self, layer: ConformerLayer, replaced: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        use_peer_names(self, LAYER_KEYS, {"layer.": ""})

    def forward(self, input: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        lengths = None if key_padding_mask is None else lengths_of_padding(key_padding_mask)
        return self.layer(input.transpose(0, 1), lengths).transpose(0, 1)
