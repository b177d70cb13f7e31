"""Puts our computation under another package's Conformer layers inside a loaded model, and takes it away again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..plain import altered
from . import espnet, lucidrains, nemo, speechbrain, torchaudio, transformers
from .accelerated import AcceleratedLayer, accelerated_class
from .adapter import Unsupported, need

__all__ = ["AccelerationReport", "accelerate", "class_for", "qualified_name", "restore"]

_MODELS = "transformers.models."
_PEERS: dict[str, type[AcceleratedLayer]] = {
    "torchaudio.models.conformer.ConformerLayer": torchaudio.TorchaudioLayer,
    "espnet.nets.pytorch_backend.conformer.encoder_layer.EncoderLayer": espnet.ESPnetLayer,
    "conformer.conformer.ConformerBlock": lucidrains.LucidrainsLayer,
    "speechbrain.lobes.models.transformer.Conformer.ConformerEncoderLayer": speechbrain.SpeechBrainLayer,
    "nemo.collections.asr.parts.submodules.conformer_modules.ConformerLayer": nemo.NemoLayer,
    f"{_MODELS}wav2vec2_conformer.modeling_wav2vec2_conformer.Wav2Vec2ConformerEncoderLayer": (
        transformers.Wav2Vec2ConformerLayer
    ),
    f"{_MODELS}wav2vec2_bert.modeling_wav2vec2_bert.Wav2Vec2BertEncoderLayer": transformers.Wav2Vec2BertLayer,
    f"{_MODELS}seamless_m4t.modeling_seamless_m4t.SeamlessM4TConformerEncoderLayer": transformers.SeamlessM4TLayer,
    f"{_MODELS}seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2ConformerEncoderLayer": (
        transformers.SeamlessM4Tv2Layer
    ),
    f"{_MODELS}parakeet.modeling_parakeet.ParakeetEncoderBlock": transformers.ParakeetLayer,
}

# other Conformer layers, so that the report can say that they were seen
_CONFORMER = re.compile(r"(?i)conformer(encoder)?(layer|block)$|conformer\S*\.EncoderLayer$")
_WHY_NOT = {
    "LasrEncoderBlock": "residual weights and norms without bias are not ours",
    "GraniteSpeechConformerBlock": "attention within blocks is not ours",
}


@dataclass(frozen=True)
class AccelerationReport:
    """What :func:`accelerate` did.

    Attributes:
        accelerated: names of the layers that our kernels compute now.
        kept: names of Conformer layers left as they were, each with the reason.
    """

    accelerated: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        if not self.accelerated and not self.kept:
            return "no Conformer layers found"
        lines = [_counted(len(self.accelerated)) + " accelerated"]
        if self.accelerated:
            lines[0] += f": {_listed(self.accelerated)}"
        if self.kept:
            lines.append(f"{_counted(len(self.kept))} not accelerated:")
            by_reason: dict[str, list[str]] = {}
            for name, reason in self.kept:
                by_reason.setdefault(reason, []).append(name)
            lines += [f"  {_listed(names)}: {reason}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def _counted(count: int) -> str:
    return f"{count} layer" + "s" * (count != 1)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, ..., {names[-1]}"


def accelerate(model: nn.Module, *, strict: bool = False) -> AccelerationReport:
    """Compute the Conformer layers of a loaded model by our kernels, in place.

    Served are torchaudio's Conformer, ESPnet's with relative positions ("latest"), NeMo's ("rel_pos"), SpeechBrain's with
    rotary positions ("RoPEMHA"), that of the package ``conformer`` (lucidrains), and transformers' Wav2Vec2Conformer,
    Wav2Vec2Bert, SeamlessM4T (both versions) and Parakeet.
    The layers stay the objects they were, with their modules, parameters, hooks, modes and names, so that optimizers, PEFT,
    checkpoints and ``save_pretrained`` see no difference; only their class gets another ``forward``.

    Results agree with the peer's within float tolerance (frames of padding may differ), in evaluation and in training:
    dropout where the peer has it, and BatchNorm statistics as the peer takes them, over the padding too.  Where ours cannot
    stand in, the peer's own forward runs: masks of anything but padding at the end of each utterance, caches of streaming,
    attention weights that are asked for, submodules that were replaced.

    Args:
        model: model that contains such layers at any depth, or is one.
        strict: raise if a Conformer layer cannot be served.

    Returns:
        The layers accelerated, and those that were not with the reasons.

    Raises:
        ValueError: ``strict``, and a layer cannot be served or there is none; the model is as it was.

    Example:
        >>> model = Wav2Vec2ConformerForCTC.from_pretrained(name)
        >>> print(lcconformer.accelerate(model))
    """
    classes: dict[int, tuple[nn.Module, type[nn.Module]]] = {}
    accelerated: list[str] = []
    kept: list[tuple[str, str]] = []
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not _is_conformer_layer(module):
            continue
        name = path or type(module).__qualname__
        try:
            classes[id(module)] = module, class_for(module)
            accelerated.append(name)
        except Unsupported as reason:
            kept.append((name, str(reason)))
    report = AccelerationReport(tuple(accelerated), tuple(kept))
    if strict and (kept or not accelerated):
        raise ValueError(f"accelerate: strict=True, and the model is left as it was\n{report}")
    for module, cls in classes.values():
        module.__class__ = cls
    return report


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo :func:`accelerate`: give every accelerated layer its own class back.

    Returns:
        Names of the layers.
    """
    names = []
    for path, module in model.named_modules():
        if isinstance(module, AcceleratedLayer):
            module.__class__ = module.peer  # type: ignore[assignment]
            names.append(path or type(module).__qualname__)
    return tuple(names)


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_conformer_layer(module: nn.Module) -> bool:
    names = [qualified_name(cls) for cls in type(module).__mro__]
    if isinstance(module, AcceleratedLayer) or names[0].startswith("lcconformer."):
        return False
    return (
        any(name in _PEERS for name in names)
        or type(module).__qualname__ in _WHY_NOT
        or _CONFORMER.search(names[0]) is not None
    )


def class_for(module: nn.Module) -> type[nn.Module]:
    """Return the class that accelerates a layer; raise :class:`~.adapter.Unsupported` where there is none."""
    kind = type(module)
    mixin = _PEERS.get(qualified_name(kind))
    if mixin is None:
        bases = [cls.__qualname__ for cls in kind.__mro__[1:] if qualified_name(cls) in _PEERS]
        why = f"a subclass of {bases[0]} may compute something else" if bases else "no adapter for this layer"
        raise Unsupported(f"{qualified_name(kind)}: {_WHY_NOT.get(kind.__qualname__, why)}")
    need("forward" not in vars(module), "its forward was replaced by another tool")
    cls = accelerated_class(kind, mixin)
    layer: Any = module
    layer.__class__ = cls
    try:
        layer.check_structure()
        need(layer.parts() is not None, _difference(layer))
    except (AttributeError, ValueError) as error:  # a submodule is gone, or has another structure
        raise Unsupported(f"unknown structure: {error}") from error
    finally:
        layer.__class__ = kind
    return cls


def _difference(layer: AcceleratedLayer) -> str:
    """Say which submodule of a layer is not what the peer made."""
    for name, module in layer.named_modules():
        why = altered(module, name, (type(module),)) if name else ""
        if why:
            return why
    return "its modules are not those of the peer, or global module hooks would not run"
