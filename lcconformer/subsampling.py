"""Front end: projects input features to the width of the encoder and optionally merges frames."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ConformerConfig
from .ops.checks import frame_mask

__all__ = ["FrontEnd"]


class FrontEnd(nn.Module):
    """Features ``[B, T, input_dim]`` and lengths ``[B]`` in, ``[B, T', d_model]`` and new lengths out, T' = ceil(T / factor).

    ``"stack"`` concatenates ``factor`` neighbouring frames, the last group padded with zeros.  ``"conv"`` is one or two 3x3
    convolutions of stride 2 over time and frequency, each followed by ReLU.  Frames beyond the length are set to zero before
    every step, so that an utterance gives the same output in any batch.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        if config.input_dim is None:
            raise ValueError("FrontEnd: config.input_dim is None; give the width of the input features")
        self.input_dim = config.input_dim
        self.kind, self.factor = config.subsampling, config.subsampling_factor
        self.masked = config.padding == "masked"
        self.convs = nn.ModuleList()
        width = config.input_dim
        if self.kind == "stack":
            width *= self.factor
        elif self.kind == "conv":
            channels_in = 1
            for _ in range(self.factor.bit_length() - 1):
                self.convs.append(nn.Conv2d(channels_in, config.d_model, 3, stride=2, padding=1))
                channels_in, width = config.d_model, (width + 1) // 2
            width *= config.d_model
        self.project = nn.Linear(width, config.d_model)

    def lengths(self, lengths: Tensor) -> Tensor:
        """Number of output frames for ``lengths`` input frames: ``ceil(lengths / factor)``."""
        return (lengths + self.factor - 1) // self.factor

    def flops(self, frames: int) -> int:
        """Floating-point operations for an utterance of ``frames`` output frames, ``frames * factor`` input frames.

        Counts the convolutions and the projection; a multiply-add is two operations.
        """
        total = 2 * frames * self.project.in_features * self.project.out_features
        time, width = frames * self.factor, self.input_dim
        for conv in self.convs:
            time, width = time // 2, (width + 1) // 2  # [d_model, time, width] comes out
            total += 2 * time * width * cast(nn.Conv2d, conv).weight.numel()
        return total

    def start(self, batch: int) -> tuple[Tensor, ...]:
        """Return what :meth:`step` remembers of ``batch`` streams at their start: the last frame of each convolution's input,
        ``[B, channels, 1, width]``.
        """
        past, width = [], self.input_dim
        for conv in self.convs:
            channels = cast(nn.Conv2d, conv).in_channels
            past.append(self.project.weight.new_zeros(batch, channels, 1, width))
            width = (width + 1) // 2
        return tuple(past)

    def step(
        self, x: Tensor, lengths: Tensor, keep: int, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Compute :meth:`forward` for the next frames of streams, whole multiples of the factor.

        Args:
            x: ``[B, T, input_dim]``.
            lengths: ``[B]`` real frames.
            keep: output frames after which the next call continues.
            past: as :meth:`start` or the last call returned it.

        Returns:
            ``(output [B, T', d_model], lengths [B], past)``.
        """
        if self.kind != "conv":
            x, new_lengths = self.forward(x, lengths)
            return x, lengths if new_lengths is None else new_lengths, past
        x = self._mask(x, lengths)[:, None]  # [B, 1, T, input_dim]
        last, left = keep * self.factor, []
        for conv, before in zip(self.convs, past):
            left.append(x[:, :, last - 1 : last])
            # a frame at an even place sees the one before it: of the two ahead, the first makes up a frame that is dropped
            x = F.relu(conv(F.pad(torch.cat((before, x), 2), (0, 0, 1, 0))))[:, :, 1:]
            lengths, last = (lengths + 1) // 2, last // 2
            x = self._mask(x, lengths)  # [B, d_model, T', F']
        return self.project(x.transpose(1, 2).flatten(2)), lengths, tuple(left)

    def _mask(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None or not self.masked:
            return x
        keep = frame_mask(lengths, x.shape[-2])  # [B, T]
        return x.masked_fill(~(keep[:, None, :, None] if x.dim() == 4 else keep[..., None]), 0.0)

    def _check_dtype(self, x: Tensor) -> None:
        weight = getattr(self.convs[0] if self.convs else self.project, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or torch.is_autocast_enabled(x.device.type):
            return
        if x.dtype != weight.dtype:
            raise ValueError(
                f"FrontEnd: features have dtype {x.dtype}, the weights {weight.dtype}; cast one to the other's, or use "
                "torch.autocast"
            )

    def forward(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self._check_dtype(x)
        x = self._mask(x, lengths)
        if self.kind == "conv" and x.shape[1] == 0:
            # a convolution refuses to see no frame
            return self.forward(F.pad(x, (0, 0, 0, 1)), lengths)[0][:, :0], lengths
        if self.kind == "stack":
            b, t, c = x.shape
            out = (t + self.factor - 1) // self.factor
            x = F.pad(x, (0, 0, 0, out * self.factor - t)).reshape(b, out, self.factor * c)
            lengths = None if lengths is None else self.lengths(lengths)
        elif self.kind == "conv":
            x = x[:, None]  # [B, 1, T, input_dim]
            for conv in self.convs:
                lengths = None if lengths is None else (lengths + 1) // 2
                x = self._mask(F.relu(conv(x)), lengths)  # [B, d_model, T', F']
            x = x.transpose(1, 2).flatten(2)
        return self.project(x), lengths
