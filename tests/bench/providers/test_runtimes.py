"""Other runtimes compute the plain Conformer with the weights and inputs that everything else gets."""

import importlib.util
import logging
import subprocess
import sys

import pytest
import torch
from lcconformer.bench.core.case import Case
from lcconformer.bench.providers import registry, runtimes
from lcconformer.bench.runs.gate import Gate, GateError
from lcconformer.bench.runs.suite import Skip, prepare

SMALL = Case("inference", 2, 9, d_model=32, layers=2, depth=2, kernel=7)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("onnxruntime", "float32"),
        ("onnxruntime", "int8"),
        ("openvino", "float32"),
        ("openvino", "bfloat16"),
        ("openvino", "int8"),
    ],
)
def test_the_gate_passes_a_runtime_and_notices_other_weights(name, dtype):
    for package in (name, "onnxscript"):
        pytest.importorskip(package, reason="pip install 'lcconformer[test]'")
    if (name, dtype) == ("openvino", "int8"):
        pytest.importorskip("nncf", reason="pip install nncf")
    (provider,) = registry.choose(name)
    case = SMALL.replace(dtype=dtype)
    runner = prepare(provider, case, Gate(case))
    (out,), gradients = runner()
    assert (out.dtype, out.shape, gradients) == (case.torch_dtype, (2, 9, 32), ())
    kept = runner.module._run
    runner.module._run = lambda x: 1.05 * kept(x)
    with pytest.raises(GateError, match="output 0 is off"):
        Gate(case).check(runner)


@pytest.mark.parametrize("name", ["eager", "lcconformer:cpu+loop"])
def test_the_gate_in_int8(name):
    """Beside PyTorch's dynamic quantization of the plain Conformer; whoever has no such form is passed over."""
    (provider,) = registry.choose(name)
    case = SMALL.replace(dtype="int8")
    runner = prepare(provider, case, Gate(case))
    with torch.no_grad():
        (out,), _ = runner()
        exact = prepare(provider, SMALL, Gate(SMALL))()[0][0]
    assert 1e-4 < (out - exact).norm() / exact.norm() < 0.05
    runner.module.register_forward_hook(lambda module, inputs, out: 1.3 * out)
    with pytest.raises(GateError, match="output 0 is off"):
        Gate(case).check(runner)
    for other in registry.choose("sdpa,transformers,lcconformer:cpu"):
        with pytest.raises(Skip, match="has no form in 8 bits"):
            prepare(other, case, Gate(case))
    with pytest.raises(ValueError, match="training in int8 on cpu; int8 is for inference on a CPU"):
        case.replace(mode="training")


SIGNALLED = """
import faulthandler, gc, os, signal
import torch
from lcconformer.bench.core.case import Case
from lcconformer.bench.providers import registry

faulthandler.enable()  # what gives the main thread a signal stack
(provider,) = registry.choose("openvino")
case = Case("inference", 1, 5, d_model=64, layers=1, depth=1, kernel=3)
first, second = provider.build(case).eval(), provider.build(case).eval()
for module in (first, second):
    module(torch.zeros(1, 5, 64))
del first, module
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("received", flush=True))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_logs_are_as_loud_as_before():
    """Quantizing and exporting are quiet; what others have to say afterwards is heard."""
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="pip install 'lcconformer[test]'")
    loggers = [logging.getLogger(name) for name in (None, "torch.onnx", "lcconformer")]
    before = [log.getEffectiveLevel() for log in loggers]
    case = SMALL.replace(dtype="int8")
    runtimes.onnxruntime(case)(torch.randn(case.batch, case.frames, case.d_model))
    assert [log.getEffectiveLevel() for log in loggers] == before


def test_signals_arrive_after_two_models_of_openvino():
    for package in ("openvino", "onnxscript"):
        pytest.importorskip(package, reason="pip install 'lcconformer[test]'")
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stdout) == (0, "received\n"), done.stderr


def test_what_a_runtime_does_not_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else name)
    assert runtimes.missing_openvino(SMALL) == "openvino not installed; pip install openvino"
    assert runtimes.missing_onnxruntime(SMALL) is None
    for change, reason in (
        ({"mode": "training"}, "runs the inference of encoders alone"),
        ({"mode": "feed_forward:forward"}, "runs the inference of encoders alone"),
        ({"device": "cuda"}, "is measured on CPUs alone"),
        ({"dtype": "bfloat16"}, "computes in float32 or int8 on a CPU"),
    ):
        assert runtimes.missing_onnxruntime(SMALL.replace(**change)) == reason


def test_peak_memory_of_a_runtime_is_not_known(tmp_path, monkeypatch):
    from lcconformer.bench.core.roofline import Ceilings
    from lcconformer.bench.core.rows import Results
    from lcconformer.bench.runs import suite

    monkeypatch.setattr(suite, "measure_ceilings", lambda case: Ceilings(0.1, 10.0))
    foreign = registry.Provider("other", "cpu", registry.eager.build, registry.eager.missing, foreign=True)
    rows = suite.run_case(SMALL, [registry.eager, foreign], Results(tmp_path / "out.json"), rounds=1)
    assert [row.peak_memory_mb is None for row in rows] == [False, True]
