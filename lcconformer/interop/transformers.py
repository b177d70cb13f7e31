"""Conformer layers of Hugging Face transformers: their weights under our names, and our computation under their calls.

transformers itself is imported only where one of its models records outputs.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..loop.weights import Table
from ..ops.checks import readable as readable_values
from ..plain import readable
from ..positions import apply_rotary
from .accelerated import AcceleratedLayer
from .adapter import (
    NotPadding,
    activation_of,
    check_activations,
    check_convolutions,
    check_norms,
    lengths_of_padding,
    lengths_of_scores_mask,
    need,
    relative_table,
    untouched,
)
from .engine import Embedded
from .keys import layer_keys, weight_and_bias
from .layer import Convolution, FeedForward, Parts, attend_relative, probability

__all__ = [
    "LAYER_KEYS",
    "PARAKEET_LAYER_KEYS",
    "ParakeetLayer",
    "SeamlessM4TLayer",
    "SeamlessM4Tv2Layer",
    "Wav2Vec2BertLayer",
    "Wav2Vec2ConformerLayer",
]

_CAPTURING = "transformers.utils.output_capturing"

LAYER_KEYS = layer_keys(
    norms=(
        "ffn1_layer_norm",
        "self_attn_layer_norm",
        "conv_module.layer_norm",
        "ffn2_layer_norm",
        "final_layer_norm",
    ),
    ffn1=("ffn1.intermediate_dense", "ffn1.output_dense"),
    qkv=("self_attn.linear_q", "self_attn.linear_k", "self_attn.linear_v"),
    out="self_attn.linear_out",
    positions=("self_attn.linear_pos", "self_attn.pos_bias_u", "self_attn.pos_bias_v"),
    conv=(
        "conv_module.pointwise_conv1",
        "conv_module.depthwise_conv",
        "conv_module.batch_norm",
        "conv_module.pointwise_conv2",
    ),
    ffn2=("ffn2.intermediate_dense", "ffn2.output_dense"),
    conv_bias=False,
)
"""Keys of ``Wav2Vec2ConformerEncoderLayer``, which SeamlessM4T's has as well."""

_CAUSAL_KEYS = (
    *(key for key in LAYER_KEYS if not key.ours.startswith("conv.depthwise_norm.")),
    *weight_and_bias("conv.depthwise_norm", "conv_module.depthwise_layer_norm"),
)
# position_embeddings_type -> position of the engine, which has the distances of relative_key as a table; it has no rotary
_POSITIONS = {None: "none", "relative": "relative", "relative_key": "none"}

