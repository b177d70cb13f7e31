"""Which modules may be read instead of called.

The fused ops and the engines of the loop take the parameters of linear maps, norms and the depthwise convolution and do what
their forward would do.  That is right only for plain modules of PyTorch.  One that was hooked, wrapped, parametrised, pruned,
quantised, sharded or replaced may do something else, and must be called.  The layer, the encoder, the engines and
:func:`~lcconformer.accelerate` all ask here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["LAYER_NORM", "LINEAR", "NORMS", "PLAIN", "altered", "obstacle", "readable"]

NORMS: dict[type[nn.Module], str] = {
    nn.LayerNorm: "layer",
    nn.BatchNorm1d: "batch",
    nn.GroupNorm: "group",
    nn.Identity: "none",
}
"""Class of a norm -> its name in the config and the ops."""

LINEAR: frozenset[type[nn.Module]] = frozenset({nn.Linear})
LAYER_NORM: frozenset[type[nn.Module]] = frozenset({nn.LayerNorm})
PLAIN: frozenset[type[nn.Module]] = frozenset({nn.Linear, nn.Conv1d, *NORMS})
"""Modules whose parameters are read."""

# functional_call puts plain tensors in the place of parameters; None is a bias that is not there
_TENSORS = frozenset({Tensor, nn.Parameter, type(None)})
# exporters and meta-data modes put these there, which stand for plain ones
_STANDINS = (FakeTensor, FunctionalTensor)


def altered(module: nn.Module, name: str, known: Collection[type[nn.Module]]) -> str:
    """Return how calling a module may differ from what its class does with its tensors; empty: it does not.

    Nothing is remembered between calls, so that a hook or a replacement counts from the moment it is there.  A call takes
    half a microsecond.  Hooks on all modules are left to the caller.

    Args:
        module: the module.
        name: of the module, for the reason.
        known: classes whose forward the caller stands in for; subclasses do not count.
    """
    kind, own = type(module), module.__dict__
    if kind not in known:
        # PEFT and quantisation have a Linear of their own
        clash = any(cls.__name__ == kind.__name__ for cls in known)
        return f"{name} is a {f'{kind.__module__}.' * clash}{kind.__name__}"
    if "forward" in own or module._compiled_call_impl is not None:
        return f"{name} has a forward of its own"
    # Dynamo guards lengths, not truth values: a hook that is registered after compilation is seen
    if (
        len(own["_forward_hooks"])
        or len(own["_forward_pre_hooks"])
        or len(own["_backward_hooks"])
        or len(own["_backward_pre_hooks"])
    ):
        return f"{name} has hooks, which would not run"
    for tensors in (own["_parameters"], own["_buffers"]):
        for leaf in tensors:
            tensor = tensors[leaf]
            if type(tensor) not in _TENSORS and not isinstance(tensor, _STANDINS):
                return f"{name}.{leaf} is a {type(tensor).__name__}, not a plain tensor"
    return ""


def obstacle(module: nn.Module, name: str, known: Collection[type[nn.Module]] = PLAIN) -> str:
    """Return why the fused ops cannot read the parameters of a module instead of calling it; empty: they can.

    It is :func:`altered`, or in a state that the ops have no form for.
    """
    why, kind = altered(module, name, known), type(module)
    if why:
        return why
    if kind is nn.Conv1d:
        return _obstacle_of_convolution(module, name)
    if kind in NORMS and kind is not nn.Identity:
        return _obstacle_of_norm(module, name)
    return ""


def _obstacle_of_convolution(module: nn.Module, name: str) -> str:
    own = module.__dict__
    (kernel,) = own["kernel_size"]
    same = own["stride"] == (1,) and own["dilation"] == (1,) and own["padding"] == (kernel // 2,) and kernel % 2 == 1
    depthwise = own["groups"] == own["in_channels"] == own["out_channels"]
    if not (same and depthwise and own["padding_mode"] == "zeros"):
        return f"{name} is no depthwise convolution of stride 1 with 'same' zero padding"
    return ""


def _obstacle_of_norm(module: nn.Module, name: str) -> str:
    own = module.__dict__
    if own["_parameters"]["weight"] is None or own["_parameters"]["bias"] is None:
        return f"{name} has no weight or no bias"
    if type(module) is nn.BatchNorm1d:
        if own["_buffers"]["running_mean"] is None or not own["track_running_stats"]:
            return f"{name} tracks no running statistics"
        if own["training"] and own["momentum"] is None:
            return f"{name} averages its statistics over all batches (momentum=None)"
    return ""


def readable(kinds: Iterable[Collection[type[nn.Module]]], *modules: nn.Module) -> bool:
    """Return whether the parameters of all these modules may be read instead of calling them.

    Args:
        kinds: classes that the reader knows, for each module.
        modules: modules that would be read.
    """
    if _has_any_global_hook():
        return False
    for known, module in zip(kinds, modules):  # noqa: SIM110  a generator costs as much as the rest
        if obstacle(module, "", known):
            return False
    return True
