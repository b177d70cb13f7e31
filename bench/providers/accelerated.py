"""The encoders that ``accelerate`` serves, as their packages make them but for front ends and LayerDrop."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.case import Case
from . import nemo, peers, speechbrain

__all__ = ["PEERS", "Peer"]


@dataclass(frozen=True)
class Peer:
    """An encoder of another package with N layers, its activation and its dropouts as its own defaults say.

    Attributes:
        name: of the model, as in the README.
        package: distribution whose version a row names.
        build: makes it for a case.
        missing: says why it cannot be built here; None: it can.
    """

    name: str
    package: str
    build: Callable[[Case], nn.Module]
    missing: Callable[[], str | None]


class _Call(nn.Module):
    """A model called by a function of it and of ``x [B, T, d_model]``."""

    def __init__(self, model: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.model, x)


def _lengths(x: Tensor) -> Tensor:
    return torch.full((x.shape[0],), x.shape[1], device=x.device)


def _first(model: Any, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out[0]


def _transformers(name: str, prefix: str, config_name: str, settings: Callable[[Case], dict[str, Any]]) -> Peer:
    def build(case: Case) -> nn.Module:
        peers.import_transformers()
        import transformers

        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        own = {"hidden_size": case.d_model, "conv_depthwise_kernel_size": case.kernel}
        config = getattr(transformers, config_name)(**own, **settings(case))
        config._attn_implementation = "sdpa"
        return _Call(getattr(module, f"{prefix}Encoder")(config), _first)

    return Peer(
        prefix.removesuffix("Conformer") if "M4T" in prefix else prefix, "transformers", build, _needs("transformers")
    )


def _needs(package: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        return None if importlib.util.find_spec(package) else f"{package} is not installed; pip install {package}"

    return missing


def _needs_torchaudio() -> str | None:
    return None if peers.torchaudio_file() else "torchaudio is not installed; pip install torchaudio"


def _wav2vec2_settings(case: Case) -> dict[str, Any]:
    dropouts = dict.fromkeys(
        ("hidden_dropout", "activation_dropout", "attention_dropout", "conformer_conv_dropout"), case.dropout
    )
    return {
        "num_attention_heads": case.num_heads,
        "intermediate_size": case.ffn_dim,
        "num_hidden_layers": case.layers,
        "layerdrop": 0.0,
        **dropouts,
    }


def _seamless_settings(case: Case) -> dict[str, Any]:
    return {
        "speech_encoder_attention_heads": case.num_heads,
        "speech_encoder_intermediate_size": case.ffn_dim,
        "speech_encoder_layers": case.layers,
        "speech_encoder_layerdrop": 0.0,
        "speech_encoder_dropout": case.dropout,
    }


def _espnet(case: Case) -> nn.Module:
    module: Any = importlib.import_module("espnet2.asr.encoder.conformer_encoder")
    encoder = module.ConformerEncoder(
        case.d_model,
        output_size=case.d_model,
        attention_heads=case.num_heads,
        linear_units=case.ffn_dim,
        num_blocks=case.layers,
        dropout_rate=case.dropout,
        positional_dropout_rate=0.0,
        attention_dropout_rate=case.dropout,
        input_layer=None,
        macaron_style=True,
        rel_pos_type="latest",
        cnn_module_kernel=case.kernel,
    )
    return _Call(encoder, lambda m, x: m(x, _lengths(x))[0])


def _nemo(case: Case) -> nn.Module:
    with nemo.source() as module:
        encoder = module.ConformerEncoder(
            feat_in=case.d_model,
            n_layers=case.layers,
            d_model=case.d_model,
            subsampling=None,
            n_heads=case.num_heads,
            conv_kernel_size=case.kernel,
            dropout=case.dropout,
            dropout_pre_encoder=0.0,
            dropout_emb=0.0,
            dropout_att=case.dropout,
        )
    return _Call(encoder, lambda m, x: m(audio_signal=x.transpose(1, 2), length=_lengths(x))[0].transpose(1, 2))


def _speechbrain(case: Case) -> nn.Module:
    with speechbrain.source() as module:
        encoder = module.ConformerEncoder(
            case.layers,
            case.d_model,
            case.ffn_dim,
            case.num_heads,
            kernel_size=case.kernel,
            dropout=case.dropout,
            attention_type="RoPEMHA",
        )
    return _Call(encoder, _first)


def _lucidrains(case: Case) -> nn.Module:
    module: Any = importlib.import_module("conformer")
    heads = {"dim_head": case.d_model // case.num_heads, "heads": case.num_heads}
    model = module.Conformer(case.d_model, depth=case.layers, **heads, conv_kernel_size=case.kernel)
    return _Call(model, lambda m, x: m(x))


PEERS: tuple[Peer, ...] = (
    Peer("torchaudio", "torchaudio", peers.torchaudio, _needs_torchaudio),
    _transformers("wav2vec2_conformer", "Wav2Vec2Conformer", "Wav2Vec2ConformerConfig", _wav2vec2_settings),
    _transformers("wav2vec2_bert", "Wav2Vec2Bert", "Wav2Vec2BertConfig", _wav2vec2_settings),
    _transformers("seamless_m4t", "SeamlessM4TConformer", "SeamlessM4TConfig", _seamless_settings),
    _transformers("seamless_m4t_v2", "SeamlessM4Tv2Conformer", "SeamlessM4Tv2Config", _seamless_settings),
    Peer("Parakeet", "transformers", peers.parakeet, _needs("transformers")),
    Peer("NeMo", "nemo_toolkit", _nemo, nemo.missing),
    Peer("ESPnet", "espnet", _espnet, _needs("espnet2")),
    Peer("SpeechBrain", "speechbrain", _speechbrain, speechbrain.missing),
    Peer("lucidrains", "conformer", _lucidrains, _needs("conformer")),
)
