"""The phases' parts that need no GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from lcconformer.bench.gpu import kernels, ncu, warm
from lcconformer.bench.gpu.cases import layer_shapes, timed
from lcconformer.bench.gpu.profiles import kernels_of, table
from lcconformer.bench.providers.registry import choose
from lcconformer.bench.reports.goals import GOALS


def test_every_goal_of_a_gpu_is_timed_in_one_of_the_phases():
    cases = {
        (one.case.mode, one.case.batch, one.case.frames, one.case.d_model)
        for phase in (4, 6)
        for one in timed(phase, small=False)
        if {"eager", "compile"} <= {p.name for p in choose(one.providers)}
        if one.case.layers == 12 and one.case.dtype == "bfloat16"
    }
    assert {(g.mode, g.batch, g.frames, g.d_model) for g in GOALS if g.device == "cuda"} <= cases


@pytest.mark.parametrize("phase", [4, 6, 7])
def test_all_providers_are_known(phase):
    for one in [*timed(phase, small=True), *timed(phase, small=False)]:
        assert one.ladder or choose(one.providers)
    assert len({str(one) for one in timed(phase, small=False)}) == len(timed(phase, small=False))


def test_each_specialisation_is_in_one_share():
    texts = [f"kernel {i}" for i in range(100)]
    shares = [warm.Share(f"{i}/7") for i in range(7)]
    assert all(sum(share.mine(text) for share in shares) == 1 for text in texts)
    assert sorted(itertools.chain.from_iterable(share.some(texts) for share in shares)) == sorted(texts)


def test_a_specialisation_is_what_triton_compiles_anew_for():
    x = torch.zeros(32)
    base = warm.specialisation("k", (x, 64, 0.5), {"BLOCK": 8, "num_warps": 4})
    assert warm.specialisation("k", (torch.ones(64), 128, 0.25), {"num_warps": 4, "BLOCK": 8}) == base
    for other in (
        warm.specialisation("j", (x, 64, 0.5), {"BLOCK": 8, "num_warps": 4}),
        warm.specialisation("k", (x[1:], 64, 0.5), {"BLOCK": 8, "num_warps": 4}),
        warm.specialisation("k", (x.half(), 64, 0.5), {"BLOCK": 8, "num_warps": 4}),
        warm.specialisation("k", (x, 63, 0.5), {"BLOCK": 8, "num_warps": 4}),
        warm.specialisation("k", (x, 1, 0.5), {"BLOCK": 8, "num_warps": 4}),
        warm.specialisation("k", (x, 64, 0.5), {"BLOCK": 16, "num_warps": 4}),
    ):
        assert other != base


def test_launches_only_compile_while_shares_are_compiled(monkeypatch):
    from triton.runtime.jit import JITFunction

    calls = []

    def run(self, *args, grid, warmup, **kwargs):
        calls.append((self.__name__, warmup))

    monkeypatch.setattr(JITFunction, "run", run)

    class Kernel:
        __name__ = "k"

    with warm.compiling(warm.Share("0/1")):
        JITFunction.run(Kernel(), 1, grid=(1,), warmup=False)
    assert calls == [("k", True)]
    assert JITFunction.run is run
    with warm.compiling(_nobody()):
        JITFunction.run(Kernel(), 1, grid=(1,), warmup=False)
    assert calls == [("k", True)]


COMPILES = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Utils:
    def load_binary(self, *args):
        return None, 1, 32, 0, 1024
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

class Launcher:
    def __init__(self, *args):
        pass
    def __call__(self, *args):
        raise AssertionError("a kernel was launched")

class Driver:
    utils, launcher_cls = Utils(), Launcher
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_active_torch_device(self):
        return torch.device("cpu")
    def map_python_to_cpp_type(self, name):
        return name

driver.set_active(Driver())
from lcconformer.bench.gpu import warm
from lcconformer.kernels import residual_layer_norm

run = JITFunction.run
def told(self, *args, **kwargs):
    compiled = run(self, *args, **kwargs)
    print(self.__name__, compiled.metadata.target.arch)
    return compiled
JITFunction.run = told
for share in ("0/2", "1/2"):
    print("share")
    with warm.compiling(warm.Share(share)):
        for dtype in (torch.float32, torch.bfloat16):
            x, w = torch.zeros(16, 64, dtype=dtype), torch.zeros(64, dtype=dtype)
            residual_layer_norm.forward(x, x, w, w, None, 1.0, 0.0, 1e-5)
"""


def test_kernels_are_compiled_once_by_all_shares_together_and_never_launched(tmp_path):
    """By Triton itself for sm_90, over a driver that refuses to launch."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    shares = [part.split("\n")[1:-1] for part in done.stdout.split("share")[1:]]
    assert len(shares) == 2
    assert shares[0] + shares[1] == ["_layer_norm_fwd_kernel 90"] * 2


def _nobody() -> warm.Share:
    share = warm.Share("1/1")
    assert not share.mine("k")
    return share


def test_the_kernels_that_ncu_watches_are_among_those_timed():
    from lcconformer.tune import calls

    (layer,) = layer_shapes(small=True)
    assert set(kernels.SIX) <= {name for name, _ in calls(layer, torch.device("cpu"))}


def test_output_of_ncu():
    header = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
    lines = [
        "==PROF== Connected", "feed_forward", header,
        '"0","_forward","GPU Speed Of Light Throughput","Duration","us","12.3"',
        '"0","_forward","Launch Statistics","Registers Per Thread","register/thread","168"',
        '"1","_forward","GPU Speed Of Light Throughput","Duration","us","4,000.5"',
    ]  # fmt: skip
    assert ncu.parse(lines) == {
        "0 _forward": {"Duration us": "12.3", "Registers Per Thread register/thread": "168"},
        "1 _forward": {"Duration us": "4,000.5"},
    }
    assert ncu.parse(["==ERROR== no counters"]) == {}


def test_a_profile_names_what_ran():
    x = torch.randn(64, 64)
    found = kernels_of(lambda: (x @ x, x @ x), "cpu", repeats=2)
    (product,) = [k for k in found if k["name"] == "aten::mm"]
    assert product["count"] == 2
    assert product["us"] > 0
    text = table(found, most=1).splitlines()
    assert len(text) == 4
    assert text[-1].startswith("all")
