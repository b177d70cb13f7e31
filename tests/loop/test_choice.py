"""Which engine runs the loop: the choice, forcing one, and the reasons against."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lcconformer import ConformerConfig, ConformerEncoder, backend, engine
from lcconformer.loop import inference, training

BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=2, conv_kernel_size=5, dropout=0.0)


def runs_on(encoder, x, **options):
    """Name of what recorded the output: the engine's function or the modules' last norm."""
    return type(encoder(x, **options)[0].grad_fn).__name__


def on_engine(encoder, x=None, **options):
    return runs_on(encoder, torch.randn(2, 9, 16) if x is None else x, **options) == "LoopFnBackward"


def test_auto_takes_the_engine_where_it_serves():
    encoder = ConformerEncoder(BASE)
    assert on_engine(encoder)
    with engine("modules"):
        assert not on_engine(encoder)
        with engine("loop"):
            assert on_engine(encoder)
        assert not on_engine(encoder)
    # what it could serve, but not as fast as the modules
    assert not on_engine(encoder.double(), torch.randn(2, 9, 16, dtype=torch.float64))
    with backend("torch"):
        assert not on_engine(encoder.float())
    with backend("triton"):
        assert not on_engine(encoder.float())


def test_it_is_the_trained_tensors_that_decide():
    encoder, x = ConformerEncoder(BASE.replace(input_dim=10)), torch.randn(2, 9, 10)
    assert on_engine(encoder, x)
    encoder.layers.requires_grad_(False)  # the front end still learns
    assert on_engine(encoder, x)
    encoder.requires_grad_(False)
    assert not encoder(x)[0].requires_grad
    assert on_engine(encoder, x.requires_grad_())
    with torch.no_grad():
        assert not encoder(x)[0].requires_grad


def test_unknown_engine(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"engine: unknown engine 'graph'; use one of auto, modules, loop"),
        engine("graph"),
    ):
        pass
    monkeypatch.setenv("LCCONFORMER_ENGINE", "fast")
    with pytest.raises(ValueError, match="LCCONFORMER_ENGINE: unknown engine 'fast'"):
        ConformerEncoder(BASE)(torch.randn(1, 5, 16))


def test_environment(monkeypatch):
    encoder = ConformerEncoder(BASE)
    monkeypatch.setenv("LCCONFORMER_ENGINE", "modules")
    assert not on_engine(encoder)
    with engine("auto"):
        assert on_engine(encoder)


class Wrapped(nn.Linear):
    """What a library for adapters or quantisation puts in place of a module."""


def wrap(layer):
    layer.attention.qkv.__class__ = Wrapped


def hook(layer):
    layer.ffn1.up.register_forward_hook(lambda *_: None)


def pre_hook(layer):
    layer.register_forward_pre_hook(lambda *_: None)


def backward_hook(layer):
    layer.conv.register_full_backward_hook(lambda *_: None)


def new_forward(layer):
    layer.ffn2.forward = lambda x: x


def compile_in_place(layer):
    layer.compile(backend="eager")


def weight_norm(layer):
    parametrizations.weight_norm(layer.ffn1.up)


def pruned(layer):
    prune.random_unstructured(layer.ffn1.up, "weight", 0.5)


class Strange(torch.Tensor):
    """As FSDP2's and others' parameters are: a tensor with an opinion."""


def subclass(layer):
    layer.norm.weight = nn.Parameter(torch.ones(16).as_subclass(Strange))


CHANGES = {
    wrap: "layers.0.attention.qkv is a Wrapped",
    hook: "layers.0.ffn1.up has hooks",
    pre_hook: "layers.0 has hooks",
    backward_hook: "layers.0.conv has hooks",
    new_forward: "layers.0.ffn2 has a forward of its own",
    compile_in_place: "layers.0 has a forward of its own",
    weight_norm: "layers.0.ffn1.up is a ParametrizedLinear",
    pruned: "layers.0.ffn1.up has hooks",
    subclass: "layers.0.norm.weight is a Strange",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changed_modules_run_as_modules(change):
    encoder, x = ConformerEncoder(BASE), torch.randn(2, 9, 16)
    change(encoder.layers[0])
    with engine("loop"), pytest.raises(NotImplementedError, match=CHANGES[change]):
        encoder(x)
    if change is not compile_in_place:
        assert not on_engine(encoder, x)


def test_hooks_are_called_again_once_they_are_there():
    """The choice is made anew in every call."""
    encoder, x = ConformerEncoder(BASE), torch.randn(2, 9, 16)
    calls = []
    assert on_engine(encoder, x)
    handle = encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    encoder(x)
    assert len(calls) == 2
    handle.remove()
    assert on_engine(encoder, x)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        assert not on_engine(encoder, x)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conditioning": ("film",)}, "conditioning"),
        ({"conv_norm": "batch", "conv_norm_statistics": "per_depth"}, "statistics per depth"),
        ({"position": "rotary"}, "position 'rotary'"),
    ],
)
def test_configurations_it_does_not_serve(changes, reason):
    encoder = ConformerEncoder(BASE.replace(**changes))
    assert not on_engine(encoder)
    with engine("loop"), pytest.raises(NotImplementedError, match=rf"engine 'loop' was forced but .*{reason}"):
        encoder(torch.randn(2, 9, 16))


@pytest.mark.parametrize("shape", [(0, 9, 16), (2, 0, 16)])
def test_no_frames(shape):
    with engine("loop"), pytest.raises(NotImplementedError, match="there are no frames"):
        ConformerEncoder(BASE)(torch.randn(shape))


def test_dtypes_that_do_not_agree():
    with (
        engine("loop"),
        pytest.raises(NotImplementedError, match=r"input is torch.float64 and weights are torch.float32"),
    ):
        ConformerEncoder(BASE)(torch.randn(2, 9, 16, dtype=torch.float64))


def test_backend_without_the_kernels():
    reason = "relpos_attention: backend 'cuda' was forced but cannot serve"
    with engine("loop"), backend("cuda"), pytest.raises(NotImplementedError, match=reason):
        ConformerEncoder(BASE)(torch.randn(2, 9, 16))


def test_transforms_and_tracers_see_the_modules():
    encoder, x = ConformerEncoder(BASE), torch.randn(2, 9, 16)
    with backend("torch"):
        want = torch.autograd.grad(encoder(x)[0].square().sum(), list(encoder.parameters()))
        parameters = dict(encoder.named_parameters())
        got = torch.func.grad(lambda p: torch.func.functional_call(encoder, p, (x,))[0].square().sum())(parameters)
        for name, gradient in zip(parameters, want):
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4)
        _, tangent = torch.func.jvp(lambda x: encoder(x)[0], (x,), (x,))
        assert tangent.isfinite().all()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            out = torch.autograd.forward_ad.unpack_dual(encoder(dual)[0])
        torch.testing.assert_close(out.tangent, tangent)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    with backend("torch"):
        torch.testing.assert_close(compiled(x)[0], encoder(x)[0])


def test_the_ops_are_asked_as_before():
    """Which backend serves each op is theirs to say, also for the engine: the benchmarks listen there."""
    from lcconformer.ops.registry import record

    with record() as served:
        assert on_engine(ConformerEncoder(BASE))
    ops = ("relpos_attention", "glu_depthwise_conv", "feed_forward", "residual_layer_norm")
    assert served == dict.fromkeys(ops, "cpu")


DDP = """
import copy, os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from lcconformer import ConformerConfig, ConformerEncoder, engine

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
config = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=3, conv_kernel_size=5, dropout=0.0, sharing="cycle:2")
encoder = ConformerEncoder(config).double()
alone = copy.deepcopy(encoder)
batches = torch.randn(2, 2, 2, 9, 16, dtype=torch.float64)  # [step, rank, B, T, D]
with engine("modules"):
    for x in batches.flatten(0, 1):
        (alone(x)[0].square().sum() / 2).backward()
