"""``python -m lcconformer tune``: which launch configurations of the Triton kernels are fastest on this GPU.

The heuristics of the kernels choose well by what the compiler says (registers, spills, shared memory); this measures a few
neighbours of every choice that a training step of one layer makes, and files the fastest for later processes to load.
Whether the feed-forward's products are cuBLAS or have its other steps inside is chosen here alone, shape by shape.
Nothing else ever tunes. Each neighbour is compiled: it takes minutes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

__all__ = ["add_arguments", "calls", "run", "tune"]

OPS = ("feed_forward", "relpos_attention", "glu_depthwise_conv", "residual_layer_norm")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# how much of the heuristic's time a candidate may take at most to replace it: less of a difference is noise
GAIN = 0.97

Timer = Callable[[Callable[[], object]], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPS, action="append", help="only this one (repeatable; default: all)")
    parser.add_argument("--batch", type=int, default=32, help="utterances (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=400, help="frames of each (default: %(default)s)")
    parser.add_argument("--d-model", type=int, default=256, help="width (default: %(default)s)")
    parser.add_argument("--ffn-dim", type=int, help="hidden width of the feed-forward (default: 4 times the width)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    parser.add_argument("--kernel-size", type=int, default=31, help="of the convolution (default: %(default)s)")
    parser.add_argument(
        "--norm", choices=("layer", "batch", "group", "none"), default="layer", help="of the convolution"
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="rate (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the activations (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="write there; for it to be read, set LCCONFORMER_TUNED to it")


def run(args: argparse.Namespace) -> int:
    """The command.

    Raises:
        NotImplementedError: no GPU that Triton serves.
    """
    from lcconformer.ops.availability import triton_reasons

    if not torch.cuda.is_available():
        raise NotImplementedError(
            "tuning measures a GPU and this machine has none that torch can use; run it on the machine that will train or "
            "serve, or do without: the kernels' own choices need no tuning"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    reasons = triton_reasons(device, DTYPES[args.dtype])
    if reasons:
        raise NotImplementedError(f"nothing to tune: {'; '.join(reasons)}")
    from lcconformer.kernels import _tuning

    gpu = torch.cuda.get_device_name(device)
    path = _tuning.file_of(gpu, args.folder)
    table = _tuning.read(path) if path.exists() else {}
    for name, call in calls(args, device):
        if args.op is None or name.split()[0] in args.op:
            table |= tune(name, call, median)
            _tuning.write(path, gpu, table)
    print(f"{len(table)} configurations in {path}")
    return 0


def median(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU in ms, the L2 cache emptied before each."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def tune(name: str, call: Callable[[], object], timer: Timer) -> dict[str, object]:
    """Try the candidates of every launch in ``call``, one launch after another: key -> the fastest LaunchConfig."""
    import triton

    from lcconformer.kernels import _tuning

    found = {}
    with _tuning.watched() as (seen, forced):
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


def calls(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of each op, at one layer's shape; residual_layer_norm last, for feed_forward uses its kernels."""
    from lcconformer.kernels import feed_forward, glu_depthwise_conv, relpos_attention, residual_layer_norm
    from lcconformer.ops.dropout import dropout_seed

    b, t, d, h, p = args.batch, args.frames, args.d_model, args.heads, args.dropout

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(DTYPES[args.dtype])

    x, norm = make(b, t, d), (make(d), make(d))
    seed = dropout_seed(x, p)
    f = args.ffn_dim or 4 * d
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

    training = args.norm == "batch"
    affine = (None, None) if args.norm == "none" else (make(d), make(d))
    running = (torch.zeros(d, device=device), torch.ones(d, device=device)) if training else (None, None)
    wide, weight, options = make(b, t, 2 * d), make(d, args.kernel_size), (args.norm, h, training, 1e-5)
    convolve = (wide, weight, make(d), None, *affine, *running, *options, True)
    yield "glu_depthwise_conv forward", lambda: glu_depthwise_conv.forward(*convolve)
    _, *saved = glu_depthwise_conv.forward(*convolve)
    convolve_backward = (x, wide, weight, None, *affine, *saved, *options)
    yield "glu_depthwise_conv backward", lambda: glu_depthwise_conv.backward(*convolve_backward)

    yield "residual_layer_norm forward", lambda: residual_layer_norm.forward(x, x, *norm, seed, 0.5, p, 1e-5)
    s, n, mean, rstd = residual_layer_norm.forward(x, x, *norm, seed, 0.5, p, 1e-5)
    yield (
        "residual_layer_norm backward",
        lambda: residual_layer_norm.backward(x, n, s, mean, rstd, norm[0], seed, 0.5, p),
    )
