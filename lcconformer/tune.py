"""Which launch configurations of the Triton kernels are fastest on this GPU.

The kernels' heuristics choose by what the compiler reports (registers, spills, shared memory). Tuning measures a few
neighbours of every choice in a training step of one layer, and writes the fastest to a file that later processes load.
It also decides, per shape, whether the feed-forward's GEMMs are cuBLAS or have the other steps fused in; nothing else does.
Nothing is ever tuned unasked. Every neighbour is compiled, which takes minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["LayerShape", "calls", "tune", "tune_gpu"]

OPS = ("feed_forward", "relpos_attention", "glu_depthwise_conv", "residual_layer_norm")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# a candidate replaces the heuristic's choice if it takes at most this part of its time; smaller gains are noise
GAIN = 0.97

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class LayerShape:
    """The layer and the batch to tune for: numbers of utterances, frames, heads and taps, widths, dtype of the activations."""

    batch: int = 32
    frames: int = 400
    d_model: int = 256
    ffn_dim: int | None = None
    heads: int = 4
    kernel_size: int = 31
    norm: str = "layer"
    dropout: float = 0.0
    dtype: str = "bfloat16"


def tune_gpu(layer: LayerShape, ops: Sequence[str] = OPS, folder: Path | None = None) -> tuple[Path, int]:
    """Tune the launches of ``ops`` on the current GPU and write the fastest configurations to a file.

    Returns:
        The file, in ``folder`` or the default folder, and the number of configurations in it.

    Raises:
        NotImplementedError: there is no GPU that Triton serves.
    """
    from lcconformer.ops.availability import triton_reasons

    if not torch.cuda.is_available():
        raise NotImplementedError(
            "tuning measures a GPU and this machine has none that torch can use; run it on the machine that will train or "
            "serve, or do without: the kernels' own choices need no tuning"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    reasons = triton_reasons(device, DTYPES[layer.dtype])
    if reasons:
        raise NotImplementedError(f"nothing to tune: {'; '.join(reasons)}")
    from lcconformer.kernels import tuning

    gpu = torch.cuda.get_device_name(device)
    path = tuning.file_of(gpu, folder)
    table = tuning.read(path) if path.exists() else {}
    for name, call in calls(layer, device):
        if name.split()[0] in ops:
            table |= tune(name, call, median)
            tuning.write(path, gpu, table)
    return path, len(table)


def median(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU in milliseconds, with a cold L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def tune(name: str, call: Callable[[], object], timer: Timer) -> dict[str, object]:
    """Try the candidates of every launch in ``call``, one launch after another: key -> the fastest LaunchConfig."""
    import triton

    from lcconformer.kernels import tuning

    found = {}
    with tuning.watched() as (seen, forced):
        call()
        for key, candidates in list(seen.items()):
            seen.clear()
            call()
            if key not in seen:  # what an earlier choice replaced has no time
                continue
            times = []
            for candidate in candidates:
                forced[key] = candidate
                try:
                    times.append(timer(call))
                except triton.TritonError:  # more shared memory or registers than there are
                    times.append(math.inf)
            best = min(range(len(times)), key=times.__getitem__)
            if times[best] > GAIN * times[0]:
                best = 0
            forced[key] = found[key] = candidates[best]
            print(f"{name}: {times[0]:.4f} -> {times[best]:.4f} ms  {key}  ->  {candidates[best]}", flush=True)
    return found


def calls(layer: LayerShape, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of each op, at one layer's shape; residual_layer_norm last, for feed_forward uses its kernels."""
    from lcconformer.kernels import (
        feed_forward,
        glu_depthwise_conv,
        glu_depthwise_conv_backward,
        relpos_attention,
        residual_layer_norm,
    )
    from lcconformer.ops.dropout import dropout_seed

    b, t, d, h, p = layer.batch, layer.frames, layer.d_model, layer.heads, layer.dropout

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(DTYPES[layer.dtype])

    x, norm = make(b, t, d), (make(d), make(d))
    seed = dropout_seed(x, p)
    f = layer.ffn_dim or 4 * d
    rows, w1, b1, w2 = x.view(b * t, d), make(f, d), make(f), make(d, f)
    # as the training engine calls it, which has its LayerNorm elsewhere
    yield "feed_forward up", lambda: feed_forward.up(rows, w1, b1, seed, p)
    forward = (x, *norm, w1, b1, w2, make(d), seed, 0.5, p, 1e-5, True)
    yield "feed_forward forward", lambda: feed_forward.forward(*forward)
    _, *saved = feed_forward.forward(*forward)
    backward = (x, x, *norm, w1, b1, w2, *saved, seed, 0.5, p)
    yield "feed_forward backward", lambda: feed_forward.backward(*backward)

    qkv = make(b, t, 3, h, d // h).unbind(2)
    attention = (*qkv, make(2 * t - 1, h, d // h), make(h, d // h), make(h, d // h), None, None, seed)
    yield "relpos_attention forward", lambda: relpos_attention.forward(*attention, p)
    out, lse = relpos_attention.forward(*attention, p)
    yield "relpos_attention backward", lambda: relpos_attention.backward(out, *attention, out, lse, p)

    training = layer.norm == "batch"
    affine = (None, None) if layer.norm == "none" else (make(d), make(d))
    running = (torch.zeros(d, device=device), torch.ones(d, device=device)) if training else (None, None)
    wide, weight, options = make(b, t, 2 * d), make(d, layer.kernel_size), (layer.norm, h, training, 1e-5)
    convolve = (wide, weight, make(d), None, *affine, *running, *options, True)
    yield "glu_depthwise_conv forward", lambda: glu_depthwise_conv.forward(*convolve)
    _, *saved = glu_depthwise_conv.forward(*convolve)
    convolve_backward = (x, wide, weight, None, *affine, *saved, *options)
    yield "glu_depthwise_conv backward", lambda: glu_depthwise_conv_backward.backward(*convolve_backward)

    yield "residual_layer_norm forward", lambda: residual_layer_norm.forward(x, x, *norm, seed, 0.5, p, 1e-5)
    s, n, mean, rstd = residual_layer_norm.forward(x, x, *norm, seed, 0.5, p, 1e-5)
    yield (
        "residual_layer_norm backward",
        lambda: residual_layer_norm.backward(x, n, s, mean, rstd, norm[0], seed, 0.5, p),
    )
