"""NeMo's Conformer layer with relative positions, of its Conformer and FastConformer encoders, under its call."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import readable as readable_values
from .accelerated import AcceleratedLayer
from .adapter import (
    NotPadding,
    activation_of,
    check_convolutions,
    check_norms,
    lengths_of_padding,
    lengths_of_scores_mask,
    need,
    relative_table,
    untouched,
)
from .keys import layer_keys
from .layer import Convolution, FeedForward, Parts, attend_relative, probability

__all__ = ["LAYER_KEYS", "NemoLayer"]

LAYER_KEYS = layer_keys(
    norms=("norm_feed_forward1", "norm_self_att", "norm_conv", "norm_feed_forward2", "norm_out"),
    ffn1=("feed_forward1.linear1", "feed_forward1.linear2"),
    qkv=("self_attn.linear_q", "self_attn.linear_k", "self_attn.linear_v"),
    out="self_attn.linear_out",
    positions=("self_attn.linear_pos", "self_attn.pos_bias_u", "self_attn.pos_bias_v"),
    conv=("conv.pointwise_conv1", "conv.depthwise_conv", "conv.batch_norm", "conv.pointwise_conv2"),
    ffn2=("feed_forward2.linear1", "feed_forward2.linear2"),
)
"""Keys of ``ConformerLayer`` with ``self_attention_model="rel_pos"``."""


class NemoLayer(AcceleratedLayer):
    """``(x [B, T, D], att_mask [B, T, T], pos_emb [1, 2T-1, D], pad_mask [B, T], two caches) -> [B, T, D]``.

    The masks are true where something is masked.  With caches, limited context or adapters the peer computes.
    """

    own_classes = (
        "ConformerFeedForward",
        "RelPositionMultiHeadAttention",
        "ConformerConvolution",
        "CausalConv1D",
        "Swish",
    )
    keys = LAYER_KEYS

    def check_structure(self) -> None:
        layer: Any = self
        conv, depthwise = layer.conv, layer.conv.depthwise_conv
        _, attention, _, causal_conv, _ = self.own
        kind = layer.self_attention_model
        need(kind == "rel_pos", f"self_attention_model={kind!r}; ours has 'rel_pos'")
        need(type(layer.self_attn) is attention, f"self_attn is a {type(layer.self_attn).__name__}")
        need(not layer.is_adapter_available(), "it has adapters, which ours would not call")
        need(layer.fc_factor == 0.5, f"a feed-forward is scaled by {layer.fc_factor}, not 0.5")
        need(conv.pointwise_activation == "glu_", f"pointwise_activation={conv.pointwise_activation!r}, not 'glu_'")
        need(type(depthwise) is causal_conv, f"the depthwise convolution is a {type(depthwise).__name__}")
        paddings = depthwise._left_padding, depthwise._right_padding
        need(
            paddings == (conv.kernel_size // 2,) * 2,
            f"the depthwise convolution is padded by {paddings} frames (conv_context_size), not centred",
        )
        check_convolutions(conv.pointwise_conv1, depthwise, conv.pointwise_conv2, padded=True)
        check_norms(layer)
        for module in (layer.feed_forward1, layer.feed_forward2, conv):
            need(self._activation(module) is not None, f"activation {type(module.activation).__name__}")

    def _activation(self, module: Any) -> str | None:
        activation, swish = module.activation, self.own[4]
        return "silu" if untouched([(activation, swish)]) else activation_of(activation)

    def _feed_forward(self, norm: nn.Module, module: Any, on: float) -> FeedForward | None:
        activation = self._activation(module)
        if activation is None:
            return None
        return FeedForward(norm, module.linear1, module.linear2, activation, probability(module.dropout), on)

    def parts(self, positions: Tensor | None = None) -> Parts | None:
        layer: Any = self
        feed_forward, attention, convolution, causal_conv, _ = self.own
        conv, attend, on = layer.conv, layer.self_attn, probability(layer.dropout)
        passed: list[tuple[nn.Module, type[nn.Module]]] = [
            *((module, feed_forward) for module in (layer.feed_forward1, layer.feed_forward2)),
            (attend, attention),
            (conv, convolution),
            *((m.dropout, nn.Dropout) for m in (layer, attend, layer.feed_forward1, layer.feed_forward2)),
        ]
        if not untouched(passed) or self._dropped() >= 1:
            return None
        activation = self._activation(conv)
        ffn1 = self._feed_forward(layer.norm_feed_forward1, layer.feed_forward1, on)
        ffn2 = self._feed_forward(layer.norm_feed_forward2, layer.feed_forward2, on)
        if ffn1 is None or ffn2 is None or activation is None:
            return None
        return Parts(
            ffn1=ffn1,
            attention_norm=layer.norm_self_att,
            attend=functools.partial(self._attend, positions),
            attention_inside=self._dropped(),
            attention_on=on,
            attention_bias=attend.linear_q.bias is not None,
            conv=Convolution(
                norm=layer.norm_conv,
                pointwise1=conv.pointwise_conv1,
                depthwise=conv.depthwise_conv,
                depthwise_norm=conv.batch_norm,
                pointwise2=conv.pointwise_conv2,
                activation=activation,
                masked=True,
                causal=False,
                on=on,
                depthwise_class=causal_conv,
            ),
            ffn2=ffn2,
            norm=layer.norm_out,
            convolution_first=False,
        )

    def _dropped(self) -> float:
        attention: Any = self.self_attn
        if attention.use_pytorch_sdpa:
            return attention.dropout_rate if attention.training else 0.0
        return probability(attention.dropout)

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
            dropout_p=self._dropped(),
        )

    def forward(
        self,
        x: Tensor,
        att_mask: Tensor | None = None,
        pos_emb: Tensor | None = None,
        pad_mask: Tensor | None = None,
        cache_last_channel: Tensor | None = None,
        cache_last_time: Tensor | None = None,
    ) -> Any:
        y = None
        if cache_last_channel is None and cache_last_time is None and pos_emb is not None:
            y = self._serve(x, att_mask, pos_emb, pad_mask)
        if y is None:
            return super().forward(x, att_mask, pos_emb, pad_mask, cache_last_channel, cache_last_time)
        return y

    def _serve(self, x: Tensor, scores: Tensor | None, positions: Tensor, padding: Tensor | None) -> Tensor | None:
        layer: Any = self
        if positions.shape[:2] != (1, 2 * x.shape[1] - 1) or (scores is None) != (padding is None):
            return None
        if layer.self_attention_model != "rel_pos" or layer.is_adapter_available() or self._needs_peer(x):
            return None
        lengths = None
        if scores is not None and padding is not None:
            try:
                lengths = lengths_of_padding(padding)
                attended = lengths_of_scores_mask(scores, x.shape[0], queries=True, keep=False)
            except NotPadding:
                return None
            if readable_values(lengths) and not torch.equal(lengths, attended):
                return None
        parts = self.parts(positions)
        if parts is None:
            return None
        return self.run(parts, x, lengths, layer.self_attn.h, "relative", relative_table(positions))

    def _needs_peer(self, x: Tensor) -> bool:
        """Whether NeMo is to record the output, or would widen float16 autocast within attention."""
        layer: Any = self
        device = x.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            return True
        recorded = layer.is_access_enabled(getattr(layer, "model_guid", None))
        return recorded and layer.access_cfg.get("save_encoder_tensors", False)
