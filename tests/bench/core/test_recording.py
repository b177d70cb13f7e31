"""What a call launches is recorded without a GPU: kernels of Triton and of PyTorch, with shapes, as on a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from lcconformer.bench.core.recording import Aten, Triton, backward, record, size_of

import lcconformer
from lcconformer import ops

BF16 = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def test_operators_of_pytorch():
    a, b, bias = meta(6, 4), meta(4, 5), meta(5)

    def call():
        y = torch.addmm(bias, a, b)
        y = y.view(2, 3, 5).transpose(0, 1)  # views launch nothing
        torch.bmm(y, meta(3, 5, 7))
        y.mul_(2)

    addmm, bmm, mul = record(call)
    assert addmm == Aten("addmm", (1, 6, 5, 4), 2.0 * (5 + 24 + 20 + 30))
    assert bmm == Aten("bmm", (3, 2, 7, 5), 2.0 * (30 + 105 + 42))
    assert mul == Aten("mul_", None, 2.0 * (30 + 30))


def test_expanded_dimensions_are_in_memory_once():
    assert size_of(meta(4, 1).expand(4, 8)) == 8
    assert size_of(meta(4, 8, dtype=torch.float32)) == 128


def test_a_kernel_is_recorded_with_its_grid_and_arguments():
    x, weight = meta(1000, 256), meta(256)

    def call():
        with torch.no_grad(), lcconformer.backend("triton"):
            ops.residual_layer_norm(x, x, weight, weight)

    (launch,) = record(call)
    assert isinstance(launch, Triton)
    assert launch.kernel.__name__ == "_layer_norm_fwd_kernel"
    assert launch.grid == (1000 // launch.arguments["BLOCK_M"],)
    assert launch.arguments["M"] == 1000
    assert launch.arguments["seed_ptr"] is None
    # x, y, s, n in bfloat16, two weights, two statistics in float32
    assert launch.bytes == 2 * (4 * 1000 * 256 + 2 * 256) + 4 * 2 * 1000


def test_code_takes_the_ways_of_a_gpu():
    seen = []

    def call():
        x = meta(2)
        seen.append((x.is_cuda, x.device.type, torch.zeros(2, device=x.device).is_cuda))

    record(call)
    assert seen == 2 * [(True, "cuda", True)]
    assert meta(2).device.type == "meta"


def test_a_backward_is_recorded():
    q = [meta(2, 70, 2, 64, grad=True) for _ in range(3)]
    shared = [meta(139, 2, 64, grad=True), meta(2, 64, grad=True), meta(2, 64, grad=True)]

    def call():
        with lcconformer.backend("triton"):
            backward(ops.relpos_attention(*q, *shared), [*q, *shared])

    names = Counter(e.kernel.__name__ for e in record(call) if isinstance(e, Triton))
    assert names["_forward"] == 1
    assert sum(n for name, n in names.items() if "backward" in name) >= 1
