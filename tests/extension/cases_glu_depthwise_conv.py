"""The CUDA kernels of glu_depthwise_conv through their Python glue, case by case, beside a float64 oracle.

Run as a program, `python cases_glu_depthwise_conv.py MODULE`, it takes cases from stdin and the kernels from an emulated
module: a process of its own, since it runs under AddressSanitizer.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lcconformer.ops.glu_depthwise_conv import cuda as glue
from lcconformer.ops.glu_depthwise_conv.library import GluDepthwiseConvFn
from lcconformer.ops.glu_depthwise_conv.reference import depthwise_conv1d

EPS = 1e-5
UTILITIES = ("test_schema", "test_faketensor")
NORM = ("norm_weight", "norm_bias", "running_mean", "running_var")
LEAVES = ("x", "weight", "bias", "norm_weight", "norm_bias")


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("emulated", Path(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_inputs(
    b: int, t: int, c: int, k: int, dtype: str, norm: str, bias: bool, **_: Any
) -> dict[str, Tensor | None]:
    kind = getattr(torch, dtype)
    return {
        "x": torch.randn(b, t, 2 * c).to(kind),
        "weight": (torch.randn(c, k) / k**0.5).to(kind),
        "bias": torch.randn(c).to(kind) if bias else None,
        "norm_weight": 0.5 + torch.rand(c) if norm != "none" else None,
        "norm_bias": torch.randn(c) if norm != "none" else None,
        "running_mean": torch.randn(c) if norm == "batch" else None,
        "running_var": 0.5 + torch.rand(c) if norm == "batch" else None,
    }


def oracle(inputs: dict[str, Tensor | None], lengths: Tensor | None) -> Tensor:
    """From PyTorch's own operators, utterance by utterance."""
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    assert x is not None
    assert weight is not None
    c = weight.shape[0]
    if x.numel() == 0:  # PyTorch's convolution wants frames
        return x[..., :c] + 0 * (weight.sum() + (0 if bias is None else bias.sum()))
    rows = []
    for i, row in enumerate(x):
        n = row.shape[0] if lengths is None else int(lengths[i])
        glu = F.pad(row[:n, :c] * torch.sigmoid(row[:n, c:]), (0, 0, 0, row.shape[0] - n))
        rows.append(depthwise_conv1d(glu.t()[None], weight, bias)[0].t())
    z = torch.stack(rows)
    mean, var, gamma, beta = (inputs[n] for n in ("running_mean", "running_var", "norm_weight", "norm_bias"))
    if gamma is not None and mean is None:
        z = F.layer_norm(z.to(gamma.dtype), (c,), gamma, beta, EPS).to(z.dtype)
    elif gamma is not None:
        # [B, C, T]: the norm's own layout
        z = F.batch_norm(z.transpose(1, 2), mean, var, gamma, beta, eps=EPS).transpose(1, 2)
    return F.silu(z)


def gradients(inputs: dict[str, Tensor | None], dy: Tensor, function: Any) -> dict[str, Tensor]:
    leaves = {n: p.requires_grad_() if n in LEAVES and p is not None else p for n, p in inputs.items()}
    out = function(leaves)
    out.backward(dy)
    grads = {f"d{n}": p.grad for n, p in leaves.items() if n in LEAVES and p is not None}
    return {"y": out.detach(), **{n: g.detach() for n, g in grads.items() if g is not None}}


def on_cuda_kernels(
    x: Any, weight: Any, bias: Any, lengths: Any, norm_weight: Any, norm_bias: Any, mean: Any, var: Any, norm: str
) -> Tensor:
    """The op as its dispatch calls it; the CPU's tensors go to the emulated kernels."""
    given = (x, weight, bias, lengths, norm_weight, norm_bias, mean, var)
    return GluDepthwiseConvFn.apply(*given, norm, 1, False, EPS, "silu", "cuda")[0]


def run(case: dict[str, Any], device: str, reseed: Callable[[int], None]) -> dict[str, Any]:
    """{tensor: {error, low, floor}}, and whether two more runs, in other schedules, gave the same bits."""
    torch.manual_seed(case["seed"])
    inputs = {n: None if p is None else p.to(device) for n, p in make_inputs(**case).items()}
    x, lengths = inputs["x"], case["lengths"]
    assert x is not None
    b, t, c = x.shape[0], x.shape[1], x.shape[2] // 2
    lengths = None if lengths is None else torch.tensor(lengths, device=device)
    dy = torch.randn(b, t, c).to(x)

    def as_dtype(dtype: torch.dtype | None) -> dict[str, Tensor | None]:
        return {n: None if p is None else p.detach().clone().to(dtype or p.dtype) for n, p in inputs.items()}

    ref = gradients(as_dtype(torch.float64), dy.double(), lambda p: oracle(p, lengths))
    low = gradients(as_dtype(x.dtype), dy, lambda p: oracle(p, lengths))

    def ours(p: dict[str, Tensor | None]) -> Tensor:
        return on_cuda_kernels(p["x"], p["weight"], p["bias"], lengths, *(p[n] for n in NORM), case["norm"])

    outs = []
    for seed in range(case["seed"], case["seed"] + 3):
        reseed(seed)
        given = as_dtype(None)
        storage = given["x"]
        assert storage is not None
        if lengths is not None:
            for i, n in enumerate(lengths):
                storage[i, n:] = float("nan")  # padding must not be looked at
        grad = dy
        if case["strided"]:  # frames and utterances apart, rows at odd elements, gradient with frames before utterances
            wide = x.new_full((b, t + 1, 2 * c + 3), float("nan"))
            wide[:, :t, 1 : 2 * c + 1] = storage
            given["x"] = wide[:, :t, 1 : 2 * c + 1]
            grad = dy.transpose(0, 1).contiguous().transpose(0, 1)
        outs.append(gradients({n: None if p is None else p.detach() for n, p in given.items()}, grad, ours))
    same = all(torch.equal(outs[0][n], out[n]) for out in outs[1:] for n in out)
    assert outs[0].keys() == ref.keys(), (outs[0].keys(), ref.keys())
    worst: dict[str, Any] = {"same_bits": same, "tensors": {}}
    for name, out in outs[0].items():
        assert out.shape == ref[name].shape, (name, out.shape, ref[name].shape)
        errors = [(p.double() - ref[name]).abs() for p in (out, low[name])]
        error, eager = (float(e.nan_to_num(torch.inf).max()) if e.numel() else 0.0 for e in errors)
        scale = float(ref[name].abs().max()) if out.numel() else 0.0
        floor = 2 * torch.finfo(out.dtype).eps * scale
        worst["tensors"][name] = {"error": error, "low": eager, "floor": floor}
    return worst


