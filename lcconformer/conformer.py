"""torchaudio's Conformer: its signature, its semantics, its state dict."""

from __future__ import annotations

from torch import Tensor, nn

from .config import ConformerConfig
from .encoder import ConformerEncoder
from .interop.keys import use_peer_names
from .interop.torchaudio import LAYER_KEYS
from .ops.checks import check_tensor

__all__ = ["Conformer"]


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
        layers = range(len(self.encoder.layers))
        use_peer_names(self, LAYER_KEYS, {f"encoder.layers.{i}.": f"conformer_layers.{i}." for i in layers})

    def forward(self, input: Tensor, lengths: Tensor, *, depth: int | None = None) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            input: ``[B, T, input_dim]``.
            lengths: ``[B]`` real frames of each utterance, int64, int32 or floating; frame i is real where i < length.
            depth: number of layers to run; None: all.

        Returns:
            ``(output [B, T, input_dim], lengths [B])``, the lengths as they were given.
        """
        check_tensor("Conformer", "lengths", lengths)
        # torchaudio counts the frames i < length of T, which is the longest length rounded down
        frames = lengths
        if lengths.is_floating_point():
            frames = (lengths.ceil().minimum(lengths.max().floor()) if lengths.numel() else lengths).long()
        output, _ = self.encoder(input, frames, depth=depth)
        return output, lengths
