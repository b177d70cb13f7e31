"""Our layer behind the calls of transformers' layers.  Imports transformers: load it only for a model of theirs.

The classes derive from those they replace, because transformers records hidden states by class and checkpoints
activations in a base class.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderBlock
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoderLayer

from ..layer import ConformerLayer, Positions
from .adapter import lengths_of_scores_mask
from .keys import use_peer_names
from .transformers import LAYER_KEYS, PARAKEET_LAYER_KEYS

__all__ = ["ParakeetLayer", "Wav2Vec2ConformerLayer"]


def _keep_checkpointing(adapter: nn.Module, replaced: nn.Module) -> None:
    for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
        if name in vars(replaced):
            setattr(adapter, name, vars(replaced)[name])


def _refuse_attentions(kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "output_attentions=True, but an accelerated layer never forms the attention weights; leave it out, or call "
            "the model without lcconformer.accelerate"
        )


def _project(layer: ConformerLayer, table: Tensor) -> Tensor:
    """Project the model's own position embeddings: ``[2T-1, D] -> [2T-1, H, D/H]``."""
    return layer.attention.pos(table).unflatten(-1, (layer.attention.heads, -1))


class Wav2Vec2ConformerLayer(Wav2Vec2ConformerEncoderLayer):
    """``(hidden_states [B, T, D], attention_mask, relative_position_embeddings) -> [B, T, D]``."""

    def __init__(self, layer: ConformerLayer, replaced: nn.Module) -> None:
        nn.Module.__init__(self)  # none of the replaced layer's own modules
        self.layer = layer
        use_peer_names(self, LAYER_KEYS, {"layer.": ""})
        _keep_checkpointing(self, replaced)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        _refuse_attentions(kwargs)
        lengths = None if attention_mask is None else lengths_of_scores_mask(attention_mask, queries=False)
        positions: Positions = None
        if self.layer.attention.position != "none":
            if relative_position_embeddings is None:
                raise ValueError("relative_position_embeddings is None; expected those of the encoder")
            if self.layer.attention.position == "rotary":
                cos, sin = relative_position_embeddings[:, :, 0, 0]  # each [T, D/H]
                positions = cos, sin
            else:
                positions = _project(self.layer, relative_position_embeddings[0])
        return self.layer(hidden_states, lengths, positions)


class ParakeetLayer(ParakeetEncoderBlock):
    """``(hidden_states [B, T, D], attention_mask, position_embeddings) -> [B, T, D]``, in evaluation mode."""

    def __init__(self, layer: ConformerLayer, replaced: nn.Module) -> None:
        nn.Module.__init__(self)  # none of the replaced layer's own modules
        self.layer = layer
        use_peer_names(self, PARAKEET_LAYER_KEYS, {"layer.": ""})
        _keep_checkpointing(self, replaced)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        _refuse_attentions(kwargs)
        if position_embeddings is None:
            raise ValueError("position_embeddings is None; expected those of the encoder")
        lengths = None if attention_mask is None else lengths_of_scores_mask(attention_mask, queries=True)
        # without dropout all rows of the batch are the same
        return self.layer(hidden_states, lengths, _project(self.layer, position_embeddings[0]))
