"""torchaudio's Conformer: its signature, its semantics, its state dict."""

from __future__ import annotations

from typing import Optional, Tuple, no_type_check  # noqa: UP035 (torch.jit.script reads annotations, and knows these)

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ConformerConfig
from .encoder import ConformerEncoder
from .interop.keys import use_peer_names
from .interop.torchaudio import LAYER_KEYS
from .layer import ConformerLayer, ConvModule, FeedForward, RelativeAttention
from .ops.checks import check_tensor

__all__ = ["Conformer"]

# torch.jit.script compiles the forward of every submodule unless it is marked so. It cannot compile these, and need not:
# Conformer._scripted calls the linear maps, norms and convolutions within them.
for _module in (ConformerEncoder, ConformerLayer, FeedForward, RelativeAttention, ConvModule):
    torch.jit.unused(_module.forward)


def _attend(q: Tensor, k: Tensor, v: Tensor, frames: Tensor, dropout_p: float) -> Tensor:
    """Attention over the real frames: ``[B, T, H, D] -> [B, T, H, D]``; zeros for an utterance without any."""
    time = torch.arange(q.size(1), device=q.device)
    mask = (time < frames.clamp(min=1).unsqueeze(1)).unsqueeze(1).unsqueeze(1)  # [B, 1, 1, T]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, dropout_p)
    return out.masked_fill((frames < 1).reshape(-1, 1, 1, 1), 0.0).transpose(1, 2)


def _group_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float, real: Tensor) -> Tensor:
    """GroupNorm with one group of ``[B, T, C]``, whose statistics are those of the real frames ``[B, T, 1]``."""
    count = real.sum(1, keepdim=True).clamp(min=1) * y.size(2)  # [B, 1, 1]
    mean = y.masked_fill(~real, 0.0).sum([1, 2], keepdim=True) / count
    variance = (y - mean).masked_fill(~real, 0.0).square().sum([1, 2], keepdim=True) / count
    return (y - mean) * torch.rsqrt(variance + eps) * weight + bias


