"""Replaces another package's Conformer layers by ours inside a loaded model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layer import ConformerLayer
from ..plain import altered
from . import torchaudio, transformers
from .adapter import Described, Unsupported, need
from .keys import Key, from_peer

__all__ = ["AccelerationReport", "accelerate"]


@dataclass(frozen=True)
class _Peer:
    keys: tuple[Key, ...]
    describe: Callable[[nn.Module], Described]
    adapter: Callable[[], Callable[[ConformerLayer, nn.Module], nn.Module]]


def _transformers_layer(name: str) -> Callable[[ConformerLayer, nn.Module], nn.Module]:
    from . import transformers_layers

    return getattr(transformers_layers, name)


_W2V2 = "transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer.Wav2Vec2ConformerEncoderLayer"
_PEERS = {
    "torchaudio.models.conformer.ConformerLayer": _Peer(
        torchaudio.LAYER_KEYS, torchaudio.describe, lambda: torchaudio.TorchaudioConformerLayer
    ),
    _W2V2: _Peer(transformers.LAYER_KEYS, transformers.describe, lambda: _transformers_layer("Wav2Vec2ConformerLayer")),
    "transformers.models.parakeet.modeling_parakeet.ParakeetEncoderBlock": _Peer(
        transformers.PARAKEET_LAYER_KEYS, transformers.describe_parakeet, lambda: _transformers_layer("ParakeetLayer")
    ),
}

# other Conformer layers, so that the report can say that they were seen
_CONFORMER = re.compile(r"(?i)conformer(encoder)?(layer|block)$|conformer\S*\.EncoderLayer$")
_WHY_NOT = {
    "Wav2Vec2BertEncoderLayer": "clipped relative keys and a causal convolution are not ours",
    "SeamlessM4Tv2ConformerEncoderLayer": "clipped relative keys and a causal convolution are not ours",
    "LasrEncoderBlock": "no adapter for this layer yet",
}

# a replaced layer's hooks keep running on ours, and their handles still remove them
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class AccelerationReport:
    """What :func:`accelerate` did: names of modules, each with a remark.

    Attributes:
        replaced: layers that are ours now; the remark is empty, or says what to keep in mind.
        kept: Conformer layers left as they were, with the reason.
    """

    replaced: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        if not self.replaced and not self.kept:
            return "no Conformer layers found"
        lines = []
        for title, entries in (("replaced", self.replaced), ("left as they were", self.kept)):
            by_remark: dict[str, list[str]] = {}
            for name, remark in entries:
                by_remark.setdefault(remark, []).append(name)
            count = f"{len(entries)} layer" + "s" * (len(entries) != 1)
            lines.append(f"{count} {title}" + ":" * bool(entries))
            for remark, names in by_remark.items():
                shown = ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
                lines.append(f"  {shown}" + f": {remark}" * bool(remark))
        return "\n".join(lines)


def accelerate(model: nn.Module) -> AccelerationReport:
    """Replace the Conformer layers of a loaded model by :class:`~lcconformer.ConformerLayer`, in place.

    Served are torchaudio's Conformer, transformers' Wav2Vec2Conformer, and transformers' Parakeet in evaluation.  The
    model keeps its call, its results within float tolerance (frames of padding may differ), and the names and shapes of
    its state dict.  A layer with a setting that ours does not have is left alone.  The replaced layers have parameters
    of their own: create optimizers afterwards.

    Args:
        model: model that contains such layers at any depth.

    Returns:
        The layers replaced, and those that were not with the reasons.

    Example:
        >>> model = Wav2Vec2ConformerForCTC.from_pretrained(name)
        >>> print(lcconformer.accelerate(model))
    """
    # how often each parameter and each module appears: a parameter of a layer must appear with the layer, nowhere else
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    places.update(id(m) for _, m in model.named_modules(remove_duplicate=False))
    made: dict[int, nn.Module | str] = {}  # a layer that appears twice stays one layer
    replaced, kept = [], []
    for path, module in list(model.named_modules(remove_duplicate=False)):
        qualified = f"{type(module).__module__}.{type(module).__qualname__}"
        if qualified.startswith("lcconformer.") or not _is_conformer_layer(module):
            continue
        if id(module) not in made:
            try:
                need(path, "it is the model itself; put it inside a module")
                made[id(module)] = _adapt(module, qualified, places)
            except Unsupported as reason:
                made[id(module)] = str(reason)
        result = made[id(module)]
        if isinstance(result, str):
            kept.append((path or type(module).__qualname__, result))
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, result)
        remark = getattr(result, "inference_only", None)
        replaced.append((path, f"for inference only: {remark}" if remark else ""))
    return AccelerationReport(tuple(replaced), tuple(kept))


def _is_conformer_layer(module: nn.Module) -> bool:
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]
    return (
        any(name in _PEERS for name in names)
        or type(module).__qualname__ in _WHY_NOT
        or _CONFORMER.search(names[0]) is not None
    )


def _adapt(module: nn.Module, qualified: str, places: Counter[int]) -> nn.Module:
    peer = _PEERS.get(qualified)
    if peer is None:
        bases = [
            cls.__qualname__ for cls in type(module).__mro__[1:] if f"{cls.__module__}.{cls.__qualname__}" in _PEERS
        ]
        why = f"a subclass of {bases[0]} may compute something else" if bases else "no adapter for this layer"
        raise Unsupported(f"{qualified}: {_WHY_NOT.get(type(module).__qualname__, why)}")
    need("forward" not in vars(module), "its forward was replaced by another tool")
    need(not module._state_dict_hooks and not module._load_state_dict_pre_hooks, "it has state-dict hooks")
    for name, child in module.named_modules():
        # whether ours can stand in for its class is checked by the peer's description
        why = altered(child, name, (type(child),)) if name else ""
        need(not why, f"{why}; accelerate before changing it")
    try:
        described = peer.describe(module)
    except (AttributeError, ValueError) as error:  # a submodule is gone, or a value that no layer of ours takes
        raise Unsupported(f"unknown structure: {error}") from error
    with torch.device("meta"):
        layer = ConformerLayer(described.config)
    _move_weights(peer.keys, module, layer, places)

    inference_only = described.inference_only or described.dropouts.why_not()
    need(
        inference_only is None or not module.training,
        f"{inference_only}; call model.eval() first to accelerate it for inference",
    )
    d = described.dropouts
    drops = any((*d.ffn_inner, *d.ffn_outer, d.weights, d.attention, d.conv))
    modes = {m.training for m in module.modules() if not isinstance(m, nn.BatchNorm1d)}
    need(not drops or len(modes) == 1, "some of its modules are in training mode and others are not")
    adapter = peer.adapter()(layer, module)
    adapter.train(module.training)
    _keep_norm_state(peer.keys, module, layer)
    for attribute in _HOOKS:
        setattr(adapter, attribute, getattr(module, attribute))
    if inference_only is None:
        described.dropouts.apply(layer)
    else:
        adapter.inference_only = inference_only  # type: ignore[assignment]
        adapter.register_forward_pre_hook(_refuse_training)
    return adapter


def _move_weights(keys: tuple[Key, ...], module: nn.Module, layer: ConformerLayer, places: Counter[int]) -> None:
    parameters = dict(module.named_parameters())
    for name, p in parameters.items():
        need(type(p) is nn.Parameter, f"{name} is a {type(p).__name__}")
        need(places[id(p)] == places[id(module)], f"{name} is shared with another module")
    kinds = {(p.dtype, p.device) for p in parameters.values()}
    need(len(kinds) == 1, f"parameters of several kinds ({', '.join(sorted(f'{d} on {v}' for d, v in kinds))})")
    state: dict[str, Tensor] = module.state_dict()
    known = {name for key in keys for name in key.theirs}
    need(set(state) <= known, f"unknown tensors {', '.join(sorted(set(state) - known))}")
    ours = from_peer(keys, state)
    want = layer.state_dict()
    wrong = sorted(n for n in set(want) | set(ours) if n not in ours or n not in want or want[n].shape != ours[n].shape)
    need(not wrong, f"weights of other shapes than the settings say ({', '.join(wrong)})")
    layer.load_state_dict(ours, assign=True)
    for key in keys:
        theirs = {parameters[name].requires_grad for name in key.theirs if name in parameters}
        need(len(theirs) <= 1, f"{', '.join(key.theirs)} are trained in part; ours packs them")
        if theirs:
            layer.get_parameter(key.ours).requires_grad_(theirs.pop())


def _keep_norm_state(keys: tuple[Key, ...], module: nn.Module, layer: ConformerLayer) -> None:
    """Copy the mode and momentum of the convolution's norm: a frozen BatchNorm stays frozen."""
    (name,) = {key.theirs[0].rpartition(".")[0] for key in keys if key.ours == "conv.depthwise_norm.weight"}
    theirs, ours = module.get_submodule(name), layer.conv.depthwise_norm
    ours.train(theirs.training)
    if isinstance(theirs, nn.BatchNorm1d) and isinstance(ours, nn.BatchNorm1d):
        ours.momentum = theirs.momentum


def _refuse_training(module: nn.Module, _args: Any) -> None:
    if module.training:
        raise NotImplementedError(
            f"this layer was accelerated for inference only ({module.inference_only}); call model.eval(), or train the "
            "model without lcconformer.accelerate"
        )
