"""The formulas against torch's own counter of floating-point operations, and against the modules' parameters."""

import pytest
import torch
from lcconformer.bench.core.case import Case
from lcconformer.bench.core.roofline import Ceilings, floor_ms, layer_parameters, measure_ceilings, work
from lcconformer.bench.providers import baselines
from lcconformer.bench.providers.op_modules import BASELINE_OPS
from torch.utils.flop_counter import FlopCounterMode

from lcconformer import ConformerConfig, ConformerLayer

CASE = Case("inference", 3, 24, d_model=128, layers=2, depth=2, kernel=7)


def count(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("position", ["relative", "none"])
def test_encoder_flops(position):
    c = CASE
    model = baselines.Conformer(c.d_model, c.num_heads, c.ffn_dim, c.layers, c.kernel, 0.0, position=position)
    executed = count(lambda: model(c.input()))
    if position == "relative":
        # plain PyTorch also scores the T-1 positions that the shift drops, and projects positions in every layer
        executed -= c.layers * 2 * c.batch * c.frames * (c.frames - 1) * c.d_model
        executed -= (c.layers - 1) * 2 * (2 * c.frames - 1) * c.d_model**2
    assert work(c, position).flops == executed


def test_encoder_flops_agree_with_its_summary():
    from lcconformer import ConformerEncoder

    config = ConformerConfig(CASE.d_model, CASE.num_heads, CASE.ffn_dim, CASE.layers, CASE.kernel)
    assert work(CASE.replace(batch=1)).flops == ConformerEncoder(config).summary(CASE.frames).flops[-1]


def test_training_is_three_forwards_of_a_matrix_product():
    c = CASE.replace(mode="feed_forward:training")
    module = BASELINE_OPS["feed_forward"](c).eval()
    assert work(c).flops == count(lambda: module(c.input()).sum().backward())


@pytest.mark.parametrize("op", ["relpos_attention", "glu_depthwise_conv", "feed_forward", "residual_layer_norm"])
def test_op_flops_and_bytes(op):
    c = CASE.replace(mode=f"{op}:forward")
    module, x = BASELINE_OPS[op](c).eval(), c.input()
    executed = count(lambda: module(x))
    if op == "relpos_attention":
        executed -= 2 * c.batch * c.frames * (c.frames - 1) * c.d_model
    assert work(c).flops == executed
    outputs = module(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = [x, *outputs, *module.parameters()]
    assert work(c).bytes == sum(t.nbytes for t in tensors)


def test_parameters_of_a_layer():
    config = ConformerConfig(CASE.d_model, CASE.num_heads, CASE.ffn_dim, 1, CASE.kernel)
    assert layer_parameters(CASE) == sum(p.numel() for p in ConformerLayer(config).parameters())


def test_floor_is_the_slower_of_the_two_ceilings():
    c = CASE.replace(mode="residual_layer_norm:forward")
    ceilings = Ceilings(gemm_tflops=1.0, copy_gb_s=2.0)
    assert floor_ms(work(c), ceilings) == pytest.approx(work(c).bytes / 2e9 * 1e3)
    ceilings = Ceilings(gemm_tflops=1e-9, copy_gb_s=2.0)
    assert floor_ms(work(CASE), ceilings) == pytest.approx(work(CASE).flops / 1e3 * 1e3)


def test_measured_ceilings_are_rates_of_this_machine(monkeypatch):
    # a clock that ticks once a second: 2 * 1024^3 FLOP and 128 MiB in one second each
    ticks = iter(range(10**6))
    monkeypatch.setattr("lcconformer.bench.core.roofline.time.perf_counter", lambda: next(ticks))
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out)
    found = measure_ceilings(CASE)
    assert found.gemm_tflops == pytest.approx(2 * 1024**3 / 1e12)
    assert found.copy_gb_s == pytest.approx(2 * 4 * 2**24 / 1e9)
