"""SpeechBrain's Conformer layer with rotary positions, under its call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops
from .accelerated import AcceleratedLayer
from .adapter import (
    NotPadding,
    activation_of,
    check_convolutions,
    check_norms,
    lengths_of_padding,
    need,
    untouched,
)
from .layer import Convolution, FeedForward, Parts, probability

__all__ = ["SpeechBrainLayer"]


class SpeechBrainLayer(AcceleratedLayer):
    """``(x [B, T, D], src_mask, src_key_padding_mask [B, T], pos_embs, dynchunktrain_config) -> ([B, T, D], None)``.

    The attention of ``attention_type="RoPEMHA"`` returns no weights; that of the others does, which ours never hold.  With
    ``src_mask`` or chunks the peer computes.
    """

    own_classes = ("PositionalwiseFeedForward", "RoPEMHA", "ConvolutionModule", "LayerNorm", "Swish")
    keys = ()  # the engine has no rotary positions

    def check_structure(self) -> None:
        layer: Any = self
        attention, conv = layer.mha_layer, layer.convolution_module
        kind = type(attention).__name__
        need(
            kind != "RelPosMHAXL",
            "its attention (RelPosMHAXL) returns the weights of every pair of frames, which ours never hold",
        )
        need(type(attention) is self.own[1], f"mha_layer is a {kind}; ours has RoPEMHA")
        need(attention._qkv_same_embed_dim, "queries, keys and values are not projected together")
        need(not conv.causal, "causal=True")
        pointwise1, _ = conv.bottleneck
        _, _, pointwise2, _ = conv.after_conv
        need(type(pointwise2) is nn.Linear, "the second pointwise convolution is no linear map")
        check_convolutions(pointwise1, conv.conv, pointwise1)
        check_norms(layer)
        activations = [conv.after_conv[1], *(f[1].ffn[1] for f in (layer.ffn_module1, layer.ffn_module2))]
        unknown = sorted({type(m).__name__ for m in activations if self._activation(m) is None})
        need(not unknown, f"activation {', '.join(unknown)}")

    def _activation(self, module: Any) -> str | None:
        swish: Any = self.own[4]
        if type(module) is swish:
            silu: Any = module.silu
            return "silu" if module.beta == 1 and untouched([(module, swish), (silu, nn.SiLU)]) else None
        return activation_of(module)

    def parts(self) -> Parts | None:
        layer: Any = self
        feed_forward, attention, convolution, layer_norm, _ = self.own
        conv = layer.convolution_module
        pointwise1, glu = conv.bottleneck
        depthwise_norm, activation, pointwise2, dropout = conv.after_conv
        passed: list[tuple[nn.Module, type[nn.Module]]] = [
            (layer.mha_layer, attention),
            (conv, convolution),
            (conv.bottleneck, nn.Sequential),
            (conv.after_conv, nn.Sequential),
            (glu, nn.GLU),
            (dropout, nn.Dropout),
            (layer.norm1, layer_norm),
            (layer.norm2, layer_norm),
        ]
        found: list[Any] = []
        for module in (layer.ffn_module1, layer.ffn_module2):
            norm, inner, on = module
            up, hidden, inside, down = inner.ffn
            passed += [(module, nn.Sequential), (inner, feed_forward), (inner.ffn, nn.Sequential)]
            passed += [(inside, nn.Dropout), (on, nn.Dropout)]
            found.append((norm, up, down, self._activation(hidden), probability(inside), probability(on)))
        of_conv = self._activation(activation)
        if of_conv is None or any(f[3] is None for f in found) or not untouched(passed) or self._dropped() >= 1:
            return None
        ffn1, ffn2 = (FeedForward(*f) for f in found)
        return Parts(
            ffn1=ffn1,
            attention_norm=layer.norm1.norm,
            attend=self._attend,
            attention_inside=self._dropped(),
            attention_on=0.0,
            attention_bias=False,
            conv=Convolution(
                norm=conv.layer_norm,
                pointwise1=pointwise1,
                depthwise=conv.conv,
                depthwise_norm=depthwise_norm,
                pointwise2=pointwise2,
                activation=of_conv,
                masked=False,
                causal=False,
                on=probability(dropout),
                masked_output=True,
            ),
            ffn2=ffn2,
            norm=layer.norm2.norm,
            convolution_first=False,
        )

    def _dropped(self) -> float:
        attention: Any = self.mha_layer
        return attention.dropout if attention.training else 0.0

    def _attend(self, h: Tensor, lengths: Tensor | None) -> Tensor:
        attention: Any = self.mha_layer
        rotate = type(attention).forward.__globals__["_rope_rotate"]
        qkv = nn.functional.linear(h, attention.in_proj_weight).unflatten(-1, (attention.num_heads, -1))
        q, k, v = qkv.chunk(3, -1)  # [B, T, H, D/H]
        if attention.vbias is not None:
            v = v + attention.value_bias_weight.view(attention.num_heads, -1)
        # the op divides scores by the square root of D/H, the peer by that of D
        q = rotate(q) * (attention.scale * attention.head_dim**0.5)
        o = ops.relpos_attention(q, rotate(k), v, lengths=lengths, dropout_p=self._dropped())
        return attention.out_proj(o.flatten(-2))

    def forward(
        self,
        x: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        pos_embs: Tensor | None = None,
        dynchunktrain_config: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        others = (src_mask, pos_embs, dynchunktrain_config)
        parts, lengths = None, None
        try:
            if all(other is None for other in others):
                lengths = None if src_key_padding_mask is None else lengths_of_padding(src_key_padding_mask)
                parts = self.parts()
        except NotPadding:
            parts = None
        if parts is None:
            return super().forward(x, src_mask, src_key_padding_mask, pos_embs, dynchunktrain_config)
        return self.run(parts, x, lengths, 0, None), None
