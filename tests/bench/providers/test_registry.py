"""Providers by name, and what each of them forces."""

import pytest
import torch
from lcconformer.bench.core.case import Case
from lcconformer.bench.providers import baselines, registry

from lcconformer import loop
from lcconformer.ops.registry import forced_backend

SMALL = Case("inference", 2, 9, d_model=32, layers=2, depth=2, kernel=7)


def test_unknown_provider():
    with pytest.raises(ValueError, match="no provider 'nemo'; use some of eager:torch"):
        registry.choose("nemo")


def test_each_engine_has_a_row_of_its_own():
    chosen = {str(p): p for p in registry.choose("lcconformer")}
    assert chosen["lcconformer:cpu"].engine == "modules"
    assert chosen["lcconformer:cpu+loop"].engine == "loop"
    with chosen["lcconformer:cpu+loop"].scope():
        assert (loop.forced_engine(), forced_backend()) == ("loop", "cpu")
    assert chosen["lcconformer:cpu+loop"].missing(SMALL.replace(mode="feed_forward:forward")) == "has no such op"


def test_the_loop_in_a_cluster_is_for_short_utterances():
    (provider,) = registry.choose("lcconformer:cuda+cluster")
    gpu = SMALL.replace(device="cuda", dtype="bfloat16")
    assert provider.engine == "cluster"
    assert provider.missing(gpu) is None
    assert provider.missing(SMALL) == "needs a CUDA device"
    assert provider.missing(gpu.replace(frames=17)) == "is for inference of at most 16 frames"
    assert provider.missing(gpu.replace(mode="training")) == "is for inference of at most 16 frames"


def test_what_compiles_for_minutes_is_chosen_by_its_full_name_alone():
    assert [str(p) for p in registry.choose("compile")] == ["compile:inductor", "compile:graphs"]
    assert [str(p) for p in registry.choose("compile:max-autotune")] == ["compile:max-autotune"]


def test_a_training_step_of_the_loop_engine_is_captured_as_a_whole():
    (both,) = registry.choose("lcconformer:triton+loop+graphs")
    assert (both.engine, both.graphs) == ("loop", True)
    gpu = SMALL.replace(device="cuda")
    assert both.missing(gpu.replace(mode="training")) is None
    assert "graphs of its own" in both.missing(gpu)
    assert both.missing(SMALL.replace(mode="training")) == "needs a CUDA device"


@pytest.mark.parametrize("frames", [1, 7, 16, 21])
@pytest.mark.parametrize("relative", [True, False])
def test_attention_in_blocks_is_attention(frames, relative):
    q, k, v = torch.randn(3, 2, frames, 2, 4, dtype=torch.float64)
    position = (torch.randn(2 * frames - 1, 2, 4).double(), *torch.randn(2, 2, 4).double()) if relative else (None,) * 3
    want = baselines.relative_attention(q, k, v, *position)
    got = baselines.relative_attention_in_blocks(q, k, v, *position, block=8)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
