"""Layers of other packages under an accelerated class: their modules, parameters, hooks and names are untouched.

An accelerated layer is the peer's own object whose class derives from the peer's and has another ``forward``.  That
computes by our ops what it knows, and calls the peer's where it meets anything else, such as a mask that is not padding at
the end, attention weights that are asked for, or a submodule that was replaced.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from torch import Tensor, nn

from ..loop.weights import Table
from . import engine, layer
from .adapter import Unsupported, need
from .keys import Key

__all__ = ["AcceleratedLayer", "accelerated_class"]


class AcceleratedLayer(nn.Module):
    """A mixin ahead of a peer's layer class.

    Attributes:
        peer: the peer's class.
        own: classes of the peer's own submodules, in the order of ``own_classes``: their names in its source file, where
            ``{}`` is that of the layer without "EncoderLayer", or ``module:class``.
        keys: where the peer keeps our tensors.
    """

    peer: ClassVar[type[nn.Module]]
    own: ClassVar[tuple[type[nn.Module], ...]]
    own_classes: ClassVar[tuple[str, ...]]
    keys: ClassVar[tuple[Key, ...]]

    def check_structure(self) -> None:
        """Raise :class:`~.adapter.Unsupported` if ours cannot stand in for this layer."""

    def parts(self) -> layer.Parts | None:
        """Return the layer's modules in their present modes; None where calling them may add something."""
        raise NotImplementedError

    def heads_and_position(self) -> tuple[int, str]:
        """Return ``num_heads`` and ``position`` of the configuration that describes the layer.

        Raises:
            Unsupported: no configuration does.
        """
        raise Unsupported("no configuration describes this layer")

    def run(
        self,
        parts: layer.Parts,
        x: Tensor,
        lengths: Tensor | None,
        heads: int,
        position: str | None,
        table: Table | None = None,
    ) -> Tensor:
        """Run the layer on ``x [B, T, D]``; ``position``, ``table`` are those of :func:`.engine.run`, None: it has none."""
        if position is not None:
            y = engine.run(self, self.keys, parts, x, lengths, heads=heads, position=position, table=table)
            if y is not None:
                return y
        return layer.run(parts, x, lengths)

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse ``torch.jit.script``, which asks this of every module it is about to compile."""
        # a module given back would stay in the model's place of this one
        raise NotImplementedError(
            f"accelerate: torch.jit.script cannot compile an accelerated {type(self).__name__}: call "
            "lcconformer.restore(model), script it and accelerate it again, or use torch.jit.trace"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made, not found by name
        return _empty, (self.peer, _mixin_of(type(self))), *super().__reduce_ex__(protocol)[2:]


def _mixin_of(cls: type) -> type[AcceleratedLayer]:
    return cls.__bases__[0]  # type: ignore[return-value]


def _empty(peer: type[nn.Module], mixin: type[AcceleratedLayer]) -> nn.Module:
    cls = accelerated_class(peer, mixin)
    return cls.__new__(cls)


def _class_named(name: str, source: dict[str, Any]) -> type[nn.Module] | None:
    """Find a class in the source of a layer, or where ``module:class`` says."""
    module, _, cls = name.rpartition(":")
    return getattr(importlib.import_module(module), cls, None) if module else source.get(cls)


_made: dict[tuple[type, type], type[nn.Module]] = {}


def accelerated_class(peer: type[nn.Module], mixin: type[AcceleratedLayer]) -> type[nn.Module]:
    """Return the class that a layer of class ``peer`` gets, under the same name, which wrapping rules and reports go by."""
    if (peer, mixin) in _made:
        return _made[peer, mixin]
    # the peer's source file, which need not be in sys.modules
    source = peer.__init__.__globals__  # type: ignore[misc]
    names = [name.format(peer.__name__.removesuffix("EncoderLayer")) for name in mixin.own_classes]
    own = [_class_named(name, source) for name in names]
    missing = [name for name, cls in zip(names, own) if cls is None]
    need(not missing, f"{peer.__module__} has no {', '.join(missing)}; is it another version?")
    attributes = {
        "peer": peer,
        "own": tuple(own),
        **{name: getattr(peer, name) for name in ("__module__", "__qualname__", "__doc__")},
    }
    made = _made[peer, mixin] = type(peer.__name__, (mixin, peer), attributes)
    return made