class Conformer(nn.Module):
    """Drop-in for ``torchaudio.models.Conformer``: the same arguments, results and state dict, in both directions.

    Args:
        input_dim: width of the input and of the residual stream.
        num_heads: attention heads.
        ffn_dim: hidden width of the feed-forward modules.
        num_layers: number of layers (loops).
        depthwise_conv_kernel_size: odd kernel size of the depthwise convolution.
        dropout: dropout probability.
        use_group_norm: GroupNorm with one group instead of BatchNorm in the convolution module.
        convolution_first: convolution before attention.
        share_layers: one set of weights for all layers; the state dict then holds ``conformer_layers.0`` alone.
        padding: ``"peer"`` reproduces torchaudio, whose convolution and norm see the padding; ``"masked"`` gives each
            utterance of a batch what it would get alone.

    ``torch.jit.script`` compiles a second path, of PyTorch's own operators, with the same weights and results to within
    rounding; nothing of what it saves needs this package.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        input_dim: int,
        num_heads: int,
        ffn_dim: int,
        num_layers: int,
        depthwise_conv_kernel_size: int,
        dropout: float = 0.0,
        use_group_norm: bool = False,
        convolution_first: bool = False,
        *,
        share_layers: bool = False,
        padding: str = "peer",
    ) -> None:
        super().__init__()
        self.encoder = ConformerEncoder(
            ConformerConfig(
                d_model=input_dim,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                num_layers=num_layers,
                conv_kernel_size=depthwise_conv_kernel_size,
                dropout=dropout,
                position="none",
                conv_norm="group" if use_group_norm else "batch",
                convolution_first=convolution_first,
                sharing="all" if share_layers else "none",
                padding=padding,
            )
        )
        self.encoder._has_scripted_path = True
        # for the scripted path, which cannot read the config
        self._num_layers, self._loops = num_layers, num_layers if share_layers else 1  # loops of each layer
        self._grouped, self._masked, self._dropout = use_group_norm, padding == "masked", float(dropout)
        layers = range(len(self.encoder.layers))
        use_peer_names(self, LAYER_KEYS, {f"encoder.layers.{i}.": f"conformer_layers.{i}." for i in layers})

    def forward(self, input: Tensor, lengths: Tensor, depth: Optional[int] = None) -> Tuple[Tensor, Tensor]:  # noqa: UP006, UP045
        """Encode.

        Args:
            input: ``[B, T, input_dim]``.
            lengths: ``[B]`` real frames of each utterance, int64, int32 or floating; frame i is real where i < length.
            depth: number of layers to run; None: all.

        Returns:
            ``(output [B, T, input_dim], lengths [B])``, the lengths as they were given.
        """
        if not torch.jit.is_scripting():
            return self._encode(input, lengths, depth)
        return self._scripted(input, lengths, depth), lengths

    def _encode(self, input: Tensor, lengths: Tensor, depth: int | None) -> tuple[Tensor, Tensor]:
        check_tensor("Conformer", "lengths", lengths)
        # torchaudio counts the frames i < length of T, which is the longest length rounded down
        frames = lengths
        if lengths.is_floating_point():
            frames = (lengths.ceil().minimum(lengths.max().floor()) if lengths.numel() else lengths).long()
        output, _ = self.encoder(input, frames, depth=depth)
        return output, lengths

    @no_type_check  # a module's submodules have no types
    def _scripted(self, x: Tensor, lengths: Tensor, depth: Optional[int]) -> Tensor:  # noqa: UP045
        """What :meth:`_encode` gives, in the language of ``torch.jit.script``."""
        most = self._num_layers
        if depth is not None:
            if depth < 1 or depth > most:
                raise ValueError(f"Conformer: depth is {depth}; expected an integer from 1 to num_layers = {most}")
            most = depth
        frames = lengths
        if lengths.is_floating_point() and lengths.numel() > 0:
            frames = torch.minimum(lengths.ceil(), lengths.max().floor())
        real = (torch.arange(x.size(1), device=x.device) < frames.unsqueeze(1)).unsqueeze(2)  # [B, T, 1]
        if self._masked:
            x = x.masked_fill(~real, 0.0)
        dropout_p = self._dropout if self.training else 0.0
        done = 0
        for layer in self.encoder.layers:
            for _ in range(self._loops):
                if done == most:
                    break
                done += 1
                y = layer.ffn1.down(F.dropout(F.silu(layer.ffn1.up(layer.ffn1.norm(x))), dropout_p))
                x = x + 0.5 * F.dropout(y, dropout_p)
                for part in range(2):
                    if (part == 0) == layer.convolution_first:
                        y = F.glu(layer.conv.pointwise1(layer.conv.norm(x)), -1)
                        if self._masked:
                            y = y.masked_fill(~real, 0.0)
                        y = layer.conv.depthwise(y.transpose(1, 2))  # [B, C, T]
                        norm = layer.conv.depthwise_norm
                        if not self._masked:
                            y = norm(y).transpose(1, 2)
                        elif self._grouped:
                            y = _group_norm(y.transpose(1, 2), norm.weight, norm.bias, norm.eps, real)
                        else:
                            y = y.transpose(1, 2)
                            kept = real.squeeze(2)
                            rows = norm(y[kept])  # [M, C]: padding has no part in the statistics
                            y = torch.zeros_like(y).index_put([kept], rows)
                        y = layer.conv.pointwise2(F.silu(y))
                    else:
                        qkv = layer.attention.qkv(layer.attention.norm(x))
                        q, k, v = qkv.unflatten(-1, [3, layer.attention.heads, -1]).unbind(2)  # each [B, T, H, D]
                        y = layer.attention.out(_attend(q, k, v, frames, dropout_p).flatten(-2))
                    x = x + F.dropout(y, dropout_p)
                y = layer.ffn2.down(F.dropout(F.silu(layer.ffn2.up(layer.ffn2.norm(x))), dropout_p))
                x = layer.norm(x + 0.5 * F.dropout(y, dropout_p))
        return x
