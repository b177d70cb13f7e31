"""Inference runtimes in wide use on CPUs: the plain Conformer exported to ONNX at the shape of the case, their best case.

Of a runtime's threads none works or spins after its call: ONNX Runtime's spin within a call, as it is used, and are told to
stop at its end; OpenVINO's sleep by themselves.  So they cannot disturb what is timed next, in the same process.  For the
threads of OpenMP, which do spin after a call of PyTorch or of ours, see ``apart`` of
:func:`~lcconformer.bench.core.timing.time_interleaved`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.case import Case
from .baselines import Conformer

__all__ = ["missing_onnxruntime", "missing_openvino", "onnxruntime", "openvino"]

# numpy [B, T, d_model] -> numpy [B, T, d_model]
_Run = Callable[[Any], Any]


class _Exported(nn.Module):
    """``[B, T, d_model] -> [B, T, d_model]`` by a runtime, which gets the model and its weights at the first call."""

    def __init__(self, case: Case, start: Callable[[bytes], _Run]) -> None:
        super().__init__()
        self.model = Conformer(case.d_model, case.num_heads, case.ffn_dim, case.layers, case.kernel, case.dropout)
        self.layers = self.model.layers
        self._start = start
        self._run: _Run | None = None

    def forward(self, x: Tensor) -> Tensor:
        given = x.detach().float()
        if self._run is None:
            self._run = self._start(_onnx(self.model.float(), given))
        return torch.from_numpy(self._run(given.numpy())).to(x.dtype)


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    """The float32 model at the shape of ``x`` as ONNX: with fixed frames a runtime computes the positions beforehand."""
    with _errors_alone("torch.onnx"), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True)
    assert program is not None
    return program.model_proto.SerializeToString()


@contextlib.contextmanager
def _errors_alone(name: str | None = None) -> Iterator[None]:
    """Let a logger, or all below the root, say nothing but errors within the block."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def onnxruntime(case: Case) -> nn.Module:
    """Build a module that ONNX Runtime computes, in float32 or in int8 by its dynamic quantization."""

    def start(model: bytes) -> _Run:
        # read at the import: no thread that reports to its makers while something is timed
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime

        if case.dtype == "int8":
            model = _quantized(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: session.run(None, {name: x})[0]

    return _Exported(case, start)


def _quantized(model: bytes) -> bytes:
    """Quantize the weights; what comes in is quantized at each call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        given.write_bytes(model)
        with _errors_alone():  # it advises to run a shape inference that the exporter has done
            quantize_dynamic(given, made, weight_type=QuantType.QInt8)
        return made.read_bytes()


def openvino(case: Case) -> nn.Module:
    """Build a module that OpenVINO computes: in float32, bfloat16, or float32 with weights compressed to int8 by NNCF.

    Its CPU plugin quantizes what meets compressed weights at each call, in groups.
    """

    def start(model: bytes) -> _Run:
        core = _openvino_core()
        network = core.read_model(model)
        if case.dtype == "int8":
            import nncf

            nncf.set_log_level(logging.ERROR)
            network = nncf.compress_weights(network, mode=nncf.CompressWeightsMode.INT8_SYM)
        config = {
            "INFERENCE_PRECISION_HINT": "bf16" if case.dtype == "bfloat16" else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = core.compile_model(network, "CPU", config).create_infer_request()
        return lambda x: request.infer({0: x})[0]

    return _Exported(case, start)


@functools.cache
def _openvino_core() -> Any:
    """One for the process, for ever: each, on its way out, gives the main thread the signal stack that it found there.

    Of two, the one that goes last brings back the other's, which is freed by then: the next signal that Python has a
    handler for ends the process.
    """
    import openvino

    return openvino.Core()


def _missing(case: Case, packages: tuple[str, ...], dtypes: tuple[str, ...]) -> str | None:
    absent = [name for name in (*packages, "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed; pip install {' '.join(absent)}"
    if case.op or case.backward:
        return "runs the inference of encoders alone"
    if case.device != "cpu":
        return "is measured on CPUs alone"
    if case.dtype not in dtypes:
        return f"computes in {' or '.join(dtypes)} on a CPU"
    return None


def missing_onnxruntime(case: Case) -> str | None:
    """Why ONNX Runtime cannot run the case; None if it can."""
    return _missing(case, ("onnxruntime",), ("float32", "int8"))


def missing_openvino(case: Case) -> str | None:
    """Why OpenVINO cannot run the case; None if it can."""
    return _missing(case, ("openvino", *["nncf"] * (case.dtype == "int8")), ("float32", "bfloat16", "int8"))
