"""The Conformer block of the package ``conformer`` (lucidrains): our computation under its call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .accelerated import AcceleratedLayer
from .adapter import check_norms, need, untouched
from .layer import Convolution, FeedForward, Parts, probability

__all__ = ["LucidrainsLayer"]


class LucidrainsLayer(AcceleratedLayer):
    """``(x [B, T, D], mask=None) -> [B, T, D]``; with a mask, which its convolution does not see, the peer computes."""

    own_classes = (
        "FeedForward",
        "Attention",
        "ConformerConvModule",
        "Scale",
        "PreNorm",
        "Swish",
        "GLU",
        "DepthWiseConv1d",
        "einops.layers.torch:Rearrange",
    )
    keys = ()  # the engine has neither its clipped positions nor its wide convolution

    def check_structure(self) -> None:
        layer: Any = self
        _, _, pointwise1, _, depthwise, _, _, pointwise2, _, _ = layer.conv.net
        (kernel,) = depthwise.conv.kernel_size
        need(kernel % 2 == 1 and kernel <= 63, f"conv_kernel_size={kernel}; ours are odd, up to 63")
        paddings = ((kernel // 2, kernel // 2), (kernel - 1, 0))
        need(tuple(depthwise.padding) in paddings, f"the depthwise convolution is padded by {depthwise.padding}")
        for conv in (pointwise1, depthwise.conv, pointwise2):
            usual = conv.stride == conv.dilation == (1,) and conv.padding == (0,) and conv.padding_mode == "zeros"
            need(usual, "a convolution has a stride, a dilation or padding of its own")
        check_norms(layer)
        for module in (layer.ff1, layer.ff2):
            need(module.scale == 0.5, f"a feed-forward is scaled by {module.scale}, not 0.5")

    def parts(self) -> Parts | None:
        layer: Any = self
        feed_forward, attention, convolution, scale, pre_norm, swish, glu, depthwise_conv, rearrange = self.own
        norm, to_channels, pointwise1, gate, depthwise, depthwise_norm, activation, pointwise2, to_frames, dropout = (
            layer.conv.net
        )
        attend = layer.attn.fn
        passed: list[tuple[nn.Module, type[nn.Module]]] = [
            *((module, scale) for module in (layer.ff1, layer.ff2)),
            *((module, pre_norm) for module in (layer.ff1.fn, layer.attn, layer.ff2.fn)),
            *((module.fn.fn, feed_forward) for module in (layer.ff1, layer.ff2)),
            (attend, attention),
            (attend.dropout, nn.Dropout),
            (attend.rel_pos_emb, nn.Embedding),
            (layer.conv, convolution),
            (layer.conv.net, nn.Sequential),
            *((module, rearrange) for module in (to_channels, to_frames)),
            (gate, glu),
            (depthwise, depthwise_conv),
            (depthwise.conv, nn.Conv1d),
            (activation, swish),
            (dropout, nn.Dropout),
        ]
        found = []
        for module in (layer.ff1, layer.ff2):
            net = module.fn.fn.net
            up, hidden, inside, down, on = net
            passed += [(net, nn.Sequential), (hidden, swish), (inside, nn.Dropout), (on, nn.Dropout)]
            found.append(FeedForward(module.fn.norm, up, down, "silu", probability(inside), probability(on)))
        if not untouched(passed):
            return None
        return Parts(
            ffn1=found[0],
            attention_norm=layer.attn.norm,
            attend=self._attend,
            attention_inside=0.0,
            attention_on=probability(attend.dropout),
            attention_bias=False,
            conv=Convolution(
                norm=norm,
                pointwise1=pointwise1,
                depthwise=depthwise.conv,
                depthwise_norm=depthwise_norm,
                pointwise2=pointwise2,
                activation="silu",
                masked=False,
                causal=depthwise.padding[1] < depthwise.padding[0],
                on=probability(dropout),
            ),
            ffn2=found[1],
            norm=layer.post_norm,
            convolution_first=False,
        )

    def _attend(self, h: Tensor, lengths: Tensor | None) -> Tensor:
        layer: Any = self
        attention = layer.attn.fn
        heads = (attention.heads, -1)
        q = attention.to_q(h).unflatten(-1, heads)  # [B, T, H, D/H]
        k, v = (x.unflatten(-1, heads) for x in attention.to_kv(h).chunk(2, -1))
        frames, last = h.shape[1], attention.max_pos_emb
        # query minus key, T-1 ... -(T-1), clipped
        distances = torch.arange(frames - 1, -frames, -1, device=h.device).clamp(-last, last) + last
        table = attention.rel_pos_emb(distances).to(q.dtype).unsqueeze(1).expand(-1, *q.shape[2:])  # [2T-1, H, D/H]
        none = q.new_zeros(q.shape[2:])
        return attention.to_out(ops.relpos_attention(q, k, v, table, none, none, lengths=lengths).flatten(-2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = self.parts() if mask is None and not torch.is_autocast_enabled(x.device.type) else None
        if parts is None:
            return super().forward(x, mask)
        return self.run(parts, x, None, 0, None)