model = DistributedDataParallel(encoder, find_unused_parameters=False)
with engine("loop"):
    with model.no_sync():
        model(batches[0, rank])[0].square().sum().backward()
    model(batches[1, rank])[0].square().sum().backward()
for (name, p), q in zip(encoder.named_parameters(), alone.parameters()):
    torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=lambda m: f"{name}: {m}")
dist.barrier()
dist.destroy_process_group()
sys.stderr.flush()
os._exit(0)  # on a busy machine a thread of PyTorch 2.13 may abort the interpreter as it ends
"""


def test_distributed_data_parallel(tmp_path):
    """Two processes, one step without synchronisation and one with it, equal one process with all batches."""
    (tmp_path / "worker.py").write_text(DDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(tmp_path / "worker.py")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("device", "names", "taken"),
    [
        ("cpu", ("cpu",) * 4, True),
        ("cpu", ("triton",) * 4, False),
        ("cuda", ("triton",) * 4, True),
        ("cuda", ("triton", "cuda", "triton", "triton"), True),
        ("cuda", ("triton", "torch", "triton", "triton"), False),
        ("xpu", ("torch",) * 4, False),
    ],
)
def test_auto_trains_on_the_engine_where_it_is_no_slower(device, names, taken):
    """Measured on the CPU kernels; on a GPU by the number of kernels launched (test_training_cost.py)."""
    x, kernels = SimpleNamespace(device=torch.device(device)), SimpleNamespace(names=names)
    assert (training.slower(x, kernels) == []) == taken


@pytest.mark.parametrize(
    ("amx", "avx512", "gain", "own", "frames", "taken"),
    [
        (True, True, 2.0, torch.bfloat16, 193, False),
        (True, True, 2.0, torch.bfloat16, 192, True),
        (True, True, 0.5, torch.float32, 193, False),
        (False, True, 2.0, torch.bfloat16, 12_000, True),
        (False, True, 2.0, torch.float32, 193, False),
        (False, True, 2.0, torch.float32, 192, True),
        (False, True, 0.5, torch.float32, 12_000, True),
        (False, False, 0.5, torch.float32, 12_000, True),
    ],
)
def test_auto_evaluates_bfloat16_on_the_engine_where_it_is_no_slower(
    amx, avx512, gain, own, frames, taken, monkeypatch
):
    monkeypatch.setattr(inference, "cpu_kernels", lambda: SimpleNamespace(bfloat16_gain=lambda: gain))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(inference.weights, "product_dtype", lambda x: own)
    stack = ConformerEncoder(ConformerConfig(d_model=2, num_heads=1))
    x = torch.empty(1, frames, 2)
    assert (inference.slower(stack, x.bfloat16()) == []) == taken
    assert inference.slower(stack, x) == []
