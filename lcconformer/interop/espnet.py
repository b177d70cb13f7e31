"""ESPnet's Conformer layer with relative positions: its weights under our names, and our computation under its call."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from .accelerated import AcceleratedLayer
from .adapter import (
    NotPadding,
    activation_of,
    check_convolutions,
    check_norms,
    lengths_of_padding,
    need,
    relative_table,
    untouched,
)
from .keys import layer_keys
from .layer import Convolution, FeedForward, Parts, attend_relative, probability

__all__ = ["LAYER_KEYS", "ESPnetLayer"]

LAYER_KEYS = layer_keys(
    norms=("norm_ff_macaron", "norm_mha", "norm_conv", "norm_ff", "norm_final"),
    ffn1=("feed_forward_macaron.w_1", "feed_forward_macaron.w_2"),
    qkv=("self_attn.linear_q", "self_attn.linear_k", "self_attn.linear_v"),
    out="self_attn.linear_out",
    positions=("self_attn.linear_pos", "self_attn.pos_bias_u", "self_attn.pos_bias_v"),
    conv=(
        "conv_module.pointwise_conv1",
        "conv_module.depthwise_conv",
        "conv_module.norm",
        "conv_module.pointwise_conv2",
    ),
    ffn2=("feed_forward.w_1", "feed_forward.w_2"),
)
"""Keys of ``EncoderLayer`` with ``macaron_style`` and ``use_cnn_module``."""

_BACKEND = "espnet.nets.pytorch_backend"


class ESPnetLayer(AcceleratedLayer):
    """``((x [B, T, D], positions [1, 2T-1, D]), mask [B, 1, T], cache=None) -> ((x, positions), mask)``."""

    own_classes = (
        f"{_BACKEND}.transformer.positionwise_feed_forward:PositionwiseFeedForward",
        f"{_BACKEND}.transformer.attention:RelPositionMultiHeadedAttention",
        f"{_BACKEND}.conformer.convolution:ConvolutionModule",
        f"{_BACKEND}.transformer.layer_norm:LayerNorm",
        f"{_BACKEND}.conformer.swish:Swish",
    )
    keys = LAYER_KEYS

    def check_structure(self) -> None:
        layer: Any = self
        feed_forward, attention, convolution, _, _ = self.own
        need(
            layer.feed_forward_macaron is not None and layer.conv_module is not None,
            "not macaron style, or no convolution",
        )
        need(layer.normalize_before and not layer.concat_after, "normalize_before=False or concat_after=True")
        kind = type(layer.self_attn).__name__
        need(
            "Legacy" not in kind,
            "legacy relative positions (rel_pos_type='legacy') depend on the length of the batch, which ours do not have",
        )
        need(type(layer.self_attn) is attention, f"self_attn is a {kind}; ours has relative positions ('rel_selfattn')")
        need(not layer.self_attn.zero_triu, "zero_triu=True")
        for module in (layer.feed_forward, layer.feed_forward_macaron):
            need(type(module) is feed_forward, f"a feed-forward is a {type(module).__name__}")
        need(type(layer.conv_module) is convolution, f"conv_module is a {type(layer.conv_module).__name__}")
        need(
            len(inspect.signature(convolution.forward).parameters) == 2,
            "conv_module takes a mask; is it another version?",
        )
        conv = layer.conv_module
        check_convolutions(conv.pointwise_conv1, conv.depthwise_conv, conv.pointwise_conv2)
        check_norms(layer)
        for module in (layer.feed_forward, layer.feed_forward_macaron, conv):
            need(self._activation(module) is not None, f"activation {type(module.activation).__name__}")

    def _activation(self, module: Any) -> str | None:
        activation, swish = module.activation, self.own[4]
        return "silu" if untouched([(activation, swish)]) else activation_of(activation)

    def _feed_forward(self, norm: nn.Module, module: Any, on: float) -> FeedForward | None:
        activation = self._activation(module)
        if activation is None:
            return None
        return FeedForward(norm, module.w_1, module.w_2, activation, probability(module.dropout), on)

    def parts(self, positions: Tensor | None = None) -> Parts | None:
        layer: Any = self
        feed_forward, attention, convolution, layer_norm, _ = self.own
        conv, on = layer.conv_module, probability(layer.dropout)
        passed: list[tuple[nn.Module, type[nn.Module]]] = [
            (layer.self_attn, attention),
            (layer.self_attn.q_norm, nn.Identity),
            (layer.self_attn.k_norm, nn.Identity),
            (conv, convolution),
            *((f, feed_forward) for f in (layer.feed_forward, layer.feed_forward_macaron)),
            *(
                (m.dropout, nn.Dropout)
                for m in (layer, layer.self_attn, layer.feed_forward, layer.feed_forward_macaron)
            ),
        ]
        activation = self._activation(conv)
        ffn1 = self._feed_forward(layer.norm_ff_macaron, layer.feed_forward_macaron, on)
        ffn2 = self._feed_forward(layer.norm_ff, layer.feed_forward, on)
        if ffn1 is None or ffn2 is None or activation is None or probability(layer.self_attn.dropout) >= 1:
            return None
        if not untouched(passed) or (layer.training and layer.stochastic_depth_rate > 0):
            return None
        return Parts(
            ffn1=ffn1,
            attention_norm=layer.norm_mha,
            attend=functools.partial(self._attend, positions),
            attention_inside=probability(layer.self_attn.dropout),
            attention_on=on,
            attention_bias=True,
            conv=Convolution(
                norm=layer.norm_conv,
                pointwise1=conv.pointwise_conv1,
                depthwise=conv.depthwise_conv,
                depthwise_norm=conv.norm,
                pointwise2=conv.pointwise_conv2,
                activation=activation,
                masked=False,
                causal=False,
                on=on,
            ),
            ffn2=ffn2,
            norm=layer.norm_final,
            convolution_first=False,
            layer_norms=frozenset({layer_norm}),
        )

    def _attend(self, positions: Tensor | None, h: Tensor, lengths: Tensor | None) -> Tensor:
        attention: Any = self.self_attn
        assert positions is not None
        return attend_relative(
            h,
            lengths,
            positions[0],
            heads=attention.h,
            qkv=(attention.linear_q, attention.linear_k, attention.linear_v),
            pos=attention.linear_pos,
            biases=(attention.pos_bias_u, attention.pos_bias_v),
            out=attention.linear_out,
            dropout_p=probability(attention.dropout),
        )

    def forward(self, x_input: Any, mask: Tensor | None, cache: Tensor | None = None) -> tuple[Any, Tensor | None]:
        y = None
        if cache is None and isinstance(x_input, tuple) and x_input[1].shape[0] == 1:
            y = self._serve(x_input[0], x_input[1], mask)
        if y is None:
            return super().forward(x_input, mask, cache)
        return (y, x_input[1]), mask

    def _serve(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor | None:
        try:
            lengths = None if mask is None else lengths_of_padding(mask, keep=True)
        except NotPadding:
            return None
        parts = self.parts(positions)
        if parts is None:
            return None
        attention: Any = self.self_attn
        return self.run(parts, x, lengths, attention.h, "relative", relative_table(positions))
