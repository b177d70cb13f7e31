"""FSDP2: layers sharded over two processes compute what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)

WORKER = """
import copy, os, sys, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from lcconformer import ConformerConfig, ConformerEncoder

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for changes in ({}, {"sharing": "none"}, {"position": "rotary"}):
    torch.manual_seed(0)
    base = dict(d_model=16, num_heads=2, ffn_dim=24, num_layers=3, conv_kernel_size=5, dropout=0.0)
    config = ConformerConfig(**base, **changes)
    whole = ConformerEncoder(config).double()
    sharded = copy.deepcopy(whole)
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    x, lengths = torch.randn(2, 9, 16, dtype=torch.float64), torch.tensor([9, 5])
    for encoder in (whole, sharded):
        encoder(x, lengths)[0].square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(sharded(x, lengths)[0], whole(x, lengths)[0])
    for (name, a), (_, b) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad, msg=name)
if dist.get_rank() == 0:
    print("equal", flush=True)
dist.barrier()
os._exit(0)  # interpreters that end together may abort in gloo's threads
"""


def test_sharded_layers_equal_whole_ones(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal" in done.stdout
