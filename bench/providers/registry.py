"""The providers: each builds a module for a case, or says why it cannot run the case here."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lcconformer
from lcconformer.interop.keys import Key
from lcconformer.interop.torchaudio import LAYER_KEYS as TORCHAUDIO_KEYS
from lcconformer.loop.cluster import FRAMES
from lcconformer.ops.registry import BACKENDS

from ..core.case import Case
from . import baselines, peers, runtimes
from .op_modules import BASELINE_OPS, LIBRARY_OPS, SDPA_OPS
from .weights import load_layers

__all__ = ["PROVIDERS", "Provider", "build", "choose", "eager", "library"]


@dataclass(frozen=True)
class Provider:
    """One implementation of the encoder and the ops.

    Attributes:
        name, backend: names in its rows; ``NAME:BACKEND`` selects it on the command line.
        build: makes the module for a case, on the CPU in float32; an encoder has its layers in ``.layers``.
        missing: says why it cannot run a case; returns None if it can.
        keys: how its layers name their weights; None for lcconformer's names.
        position: positions it knows, ``"relative"`` or ``"none"``.
        conv_norm: norm after the depthwise convolution, ``"layer"`` or ``"batch"``.
        conv_bias: whether its convolutions have biases.
        forced: the backend that lcconformer's ops must use; None for other implementations.
        engine: the engine that lcconformer's encoder must use, ``"modules"``, ``"loop"`` or ``"cluster"``.
        compile: arguments of ``torch.compile``; None if it is not compiled.
        graphs: whether the whole call, in training forward and backward, is captured in a CUDA graph and replayed.
        scores: matrices ``[B, H, T, T]`` that attention certainly holds at once.
        note: how its maths differs from the reference, for the table.
        foreign: whether another runtime computes it, whose memory is not PyTorch's and whose threads are its own.
        int8: whether it has a form with weights in 8 bits.
    """

    name: str
    backend: str
    build: Callable[[Case], nn.Module]
    missing: Callable[[Case], str | None]
    keys: tuple[Key, ...] | None = None
    position: str = "relative"
    conv_norm: str = "layer"
    conv_bias: bool = True
    forced: str | None = None
    engine: str = "modules"
    compile: dict | None = None
    graphs: bool = False
    scores: int = 0
    note: str = ""
    foreign: bool = False
    int8: bool = False

    def __str__(self) -> str:
        return self.name if self.backend == "torch" and self.name == "eager" else f"{self.name}:{self.backend}"

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Context of every call of the module: forces backend and engine."""
        if self.forced is None:
            yield
            return
        with lcconformer.backend(self.forced), lcconformer.engine(self.engine):
            yield


def _baseline(attention) -> Callable[[Case], nn.Module]:
    def build(case: Case) -> nn.Module:
        if case.op:
            ops = BASELINE_OPS if attention is baselines.relative_attention else SDPA_OPS
            return ops[case.op](case)
        return baselines.Conformer(
            case.d_model,
            case.num_heads,
            case.ffn_dim,
            case.layers,
            case.kernel,
            case.dropout,
            attention=attention,
        )

    def build_or_quantize(case: Case) -> nn.Module:
        return _Quantized(build(case), baselines.quantized) if case.dtype == "int8" else build(case)

    return build_or_quantize


class _Quantized(nn.Module):
    """``[B, T, d_model] -> [B, T, d_model]`` by what ``quantize`` makes of a module, at the first call: its weights are loaded
    before.
    """

    def __init__(self, module: nn.Module, quantize: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.module, self.layers = module, module.layers
        self._quantize = quantize
        self._quantized: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._quantized is None:
            self._quantized = self._quantize(self.module)
        return self._quantized(x)


class _Encoder(nn.Module):
    """lcconformer's encoder at the depth of the case: ``[B, T, d_model] -> [B, T, d_model]``."""

    def __init__(self, case: Case, sharing: str) -> None:
        super().__init__()
        self.encoder = lcconformer.ConformerEncoder(
            lcconformer.ConformerConfig(
                d_model=case.d_model,
                num_heads=case.num_heads,
                ffn_dim=case.ffn_dim,
                num_layers=case.layers,
                conv_kernel_size=case.kernel,
                dropout=case.dropout,
                sharing=sharing,
            )
        )
        self.layers = self.encoder.layers
        self.depth = case.depth

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, depth=self.depth)[0]


def library(case: Case, sharing: str = "all") -> nn.Module:
    """lcconformer's module for the case, an op or an encoder; ``sharing`` is that of :class:`lcconformer.ConformerConfig`."""
    if case.op:
        return LIBRARY_OPS[case.op](case)
    encoder = _Encoder(case, sharing)
    return _Quantized(encoder, _quantize) if case.dtype == "int8" else encoder


def _quantize(encoder: _Encoder) -> nn.Module:
    encoder.encoder = lcconformer.quantize(encoder.encoder)
    return encoder


def _always(case: Case) -> str | None:
    return None


def _encoder_only(case: Case) -> str | None:
    return "has no such op" if case.op else None


def _needs_sdpa(case: Case) -> str | None:
    return "is about attention" if case.op and case.op != "relpos_attention" else None


def _needs_compiler(case: Case) -> str | None:
    if case.device == "cpu" and not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler on a CPU; install g++"
    return None


def _needs_cuda(case: Case) -> str | None:
    return None if case.device == "cuda" else "needs a CUDA device"


def _needs_torchaudio(case: Case) -> str | None:
    if peers.torchaudio_file() is None:
        return "torchaudio is not installed; pip install torchaudio"
    return _encoder_only(case)


