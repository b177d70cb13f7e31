"""The cluster-resident loop against the modules in float64: emulated on the CPU, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcconformer import ConformerConfig, ConformerEncoder, ExitRule, engine
from lcconformer.loop import cluster

from . import cases_cluster_loop as cases


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request):
    """``run(**case)`` -> the answer of ``cases``."""
    if request.param == "emulated":
        return request.getfixturevalue("worker")
    why = cluster._missing(torch.device("cuda", torch.cuda.current_device()))
    if why:
        pytest.skip("; ".join(why))
    return lambda **case: (cases.exits if "rule" in case else cases.run)(case, "cuda", lambda _seed: None)


def check(run: Any, **case: Any) -> None:
    answer = run(**{"b": 1, "t": 16, "lengths": None, "depth": 1, "schedules": 1, "seed": 0, "config": {}, **case})
    for k, (error, allowed) in enumerate(answer["errors"], 1):
        assert error <= allowed, f"depth {k}: error {error:.3g} > {allowed:.3g}"
    assert answer["finite"]
    assert answer["same_bits"], "the result depends on the schedule, or on whether all loops are asked for"


def test_every_depth(run):
    check(run, depth=2, schedules=3)


def test_lengths(run):
    check(run, b=2, t=13, lengths=[9, 0], seed=1)


def test_one_frame_and_no_norm(run):
    config = {"conv_norm": "none", "attention_bias": False, "conv_bias": False, "conv_kernel_size": 3}
    check(run, t=1, config=config, seed=2)


def test_batch_norm_and_padding_that_is_seen(run):
    check(run, t=9, lengths=[5], config={"conv_norm": "batch", "padding": "peer"}, seed=3)


def check_exits(run: Any, rule: dict[str, Any], expected: list[int], **case: Any) -> None:
    answer = run(**{"t": 11, "b": 2, "lengths": [11, 7], "seed": 5, "config": {}, "rule": rule, **case})
    ours, modules, exact = answer["depths"]
    assert ours == modules == exact == expected
    error, allowed = answer["error"]
    assert error <= allowed


def test_each_utterance_stops_at_the_depth_of_adaptive(run):
    check_exits(run, {"kind": "change", "threshold": 0.713}, [1, 2])


@pytest.mark.slow
def test_all_loops_in_any_schedule(run):
    check(run, depth=4, schedules=4, t=15, lengths=[14], seed=6)


@pytest.mark.slow
def test_the_exit_rule_has_a_minimum_and_a_maximum(run):
    check_exits(run, {"kind": "change", "threshold": 1e-6, "depth": 2}, [2, 2])
    check_exits(run, {"kind": "change", "threshold": 1e6, "min_depth": 2}, [2, 2])
    check_exits(run, {"kind": "fixed", "depth": 1}, [1, 1])


def test_no_bank_conflicts(worker):
    wavefronts, conflicts = worker(traffic=True)
    assert conflicts <= wavefronts / 100, f"{conflicts} of {wavefronts} wavefronts of a block are bank conflicts"


@pytest.fixture
def able(monkeypatch):
    """As if there were a GPU that can run the kernel."""
    monkeypatch.setattr(cluster, "_missing", lambda device: [])


CONFIG = ConformerConfig(num_layers=2)


def make(**changes: Any) -> ConformerEncoder:
    return ConformerEncoder(CONFIG.replace(**changes)).to(torch.bfloat16).eval()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"d_model": 128}, "the layer that fits has d_model = 256, got 128"),
        ({"num_heads": 8}, "num_heads = 4, got 8"),
        ({"ffn_dim": 512}, "ffn_dim = 1024, got 512"),
        ({"position": "none"}, "position='none' is left to the modules"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"conv_norm": "group"}, "conv_norm='group'"),
        ({"conv_norm": "batch", "conv_norm_statistics": "per_depth"}, "conv_norm_statistics='per_depth'"),
        ({"convolution_first": True}, "convolution_first=True"),
        ({"conditioning": ("step",)}, "conditioning is left to the modules"),
        ({"sharing": "none"}, "one shared layer fits, the encoder has 2"),
    ],
)
@pytest.mark.usefixtures("able")
def test_encoders_that_do_not_fit_are_named(changes, reason):
    encoder = make(**changes)
    x = torch.zeros(1, 4, encoder.config.d_model, dtype=torch.bfloat16)
    with engine("cluster"), torch.no_grad():
        assert any(reason in r for r in encoder.explain(x).against)
        with pytest.raises(NotImplementedError, match=r"engine 'cluster' was forced but cannot serve .*"):
            encoder(x)


@pytest.mark.usefixtures("able")
def test_calls_that_do_not_fit_are_named():
    encoder, x = make(), torch.zeros(1, 4, 256, dtype=torch.bfloat16)

    def reasons(encoder: ConformerEncoder, x: torch.Tensor, **options: Any) -> str:
        with engine("cluster"):
            return "; ".join(encoder.explain(x, **options).against)

    assert "autograd records the loops" in reasons(encoder, x)
    with torch.no_grad():
        assert reasons(encoder, x) == ""
        assert "a cluster holds 1 to 16 frames, got 17" in reasons(encoder, torch.zeros(1, 17, 256, dtype=x.dtype))
        assert "a packed batch" in reasons(encoder, x[0], cu_seqlens=torch.tensor([0, 4]))
        assert "the input is torch.float32" in reasons(encoder, x.float())
        assert "training mode" in reasons(make().train(), x)
        assert "the input is on cpu, weights are on meta" in reasons(make().to("meta"), x)
        encoder.layers[0].norm.float()
        assert "a parameter or statistic is not torch.bfloat16" in reasons(encoder, x)
        with engine("cluster"), pytest.raises(NotImplementedError, match="the cosine distance is left to the modules"):
            make().adaptive(x, None, ExitRule("cosine"))


def test_it_serves_on_request_only():
    encoder, x = make(), torch.zeros(1, 4, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        assert encoder.explain(x).engine != "cluster"
        with engine("cluster"):
            found = encoder.explain(x)
        assert found.engine is None
        assert "the tensors are on device type 'cpu'" in found.against


@pytest.mark.usefixtures("able")
def test_explained():
    with engine("cluster"), torch.no_grad():
        assert str(make().explain(torch.zeros(1, 4, 256, dtype=torch.bfloat16))) == (
            "loops run in a cluster of blocks, in one launch\nshared_loop  cuda"
        )
