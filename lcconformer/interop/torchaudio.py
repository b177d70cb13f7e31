"""torchaudio's Conformer layer: its weights under our names, and our computation under its call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .accelerated import AcceleratedLayer
from .adapter import (
    NotPadding,
    activation_of,
    check_activations,
    check_convolutions,
    check_norms,
    lengths_of_padding,
    need,
    untouched,
)
from .keys import STATISTICS, Key, weight_and_bias
from .layer import Convolution, FeedForward, Parts, probability

__all__ = ["LAYER_KEYS", "TorchaudioLayer"]


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


class TorchaudioLayer(AcceleratedLayer):
    """``(input [T, B, D], key_padding_mask [B, T] bool or None) -> [T, B, D]``, as ``torchaudio.models.ConformerLayer``."""

    own_classes = ("_FeedForwardModule", "_ConvolutionModule")
    keys = LAYER_KEYS

    def check_structure(self) -> None:
        layer: Any = self
        convolution = layer.conv_module.sequential
        check_convolutions(convolution[0], convolution[2], convolution[5])
        check_norms(layer)
        check_activations(layer.ffn1.sequential[2], layer.ffn2.sequential[2], convolution[4])
        attention = layer.self_attn
        plain = attention.bias_k is None and attention.bias_v is None and not attention.add_zero_attn
        need(plain, "self_attn has added keys (add_bias_kv or add_zero_attn)")
        need(attention._qkv_same_embed_dim and not attention.batch_first, "self_attn has another layout")

    def parts(self) -> Parts | None:
        layer: Any = self
        feed_forward, convolution = self.own
        conv = layer.conv_module
        found: list[Any] = []
        passed = [(layer.self_attn, nn.MultiheadAttention), (layer.self_attn_dropout, nn.Dropout), (conv, convolution)]
        for module in (layer.ffn1, layer.ffn2):
            passed += [(module, feed_forward), (module.sequential, nn.Sequential)]
            norm, up, activation, inside, down, on = module.sequential
            passed += [(inside, nn.Dropout), (on, nn.Dropout)]
            found.append((norm, up, down, activation_of(activation), probability(inside), probability(on)))
        pointwise1, glu, depthwise, norm, activation, pointwise2, dropout = conv.sequential
        passed += [(conv.sequential, nn.Sequential), (glu, nn.GLU), (dropout, nn.Dropout)]
        names: list[Any] = [*(f[3] for f in found), activation_of(activation)]
        if None in names or not untouched(passed):
            return None
        ffn1, ffn2 = (FeedForward(*f) for f in found)
        return Parts(
            ffn1=ffn1,
            attention_norm=layer.self_attn_layer_norm,
            attend=self._attend,
            attention_inside=self._dropped(),
            attention_on=probability(layer.self_attn_dropout),
            attention_bias=layer.self_attn.in_proj_bias is not None,
            conv=Convolution(
                conv.layer_norm, pointwise1, depthwise, norm, pointwise2, names[2], False, False, probability(dropout)
            ),
            ffn2=ffn2,
            norm=layer.final_layer_norm,
            convolution_first=bool(layer.convolution_first),
        )

    def heads_and_position(self) -> tuple[int, str]:
        attention: Any = self.self_attn
        return attention.num_heads, "none"

    def _attend(self, h: Tensor, lengths: Tensor | None) -> Tensor:
        attention: Any = self.self_attn
        qkv = F.linear(h, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (x.unflatten(-1, (attention.num_heads, -1)) for x in qkv.chunk(3, -1))  # [B, T, H, D]
        o = ops.relpos_attention(q, k, v, lengths=lengths, dropout_p=self._dropped())
        return attention.out_proj(o.flatten(-2))

    def _dropped(self) -> float:
        attention: Any = self.self_attn
        return attention.dropout if attention.training else 0.0

    def forward(self, input: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        try:
            lengths = None if key_padding_mask is None else lengths_of_padding(key_padding_mask)
            parts = self.parts()
        except NotPadding:
            parts = None
        if parts is None:
            return super().forward(input, key_padding_mask)
        attention: Any = self.self_attn
        return self.run(parts, input.transpose(0, 1), lengths, attention.num_heads, "none").transpose(0, 1)
