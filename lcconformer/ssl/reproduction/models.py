"""The models that are compared: the paper's three, the improved one with its parts, and the controls."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...config import ConformerConfig
from ...depth import DepthSampler
from ...encoder import ConformerEncoder

__all__ = ["MODELS", "Model", "count_parameters"]


@dataclass(frozen=True)
class Model:
    """One of the compared models: how it differs from an encoder of one shared layer.

    Attributes:
        name: what the options and tables call it.
        text: what it is, in a few words.
        depth: kind of :class:`~lcconformer.DepthSampler` in training.
        changes: fields of the configuration that differ.
        equal: what a control has in common with C: ``"parameters"``: narrower layers of its own, as many parameters;
            ``"compute"``: fewer layers, as many as C runs on average.
        equal_loops: name of a model; its loops, over all steps, are as many.  Empty: as many steps as C.
    """

    name: str
    text: str
    depth: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    equal: str = ""
    equal_loops: str = ""

    def encoder(self, base: ConformerConfig) -> ConformerConfig:
        """Configuration of this model, where ``base`` is that of C."""
        own = base.replace(**self.changes)
        if self.equal == "parameters":
            return _narrower(own, count_parameters(base))
        if self.equal == "compute":
            return own.replace(num_layers=max(1, round((base.num_layers + 1) / 2)))
        return own

    def steps(self, steps: int, base: ConformerConfig) -> int:
        """Number of steps of this model where C takes ``steps``."""
        if not self.equal_loops:
            return steps
        other, own = (DepthSampler(depth, base.num_layers) for depth in (MODELS[self.equal_loops].depth, self.depth))
        return max(1, round(steps * other.mean_depth() / own.mean_depth()))


_UNSHARED, _FILM = {"sharing": "none"}, {"conditioning": ("film",)}
MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("A", "a layer of its own per depth, all loops in each step: the conventional model", "fixed", _UNSHARED),
        Model("B", "one shared layer, all loops in each step", "fixed"),
        Model("C", "one shared layer, a uniformly random number of loops in each step: the paper", "uniform"),
        Model("C-time", "C with as many loops in all its steps as A", "uniform", equal_loops="A"),
        Model("D", "C with sandwich steps (deepest, shallowest, random) and FiLM by depth", "sandwich", _FILM),
        Model("D-time", "D with as many loops in all its steps as C", "sandwich", _FILM, equal_loops="C"),
        Model("sandwich", "C with sandwich steps", "sandwich"),
        Model("film", "C with FiLM by depth", "uniform", _FILM),
        Model("narrow", "control: A with narrower layers, as many parameters as C", "fixed", _UNSHARED, "parameters"),
        Model("shallow", "control: A with as many layers as C runs on average", "fixed", _UNSHARED, "compute"),
        Model("dropped", "control: A without a random number of its last layers in each step", "uniform", _UNSHARED),
        Model("layerdrop", "control: A with LayerDrop, as many loops as C on average", "layer_drop", _UNSHARED),
    )
}


@functools.cache
def count_parameters(config: ConformerConfig) -> int:
    """Number of stored parameters of an encoder."""
    with torch.device("meta"):
        return sum(p.numel() for p in ConformerEncoder(config).parameters())


def _narrower(config: ConformerConfig, wanted: int) -> ConformerConfig:
    """The configuration, narrower in proportion, whose number of parameters is nearest to ``wanted``."""
    grain = 2 * config.num_heads
    widths = range(grain, config.d_model + 1, grain)

    def at(width: int) -> ConformerConfig:
        return config.replace(d_model=width, ffn_dim=max(1, round(config.ffn_dim * width / config.d_model)))

    place = bisect.bisect_left(widths, wanted, key=lambda width: count_parameters(at(width)))
    near = [at(width) for width in widths[max(0, place - 1) : place + 1]]
    return min(near, key=lambda one: abs(count_parameters(one) - wanted))
