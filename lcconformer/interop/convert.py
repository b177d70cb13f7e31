"""An encoder of ours with the weights of another package's Conformer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConformerConfig
from ..encoder import ConformerEncoder
from ..layer import ConformerLayer
from .accelerate import class_for, qualified_name, restore
from .adapter import Unsupported, need
from .engine import layer_config
from .keys import from_peer
from .layer import Parts

__all__ = ["to_lcconformer"]

_TORCHAUDIO = "torchaudio.models.conformer.Conformer"


def to_lcconformer(model: nn.Module) -> ConformerEncoder:
    """Return an encoder that computes what a loaded Conformer of another package does, with a copy of its weights.

    Unlike :func:`~lcconformer.accelerate`, which leaves the model what it was, this makes one of ours: with a depth chosen per
    call, packed batches, ``save_pretrained`` and :func:`~lcconformer.share`.

    Args:
        model: torchaudio's ``Conformer``; or its layers, or those of transformers' Wav2Vec2ConformerEncoder (positions
            relative or none) or ParakeetEncoder, as the ``nn.ModuleList`` that these keep them in.  It is left as it is.

    Returns:
        The encoder, on the device, in the dtypes and in the mode of ``model``.  In evaluation it makes of
        ``x [B, T, d_model]`` and lengths what the layers do, within float tolerance at real frames.  ``config.dropout`` is the
        peer's where that is the same on and inside all branches and on attention weights, else 0.

    Raises:
        ValueError: another model, or one that no configuration describes; the message says why.

    Example:
        >>> peer = transformers.ParakeetEncoder.from_pretrained(name)
        >>> encoder = lcconformer.interop.to_lcconformer(peer.layers)
        >>> x = peer.subsampling(features) * peer.input_scale
        >>> output, _ = encoder(x)  # what peer(features) returns
    """
    layers = model.conformer_layers if qualified_name(type(model)) == _TORCHAUDIO else model
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(
            f"to_lcconformer: got {qualified_name(type(model))}; expected torchaudio's Conformer, or the nn.ModuleList of the "
            "layers of an encoder, such as encoder.layers: what an encoder has around them, as Wav2Vec2Conformer its last "
            "layer_norm and Parakeet its subsampling, is no part of ours, so call that beside it"
        )
    unique = {id(layer): layer for layer in layers}  # a layer that is there twice is shared
    order = list(unique)
    found = []
    for layer in unique.values():
        name = next(name for name, other in layers.named_children() if other is layer)
        try:
            found.append(_described(layer))
        except Unsupported as reason:
            raise ValueError(f"to_lcconformer: layer {name}: {reason}") from None
        if found[-1][0] != found[0][0]:
            raise ValueError(
                f"to_lcconformer: layer {name} is not like the first, and an encoder has one configuration:\n"
                f"{found[-1][0]}\n{found[0][0]}"
            )
    sharing = "none" if len(order) == len(layers) else tuple(order.index(id(layer)) for layer in layers)
    config = found[0][0].replace(num_layers=len(layers), sharing=sharing)
    state = {f"layers.{i}.{name}": x.detach().clone() for i, (_, s) in enumerate(found) for name, x in s.items()}
    with torch.device("meta"):
        encoder = ConformerEncoder(config)
    encoder.load_state_dict(state, assign=True)
    return encoder.train(model.training)


def _described(layer: nn.Module) -> tuple[ConformerConfig, dict[str, Tensor]]:
    """Return the configuration of one layer and its state dict under our names."""
    copied: Any = copy.deepcopy(layer).train()  # for its dropout
    restore(copied)
    copied.__class__ = class_for(copied)
    parts: Parts = copied.parts()
    heads, position = copied.heads_and_position()
    matrices: list[Any] = [parts.ffn1.up, parts.ffn1.down, parts.ffn2.up, parts.ffn2.down]
    need(all(m.bias is not None for m in matrices), "a feed-forward module has no biases; ours have them")
    config = layer_config(parts, heads, position)
    need(config is not None, "its norms or linear maps are not ours, or the epsilons of its LayerNorms differ")
    assert config is not None
    norm: Any = parts.conv.depthwise_norm
    epsilon = getattr(norm, "eps", config.layer_norm_eps)
    need(
        epsilon == config.layer_norm_eps,
        f"the norm of the convolution has eps={epsilon}, the LayerNorms {config.layer_norm_eps}; ours has one for all",
    )
    activations = {parts.ffn1.activation, parts.conv.activation, parts.ffn2.activation}
    need(len(activations) == 1, f"activations {', '.join(sorted(activations))}; ours has one for all")
    ffns = parts.ffn1, parts.ffn2
    dropouts = {parts.attention_inside, parts.attention_on, parts.conv.on, *(p for f in ffns for p in (f.inside, f.on))}
    config = config.replace(dropout=dropouts.pop() if len(dropouts) == 1 else 0.0)

    theirs = layer.state_dict()
    unknown = set(theirs) - {name for key in copied.keys for name in key.theirs}
    need(not unknown, f"ours has no place for {', '.join(sorted(unknown))}")
    ours = from_peer(copied.keys, theirs)
    with torch.device("meta"):
        wanted = {name: x.shape for name, x in ConformerLayer(config).state_dict().items()}
    other = {name for name, _ in {(n, x.shape) for n, x in ours.items()} ^ set(wanted.items())}
    need(not other, f"tensors that are missing, or of other shapes than ours: {', '.join(sorted(other))}")
    return config, ours
