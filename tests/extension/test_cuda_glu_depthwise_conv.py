"""The CUDA kernels of glu_depthwise_conv against a float64 oracle.

The same grid twice: emulated on the CPU, under sanitizers and in random schedules, and on a GPU where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcconformer.ops.glu_depthwise_conv import Traits
from lcconformer.ops.glu_depthwise_conv import cuda as glue

from . import cases_glu_depthwise_conv as cases

FRAMES = (1, 7, 63, 65, 127, 203)
WIDTHS = (1, 3, 31, 63)
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request):
    """``run(**case)`` -> errors; see ``cases.run``."""
    if request.param == "emulated":
        return request.getfixturevalue("worker")
    torch.backends.cudnn.allow_tf32 = False  # eager float32 is to be float32
    return lambda **case: cases.run(case, "cuda", lambda _seed: None)


def check(run: Any, **case: Any) -> None:
    """max |out - ref| <= r * max |low - ref| + two roundings of the largest value; and the same bits in any schedule."""
    case = {"b": 2, "c": 5, "k": 31, "dtype": "float32", "lengths": None, "norm": "none", "bias": True,
            "strided": False, "slots": 0, "segments": 0, "seed": 0, **case}  # fmt: skip
    answer = run(**case)
    for name, got in answer["tensors"].items():
        bound = (2 if name == "y" else 3) * got["low"] + got["floor"]
        assert got["error"] <= bound, f"{name}: error {got['error']:.3g} > {bound:.3g}; eager has {got['low']:.3g}"
    assert answer["same_bits"], "the result depends on the schedule"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("t", FRAMES)
def test_odd_shapes(run, t, k, dtype):
    check(run, t=t, k=k, dtype=dtype, lengths=[t // 2, t])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 2, 65, 130])
def test_channels_and_dtypes(run, c, dtype):
    check(run, t=67, c=c, dtype=dtype, lengths=[67, 40])


@pytest.mark.parametrize("k", [33, 47, 49])
def test_widths_around_the_groups_of_taps(run, k):
    check(run, t=70, k=k)


@pytest.mark.parametrize("lengths", [[0, 65], [0, 0], [64, 1], [65, 65]])
def test_lengths(run, lengths):
    check(run, t=65, lengths=lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_folded_batch_norm(run, bias, dtype):
    check(run, t=65, c=6, norm="batch", bias=bias, dtype=dtype, lengths=[65, 30])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 6, 65, 128, 130, 264])
def test_layer_norm(run, c, dtype):
    check(run, t=35, c=c, k=7, norm="layer", dtype=dtype, lengths=[35, 9])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("t", [1, 31, 33, 70])
def test_layer_norm_at_odd_shapes(run, t, k, dtype):
    check(run, t=t, k=k, dtype=dtype, norm="layer", lengths=[t, t // 2])


@pytest.mark.parametrize("c", [1024, 1023])
def test_layer_norm_of_the_most_channels(run, c):
    check(run, b=1, t=3, c=c, k=3, norm="layer", dtype="bfloat16", slots=1)


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [5, 6, 8])
def test_strided_input_and_gradient(run, c, dtype, norm):
    check(run, t=66, c=c, k=7, dtype=dtype, norm=norm, strided=True, lengths=[66, 9])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [8, 72])
def test_rows_of_whole_eights(run, c, dtype):
    check(run, t=67, c=c, dtype=dtype, lengths=[67, 40])


@pytest.mark.parametrize(("b", "t"), [(0, 5), (2, 0)])
def test_nothing_to_do(run, b, t):
    check(run, b=b, t=t)


@pytest.mark.parametrize("slots", [1, 3])
def test_blocks_that_walk_over_several_tiles(run, slots):
    check(run, t=200, slots=slots, lengths=[130, 200])  # 8 tiles


@pytest.mark.parametrize(
    ("norm", "t", "segments"),
    [("none", 203, 5), ("none", 203, 9), ("batch", 250, 16), ("layer", 203, 3), ("layer", 110, 7)],
)
def test_tiles_of_several_segments(run, norm, t, segments):
    """Of products: fewer than eight, more than eight, all there can be; the last tile is shorter, and has padding."""
    check(run, t=t, c=40, norm=norm, dtype="bfloat16", segments=segments, lengths=[t, t - 60])


@pytest.mark.gpu
def test_replays_in_a_cuda_graph():
    inputs = {
        n: p if p is None else p.cuda() for n, p in cases.make_inputs(2, 70, 8, 31, "float16", "none", True).items()
    }
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    lengths = torch.tensor([70, 33], device="cuda")
    args = (x, weight, bias, lengths, None, None, None, None, "none")
    cases.on_cuda_kernels(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cases.on_cuda_kernels(*args)
    x.copy_(torch.randn_like(x))
    lengths.copy_(torch.tensor([5, 70]))
    graph.replay()
    torch.testing.assert_close(out, cases.on_cuda_kernels(*args), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("norm", "k", "dtype"),
    [*((norm, 31, dtype) for norm in ("none", "layer") for dtype in ("float32", "bfloat16")),
     ("none", 7, "float32"), ("layer", 63, "bfloat16"), ("none", 63, "float16")],
)  # fmt: skip
def test_no_bank_conflicts(worker, norm, k, dtype):
    """No two lanes ask a bank of shared memory for different words at a time; the wavefronts that are left are counted."""
    got = worker(traffic={"norm": norm, "dtype": dtype, "t": 112, "k": k})
    for direction, (wavefronts, conflicts) in got.items():
        assert wavefronts > 0
        assert conflicts == 0, f"{direction}: {conflicts} of {wavefronts} wavefronts of a block are bank conflicts"


def test_schemas_and_fakes_hold(worker):
    assert worker(opcheck=True) == {}


def test_widths_outside_of_the_kernel_are_refused(worker):
    assert "K is 65; expected odd, 1 to 63" in worker(width=65)["error"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm": "group"}, "norm='group' is not fused"),
        ({"norm": "layer", "channels": 1025}, "norm='layer' is fused up to C = 1024, got C = 1025"),
        ({"norm": "layer", "norm_dtype": torch.float64}, "norm_weight is float64"),
        ({"norm": "batch", "training": True}, "norm='batch' in training is not fused"),
        ({"activation": "gelu"}, "activation 'gelu' is not fused"),
        ({"dtype": torch.float64}, "dtype torch.float64"),
        ({}, "device type 'cpu'"),
    ],
)
def test_reasons_against_the_kernel(options, reason):
    options = {"norm": "none", "training": False, "activation": "silu", "dtype": torch.float32, "channels": 1,
               "norm_dtype": None, **options}  # fmt: skip
    traits = Traits(torch.device("cpu"), **options)
    assert any(reason in r for r in glue.unsupported(traits))
