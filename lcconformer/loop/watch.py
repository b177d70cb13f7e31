"""What an engine that stands in for an encoder's modules must notice about them, in tens of microseconds per call."""

from __future__ import annotations

import weakref
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from lcconformer.layer import ConformerLayer, ConvModule, FeedForward, RelativeAttention

if TYPE_CHECKING:
    from lcconformer.encoder import ConformerEncoder

__all__ = ["Watch", "watch"]

# what the engines know; a subclass or a wrapped module may compute something else
_READ_THEIR_MODE = {ConformerLayer, FeedForward, RelativeAttention, ConvModule}
_KNOWN = {
    *_READ_THEIR_MODE,
    *(nn.ModuleList, nn.Linear, nn.LayerNorm, nn.Conv1d, nn.BatchNorm1d, nn.GroupNorm, nn.Identity),
}
_PLAIN = {Tensor, nn.Parameter}
_version, _address, _training = attrgetter("_version"), attrgetter("_cdata"), attrgetter("training")
_hooks = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """The modules of an encoder's loop, their parameters and buffers, as they were found.

    Holds the modules below the encoder, not the encoder, and no tensor of theirs.
    """

    def __init__(self, encoder: ConformerEncoder) -> None:
        self._config = encoder.config
        self._layers = list(encoder.layers.modules())
        others = [] if encoder.conditioning is None else list(encoder.conditioning.modules())
        modules: list[nn.Module] = [encoder, *self._layers, *others]
        # name -> tensor, name -> module
        self._owners: list[dict[str, Any]] = [d for m in modules for d in (m._parameters, m._buffers)]
        self._parts: list[dict[str, Any]] = [*self._owners, *(m._modules for m in modules[1:])]
        self._found = self._ids()
        self._own = (encoder._modules.get("layers"), encoder._modules.get("conditioning"))
        self._matrices: list[dict[str, Any]] = [m._parameters for m in self._layers if type(m) is nn.Linear]
        self._modes = [m for m in self._layers if type(m) in _READ_THEIR_MODE]
        self._written = 0
        self._ids_of_tensors = {id(t) for t in self.tensors()}
        self._names = [f"layers.{name}" if name else "layers" for name, _ in encoder.layers.named_modules()]

    def _ids(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(dict.values, self._parts))))

    def holds(self, encoder: ConformerEncoder) -> bool:
        """Whether these are still the modules, parameters and buffers of the encoder."""
        layers, conditioning = self._own
        modules = encoder._modules
        return (
            modules.get("layers") is layers
            and modules.get("conditioning") is conditioning
            and self._ids() == self._found
        )

    def tensors(self) -> list[Tensor]:
        """Every parameter and buffer of the loop, in a fixed order."""
        return [t for t in chain.from_iterable(map(dict.values, self._owners)) if t is not None]

    def places(self) -> tuple[list, ...]:
        """Where the tensors lie, and how; to be compared while :meth:`memory` is kept."""
        tensors = self.tensors()
        memory = map(_address, map(Tensor.untyped_storage, tensors))
        return (
            list(map(Tensor.data_ptr, tensors)),
            list(memory),
            list(map(Tensor.stride, tensors)),
            list(map(Tensor.size, tensors)),
        )

    def state(self) -> tuple[list, ...]:
        """:meth:`places`, and how often each tensor was written as far as autograd or an optimizer tells."""
        return *self.places(), list(map(_version, self.tensors())), [self._written]

    def stepped(self, parameters: set[int]) -> None:
        """An optimizer has written to parameters with these ids."""
        self._written += not self._ids_of_tensors.isdisjoint(parameters)

    def memory(self) -> list[StorageWeakRef]:
        """While these live, no other memory gets the address of what the tensors lie in now."""
        return [StorageWeakRef(t.untyped_storage()) for t in self.tensors()]

    def changed(self) -> list[str]:
        """Why the layers may do something else than their weights tell; empty: they do not."""
        if _has_any_global_hook():
            return ["global module hooks would not run"]
        for name, module in zip(self._names, self._layers):
            if type(module) not in _KNOWN:
                return [f"{name} is a {type(module).__name__}"]
            if "forward" in module.__dict__ or module._compiled_call_impl is not None:
                return [f"{name} has a forward of its own"]
            if any(_hooks(module)):
                return [f"{name} has hooks, which would not run"]
            for leaf, tensor in chain(module._parameters.items(), module._buffers.items()):
                if tensor is not None and type(tensor) not in _PLAIN:
                    return [f"{name}.{leaf} is a {type(tensor).__name__}, not a plain tensor"]
        return []

    def unfit(self, dtype: torch.dtype) -> list[str]:
        """Why the layers cannot evaluate inputs of ``dtype`` from their weights alone; empty: they can."""
        config = self._config
        if any(getattr(p.get("weight"), "dtype", None) != dtype for p in self._matrices):
            return [f"the input is {dtype} and a weight is not"]
        if any(map(_training, self._modes)) and (config.dropout > 0.0 or config.conv_norm == "batch"):
            return ["a module is in training mode"]
        for name, module in zip(self._names, self._layers):
            if module.__dict__.get("eps", config.layer_norm_eps) != config.layer_norm_eps:
                return [f"{name} has an epsilon other than the config's {config.layer_norm_eps}"]
        return []


_watched: weakref.WeakKeyDictionary[nn.Module, Watch] = weakref.WeakKeyDictionary()


def watch(encoder: ConformerEncoder) -> Watch:
    """The watch over an encoder; a new one whenever a module, parameter or buffer is another than before."""
    found = _watched.get(encoder)
    if found is None or not found.holds(encoder):
        found = _watched[encoder] = Watch(encoder)
    return found


def _after_step(optimizer: Optimizer, *_: object) -> None:
    """The kernels of fused optimizers write without autograd's counting (seen with torch 2.13's and ``fused=True``)."""
    found = list(_watched.values())
    if found:
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for each in found:
            each.stepped(parameters)


register_optimizer_step_post_hook(_after_step)
