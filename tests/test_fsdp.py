"""Two processes: layers sharded by FSDP2 compute what one process does, statistics of a SyncBatchNorm are never local."""

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
        if changes.get("sharing") == "none":  # parts of a layer on their own, as large models have them
            for part in (layer.ffn1, layer.attention.qkv, layer.attention.pos, layer.ffn2):
                fully_shard(part, mesh=mesh)
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


SYNC = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from lcconformer import ConformerConfig, ConformerLayer, accelerate

torch.set_num_threads(1)
dist.init_process_group("gloo")
config = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, conv_kernel_size=5, dropout=0.0, conv_norm="batch")
layer = nn.SyncBatchNorm.convert_sync_batchnorm(ConformerLayer(config))
x = torch.randn(2, 9, 16)
try:
    layer(x)
except ValueError as refused:  # PyTorch synchronises on accelerators only; what must not happen is a local result
    assert "SyncBatchNorm expected input tensor to be on GPU" in str(refused), refused
else:
    raise AssertionError("the statistics of one process were taken for those of all")
assert layer.eval()(x).isfinite().all()
dist.barrier()
os._exit(0)  # interpreters that end together may abort in gloo's threads
"""


def in_two_processes(tmp_path: Path, program: str) -> str:
    worker = tmp_path / "worker.py"
    worker.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_sharded_layers_equal_whole_ones(tmp_path: Path) -> None:
    assert "equal" in in_two_processes(tmp_path, WORKER)


def test_sync_batch_norm_is_not_computed_locally(tmp_path: Path) -> None:
    in_two_processes(tmp_path, SYNC)
