"""Column sums of per-program partial results, in a fixed order: gradients of weights without float atomics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .common import TRITON_DTYPE, AotConfig, LaunchConfig, cdiv, constexpr_signature, launch

# what changes with T, B or K: specialised on ones and multiples of 16 it would compile again for new lengths
RUNTIME = ("P",)

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


def aot_configs(arch: int) -> Iterator[AotConfig]:
    """The reduce, into either width of weights."""
    for dtype in (torch.float32, torch.bfloat16):
        pointers = {"part_ptr": "*fp32", "out_ptr": f"*{TRITON_DTYPE[dtype]}"}
        scalars = {"P": "i32", "N": "i32"}
        yield AotConfig(
            name="partials.sum_rows",
            kernel=_sum_rows_kernel,
            signature=constexpr_signature(_sum_rows_kernel, pointers, scalars, _CONFIG.blocks),
            constexprs=_CONFIG.blocks,
            dtype=TRITON_DTYPE[dtype],
            launch=_CONFIG,
            divisible=frozenset({"N"}),
            spill_budget=0,
        )