def opcheck() -> dict[str, str]:
    """Of both operators, with every optional tensor and with none; the failures."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 2, 10).transpose(0, 1), torch.randn(5, 3)
    bias, lengths, affine, stats = torch.randn(5), torch.tensor([9, 4]), torch.randn(2, 5), torch.rand(2, 5)
    y, dout = torch.randn(2, 9, 5), torch.randn(2, 5, 9).transpose(1, 2)
    empty = torch.empty(0)
    failed = {}
    for norm, given, norm_args, saved in (
        ("batch", (bias, lengths), (*affine, *stats), (*stats, empty)),
        ("layer", (bias, lengths), (*affine, None, None), (empty,) * 3),
        ("none", (None, None), (None,) * 4, (empty,) * 3),
    ):
        options = (norm, 1, False, EPS, "silu")
        forward, backward = torch.ops.lcconformer.glu_depthwise_conv_fwd, torch.ops.lcconformer.glu_depthwise_conv_bwd
        calls = {
            "forward": (forward, (x, weight, *given, *norm_args, *options, True)),
            "forward, nothing saved": (forward, (x, weight, *given, *norm_args, *options, False)),
            "backward": (backward, (dout, x, weight, *given, *norm_args, *options, y, *saved)),
        }
        for name, (operator, args) in calls.items():
            result = torch.library.opcheck(
                operator, args, {"backend": "cuda"}, test_utils=UTILITIES, raise_exception=False
            )
            failed |= {f"{norm}, {name}: {test}": str(got) for test, got in result.items() if got != "SUCCESS"}
    return failed


def refusal(width: int) -> dict[str, str]:
    """What a kernel width that the op would not let through meets in the launcher."""
    try:
        on_cuda_kernels(torch.randn(1, 4, 4), torch.randn(2, width), *[None] * 6, "none")
    except ValueError as error:
        return {"error": str(error)}
    return {"error": ""}


def traffic(emulated: Any, norm: str, dtype: str, t: int, k: int) -> dict[str, list[int]]:
    """{kernel: (wavefronts, bank conflicts)} of the worst blocks at 128 channels."""
    x, weight = torch.randn(1, t, 256).to(getattr(torch, dtype)), torch.randn(128, k).to(getattr(torch, dtype))
    affine = torch.randn(2, 128)
    norm_args = (*affine, None, None) if norm == "layer" else (None,) * 4
    args = glue.GluDepthwiseConv(x, weight, None, None, *norm_args, norm, 1, False, EPS, "silu")
    counts = {}
    # a tile of products of as many segments as there are, which the launcher would share among blocks
    kernels = SimpleNamespace(**{name: getattr(emulated, name) for name in dir(emulated)})
    kernels.GluDepthwiseConvForward = lambda **fields: emulated.GluDepthwiseConvForward(**fields, segments=t // 16)
    glue._kernels = lambda: kernels
    emulated.count_traffic()
    out, saved = glue.forward(args, True)
    counts["forward"] = list(emulated.traffic())
    emulated.count_traffic()
    glue.backward(torch.randn_like(out), args, saved)
    counts["backward"] = list(emulated.traffic())
    return counts


def main() -> None:
    torch.set_num_threads(1)
    emulated = load(sys.argv[1])
    for line in sys.stdin:
        case = json.loads(line)
        if "traffic" in case:
            print(json.dumps(traffic(emulated, **case["traffic"])), flush=True)
            continue
        if "opcheck" in case or "width" in case:
            glue._kernels = lambda: emulated
            print(json.dumps(opcheck() if "opcheck" in case else refusal(case["width"])), flush=True)
            continue
        kernels = SimpleNamespace(**{name: getattr(emulated, name) for name in dir(emulated)})
        if case["slots"]:  # fewer blocks than the launcher would ask for: each walks over several tiles
            kernels.glu_depthwise_conv_slots = lambda *_, n=case["slots"]: n
        if case["segments"]:  # of a tile of products, in place of what the launcher would choose
            kernels.GluDepthwiseConvForward = lambda n=case["segments"], **fields: emulated.GluDepthwiseConvForward(
                **fields, segments=n
            )
        glue._kernels = lambda kernels=kernels: kernels
        print(json.dumps(run(case, "cpu", emulated.set_seed)), flush=True)


if __name__ == "__main__":
    main()
