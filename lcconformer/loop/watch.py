"""Detects changes to an encoder's modules and tensors between calls, in tens of microseconds per call."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lcconformer.layer import ConformerLayer, ConvModule, FeedForward, RelativeAttention
from lcconformer.plain import LAYER_NORM, LINEAR, NORMS, PLAIN, obstacle
from lcconformer.quantization import QuantizedLinear
from lcconformer.stack import LayerStack

__all__ = ["Watch", "watch"]

# what the engines know; a subclass or a wrapped module may compute something else
_DROP = {ConformerLayer, FeedForward, RelativeAttention}
_KNOWN = PLAIN | _DROP | {ConvModule, nn.ModuleList}
_CLASSES_OF: dict[str, Collection[type[nn.Module]]] = {
    "ffn1": {FeedForward},
    "ffn2": {FeedForward},
    "attention": {RelativeAttention},
    "conv": {ConvModule},
    "norm": LAYER_NORM,
    "pos": LINEAR,
    "depthwise": {nn.Conv1d},
}
# by the config's weights
_MATRICES: dict[str, Collection[type[nn.Module]]] = {"float": LINEAR, "int8": {QuantizedLinear}}
_MATRIX_NAMES = {"up", "down", "qkv", "out", "pointwise1", "pointwise2"}
# settings of a module that the engines take from the encoder's config: attribute -> field
_SETTINGS: dict[type[nn.Module], dict[str, str]] = {
    ConformerLayer: {"convolution_first": "convolution_first"},
    FeedForward: {"activation": "activation"},
    RelativeAttention: {"position": "position", "rotary_input": "rotary_input", "heads": "num_heads"},
}
# what the engines do themselves; a subclass or an instance may do it otherwise
_METHODS = ("step", "overrides", "layer_of", "project_positions")
_version, _address = attrgetter("_version"), attrgetter("_cdata")


class Watch:
    """The modules of an encoder's loop, their parameters and buffers, as they were found.

    Holds the modules below the stack, not the stack, and no tensor of theirs.
    """

    def __init__(self, stack: LayerStack) -> None:
        self._config = stack.config
        self._methods = _own_methods(stack)
        self._layers = list(stack.layers.modules())
        others = [] if stack.conditioning is None else list(stack.conditioning.modules())
        modules: list[nn.Module] = [stack, *self._layers, *others]
        # name -> tensor, name -> module
        self._owners: list[dict[str, Any]] = [d for m in modules for d in (m._parameters, m._buffers)]
        self._parts: list[dict[str, Any]] = [*self._owners, *(m._modules for m in modules[1:])]
        self._found = self._ids()
        self._own = (stack._modules.get("layers"), stack._modules.get("conditioning"))
        self._matrices: list[dict[str, Any]] = [m._parameters for m in self._layers if type(m) is nn.Linear]
        self._drop: list[Any] = [m for m in self._layers if type(m) in _DROP]
        self._batch_norms = [m for m in self._layers if type(m) is nn.BatchNorm1d]
        self._written = 0
        self._ids_of_tensors = {id(t) for t in self.tensors()}
        self._names = [f"layers.{name}" if name else "layers" for name, _ in stack.layers.named_modules()]
        self._known = [self._classes(name) for name in self._names]

    def _classes(self, name: str) -> Collection[type[nn.Module]]:
        """Classes that the engines know for a module of this name, such as ``layers.0.ffn1.up``."""
        leaf = name.rpartition(".")[2]
        if leaf in _MATRIX_NAMES:
            return _MATRICES[self._config.weights]
        return {ConformerLayer} if leaf.isdigit() else _CLASSES_OF.get(leaf, _KNOWN)

    def _ids(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(dict.values, self._parts))))

    def holds(self, stack: LayerStack) -> bool:
        """Whether these are still the modules, parameters and buffers of the stack."""
        layers, conditioning = self._own
        modules = stack._modules
        return (
            stack.config is self._config
            and _own_methods(stack) == self._methods
            and modules.get("layers") is layers
            and modules.get("conditioning") is conditioning
            and self._ids() == self._found
        )

    def tensors(self) -> list[Tensor]:
        """Return every parameter and buffer of the loop, in a fixed order."""
        return [t for t in chain.from_iterable(map(dict.values, self._owners)) if t is not None]

    def places(self) -> tuple[list, ...]:
        """Return the addresses, storages, strides and shapes of the tensors; comparable while :meth:`memory` is kept."""
        tensors = self.tensors()
        memory = map(_address, map(Tensor.untyped_storage, tensors))
        return (
            list(map(Tensor.data_ptr, tensors)),
            list(memory),
            list(map(Tensor.stride, tensors)),
            list(map(Tensor.size, tensors)),
        )

    def state(self) -> tuple[list, ...]:
        """Return :meth:`places` and how often each tensor was written, as far as autograd and optimizers tell."""
        return *self.places(), list(map(_version, self.tensors())), [self._written]

    def stepped(self, parameters: set[int]) -> None:
        """Record that an optimizer has written to parameters with these ids."""
        self._written += not self._ids_of_tensors.isdisjoint(parameters)

    def memory(self) -> list[StorageWeakRef]:
        """Return weak references that keep the addresses of the present storages from being used again."""
        return [StorageWeakRef(t.untyped_storage()) for t in self.tensors()]

    def changed(self) -> list[str]:
        """Return why calling the layers may differ from computing with their weights; empty: it does not."""
        if _has_any_global_hook():
            return ["global module hooks would not run"]
        if self._methods:
            return [f"the encoder has its own {self._methods[0]}(), which would not run"]
        for name, module, known in zip(self._names, self._layers, self._known):
            why = obstacle(module, name, known)
            if why:
                return [why]
            why = self._another_setting(module, name)
            if why:
                return [why]
        return []

    def _another_setting(self, module: nn.Module, name: str) -> str:
        config = self._config
        if type(module) is ConvModule:
            if module.config is not config and module.config != config:
                return f"{name}.config is not that of the encoder"
            return self._another_norm(module.depthwise_norm, f"{name}.depthwise_norm")
        for attribute, field in _SETTINGS.get(type(module), {}).items():
            value, said = getattr(module, attribute), getattr(config, field)
            if value != said:
                return f"{name}.{attribute} is {value!r}, but the config says {said!r}"
        return ""

    def _another_norm(self, norm: Any, name: str) -> str:
        config = self._config
        if NORMS.get(type(norm), config.conv_norm) != config.conv_norm:
            return f"{name} is a {type(norm).__name__}, but the config says conv_norm={config.conv_norm!r}"
        if type(norm) is nn.GroupNorm and norm.num_groups != config.conv_norm_groups:
            return f"{name} has {norm.num_groups} groups, but the config says {config.conv_norm_groups}"
        return ""

    def trains(self) -> bool:
        """Whether a module would drop elements or take the statistics of a batch."""
        return any(m.training and m.dropout > 0.0 for m in self._drop) or self.trains_batch_norm()

    def trains_batch_norm(self) -> bool:
        """Whether a BatchNorm would take the statistics of a batch."""
        return any(m.training for m in self._batch_norms)

    def unfit(self, dtype: torch.dtype) -> list[str]:
        """Return why the layers cannot evaluate inputs of ``dtype`` from their weights alone; empty: they can."""
        config = self._config
        if any(getattr(p.get("weight"), "dtype", None) != dtype for p in self._matrices):
            return [f"the input is {dtype} and a weight is not"]
        for name, module in zip(self._names, self._layers):
            if module.__dict__.get("eps", config.layer_norm_eps) != config.layer_norm_eps:
                return [f"{name} has an epsilon other than the config's {config.layer_norm_eps}"]
        return []


def _own_methods(stack: LayerStack) -> list[str]:
    """Return which methods of the loop are not those of LayerStack."""
    kind, own = type(stack), stack.__dict__
    return [name for name in _METHODS if name in own or getattr(kind, name) is not getattr(LayerStack, name)]


_watched: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()


def watch(stack: LayerStack) -> Watch:
    """Return the watch over an encoder: a new one whenever a module, parameter or buffer was replaced."""
    found = _watched.get(stack)
    if found is None or not found.holds(stack):
        found = _watched[stack] = Watch(stack)
    return found


def _after_step(optimizer: Optimizer, *_: object) -> None:
    """Count an optimizer step: fused kernels write without bumping autograd's version counter (seen in torch 2.13)."""
    found = list(_watched.values())
    if found:
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for each in found:
            each.stepped(parameters)


register_optimizer_step_post_hook(_after_step)
