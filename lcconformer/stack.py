"""The layers of an encoder and how its loops use them: what the engines of :mod:`lcconformer.loop` see of an encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.stateless import _reparametrize_module

from .blocks import Lengths, position_frames
from .conditioning import DepthConditioning
from .config import ConformerConfig
from .layer import ConformerLayer, Positions, RelativeAttention
from .plain import altered
from .sharing import sharing_map
from .subsampling import FrontEnd

__all__ = ["LayerStack"]


class LayerStack(nn.Module):
    """N loops over one shared layer or a few, with what distinguishes the loops from one another.

    Args:
        config: widths, sharing map, conditioning and statistics.
        front_end: registered ahead of the layers, so that parameters and state dict keep their order; loops do not use it.

    Attributes:
        layer_map: index into ``layers`` for each of the N loops.
        gradient_checkpointing: keep no more than the input of each loop for the backward, which recomputes the loop
            (arXiv 1604.06174); False to begin with.
    """

    running_mean: Tensor  # [N, d_model], with conv_norm_statistics="per_depth"
    running_var: Tensor

    def __init__(self, config: ConformerConfig, front_end: FrontEnd | None) -> None:
        super().__init__()
        self.config = config
        self.layer_map = sharing_map(config.sharing, config.num_layers)
        self.front_end = front_end
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(max(self.layer_map) + 1))
        self.conditioning = DepthConditioning(config, self.layers[0]) if config.conditioning else None
        self.gradient_checkpointing = False
        self._per_depth_statistics = config.conv_norm_statistics == "per_depth"
        if self._per_depth_statistics:
            self.register_buffer("running_mean", torch.zeros(config.num_layers, config.d_model))
            self.register_buffer("running_var", torch.ones(config.num_layers, config.d_model))

    def layer_of(self, k: int) -> ConformerLayer:
        """Return the layer of loop ``k`` (from 0)."""
        return cast(ConformerLayer, self.layers[self.layer_map[k]])

    @contextlib.contextmanager
    def only(self, layers: Sequence[int]) -> Iterator[None]:
        """Leave layers out within the block, in which loop k runs layer ``layers[k]`` (LayerDrop, arXiv 1909.11556).

        It is for training: calls within the block take a depth up to ``len(layers)``, and their backward belongs there too.

        Args:
            layers: layers to keep, from 0, one or more, in rising order.

        Raises:
            ValueError: they are not that; loops share a layer, or are told apart by more than their layer; evaluation mode.
        """
        n, kept = self.config.num_layers, tuple(layers)
        if not kept or kept != tuple(sorted({*kept} & {*range(n)})):
            raise ValueError(
                f"ConformerEncoder: layers to keep are {list(kept)}; expected some of 0 ... {n - 1}, rising"
            )
        if len(self.layers) < n or self.conditioning is not None or self._per_depth_statistics:
            raise ValueError(
                "ConformerEncoder: only layers of their own can be left out: it takes sharing='none', no conditioning and no "
                "statistics per depth"
            )
        if not self.training:  # engines of inference keep what they know of the layers
            raise ValueError("ConformerEncoder: layers are left out in training alone: call train()")
        before, self.layer_map = self.layer_map, kept
        try:
            yield
        finally:
            self.layer_map = before

    def project_positions(self, k: int, x: Tensor, lengths: Lengths, positions: dict[int, Positions]) -> None:
        """Fill in what the layer of loop ``k`` needs of positions for ``x [B, T, d_model]``, once for all its loops.

        A hooked or wrapped layer gets None and computes them in every loop: its parameters may be ready only inside its
        forward (FSDP).
        """
        index = self.layer_map[k]
        if index not in positions:
            layer = self.layer_of(k)
            inside = altered(layer, "", (ConformerLayer,)) or altered(layer.attention, "", (RelativeAttention,))
            positions[index] = None if inside else layer.positions(position_frames(x, lengths))

    def step(self, k: int, x: Tensor, lengths: Lengths, positions: dict[int, Positions]) -> Tensor:
        """Run loop ``k``: ``[B, T, d_model] -> [B, T, d_model]``.

        Args:
            lengths: ``[B]`` real frames, or None; or what is known of a packed batch ``x [1, total, d_model]`` or
                of blocks.
            positions: what :meth:`project_positions` found, by unique layer; filled in as needed.
        """
        self.project_positions(k, x, lengths, positions)
        layer, own = self.layer_of(k), positions[self.layer_map[k]]
        if self.conditioning is not None:
            x = self.conditioning.enter(x, k)
        overrides = self.overrides(k)
        if overrides and torch.jit.is_tracing():
            with _reparametrize_module(layer, overrides):  # what functional_call does, which refuses to be traced
                return layer(x, lengths, own)
        if overrides:
            return functional_call(layer, overrides, (x, lengths, own))
        return layer(x, lengths, own)

    def overrides(self, k: int) -> dict[str, Tensor]:
        """Return the parameters and buffers of its layer that loop ``k`` replaces by its own, by name."""
        overrides: dict[str, Tensor] = {}
        if self.conditioning is not None:
            overrides = self.conditioning.overrides(self.layer_of(k), k)
        if self._per_depth_statistics:
            overrides["conv.depthwise_norm.running_mean"] = self.running_mean[k]
            overrides["conv.depthwise_norm.running_var"] = self.running_var[k]
        return overrides