PARAKEET_LAYER_KEYS = layer_keys(
    norms=("norm_feed_forward1", "norm_self_att", "norm_conv", "norm_feed_forward2", "norm_out"),
    ffn1=("feed_forward1.linear1", "feed_forward1.linear2"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    positions=("self_attn.relative_k_proj", "self_attn.bias_u", "self_attn.bias_v"),
    conv=("conv.pointwise_conv1", "conv.depthwise_conv", "conv.norm", "conv.pointwise_conv2"),
    ffn2=("feed_forward2.linear1", "feed_forward2.linear2"),
)
"""Keys of ``ParakeetEncoderBlock``."""


def _intact(attention: Any, cls: type[nn.Module]) -> bool:
    """Return whether nothing is lost if the attention module is read: hooks of transformers may be there, idle."""
    hooks = attention._forward_hooks
    if not hooks:
        return untouched([(attention, cls)])
    if torch.compiler.is_compiling() or any(h.__module__ != _CAPTURING for h in hooks.values()):
        return False
    captured = importlib.import_module(_CAPTURING)._active_collector.get()
    quiet = captured is None or "attentions" not in captured
    others = (attention._forward_pre_hooks, attention._backward_hooks, attention._backward_pre_hooks)
    return quiet and readable(()) and type(attention) is cls and "forward" not in vars(attention) and not any(others)


def _check_implementation(attention: Any, *known: str) -> None:
    found = attention.config._attn_implementation
    need(
        found in known, f"attention implementation {found!r}; ours takes the masks of {' and '.join(map(repr, known))}"
    )


class _Wav2Vec2Layer(AcceleratedLayer):
    """The layer that Wav2Vec2Conformer, Wav2Vec2Bert and both SeamlessM4T share but for a few settings.

    Attributes:
        masked: padding is zeroed in front of the depthwise convolution.
        causal: the depthwise convolution is causal, and a LayerNorm follows it.
    """

    own_classes = ("{}FeedForward", "{}SelfAttention", "{}ConvolutionModule")
    keys = LAYER_KEYS
    masked: ClassVar[bool]
    causal: ClassVar[bool] = False
    implementations: ClassVar[tuple[str, ...]] = ("eager", "sdpa")

    def check_structure(self) -> None:
        layer: Any = self
        conv = layer.conv_module
        check_convolutions(conv.pointwise_conv1, conv.depthwise_conv, conv.pointwise_conv2, padded=self.causal)
        check_norms(layer)
        check_activations(layer.ffn1.intermediate_act_fn, layer.ffn2.intermediate_act_fn, conv.activation)
        _check_implementation(layer.self_attn, *self.implementations)
        kind = layer.self_attn.position_embeddings_type
        need(kind in ("relative", "rotary", "relative_key", None), f"position_embeddings_type {kind!r}")

    def parts(self, positions: Tensor | None = None) -> Parts | None:
        layer: Any = self
        feed_forward, attention, convolution = self.own
        conv, dropout = layer.conv_module, layer.self_attn_dropout
        passed: list[tuple[nn.Module, type[nn.Module]]] = [
            *((module, feed_forward) for module in (layer.ffn1, layer.ffn2)),
            (conv, convolution),
            (conv.glu, nn.GLU),
            *((module, nn.Dropout) for module in (dropout, conv.dropout, layer.self_attn.dropout)),
            *((m, nn.Dropout) for f in (layer.ffn1, layer.ffn2) for m in (f.intermediate_dropout, f.output_dropout)),
        ]
        activation = activation_of(conv.activation)
        ffn1 = self._feed_forward(layer.ffn1_layer_norm, layer.ffn1)
        ffn2 = self._feed_forward(layer.ffn2_layer_norm, layer.ffn2)
        if ffn1 is None or ffn2 is None or activation is None:
            return None
        if (
            not untouched(passed)
            or not _intact(layer.self_attn, attention)
            or probability(layer.self_attn.dropout) >= 1
        ):
            return None
        return Parts(
            ffn1=ffn1,
            attention_norm=layer.self_attn_layer_norm,
            attend=functools.partial(self._attend, positions),
            attention_inside=probability(layer.self_attn.dropout),
            attention_on=probability(dropout),
            attention_bias=True,
            conv=Convolution(
                norm=conv.layer_norm,
                pointwise1=conv.pointwise_conv1,
                depthwise=conv.depthwise_conv,
                depthwise_norm=conv.depthwise_layer_norm if self.causal else conv.batch_norm,
                pointwise2=conv.pointwise_conv2,
                activation=activation,
                masked=self.masked,
                causal=self.causal,
                on=probability(conv.dropout),
            ),
            ffn2=ffn2,
            norm=layer.final_layer_norm,
            convolution_first=False,
        )

    @staticmethod
    def _feed_forward(norm: nn.Module, module: Any) -> FeedForward | None:
        activation = activation_of(module.intermediate_act_fn)
        if activation is None:
            return None
        inside, on = probability(module.intermediate_dropout), probability(module.output_dropout)
        return FeedForward(norm, module.intermediate_dense, module.output_dense, activation, inside, on)

    def _attend(self, positions: Tensor | None, h: Tensor, lengths: Tensor | None) -> Tensor:
        attention: Any = self.self_attn
        kind, split = attention.position_embeddings_type, (attention.num_heads, attention.head_size)
        if kind == "relative":
            assert positions is not None
            return attend_relative(
                h,
                lengths,
                positions[0],
                heads=attention.num_heads,
                qkv=(attention.linear_q, attention.linear_k, attention.linear_v),
                pos=attention.linear_pos,
                biases=(attention.pos_bias_u, attention.pos_bias_v),
                out=attention.linear_out,
                dropout_p=probability(attention.dropout),
            )
        rotated = h
        if kind == "rotary":
            assert positions is not None
            cos, sin = positions[:, : h.shape[1], 0, 0]  # each [T, D/H]
            rotated = apply_rotary(h.unflatten(-1, split), cos.to(h.dtype), sin.to(h.dtype)).flatten(-2)
        q, k = (linear(rotated).unflatten(-1, split) for linear in (attention.linear_q, attention.linear_k))
        v = attention.linear_v(h).unflatten(-1, split)  # [B, T, H, D/H]
        relative: tuple[Tensor, ...] = ()
        if kind == "relative_key":
            table = self._embedded().rows(h.shape[1], h.device).unsqueeze(1).expand(-1, *split)
            relative = table, h.new_zeros(split), h.new_zeros(split)
        o = ops.relpos_attention(
            q, k, v, *(x.to(q.dtype) for x in relative), lengths=lengths, dropout_p=probability(attention.dropout)
        )
        return attention.linear_out(o.flatten(-2))

    def _embedded(self) -> Embedded:
        attention: Any = self.self_attn
        clip = attention.left_max_position_embeddings, attention.right_max_position_embeddings
        return Embedded(attention.distance_embedding, *clip)

    def serve(
        self, x: Tensor, scores: Tensor | None, frames: Tensor | None, positions: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Run the layer on ``x [B, T, D]``; None: only the peer's own forward will do.

        Args:
            scores: mask of attention.
            frames: mask of the convolution ``[B, T]``, true at real frames.
            positions: those of the encoder.
            kwargs: the rest of the call.
        """
        attention: Any = self.self_attn
        kind = attention.position_embeddings_type
        if kwargs.get("output_attentions") or (kind in ("relative", "rotary") and positions is None):
            return None
        try:
            lengths = None if scores is None else lengths_of_scores_mask(scores, x.shape[0], queries=False)
            if frames is not None:
                convolved = lengths_of_padding(frames, keep=True)
                if lengths is not None and readable_values(lengths) and not torch.equal(lengths, convolved):
                    return None
                lengths = convolved
        except NotPadding:
            return None
        parts = self.parts(positions)
        if parts is None:
            return None
        position = _POSITIONS.get(kind)
        table: Table | None = None
        if kind == "relative_key":
            table = self._embedded()
        elif kind == "relative" and positions is not None:
            table = relative_table(positions)
        return self.run(parts, x, lengths, attention.num_heads, position, table)


class Wav2Vec2ConformerLayer(_Wav2Vec2Layer):
    """``(hidden_states [B, T, D], attention_mask, relative_position_embeddings) -> [B, T, D]``."""

    masked = False

    def heads_and_position(self) -> tuple[int, str]:
        attention: Any = self.self_attn
        kind = attention.position_embeddings_type
        need(kind in ("relative", None), f"position_embeddings_type {kind!r}; expected 'relative' or None")
        return attention.num_heads, kind or "none"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        y = self.serve(hidden_states, attention_mask, None, relative_position_embeddings, kwargs)
        if y is None:
            return super().forward(hidden_states, attention_mask, relative_position_embeddings, **kwargs)
        return y


class SeamlessM4TLayer(_Wav2Vec2Layer):
    """As :class:`Wav2Vec2ConformerLayer`, with ``conv_attention_mask [B, T]``."""

    masked = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
        conv_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        masks = attention_mask, conv_attention_mask
        y = self.serve(hidden_states, *masks, relative_position_embeddings, kwargs)
        if y is None:
            mask, conv_mask = masks
            return super().forward(hidden_states, mask, relative_position_embeddings, conv_mask, **kwargs)
        return y


class Wav2Vec2BertLayer(SeamlessM4TLayer):
    """As :class:`SeamlessM4TLayer`, with a causal convolution and a LayerNorm in it."""

    keys = _CAUSAL_KEYS
    causal = True


class SeamlessM4Tv2Layer(_Wav2Vec2Layer):
    """``(hidden_states [B, T, D], attention_mask, conv_attention_mask [B, T]) -> [B, T, D]``."""

    keys = _CAUSAL_KEYS
    masked = True
    causal = True
    # eager attention of transformers adds the boolean mask to the scores (5.18), and padding leaks
    implementations = ("sdpa",)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        conv_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        y = None
        attention: Any = self.self_attn
        if attention.config._attn_implementation in self.implementations:
            y = self.serve(hidden_states, attention_mask, conv_attention_mask, None, kwargs)
        if y is None:
            return super().forward(hidden_states, attention_mask, conv_attention_mask, **kwargs)
        return y


class ParakeetLayer(AcceleratedLayer):
    """``(hidden_states [B, T, D], attention_mask, position_embeddings) -> [B, T, D]``."""

    own_classes = ("ParakeetEncoderFeedForward", "ParakeetEncoderAttention", "ParakeetEncoderConvolutionModule")
    keys = PARAKEET_LAYER_KEYS

    def check_structure(self) -> None:
        layer: Any = self
        conv, attention = layer.conv, layer.self_attn
        check_convolutions(conv.pointwise_conv1, conv.depthwise_conv, conv.pointwise_conv2)
        check_norms(layer)
        check_activations(layer.feed_forward1.activation, layer.feed_forward2.activation, conv.activation)
        _check_implementation(attention, "eager", "sdpa")
        config = attention.config
        need(config.num_key_value_heads == config.num_attention_heads, "grouped keys (num_key_value_heads)")

    def parts(self, positions: Tensor | None = None) -> Parts | None:
        layer: Any = self
        feed_forward, attention, convolution = self.own
        conv = layer.conv
        passed = [(layer.feed_forward1, feed_forward), (layer.feed_forward2, feed_forward), (conv, convolution)]
        activation = activation_of(conv.activation)
        ffn1 = self._feed_forward(layer.norm_feed_forward1, layer.feed_forward1)
        ffn2 = self._feed_forward(layer.norm_feed_forward2, layer.feed_forward2)
        if ffn1 is None or ffn2 is None or activation is None:
            return None
        if not untouched(passed) or not _intact(layer.self_attn, attention) or self._dropped() >= 1:
            return None
        return Parts(
            ffn1=ffn1,
            attention_norm=layer.norm_self_att,
            attend=functools.partial(self._attend, positions),
            attention_inside=self._dropped(),
            attention_on=0.0,
            attention_bias=layer.self_attn.config.attention_bias,
            conv=Convolution(
                norm=layer.norm_conv,
                pointwise1=conv.pointwise_conv1,
                depthwise=conv.depthwise_conv,
                depthwise_norm=conv.norm,
                pointwise2=conv.pointwise_conv2,
                activation=activation,
                masked=True,
                causal=False,
                on=0.0,
            ),
            ffn2=ffn2,
            norm=layer.norm_out,
            convolution_first=False,
        )

    @staticmethod
    def _feed_forward(norm: nn.Module, module: Any) -> FeedForward | None:
        activation = activation_of(module.activation)
        if activation is None:
            return None
        # within the branch alone: Parakeet drops nothing on residual branches
        inside = module.activation_dropout if module.training else 0.0
        return FeedForward(norm, module.linear1, module.linear2, activation, inside, 0.0)

    def heads_and_position(self) -> tuple[int, str]:
        attention: Any = self.self_attn
        return attention.config.num_attention_heads, "relative"

    def _dropped(self) -> float:
        attention: Any = self.self_attn
        return attention.attention_dropout if attention.training else 0.0

    def _attend(self, positions: Tensor | None, h: Tensor, lengths: Tensor | None) -> Tensor:
        attention: Any = self.self_attn
        assert positions is not None
        return attend_relative(
            h,
            lengths,
            positions[0],
            heads=attention.config.num_attention_heads,
            qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
            pos=attention.relative_k_proj,
            biases=(attention.bias_u, attention.bias_v),
            out=attention.o_proj,
            dropout_p=self._dropped(),
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        y = None
        if position_embeddings is not None and not kwargs.get("output_attentions"):
            y = self._serve(hidden_states, attention_mask, position_embeddings)
        if y is None:
            return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)
        return y

    def _serve(self, x: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor | None:
        attention: Any = self.self_attn
        config = attention.config
        if self.training and config.dropout_positions and x.shape[0] > 1:
            return None  # each utterance has positions of its own
        try:
            lengths = None if mask is None else lengths_of_scores_mask(mask, x.shape[0], queries=True)
        except NotPadding:
            return None
        parts = self.parts(positions)
        if parts is None:
            return None
        return self.run(parts, x, lengths, config.num_attention_heads, "relative", relative_table(positions))
