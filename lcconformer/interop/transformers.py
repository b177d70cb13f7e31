"""Conformer layers of Hugging Face transformers: their weights under our names, and their settings."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import ConformerConfig
from .adapter import Described, Dropouts, activation_of, check_convolutions, common_eps, need, need_types
from .keys import STATISTICS, Key, weight_and_bias

__all__ = ["LAYER_KEYS", "PARAKEET_LAYER_KEYS", "describe", "describe_parakeet"]

_QKV = ("self_attn.linear_q", "self_attn.linear_k", "self_attn.linear_v")

LAYER_KEYS: tuple[Key, ...] = (
    *weight_and_bias("ffn1.norm", "ffn1_layer_norm"),
    *weight_and_bias("ffn1.up", "ffn1.intermediate_dense"),
    *weight_and_bias("ffn1.down", "ffn1.output_dense"),
    *weight_and_bias("attention.norm", "self_attn_layer_norm"),
    *weight_and_bias("attention.qkv", *_QKV),
    *weight_and_bias("attention.out", "self_attn.linear_out"),
    Key("attention.pos.weight", ("self_attn.linear_pos.weight",)),
    Key("attention.u", ("self_attn.pos_bias_u",)),
    Key("attention.v_bias", ("self_attn.pos_bias_v",)),
    *weight_and_bias("conv.norm", "conv_module.layer_norm"),
    Key("conv.pointwise1.weight", ("conv_module.pointwise_conv1.weight",), pointwise=True),
    Key("conv.depthwise.weight", ("conv_module.depthwise_conv.weight",)),
    *weight_and_bias("conv.depthwise_norm", "conv_module.batch_norm"),
    *(Key(f"conv.depthwise_norm.{s}", (f"conv_module.batch_norm.{s}",)) for s in STATISTICS),
    Key("conv.pointwise2.weight", ("conv_module.pointwise_conv2.weight",), pointwise=True),
    *weight_and_bias("ffn2.norm", "ffn2_layer_norm"),
    *weight_and_bias("ffn2.up", "ffn2.intermediate_dense"),
    *weight_and_bias("ffn2.down", "ffn2.output_dense"),
    *weight_and_bias("norm", "final_layer_norm"),
)
"""Keys of ``Wav2Vec2ConformerEncoderLayer``."""

PARAKEET_LAYER_KEYS: tuple[Key, ...] = (
    *weight_and_bias("ffn1.norm", "norm_feed_forward1"),
    *weight_and_bias("ffn1.up", "feed_forward1.linear1"),
    *weight_and_bias("ffn1.down", "feed_forward1.linear2"),
    *weight_and_bias("attention.norm", "norm_self_att"),
    *weight_and_bias("attention.qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *weight_and_bias("attention.out", "self_attn.o_proj"),
    Key("attention.pos.weight", ("self_attn.relative_k_proj.weight",)),
    Key("attention.u", ("self_attn.bias_u",)),
    Key("attention.v_bias", ("self_attn.bias_v",)),
    *weight_and_bias("conv.norm", "norm_conv"),
    *weight_and_bias("conv.pointwise1", "conv.pointwise_conv1", pointwise=True),
    *weight_and_bias("conv.depthwise", "conv.depthwise_conv"),
    *weight_and_bias("conv.depthwise_norm", "conv.norm"),
    *(Key(f"conv.depthwise_norm.{s}", (f"conv.norm.{s}",)) for s in STATISTICS),
    *weight_and_bias("conv.pointwise2", "conv.pointwise_conv2", pointwise=True),
    *weight_and_bias("ffn2.norm", "norm_feed_forward2"),
    *weight_and_bias("ffn2.up", "feed_forward2.linear1"),
    *weight_and_bias("ffn2.down", "feed_forward2.linear2"),
    *weight_and_bias("norm", "norm_out"),
)
"""Keys of ``ParakeetEncoderBlock``."""


def _check(layer: Any, keys: tuple[Key, ...], convs: tuple[str, str, str], norm: str) -> None:
    """Require plain submodules where weights are, and an attention that ours can stand in for."""
    for key in keys:
        for name in key.theirs:
            module, _, leaf = name.rpartition(".")
            if leaf != "weight" or (module.endswith("linear_pos") and not hasattr(layer.self_attn, "linear_pos")):
                continue
            cls: type[nn.Module] = nn.Linear
            if module in convs:
                cls = nn.Conv1d
            elif module == norm:
                cls = nn.BatchNorm1d
            elif "norm" in module:
                cls = nn.LayerNorm
            need_types(layer, {module: cls})
    attention = layer.self_attn.config
    need(
        attention._attn_implementation in ("eager", "sdpa"),
        f"attention implementation {attention._attn_implementation!r}; ours takes the masks of 'eager' and 'sdpa'",
    )
    need(not getattr(attention, "output_attentions", False), "config.output_attentions: ours never forms the weights")


def describe(layer: Any) -> Described:
    """Return the settings of a ``Wav2Vec2ConformerEncoderLayer``."""
    convs = ("conv_module.pointwise_conv1", "conv_module.depthwise_conv", "conv_module.pointwise_conv2")
    _check(layer, LAYER_KEYS, convs, "conv_module.batch_norm")
    get = layer.get_submodule
    attention = layer.self_attn
    position = {"relative": "relative", "rotary": "rotary", None: "none"}.get(attention.position_embeddings_type, "")
    need(position, f"position_embeddings_type {attention.position_embeddings_type!r}")
    config = ConformerConfig(
        d_model=get("self_attn.linear_q").in_features,
        num_heads=attention.num_heads,
        ffn_dim=get("ffn1.intermediate_dense").out_features,
        num_layers=1,
        conv_kernel_size=check_convolutions(layer, *convs),
        dropout=0.0,
        position=position,
        rotary_input="hidden",
        conv_norm="batch",
        activation=activation_of(
            get("ffn1.intermediate_act_fn"), get("ffn2.intermediate_act_fn"), get("conv_module.activation")
        ),
        conv_bias=False,
        layer_norm_eps=common_eps(layer),
        padding="peer",
    )
    dropouts = Dropouts(
        ffn_inner=tuple(get(f"{name}.intermediate_dropout").p for name in ("ffn1", "ffn2")),
        ffn_outer=tuple(get(f"{name}.output_dropout").p for name in ("ffn1", "ffn2")),
        weights=get("self_attn.dropout").p,
        attention=get("self_attn_dropout").p,
        conv=get("conv_module.dropout").p,
    )
    return Described(config, dropouts)


def describe_parakeet(layer: Any) -> Described:
    """Return the settings of a ``ParakeetEncoderBlock``."""
    convs = ("conv.pointwise_conv1", "conv.depthwise_conv", "conv.pointwise_conv2")
    _check(layer, PARAKEET_LAYER_KEYS, convs, "conv.norm")
    get = layer.get_submodule
    attention = layer.self_attn.config
    need(get("feed_forward1.linear1").bias is not None, "feed-forward modules without bias (attention_bias=False)")
    need(attention.num_key_value_heads == attention.num_attention_heads, "grouped keys (num_key_value_heads)")
    need(attention.num_attention_heads * layer.self_attn.head_dim == attention.hidden_size, "a head_dim of its own")
    config = ConformerConfig(
        d_model=attention.hidden_size,
        num_heads=attention.num_attention_heads,
        ffn_dim=get("feed_forward1.linear1").out_features,
        num_layers=1,
        conv_kernel_size=check_convolutions(layer, *convs),
        dropout=0.0,
        conv_norm="batch",
        activation=activation_of(
            get("feed_forward1.activation"), get("feed_forward2.activation"), get("conv.activation")
        ),
        conv_bias=get("conv.depthwise_conv").bias is not None,
        layer_norm_eps=common_eps(layer),
    )
    zero = Dropouts((0.0,), (0.0,), 0.0, 0.0, 0.0)
    return Described(config, zero, inference_only="in training its BatchNorm takes statistics over padding too")
