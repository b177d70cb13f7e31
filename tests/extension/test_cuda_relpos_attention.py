"""The CUDA kernels of relpos_attention, forward and backward, against a float64 oracle.

The same grid twice, as any GPU has it and, by products of warpgroups forward, as one of sm_90: emulated on the CPU, under
sanitizers and in random schedules, and on a GPU where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcconformer.ops.relpos_attention import RelposAttention, Traits
from lcconformer.ops.relpos_attention import cuda as glue

from . import cases_relpos_attention as cases

FRAMES = (1, 7, 63, 65, 127, 203)
DTYPES = ("float16", "bfloat16")


ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("gpu", "gpu-warpgroups")]


@pytest.fixture(params=["emulated", "emulated-warpgroups", *ON_GPU])
def run(request, monkeypatch):
    """``run(**case)`` -> errors; see ``cases.run``."""
    by_warpgroups = request.param.endswith("warpgroups")
    if not request.param.startswith("gpu"):
        worker = request.getfixturevalue("worker")
        return lambda **case: worker(**{"arch": 90 if by_warpgroups else 80, "forward_only": by_warpgroups, **case})
    if by_warpgroups and not glue.by_warpgroups(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("the GPU, or the build, has no products of warpgroups")
    monkeypatch.setattr(glue, "by_warpgroups", lambda device: by_warpgroups)
    return lambda **case: cases.run(case | {"forward_only": False}, "cuda", lambda _seed: None)


def check(run: Any, **case: Any) -> None:
    """max |out - ref| <= r * max |low - ref| + two roundings of the largest value; and the same bits in any schedule."""
    case = {"b": 2, "t": 67, "h": 1, "d": 64, "dtype": "bfloat16", "lengths": None, "packed": None, "dropout": 0.0,
            "strided": 0, "slots": 0, "seed": 0, **case}  # fmt: skip
    answer = run(**case)
    for name, got in answer["tensors"].items():
        bound = (3 if name.startswith("d") else 2) * got["low"] + got["floor"]
        assert got["error"] <= bound, f"{name}: error {got['error']:.3g} > {bound:.3g}; eager has {got['low']:.3g}"
    assert answer["same_bits"], "the result depends on the schedule"


@pytest.mark.parametrize("t", FRAMES)
def test_odd_shapes(run, t):
    check(run, t=t, d=32, lengths=[t // 2, t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [32, 64, 96, 128])
def test_head_widths_and_dtypes(run, d, dtype):
    check(run, t=37, h=2, d=d, dtype=dtype, lengths=[37, 32])


@pytest.mark.parametrize("d", [96, 128])
def test_wide_heads_of_several_tiles(run, d):
    check(run, b=1, t=131, d=d)


@pytest.mark.parametrize("lengths", [[0, 65], [0, 0], [64, 1], [65, 33]])
def test_lengths(run, lengths):
    check(run, t=65, lengths=lengths)


@pytest.mark.parametrize("packed", [[50, 0, 7, 133], [1], [0, 0, 3]])
def test_packed_utterances_are_each_alone(run, packed):
    check(run, t=140, h=2, d=32, packed=packed)


@pytest.mark.parametrize(("dropout", "dtype"), [(0.3, "bfloat16"), (0.9, "float16"), (1.0, "bfloat16")])
def test_dropout(run, dropout, dtype):
    check(run, t=70, h=2, d=32, dtype=dtype, dropout=dropout, lengths=[70, 41])


def test_dropout_of_packed_utterances(run):
    check(run, t=70, h=2, d=32, dropout=0.3, packed=[70, 41])


@pytest.mark.parametrize("strided", [3, 8])
def test_strided_inputs(run, strided):
    """Rows that start at a multiple of sixteen bytes are taken as they are, others are copied."""
    check(run, t=40, h=2, d=32, strided=strided, lengths=[40, 9])


@pytest.mark.parametrize(("slots", "packed"), [(1, None), (4, None), (2, [20, 0, 37])])
def test_backward_of_some_heads_at_a_time(run, slots, packed):
    """The gradient of positions adds up over them."""
    lengths = None if packed else [37, 20, 5]
    check(run, b=3, t=37, h=3, d=32, lengths=lengths, packed=packed, dropout=0.3, slots=slots, forward_only=False)


@pytest.mark.parametrize("t", [30, 90])
def test_backward_of_several_utterances_by_one_block(run, t):
    """With an odd number of tiles, one or three, the first tile of an utterance goes where the last one's was."""
    check(run, b=3, t=t, d=32, lengths=[t, t - 5, t], slots=3)


@pytest.mark.gpu
def test_replays_in_a_cuda_graph():
    q, *others = [x.cuda() for x in cases.make_inputs((2, 70), 70, 2, 64, "bfloat16")]
    lengths = torch.tensor([70, 33], device="cuda")
    args = RelposAttention(q, *others, lengths, None, None, 0.0)

    def both() -> tuple[torch.Tensor, ...]:
        out, lse = glue.forward(args)
        return out, lse, *glue.backward(q, args, out, lse)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    q.copy_(torch.randn_like(q))
    lengths.copy_(torch.tensor([5, 70]))
    graph.replay()
    for got, expected in zip(found, both()):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("way", "arch"), [("forward", 80), ("backward", 80), ("forward", 90)])
@pytest.mark.parametrize("d", [64, 128])
def test_no_bank_conflicts(worker, d, way, arch):
    """No two lanes ask a bank of shared memory for different words at a time."""
    wavefronts, conflicts = worker(traffic=[d, way, arch])
    assert wavefronts > 0
    assert conflicts == 0, f"{conflicts} of {wavefronts} wavefronts of a block are bank conflicts"


def test_schemas_and_fakes_hold(worker):
    assert worker(opcheck=True) == {}


def test_head_widths_outside_of_the_kernel_are_refused(worker):
    assert "D is 48; expected 32, 64, 96 or 128" in worker(refusal=[48, "bfloat16"])


@pytest.mark.parametrize(
    ("dtype", "d", "reason"),
    [
        (torch.float32, 64, "dtype torch.float32 is not one of float16, bfloat16"),
        (torch.bfloat16, 48, "heads have D = 32, 64, 96, 128, got D = 48"),
        (torch.bfloat16, 64, "device type 'cpu'"),
    ],
)
def test_reasons_against_the_kernel(dtype, d, reason):
    assert any(reason in r for r in glue.unsupported(Traits(torch.device("cpu"), dtype, d)))