def _needs_transformers(case: Case) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed; pip install transformers"
    return _encoder_only(case)


def _needs_device(backend: str) -> Callable[[Case], str | None]:
    def missing(case: Case) -> str | None:
        if backend == "cuda":
            return _needs_cuda(case)
        if backend == "cpu" and case.device != "cpu":
            return "is for CPU tensors"
        # interpreted kernels serve to test the suite; their times mean nothing
        if backend == "triton" and case.device == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
            return "needs a CUDA device"
        return None

    return missing


_eager = _baseline(baselines.relative_attention)
# the scores, before and after the shift
eager = Provider("eager", "torch", _eager, _always, scores=3, int8=True)


def _compiled(backend: str, missing, graphs: bool = False, **arguments) -> Provider:
    return Provider("compile", backend, _eager, missing, compile=dict(dynamic=False, **arguments), graphs=graphs)


def _library(backend: str, graphs: bool = False, engine: str = "modules") -> Provider:
    device = _needs_cuda if graphs else _needs_device(backend)

    def missing(case: Case) -> str | None:
        if graphs and engine == "loop" and not case.backward:
            return "the inference engine records graphs of its own, which no other can hold"
        if engine == "cluster" and (case.backward or case.frames > FRAMES):
            return f"is for inference of at most {FRAMES} frames"
        return device(case) or (None if engine == "modules" else _encoder_only(case))

    label = backend + ("" if engine == "modules" else f"+{engine}") + ("+graphs" if graphs else "")
    int8 = backend == "cpu" and engine == "loop"
    return Provider("lcconformer", label, library, missing, forced=backend, engine=engine, graphs=graphs, int8=int8)


PROVIDERS: tuple[Provider, ...] = (
    eager,
    Provider("sdpa", "torch", _baseline(baselines.sdpa_relative_attention), _needs_sdpa),
    _compiled("inductor", _needs_compiler),
    _compiled("graphs", _needs_cuda, graphs=True),
    _compiled("max-autotune", _needs_cuda, graphs=True, mode="max-autotune-no-cudagraphs"),
    Provider(
        "torchaudio",
        "torch",
        peers.torchaudio,
        _needs_torchaudio,
        TORCHAUDIO_KEYS,
        position="none",
        conv_norm="batch",
        note="computes less: no relative positions; BatchNorm",
    ),
    Provider(
        "transformers",
        "wav2vec2",
        peers.wav2vec2,
        _needs_transformers,
        peers.WAV2VEC2_KEYS,
        conv_norm="batch",
        conv_bias=False,
        scores=3,
        note="BatchNorm, no convolution biases",
    ),
    Provider(
        "transformers",
        "parakeet",
        peers.parakeet,
        _needs_transformers,
        peers.PARAKEET_KEYS,
        conv_norm="batch",
        note="BatchNorm, no dropout on residual branches",
    ),
    Provider("onnxruntime", "cpu", runtimes.onnxruntime, runtimes.missing_onnxruntime, foreign=True, int8=True),
    Provider("openvino", "cpu", runtimes.openvino, runtimes.missing_openvino, foreign=True, int8=True),
    *(_library(b) for b in reversed(BACKENDS)),
    *(_library(b, graphs=True) for b in ("triton", "cuda")),
    *(_library(b, engine="loop") for b in ("cpu", "triton")),
    _library("triton", graphs=True, engine="loop"),
    *(_library("cuda", graphs=graphs, engine="cluster") for graphs in (False, True)),
)
# only when named in full: it compiles for minutes and gains a few percent
_ON_REQUEST = {"compile:max-autotune"}


def choose(names: str | None) -> tuple[Provider, ...]:
    """Providers by name.

    Args:
        names: ``NAME``, for all its backends that prepare quickly, or ``NAME:BACKEND``, separated by commas; None for all
            that prepare quickly.

    Raises:
        ValueError: a name is unknown.
    """
    ready = tuple(p for p in PROVIDERS if f"{p.name}:{p.backend}" not in _ON_REQUEST)
    if names is None:
        return ready
    chosen: list[Provider] = []
    for name in names.split(","):
        found = [p for p in PROVIDERS if name == f"{p.name}:{p.backend}"] or [p for p in ready if name == p.name]
        if not found:
            known = ", ".join(f"{p.name}:{p.backend}" for p in PROVIDERS)
            raise ValueError(f"bench: no provider {name!r}; use some of {known} (or the part before the colon)")
        chosen += [p for p in found if p not in chosen]
    return tuple(chosen)


def build(provider: Provider, case: Case, state: dict[str, Tensor] | None) -> nn.Module:
    """Build a provider's module on the case's device, and compile it if the provider is compiled.

    Args:
        provider: what to build.
        case: what it will run.
        state: weights for every layer, by lcconformer's names; None keeps those that the module was built with.
    """
    module: Any = provider.build(case)
    # transformers keeps the frequencies of its positions in a buffer, which must not be cast to half precision
    rates = {name: buffer.clone() for name, buffer in module.named_buffers() if name.endswith("inv_freq")}
    if state is not None:
        load_layers(module.layers, state, provider.keys)
    case.place(module)
    for name, buffer in rates.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, buffer.to(case.device))
    if provider.compile is None:
        return module
    if case.op:
        compiled: Any = torch.compile(module, **provider.compile)
        return compiled
    # one layer, whose code serves all: a twelfth of the time to compile, and the CUDA graph spares the launches in between
    for layer in module.layers:
        layer.compile(**provider.compile)
    return module
