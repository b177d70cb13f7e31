"""What the compiled kernels are run on: every shipped configuration, at odd shapes; sizes as in the ops' own docstrings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ARCHITECTURES = (80, 90)
Case = dict[str, Any]


def attention(d: int, dtype: str, t: int = 67, **more: Any) -> Case:
    # a batch with padding; packed utterances differ in length
    return {"op": "relpos_attention", "b": 2, "t": t, "h": 1, "d": d, "dtype": dtype, "lengths": [t, t // 2], **more}


def convolution(norm: str, c: int, dtype: str, t: int = 261, k: int = 31, **more: Any) -> Case:
    lengths = [t] if t > 100 else [t, t // 2]
    return {"op": "glu_depthwise_conv", "b": len(lengths), "t": t, "c": c, "k": k, "norm": norm, "dtype": dtype,
            "lengths": lengths, **more}  # fmt: skip


def feed_forward(dtype: str, t: int = 37, **more: Any) -> Case:
    return {"op": "feed_forward", "b": 2, "t": t, "d": 72, "f": 200, "dtype": dtype} | more


def residual(d: int, dtype: str, **more: Any) -> Case:
    return {"op": "residual_layer_norm", "b": 2, "t": 19, "d": d, "dtype": dtype, **more}


def all_cases(arch: int) -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        for d, t in ((16, 131 if dtype == "bf16" else 67), (32, 67), (64, 67), (128, 37)):
            yield attention(d, dtype, t)
        for dropout in (0.0, 0.3):
            yield feed_forward(dtype, dropout=dropout)
        for d in (200, 512, 768, 1100):
            yield residual(d, dtype, dropout=0.3)
        yield feed_forward(dtype, 5, d=300)
        yield convolution("none", 65, dtype)
        for c in (200, 512, 1000, 1500):
            yield convolution("layer", c, dtype, k=7 if c > 1000 else 31)
    yield attention(64, "bf16", 1)
    yield attention(64, "fp16", 131)
    yield attention(64, "fp32", 37, tf32=True)
    yield attention(64, "bf16", 67, dropout=0.3)
    yield attention(64, "bf16", 67, packed=True)
    for index in range(4):
        for dropout in (0.0, 0.3):
            for norm in (False, True):
                yield feed_forward("bf16", 83, products=index, norm=norm, dropout=dropout)
    yield feed_forward("fp16", 83, products=0, norm=False)
    yield feed_forward("fp16", 37, products=0, norm=True)
    yield convolution("group", 68, "fp32", t=67)
    for norm in ("none", "batch", "batch-training", "group"):
        yield convolution(norm, 68, "bf16", t=67 if norm == "none" else 261, k=7 if norm == "none" else 31)


def quick_cases() -> Iterator[Case]:
    """A few that reach what the others reach: mma.sync, wgmma, copies on their way, shuffles, shared memory."""
    yield {**attention(64, "bf16", 37), "arch": 90}
    yield {**attention(16, "fp32", 1), "arch": 80}
    yield {**attention(32, "bf16", 37), "arch": 80}
    yield {**feed_forward("bf16", 37, products=2, norm=False), "arch": 90}
    yield {**residual(200, "fp32", dropout=0.3), "arch": 80}


def cuda_cases() -> Iterator[Case]:
    """Channels odd and even, taps of one group and of four, tails; every dtype; with and without a folded norm."""
    yield convolution("none", 66, "fp32", 67)
    yield convolution("batch", 66, "bf16", 131, 3)
    yield convolution("batch", 130, "fp16", 37)
    yield convolution("none", 5, "bf16", 1, 63)
    yield convolution("batch", 5, "fp32", 65, 47)


SHOWN = ("t", "d", "f", "c", "k", "dtype", "norm", "dropout", "packed", "tf32", "products")


def name_of(case: Case) -> str:
    """A name with the op in it, by which the table of evidence counts."""
    words = [f"{k}={v}" if not isinstance(v, str) else v for k, v in case.items() if k in SHOWN]
    return f"{case['op']}-sm{case['arch']}-" + "-".join(words)


EVERYTHING = [{**case, "arch": arch} for arch in ARCHITECTURES for case in all_cases(arch)]
