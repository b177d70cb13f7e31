"""What the compiled kernels are run on: every shipped configuration, at odd shapes; sizes as in the ops' own docstrings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ARCHITECTURES = (80, 90)
Case = dict[str, Any]


def attention(d: int, dtype: str, t: int = 67, **more: Any) -> Case:
    # a batch with padding; packed utterances differ in length
    return {"op": "relpos_attention", "b": 2, "t": t, "h": 1, "d": d, "dtype": dtype, "lengths": [t, t // 2], **more}


def convolution(norm: str, c: int, dtype: str, t: int = 67, k: int = 31, **more: Any) -> Case:
    lengths = [t] if t > 100 else [t, t // 2]
    return {"op": "glu_depthwise_conv", "b": len(lengths), "t": t, "c": c, "k": k, "norm": norm, "dtype": dtype,
            "lengths": lengths, **more}  # fmt: skip


def feed_forward(dtype: str, t: int = 37, **more: Any) -> Case:
    return {"op": "feed_forward", "b": 2, "t": t, "d": 72, "f": 200, "dtype": dtype} | more


def residual(d: int, dtype: str, **more: Any) -> Case:
    return {"op": "residual_layer_norm", "b": 2, "t": 19, "d": d, "dtype": dtype, **more}


def norm_product(epilogue: str, d: int, t: int, dtype: str = "bf16", **more: Any) -> Case:
    # more columns than a tile has, and no multiple of it
    return {"op": "chain_norm_product", "t": t, "d": d, "f": 72, "dtype": dtype, "epilogue": epilogue, **more}


def chain_cases() -> Iterator[Case]:
    """Rows that have tiles of their own: up to 128, up to 512, more (``many``); widths for each number of row chunks."""
    for rows in ({"t": 19}, {"t": 131}, {"t": 83, "many": True}):
        for epilogue in ("none", "silu"):
            yield norm_product(epilogue, 208, **rows)
        for d in (208, 496):
            yield norm_product("glu", d, **rows)
            yield norm_product("silu", d, **rows, two=True)
        yield {"op": "chain_residual_product", "d": 400, "f": 72, "dtype": "bf16", **rows}
    for rows in ({"t": 19}, {"t": 83, "many": True}):
        yield norm_product("glu", 144, **rows)
        yield norm_product("silu", 144, **rows, two=True)
    yield norm_product("glu", 752, 19)
    yield norm_product("silu", 752, 19, two=True)
    for dtype in ("fp16", "fp32"):
        d = 240 if dtype == "fp32" else 208
        yield norm_product("glu", d, 19, dtype)
        yield norm_product("silu", d, 19, dtype, two=True)
        yield {"op": "chain_residual_product", "t": 19, "d": 400, "f": 72, "dtype": dtype}
    for d in (200, 752):
        yield {"op": "chain_norm", "t": 19, "d": d, "dtype": "bf16"}
    for many in (False, True):
        for c in (200, 400, 700):
            yield depthwise("layer", c, "bf16", many=many)
        yield depthwise("batch" if many else "none", 260, "bf16", many=many)
    for dtype in ("fp16", "fp32"):
        yield depthwise("layer", 200, dtype)


def depthwise(norm: str, c: int, dtype: str, **more: Any) -> Case:
    return {"op": "chain_depthwise", "b": 2, "t": 37, "c": c, "k": 7, "norm": norm, "dtype": dtype,
            "lengths": [37, 18], **more}  # fmt: skip


def all_cases(arch: int) -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        for d, t in ((16, 131), (32, 67), (64, 67), (128, 37)):
            yield attention(d, dtype, t)
        for dropout in (0.0, 0.3):
            yield feed_forward(dtype, dropout=dropout)
        for d in (200, 512, 768, 1100):
            yield residual(d, dtype, dropout=0.3)
        yield feed_forward(dtype, 5, d=300)
        # chunks of 23 frames, two steps and a tail
        yield convolution("none", 200, dtype, programs=6)
        for c in (200, 512, 1000, 1500):
            yield convolution("layer", c, dtype, programs=6)
    yield from chain_cases()
    yield {"op": "accumulate", "parts": 13, "dtype": "fp32"}
    for k in (7, 63):
        yield convolution("layer", 200, "bf16", k=k)
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
    yield convolution("group", 68, "fp32")
    for norm in ("none", "batch", "batch-training", "group"):
        c, k = (68, 7) if norm == "none" else (200, 31)
        yield convolution(norm, c, "bf16", k=k)


def quick_cases() -> Iterator[Case]:
    """A few that reach what the others reach: mma.sync, wgmma, copies on their way, shuffles, shared memory."""
    yield {**attention(64, "bf16", 37), "arch": 90}
    yield {**attention(16, "fp32", 1), "arch": 80}
    yield {**attention(32, "bf16", 37), "arch": 80}
    yield {**feed_forward("bf16", 37, products=2, norm=False), "arch": 90}
    yield {**residual(200, "fp32", dropout=0.3), "arch": 80}


def cuda_cases() -> Iterator[Case]:
    """Channels odd, even, in eights; taps of one group and of four, tails; with a norm and without; heads of every width."""
    yield convolution("none", 66, "fp32", 67)
    yield convolution("batch", 66, "bf16", 131, 3)
    yield convolution("batch", 130, "fp16", 37)
    yield convolution("none", 5, "bf16", 1, 63)
    yield convolution("batch", 5, "fp32", 65, 47)
    yield convolution("none", 72, "bf16", 150)
    yield convolution("layer", 136, "bf16", 37)
    yield convolution("layer", 130, "fp16", 37, 7)
    for d, dtype, t, more in (
        (32, "bf16", 131, {}), (64, "fp16", 67, {}), (64, "bf16", 67, {"dropout": 0.3}), (96, "bf16", 37, {"packed": True}),
        (128, "fp16", 37, {}), (128, "bf16", 131, {"forward_only": True}),
    ):  # fmt: skip
        yield attention(d, dtype, t, **more)


SHOWN = (
    "t", "d", "f", "c", "k", "dtype", "norm", "dropout", "packed", "tf32", "products", "programs", "epilogue", "two",
    "many",
)  # fmt: skip


def name_of(case: Case) -> str:
    """A name with the op in it, by which the table of evidence counts."""
    words = [f"{k}={v}" if not isinstance(v, str) else v for k, v in case.items() if k in SHOWN]
    return f"{case['op']}-sm{case['arch']}-" + "-".join(words)


EVERYTHING = [{**case, "arch": arch} for arch in ARCHITECTURES for case in all_cases(arch)]

UNCOVERED: list[str] = []
"""Shipped configurations that no case launches, each with its reason."""
