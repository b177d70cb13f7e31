"""Depth conditioning: parameters that tell the depths of a shared layer apart. Every form starts as the identity.

``layer_norm``: separate LayerNorms per depth, stored as increments (Sharing-MoE Conformer, arXiv 2209.08326).  ``step``: an
embedding of the depth, added to the input of the loop (Universal Transformer, arXiv 1807.03819).  ``film``: a scale and a
shift of that input.  ``lora``: a low-rank increment per matrix and depth (Relaxed Recursive Transformers, arXiv 2410.20672).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .config import ConformerConfig

__all__ = ["DepthConditioning"]


class DepthConditioning(nn.Module):
    """Per-depth parameters, each stacked over all depths ``[N, ...]`` in one tensor.

    Because they are stacked, every parameter has a gradient at any sampled depth (zero where a depth did not run), and
    data-parallel training never waits for an unused one.

    Args:
        config: configuration; ``conditioning``, ``lora_rank``, ``num_layers`` and ``d_model`` are used.
        layer: a layer of the encoder, for the names and shapes of its norms and matrices.
    """

    def __init__(self, config: ConformerConfig, layer: nn.Module) -> None:
        super().__init__()
        n, d, rank = config.num_layers, config.d_model, config.lora_rank
        self.step = nn.Parameter(torch.zeros(n, d)) if "step" in config.conditioning else None
        self.film = nn.Parameter(torch.zeros(n, 2, d)) if "film" in config.conditioning else None
        self._norms: list[str] = []
        self._matrices: list[str] = []
        self.norm_deltas, self.lora_a, self.lora_b = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for name, module in layer.named_modules():
            if isinstance(module, nn.LayerNorm) and "layer_norm" in config.conditioning:
                for leaf, parameter in module.named_parameters():
                    self._norms.append(f"{name}.{leaf}")
                    self.norm_deltas.append(nn.Parameter(torch.zeros(n, *parameter.shape)))
            # the position projection runs once per forward, whatever the depth
            if isinstance(module, nn.Linear) and "lora" in config.conditioning and name != "attention.pos":
                self._matrices.append(f"{name}.weight")
                a = torch.empty(n, rank, module.in_features)
                self.lora_a.append(nn.Parameter(a.uniform_(-1, 1).div_(math.sqrt(module.in_features))))
                self.lora_b.append(nn.Parameter(torch.zeros(n, module.out_features, rank)))

    def enter(self, x: Tensor, depth: int) -> Tensor:
        """Condition ``x [B, T, d_model]``, the input of loop ``depth`` (from 0)."""
        if self.step is not None:
            x = x + self.step[depth]
        if self.film is not None:
            scale, shift = self.film[depth]
            x = x * (1.0 + scale) + shift
        return x

    def overrides(self, layer: nn.Module, depth: int) -> dict[str, Tensor]:
        """The conditioned parameters of ``layer``, by name, with their values in loop ``depth`` (from 0)."""
        out: dict[str, Tensor] = {}
        for name, delta in zip(self._norms, self.norm_deltas):
            out[name] = layer.get_parameter(name) + delta[depth]
        for name, a, b in zip(self._matrices, self.lora_a, self.lora_b):
            out[name] = layer.get_parameter(name) + b[depth] @ a[depth]
        return out

    @torch.no_grad()
    def fit(self, layer: nn.Module, depth: int, parameters: Mapping[str, Tensor]) -> None:
        """Bring the conditioned parameters of ``layer`` in loop ``depth`` (from 0) as close to ``parameters`` as can be.

        LayerNorms become equal; matrices differ by what truncated SVD leaves out at the rank of ``"lora"`` (Eckart-Young).
        """
        for name, delta in zip(self._norms, self.norm_deltas):
            delta[depth] = parameters[name] - layer.get_parameter(name)
        for name, a, b in zip(self._matrices, self.lora_a, self.lora_b):
            difference = parameters[name].double() - layer.get_parameter(name).double()
            u, s, v = torch.linalg.svd(difference, full_matrices=False)
            rank = min(a.shape[1], s.shape[0])
            # the scale goes to b, so that a never becomes zero, and all of the rank can learn
            a[depth, :rank] = v[:rank]
            b[depth] = 0.0
            b[depth, :, :rank] = u[:, :rank] * s[:rank]
