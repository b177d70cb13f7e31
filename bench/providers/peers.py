"""Encoders in wide use, wrapped as ``[B, T, d_model] -> [B, T, d_model]``, and the names of their layers' weights.

Front ends, LayerDrop and norms after the stack are removed: every peer does the work of N layers and nothing else.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lcconformer.interop.keys import Key

from ..core.case import Case

__all__ = [
    "PARAKEET_KEYS",
    "WAV2VEC2_KEYS",
    "import_transformers",
    "parakeet",
    "torchaudio",
    "torchaudio_file",
    "wav2vec2",
]


class _Call(nn.Module):
    """A peer's encoder, called with ``x [B, T, d_model]`` alone."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state


class _TorchaudioCall(_Call):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, torch.full((x.shape[0],), x.shape[1], device=x.device))[0]


class _PassThrough(nn.Module):
    """Replaces Parakeet's subsampling: the input already has the width and the frame rate of the layers."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


def torchaudio_file() -> Path | None:
    """Path of torchaudio's conformer.py, or None.

    The file is loaded by itself, because torchaudio cannot be imported where its native library does not fit torch.
    """
    spec = importlib.util.find_spec("torchaudio")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "models" / "conformer.py"
    return path if path.exists() else None


def torchaudio(case: Case) -> nn.Module:
    """Build ``torchaudio.models.Conformer``: no positions, BatchNorm."""
    spec = importlib.util.spec_from_file_location("torchaudio.models.conformer", torchaudio_file())
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Conformer(case.d_model, case.num_heads, case.ffn_dim, case.layers, case.kernel, dropout=case.dropout)
    return _TorchaudioCall(model, model.conformer_layers)


def import_transformers() -> None:
    """Import transformers' audio code, which imports torchaudio if installed: hide it where its library does not fit torch."""
    try:
        import torchaudio  # noqa: F401
    except ImportError:
        pass
    except OSError:
        import transformers.utils

        with mock.patch.object(transformers.utils, "is_torchaudio_available", return_value=False):
            import transformers.audio_utils


def wav2vec2(case: Case) -> nn.Module:
    """Build transformers' Wav2Vec2Conformer encoder: relative positions, BatchNorm, no convolution biases."""
    import_transformers()
    from transformers import Wav2Vec2ConformerConfig
    from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoder

    config: Any = Wav2Vec2ConformerConfig(
        hidden_size=case.d_model,
        num_hidden_layers=case.layers,
        num_attention_heads=case.num_heads,
        intermediate_size=case.ffn_dim,
        conv_depthwise_kernel_size=case.kernel,
        hidden_act="swish",
        position_embeddings_type="relative",
        hidden_dropout=case.dropout,
        activation_dropout=case.dropout,
        attention_dropout=case.dropout,
        conformer_conv_dropout=case.dropout,
        layerdrop=0.0,
    )
    config._attn_implementation = "sdpa"
    model: Any = Wav2Vec2ConformerEncoder(config)
    model.layer_norm = nn.Identity()
    # its forward does not use it
    del model.pos_conv_embed
    return _Call(model, model.layers)


def parakeet(case: Case) -> nn.Module:
    """Build transformers' Parakeet (FastConformer) encoder: BatchNorm, no dropout on residual branches."""
    import_transformers()
    from transformers import ParakeetEncoder, ParakeetEncoderConfig

    config: Any = ParakeetEncoderConfig(
        hidden_size=case.d_model,
        num_hidden_layers=case.layers,
        num_attention_heads=case.num_heads,
        intermediate_size=case.ffn_dim,
        conv_kernel_size=case.kernel,
        dropout=case.dropout,
        activation_dropout=case.dropout,
        attention_dropout=case.dropout,
        layerdrop=0.0,
        scale_input=False,
    )
    config._attn_implementation = "sdpa"
    model: Any = ParakeetEncoder(config)
    model.subsampling = _PassThrough()
    return _Call(model, model.layers)


def _both(ours: str, theirs: str, pointwise: bool = False) -> tuple[Key, Key]:
    return Key(f"{ours}.weight", (f"{theirs}.weight",), pointwise), Key(f"{ours}.bias", (f"{theirs}.bias",))


def _batch_norm(theirs: str) -> tuple[Key, ...]:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return tuple(Key(f"conv.depthwise_norm.{n}", (f"{theirs}.{n}",)) for n in names)


def _packed(ours: str, theirs: tuple[str, ...]) -> tuple[Key, Key]:
    return Key(f"{ours}.weight", tuple(f"{t}.weight" for t in theirs)), Key(
        f"{ours}.bias", tuple(f"{t}.bias" for t in theirs)
    )


WAV2VEC2_KEYS: tuple[Key, ...] = (
    *_both("ffn1.norm", "ffn1_layer_norm"),
    *_both("ffn1.up", "ffn1.intermediate_dense"),
    *_both("ffn1.down", "ffn1.output_dense"),
    *_both("attention.norm", "self_attn_layer_norm"),
    *_packed("attention.qkv", ("self_attn.linear_q", "self_attn.linear_k", "self_attn.linear_v")),
    *_both("attention.out", "self_attn.linear_out"),
    Key("attention.pos.weight", ("self_attn.linear_pos.weight",)),
    Key("attention.u", ("self_attn.pos_bias_u",)),
    Key("attention.v_bias", ("self_attn.pos_bias_v",)),
    *_both("conv.norm", "conv_module.layer_norm"),
    Key("conv.pointwise1.weight", ("conv_module.pointwise_conv1.weight",), pointwise=True),
    Key("conv.depthwise.weight", ("conv_module.depthwise_conv.weight",)),
    *_batch_norm("conv_module.batch_norm"),
    Key("conv.pointwise2.weight", ("conv_module.pointwise_conv2.weight",), pointwise=True),
    *_both("ffn2.norm", "ffn2_layer_norm"),
    *_both("ffn2.up", "ffn2.intermediate_dense"),
    *_both("ffn2.down", "ffn2.output_dense"),
    *_both("norm", "final_layer_norm"),
)

PARAKEET_KEYS: tuple[Key, ...] = (
    *_both("ffn1.norm", "norm_feed_forward1"),
    *_both("ffn1.up", "feed_forward1.linear1"),
    *_both("ffn1.down", "feed_forward1.linear2"),
    *_both("attention.norm", "norm_self_att"),
    *_packed("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    *_both("attention.out", "self_attn.o_proj"),
    Key("attention.pos.weight", ("self_attn.relative_k_proj.weight",)),
    Key("attention.u", ("self_attn.bias_u",)),
    Key("attention.v_bias", ("self_attn.bias_v",)),
    *_both("conv.norm", "norm_conv"),
    *_both("conv.pointwise1", "conv.pointwise_conv1", pointwise=True),
    *_both("conv.depthwise", "conv.depthwise_conv"),
    *_batch_norm("conv.norm"),
    *_both("conv.pointwise2", "conv.pointwise_conv2", pointwise=True),
    *_both("ffn2.norm", "norm_feed_forward2"),
    *_both("ffn2.up", "feed_forward2.linear1"),
    *_both("ffn2.down", "feed_forward2.linear2"),
    *_both("norm", "norm_out"),
)
