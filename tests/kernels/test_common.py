"""The helpers of the kernels: dropout by counter against Philox written out, launch bookkeeping."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from lcconformer.kernels import common
from lcconformer.kernels.common import LaunchConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _keep_kernel(out_ptr, seed_ptr, stream, major, row, column, threshold, M: tl.constexpr, N: tl.constexpr):
    keep = common.dropout_keep(tl.load(seed_ptr), stream, major, row + tl.arange(0, M), column, threshold, N)
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], keep.to(tl.int8))


def kept(seed: int, stream: int, major: int, row: int, column: int, p: float, m: int = 64, n: int = 256) -> np.ndarray:
    out = torch.full((m, n), -1, dtype=torch.int8, device=DEVICE)
    args = (torch.tensor([seed], device=DEVICE), stream, major, row, column, common.dropout_threshold(p))
    common.launch(_keep_kernel, (1,), LaunchConfig(4, 1), out, out, *args, M=m, N=n)
    return out.cpu().numpy()


def philox(key: int, counter: tuple[int, int, int, int], rounds: int = 7) -> list[int]:
    """Philox-4x32 of Salmon et al. 2011, one counter at a time."""
    c, k, mask = list(counter), [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF], 0xFFFFFFFF
    for _ in range(rounds):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [high >> 32 ^ c[1] ^ k[0], high & mask, low >> 32 ^ c[3] ^ k[1], low & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def test_philox_written_out_gives_the_published_numbers():
    """Known answers of Random123 for ten rounds: all zeros, all ones."""
    ones = 0xFFFFFFFF
    assert philox(0, (0, 0, 0, 0), 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(ones << 32 | ones, (ones,) * 4, 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", [3, 2**40 + 5, -7])
def test_dropout_decisions_are_those_of_philox(seed):
    m, n, p = 3, 16, 0.4
    threshold = common.dropout_threshold(p)
    want = np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            column = 24 + j
            word = philox(seed % 2**64, (column // 8, 100 + i, 5, 2))[column % 8 // 2]
            want[i, j] = (word >> 16 if column % 2 else word & 0xFFFF) >= threshold
    # a block has 4 rows, a power of two
    assert (kept(seed, 2, 5, 100, 24, p, 4, n)[:m] == want).all()


def test_dropout_rate_and_independence():
    p, n = 0.1, 64 * 256
    first = kept(1, 0, 0, 0, 0, p)
    others = [kept(2, 0, 0, 0, 0, p), kept(1, 1, 0, 0, 0, p), kept(1, 0, 1, 0, 0, p), kept(1, 0, 0, 64, 0, p)]
    others += [kept(1, 0, 0, 0, 256, p), np.roll(first, 1, 0), np.roll(first, 1, 1), np.roll(first, 2, 1)]
    sigma = (p * (1 - p) / n) ** 0.5
    for mask in (first, *others[:5]):
        assert abs(1 - mask.mean() - p) < 4 * sigma
    for mask in others:
        assert abs(np.corrcoef(first.ravel(), mask.ravel())[0, 1]) < 4 / n**0.5


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999999])
def test_kept_values_are_scaled_by_the_exact_probability(p):
    kept_probability = 1 - common.dropout_threshold(p) / common.DROPOUT_LEVELS
    assert kept_probability > 0
    assert common.dropout_scale(p) * kept_probability == pytest.approx(1, abs=1e-12)
    assert kept_probability == pytest.approx(1 - p, abs=1.0 / common.DROPOUT_LEVELS)


@pytest.mark.parametrize(("arch", "nearest"), [(80, 80), (87, 86), (90, 90), (103, 100), (121, 120)])
def test_nearest_arch(arch, nearest):
    assert common.nearest_arch(arch) == nearest


def test_a_shipped_kernel_has_every_constexpr_and_no_other():
    class Kernel:
        arg_names = ("x_ptr", "seed_ptr", "bias_ptr", "eps", "n", "BLOCK")

        @staticmethod
        def fn(x_ptr, seed_ptr, bias_ptr, eps, n, BLOCK: tl.constexpr):
            pass

    config = LaunchConfig(4, 1, {"BLOCK": 16})
    given = common.aot_config("k", Kernel, "bf16", config, {"bias_ptr": None}, divisible=("n", "other"))
    assert given.signature == {"x_ptr": "*bf16", "seed_ptr": "*i64", "eps": "fp32", "n": "i32"}
    assert given.divisible == {"n"}
    with pytest.raises(ValueError, match=r"k: constexprs without a value: \['BLOCK'\]; .*: \['WARPS'\]"):
        common.aot_config("k", Kernel, "bf16", LaunchConfig(4, 1), {"WARPS": 4})


def test_an_empty_grid_launches_nothing():
    x = torch.zeros(1, device=DEVICE)
    common.launch(None, (0, 3), LaunchConfig(4, 1), x)


def test_collected_launches_are_made_later_and_read_tensors_where_they_are():
    out, seed = torch.full((16, 16), -1, dtype=torch.int8, device=DEVICE), torch.tensor([1], device=DEVICE)
    with common.collected() as launches:
        common.launch(_keep_kernel, (1,), LaunchConfig(4, 1), out, out, seed, 0, 0, 0, 0, 1 << 15, M=16, N=16)
        common.launch(_keep_kernel, (0,), LaunchConfig(4, 1), out, out, seed, 0, 0, 0, 0, 1 << 15, M=16, N=16)
    assert len(launches) == 1
    assert (out == -1).all()
    for number in (2, 3):
        seed.fill_(number)
        common.run(launches, out)
        assert (out.cpu().numpy() == kept(number, 0, 0, 0, 0, 0.5, 16, 16)).all()


def test_a_thread_collects_its_own_launches():
    with common.collected() as launches:
        found = []
        thread = threading.Thread(target=lambda: found.append(kept(1, 0, 0, 0, 0, 0.5, 16, 16)))
        thread.start()
        thread.join()
    assert launches == []
    assert (found[0] == kept(1, 0, 0, 0, 0, 0.5, 16, 16)).all()


def test_a_bound_launch_is_what_triton_would_launch():
    """Over a driver that does nothing: the same kernel, grid and arguments, for arguments of every kind."""
    script = Path(__file__).with_name("launch_without_gpu.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["kernels"] > 40
    assert found["bound"] == found["kernels"]
