"""Blocks of streams on the packed weights of the CPU: rows as in :mod:`.inference`, attention and convolution with a past."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lcconformer.blocks import Chunking, Past, Remembered
from lcconformer.config import ConformerConfig
from lcconformer.ops.registry import Choice, note
from lcconformer.stack import LayerStack

from . import weights
from .inference import OP, Loop, convert
from .weights import PackedLayer

__all__ = ["run"]


@torch.no_grad()
def run(
    stack: LayerStack, x: Tensor, lengths: Tensor, seen: Tensor, pasts: list[Past], chunking: Chunking
) -> tuple[Tensor, list[Past]]:
    """Run a loop for each of ``pasts`` over the next blocks ``x [B, Q, d_model]``; return output and what they remember.

    Args:
        lengths, seen: ``[B]``, see :class:`~lcconformer.blocks.Blocks`.
    """
    note(Choice(OP, "cpu"))
    layers = weights.packed(stack, len(pasts), x.shape[0] * x.shape[1])
    loop = _Streams(stack.config, x, layers[0].dtype)
    loop.enter(x, None)
    after = []
    for k, (layer, past) in enumerate(zip(layers, pasts, strict=True)):
        if stack.conditioning is not None:
            loop.x.copy_(stack.conditioning.enter(loop.x, k))
        loop.blocks = Remembered(chunking, lengths, seen, past)
        loop.step(layer)
        after.append(loop.blocks.past)
    return (loop.x if x.dtype == torch.float32 else convert(loop.x, x.dtype)), after


class _Streams(Loop):
    """The residual stream of one call; ``blocks`` are those of the loop that runs."""

    blocks: Remembered

    def __init__(self, config: ConformerConfig, x: Tensor, dtype: torch.dtype) -> None:
        super().__init__(config, x, None, dtype)

    def _read(self, columns: int) -> Tensor:
        """What the rows before have left: ``[B, Q, columns]``."""
        b, q, _ = self.x.shape
        return self.wide[: b * q, :columns].unflatten(0, (b, q))

    def _write(self, y: Tensor) -> None:
        """Leave ``y [B, Q, d_model]`` to the rows that follow."""
        b, q, d = self.x.shape
        self.branch[: b * q].view(b, q, d).copy_(y)

    def _attention(self, layer: PackedLayer) -> Iterator[Any]:
        yield functools.partial(self._attend, layer)

    def _convolutions(self, layer: PackedLayer) -> Iterator[Any]:
        yield functools.partial(self._convolve, layer)

    def _attend(self, layer: PackedLayer) -> None:
        d = self.x.shape[2]
        h, own, relative = self.config.num_heads, layer.attention, None
        if own.u is not None and own.v_bias is not None:
            chunking = self.blocks.chunking
            pos = layer.positions(chunking.left + chunking.block)[:, :d].unflatten(1, (h, d // h))
            relative = (pos, own.u, own.v_bias)
        heads = self._read(3 * d).float().unflatten(2, (3, h, d // h)).unbind(2)
        self._write(self.blocks.attend(*heads, relative=relative, rotary=None, dropout_p=0.0).flatten(2))

    def _convolve(self, layer: PackedLayer) -> None:
        d = self.x.shape[2]
        y, lengths = self.blocks.extend(self._read(2 * d))
        out = y.new_empty(*y.shape[:2], d)
        self.cpu.glu_depthwise_conv_forward(self._convolution(layer, y, out, lengths))
        self._write(out[:, self.blocks.chunking.reach :])
