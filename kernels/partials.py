"""Column sums of per-program partial results, in a fixed order: gradients of weights without float atomics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from .common import AotConfig, LaunchConfig, aot_config, cdiv, launch

# what changes with T, B or K: specialised on ones and multiples of 16 it would compile again for new lengths
RUNTIME = ("P",)

SEGMENTS = 20  # partial results that one launch of `accumulate` adds up
ACCUMULATE_RUNTIME = tuple(f"{name}{i}" for name in ("P", "at") for i in range(SEGMENTS))

# a program takes few columns, so that there are many, and 256 rows a step: each of 128 threads has 8 loads of 16 bytes in
# flight, and 1000 partials are 4 steps
_CONFIG = LaunchConfig(num_warps=4, num_stages=1, blocks={"BLOCK_P": 256, "BLOCK_N": 16})


@triton.jit(do_not_specialize=RUNTIME)
def _sum_rows_kernel(part_ptr, out_ptr, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & (offs_n < N)[None, :]
        acc += tl.load(part_ptr + offs_p.to(tl.int64)[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_n, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=offs_n < N)


def sum_rows(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[P, ...]`` float32 -> ``[...]`` in ``dtype``: the sum over the first dimension, bit-reproducible."""
    out = part.new_empty(part.shape[1:], dtype=dtype)
    p, n = part.shape[0], out.numel()
    launch(_sum_rows_kernel, (cdiv(n, _CONFIG.blocks["BLOCK_N"]),), _CONFIG, part, part, out, p, n)
    return out


@triton.jit
def _segment(block, part_ptr, P, N, out_ptr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add the sums of part [P, N] to out [N] if `block` is one of its blocks; return it as the next segment counts."""
    if part_ptr is None:
        return block
    else:
        blocks = tl.cdiv(N, BLOCK_N)
        if (block >= 0) & (block < blocks):
            offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
            for start in range(0, P, BLOCK_P):
                offs_p = start + tl.arange(0, BLOCK_P)
                mask = (offs_p < P)[:, None] & (offs_n < N)[None, :]
                part = tl.load(part_ptr + offs_p.to(tl.int64)[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
                acc += part.to(tl.float32)
            total = tl.load(out_ptr + offs_n, mask=offs_n < N, other=0.0)
            tl.store(out_ptr + offs_n, total + tl.sum(acc, 0), mask=offs_n < N)
        return block - blocks


@triton.jit(do_not_specialize=ACCUMULATE_RUNTIME)
def _accumulate_kernel(
    out_ptr,
    part0_ptr, P0, N0, at0, part1_ptr, P1, N1, at1, part2_ptr, P2, N2, at2, part3_ptr, P3, N3, at3,
    part4_ptr, P4, N4, at4, part5_ptr, P5, N5, at5, part6_ptr, P6, N6, at6, part7_ptr, P7, N7, at7,
    part8_ptr, P8, N8, at8, part9_ptr, P9, N9, at9, part10_ptr, P10, N10, at10, part11_ptr, P11, N11, at11,
    part12_ptr, P12, N12, at12, part13_ptr, P13, N13, at13, part14_ptr, P14, N14, at14, part15_ptr, P15, N15, at15,
    part16_ptr, P16, N16, at16, part17_ptr, P17, N17, at17, part18_ptr, P18, N18, at18, part19_ptr, P19, N19, at19,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[at ... at + N] += the sums over the rows of each part [P, N]; absent parts are None."""
    block = tl.program_id(0)
    block = _segment(block, part0_ptr, P0, N0, out_ptr + at0, BLOCK_P, BLOCK_N)
    block = _segment(block, part1_ptr, P1, N1, out_ptr + at1, BLOCK_P, BLOCK_N)
    block = _segment(block, part2_ptr, P2, N2, out_ptr + at2, BLOCK_P, BLOCK_N)
    block = _segment(block, part3_ptr, P3, N3, out_ptr + at3, BLOCK_P, BLOCK_N)
    block = _segment(block, part4_ptr, P4, N4, out_ptr + at4, BLOCK_P, BLOCK_N)
    block = _segment(block, part5_ptr, P5, N5, out_ptr + at5, BLOCK_P, BLOCK_N)
    block = _segment(block, part6_ptr, P6, N6, out_ptr + at6, BLOCK_P, BLOCK_N)
    block = _segment(block, part7_ptr, P7, N7, out_ptr + at7, BLOCK_P, BLOCK_N)
    block = _segment(block, part8_ptr, P8, N8, out_ptr + at8, BLOCK_P, BLOCK_N)
    block = _segment(block, part9_ptr, P9, N9, out_ptr + at9, BLOCK_P, BLOCK_N)
    block = _segment(block, part10_ptr, P10, N10, out_ptr + at10, BLOCK_P, BLOCK_N)
    block = _segment(block, part11_ptr, P11, N11, out_ptr + at11, BLOCK_P, BLOCK_N)
    block = _segment(block, part12_ptr, P12, N12, out_ptr + at12, BLOCK_P, BLOCK_N)
    block = _segment(block, part13_ptr, P13, N13, out_ptr + at13, BLOCK_P, BLOCK_N)
    block = _segment(block, part14_ptr, P14, N14, out_ptr + at14, BLOCK_P, BLOCK_N)
    block = _segment(block, part15_ptr, P15, N15, out_ptr + at15, BLOCK_P, BLOCK_N)
    block = _segment(block, part16_ptr, P16, N16, out_ptr + at16, BLOCK_P, BLOCK_N)
    block = _segment(block, part17_ptr, P17, N17, out_ptr + at17, BLOCK_P, BLOCK_N)
    block = _segment(block, part18_ptr, P18, N18, out_ptr + at18, BLOCK_P, BLOCK_N)
    block = _segment(block, part19_ptr, P19, N19, out_ptr + at19, BLOCK_P, BLOCK_N)


def accumulate(parts: Sequence[torch.Tensor], total: torch.Tensor, offsets: Sequence[int]) -> None:
    """Add the sum over the first dimension of each part ``[P, ...]`` to the flat float32 ``total``, from its offset on.

    One launch for each 20 parts; bit-reproducible.
    """
    for first in range(0, len(parts), SEGMENTS):
        segments: list[torch.Tensor | int | None] = []
        blocks, some = 0, parts[first : first + SEGMENTS]
        for part, at in zip(some, offsets[first:]):
            n = math.prod(part.shape[1:])
            segments += [part, part.shape[0], n, at]
            blocks += cdiv(n, _CONFIG.blocks["BLOCK_N"])
        segments += [None, 0, 0, 0] * (SEGMENTS - len(some))
        launch(_accumulate_kernel, (blocks,), _CONFIG, total, total, *segments)


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """The reduce, into either width of weights, and the sums of a layer's 13 small gradients."""
    for dtype in ("fp32", "bf16"):
        part = {"part_ptr": "*fp32"}
        yield aot_config("partials.sum_rows", _sum_rows_kernel, dtype, _CONFIG, {}, types=part, divisible=("N",))
    used, absent = range(13), range(13, SEGMENTS)
    constexprs: dict[str, int | None] = {f"part{i}_ptr": None for i in absent}
    constexprs |= {f"{name}{i}": 0 for name in ("P", "N", "at") for i in absent}
    sizes = [f"N{i}" for i in used]
    yield aot_config("partials.accumulate", _accumulate_kernel, "fp32", _CONFIG, constexprs, divisible=sizes)
