"""The gate lets right providers pass and refuses every wrong one."""

import dataclasses

import pytest
import torch
from lcconformer.bench.core.case import OPS, Case
from lcconformer.bench.providers import baselines, registry
from lcconformer.bench.providers.op_modules import BASELINE_OPS
from lcconformer.bench.runs.gate import Gate, GateError
from lcconformer.bench.runs.runner import Runner

SMALL = Case("inference", 3, 21, d_model=64, layers=2, depth=2, kernel=7)


def check(provider, case):
    gate = Gate(case)
    return gate.check(Runner(provider, case, registry.build(provider, case, gate.state(provider))))


PEERS = ("eager:torch", "sdpa:torch", "torchaudio:torch", "transformers:wav2vec2", "transformers:parakeet")


@pytest.mark.parametrize(
    ("name", "mode", "dtype"),
    [
        *((name, mode, "float32") for name in (*PEERS, "lcconformer:torch") for mode in ("inference", "training")),
        *((name, "training", "bfloat16") for name in (*PEERS, "lcconformer:torch")),
        ("lcconformer:torch", "training", "amp"),
    ],
)
def test_the_same_maths_passes(name, mode, dtype):
    (provider,) = registry.choose(name)
    case = SMALL.replace(mode=mode, dtype=dtype)
    if reason := provider.missing(case):
        pytest.skip(reason)
    assert check(provider, case) <= 1.0


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("op", OPS)
def test_ops_pass(op, mode):
    (provider,) = registry.choose("lcconformer:torch")
    assert check(provider, SMALL.replace(mode=f"{op}:{mode}")) <= 1.0


def test_shallow_output_is_checked_at_its_own_depth():
    (provider,) = registry.choose("lcconformer:torch")
    gate = Gate(SMALL)
    case = SMALL.replace(depth=1)
    runner = Runner(provider, case, registry.build(provider, case, gate.state(provider)))
    assert gate.check(runner) <= 1.0
    runner.case = SMALL
    with pytest.raises(GateError, match="output 0 is off by"):
        gate.check(runner)


def without_position_bias(q, k, v, pos, u, v_bias, dropout_p=0.0):
    return baselines.relative_attention(q, k, v, pos, u, torch.zeros_like(v_bias), dropout_p)


def positions_off_by_one(q, k, v, pos, u, v_bias, dropout_p=0.0):
    return baselines.relative_attention(q, k, v, pos.roll(1, 0), u, v_bias, dropout_p)


def nan_in_one_utterance(q, k, v, pos, u, v_bias, dropout_p=0.0):
    # the middle one, which the reference does not run
    out = baselines.relative_attention(q, k, v, pos, u, v_bias, dropout_p)
    return out.index_fill(0, torch.tensor([1]), torch.nan)


def gradient_lost(q, k, v, pos, u, v_bias, dropout_p=0.0):
    return baselines.relative_attention(q, k, v, pos, u + 0.0 * u.sum() - u + u.detach(), v_bias, dropout_p)


def gradient_doubled(q, k, v, pos, u, v_bias, dropout_p=0.0):
    return baselines.relative_attention(q, k, v, 2 * pos - pos.detach(), u, v_bias, dropout_p)


@pytest.mark.parametrize(
    ("wrong", "mode", "dtype", "message"),
    [
        (without_position_bias, "inference", "float32", "output 0 is off by"),
        (without_position_bias, "inference", "bfloat16", "output 0 is off by"),
        (positions_off_by_one, "inference", "float32", "output 0 is off by"),
        (nan_in_one_utterance, "inference", "float32", "not finite"),
        (gradient_lost, "training", "float32", "gradient of attention.u is off by"),
        (gradient_doubled, "training", "bfloat16", "gradient of attention.pos.weight is off by"),
    ],
)
def test_a_wrong_provider_is_refused(wrong, mode, dtype, message):
    def build(c):
        sizes = (c.d_model, c.num_heads, c.ffn_dim, c.layers, c.kernel, c.dropout)
        return baselines.Conformer(*sizes, attention=wrong)

    with pytest.raises(GateError, match=message):
        check(dataclasses.replace(registry.eager, name="mutant", build=build), SMALL.replace(mode=mode, dtype=dtype))


def test_without_finite_numbers_of_plain_pytorch_nothing_passes(monkeypatch):
    monkeypatch.setattr(baselines.Conformer, "forward", lambda self, x: x * (1.0 if x.dtype == torch.float64 else 1e60))
    with pytest.raises(GateError, match="plain PyTorch in float32 gives outputs that are not finite"):
        check(registry.eager, SMALL)


def test_a_wrong_op_is_refused():
    def build(case):
        module = BASELINE_OPS["feed_forward"](case)
        module.register_forward_hook(lambda module, args, out: out + 0.01)
        return module

    provider = dataclasses.replace(registry.eager, name="mutant", build=build)
    with pytest.raises(GateError, match="output 0 is off by"):
        check(provider, SMALL.replace(mode="feed_forward:forward"))


def test_weights_that_are_not_set_are_an_error():
    provider = dataclasses.replace(registry.choose("torchaudio")[0], keys=())
    with pytest.raises(ValueError, match="weights without a counterpart"):
        check(provider, SMALL)
