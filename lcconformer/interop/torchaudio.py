"""torchaudio's Conformer layer under our names."""

from __future__ import annotations

from .keys import Key

__all__ = ["LAYER_KEYS"]


def _both(ours: str, theirs: str, pointwise: bool = False) -> tuple[Key, Key]:
    return Key(f"{ours}.weight", (f"{theirs}.weight",), pointwise), Key(f"{ours}.bias", (f"{theirs}.bias",))


def _ffn(name: str) -> tuple[Key, ...]:
    return (
        *_both(f"{name}.norm", f"{name}.sequential.0"),
        *_both(f"{name}.up", f"{name}.sequential.1"),
        *_both(f"{name}.down", f"{name}.sequential.4"),
    )


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

LAYER_KEYS: tuple[Key, ...] = (
    *_ffn("ffn1"),
    *_both("attention.norm", "self_attn_layer_norm"),
    Key("attention.qkv.weight", ("self_attn.in_proj_weight",)),
    Key("attention.qkv.bias", ("self_attn.in_proj_bias",)),
    *_both("attention.out", "self_attn.out_proj"),
    *_both("conv.norm", "conv_module.layer_norm"),
    *_both("conv.pointwise1", "conv_module.sequential.0", pointwise=True),
    *_both("conv.depthwise", "conv_module.sequential.2"),
    *_both("conv.depthwise_norm", "conv_module.sequential.3"),
    *(Key(f"conv.depthwise_norm.{s}", (f"conv_module.sequential.3.{s}",)) for s in _STATISTICS),
    *_both("conv.pointwise2", "conv_module.sequential.5", pointwise=True),
    *_ffn("ffn2"),
    *_both("norm", "final_layer_norm"),
)
