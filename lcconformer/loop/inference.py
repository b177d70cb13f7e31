"""The inference engine: on a GPU the loop as CUDA graphs (:mod:`.graphs`), on a CPU on packed weights (:mod:`.weights`).

On the CPU a loop is five kernels in buffers made once per call: rows (feed-forward, norm, projection), attention, rows,
convolution, rows.  Everything is float32 inside, whatever the dtype of the encoder, and a frame gets the same bits in
any batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcconformer import extension
from lcconformer.ops.availability import cpu_reasons
from lcconformer.ops.native import i64, pointer
from lcconformer.ops.native import run as run_kernel
from lcconformer.ops.registry import Choice, forced_backend, note

from . import graphs, weights
from .watch import watch
from .weights import PANEL, ROWS, Norm, PackedLayer

if TYPE_CHECKING:
    from lcconformer.encoder import ConformerEncoder

__all__ = ["reasons", "run", "slower"]

OP = "shared_loop"


def reasons(encoder: ConformerEncoder, x: Tensor, lengths: Tensor | None) -> list[str]:
    """Why this engine cannot run the loops of ``x [B, T, d_model]``; empty: it can."""
    config = encoder.config
    layers = watch(encoder)
    found = layers.changed() or layers.unfit(x.dtype)
    if torch.is_autocast_enabled(x.device.type):
        found.append("autocast is on")
    if x.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            found.append("a CUDA graph is being captured, which the modules become part of")
        return found
    found += cpu_reasons(x.device, x.dtype)
    if forced_backend() not in ("auto", "cpu"):
        found.append(f"backend {forced_backend()!r} is forced, and the engine is made of CPU kernels")
    if config.activation != "silu":
        found.append(f"activation {config.activation!r} is not fused, only 'silu' is")
    if config.position == "rotary":
        found.append("rotary positions are left to the modules")
    return found


# float32 engine against the bfloat16 products of oneDNN, EPYC 9004, d = 256, times as fast: 2.5 at 16 frames, 1.09 at 100,
# 0.82 at 400, 0.76 at 8 x 400
_BFLOAT16_FRAMES = 192


def slower(x: Tensor) -> list[str]:
    """Why the modules are, or may be, faster for ``x [B, T, d_model]``; empty: they are not."""
    if x.device.type == "cuda":
        return ["no GPU has measured the engine yet; LCCONFORMER_ENGINE=loop forces it"]
    products = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if x.dtype == torch.bfloat16 and products and x.shape[0] * x.shape[1] > _BFLOAT16_FRAMES:
        return ["the engine works in float32, and this processor is faster at products of bfloat16"]
    return []


@torch.no_grad()
def run(
    encoder: ConformerEncoder, x: Tensor, lengths: Tensor | None, depth: int, return_hidden_states: bool
) -> list[Tensor]:
    """Outputs ``[B, T, d_model]`` of each loop if ``return_hidden_states``, else of the last alone."""
    if not x.numel():
        return [x.clone() for _ in range(depth if return_hidden_states else 1)]
    if x.device.type == "cuda":
        return graphs.run(encoder, x, lengths, depth, return_hidden_states)
    note(Choice(OP, "cpu"))
    layers = weights.packed(encoder, depth)
    loop = _Loop(encoder, x, lengths)
    outputs = []
    for k, layer in enumerate(layers):
        if encoder.conditioning is not None:
            loop.x.copy_(encoder.conditioning.enter(loop.x, k))
        loop.step(layer)
        if return_hidden_states or k == depth - 1:
            outputs.append(loop.x.to(x.dtype, copy=k < depth - 1))
    return outputs


class _Loop:
    """The residual stream of one call, its buffers, and what is the same in all its loops."""

    def __init__(self, encoder: ConformerEncoder, x: Tensor, lengths: Tensor | None) -> None:
        config = self.config = encoder.config
        b, t, d = x.shape

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device="cpu")

        self.x = empty(b, t, d).copy_(x)
        self.lengths = i64(lengths)
        # the last tile of rows may reach beyond the last frame
        rows = b * t + ROWS
        self.wide = empty(rows, -(-3 * d // PANEL) * PANEL)  # queries, keys, values; or values and gates
        self.branch = empty(rows, d)  # output of attention or convolution
        self.rows = {"x": pointer(self.x), "M": b * t, "D": d, "eps": config.layer_norm_eps}
        self.rows |= {"threads": torch.get_num_threads(), "branch": pointer(self.branch)}
        self.rows |= {"out": pointer(self.wide), "out_stride": self.wide.stride(0)}

        h, pitch = config.num_heads, self.wide.stride(0)
        heads = [(pointer(self.wide) + 4 * i * d, t * pitch, pitch, d // h) for i in range(3)]
        self.attention: dict[str, Any] = dict(zip("qkv", heads))
        self.attention |= {"B": b, "T": t, "H": h, "D": d // h, "rows": b * t}
        self.attention |= {"lengths": pointer(self.lengths), "out": pointer(self.branch)}

        masked = pointer(self.lengths) if config.padding == "masked" else 0
        self.conv: dict[str, Any] = {"x": pointer(self.wide), "x_stride_b": t * pitch, "x_stride_t": pitch}
        self.conv |= {"B": b, "T": t, "C": d, "K": config.conv_kernel_size, "groups": config.conv_norm_groups}
        self.conv |= {"lengths": masked, "out": pointer(self.branch), "eps": config.layer_norm_eps}
        self.norm = {"layer": 1, "group": 4}.get(config.conv_norm, 0)  # enum Norm of csrc/cpu/kernels.h
        if config.conv_norm == "group":
            self.before_norm = empty(b, t, d)
            self.mean, self.var = empty(2, b, config.conv_norm_groups)
            self.conv |= {"y": pointer(self.before_norm), "mean": pointer(self.mean), "var": pointer(self.var)}

    def step(self, layer: PackedLayer) -> None:
        """One loop, in place."""
        rows = extension.load().cpu.rows_forward
        attention, conv = layer.attention, layer.conv
        first, second = (attention.norm, attention.qkv), (conv.norm, conv.pointwise1)
        merge_first, merge_second = attention.out, conv.pointwise2
        if self.config.convolution_first:
            first, second, merge_first, merge_second = second, first, merge_second, merge_first

        ffn = layer.ffn1
        rows(**self.rows, hidden_norm=ffn.norm.fields, up=ffn.up.fields, down=ffn.down.fields, **_project(*first))
        self._middle(layer, self.config.convolution_first)
        rows(**self.rows, merge=merge_first.fields, **_project(*second))
        self._middle(layer, not self.config.convolution_first)
        ffn = layer.ffn2
        hidden = {"hidden_norm": ffn.norm.fields, "up": ffn.up.fields, "down": ffn.down.fields}
        rows(**self.rows, merge=merge_second.fields, **hidden, norm=layer.norm.fields)

    def _middle(self, layer: PackedLayer, convolution: bool) -> None:
        if convolution:
            conv = layer.conv
            affine = conv.depthwise_norm or Norm(conv.bias, conv.bias)
            fields = {"norm_weight": pointer(affine.weight), "norm_bias": pointer(affine.bias), "norm": self.norm}
            run_kernel("conv_forward", self.x, taps=pointer(conv.taps), bias=pointer(conv.bias), **fields, **self.conv)
            return
        attention = layer.attention
        panels = layer.position_panels(self.x.shape[1])
        relative = {"pos_panels": pointer(panels), "u": pointer(attention.u), "v_bias": pointer(attention.v_bias)}
        run_kernel("attention_forward", self.x, **self.attention, **relative)


def _project(norm: Norm, matrix: weights.Matrix) -> dict[str, Any]:
    return {"norm": norm.fields, "next": matrix.fields}
