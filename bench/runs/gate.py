"""The correctness gate: a provider with wrong numbers is not timed.

The rule is that of :mod:`lcconformer.tolerance`: the reference is the plain Conformer in float64 with the same weights, and
``low`` the plain Conformer in the dtype and on the device of the case, in int8 by PyTorch's dynamic quantization.  A provider
runs at the shape that is timed; the reference runs only the first and the last utterance, which do not depend on the rest of
the batch.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcconformer.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, allowed_error, passes, relative_error

from ..core.case import Case
from ..providers import baselines
from ..providers.op_modules import BASELINE_OPS
from ..providers.registry import Provider
from ..providers.weights import layer_gradients, load_layers, random_layer
from .runner import Runner, as_tuple

__all__ = ["Gate", "GateError"]


# frames above which the reference keeps the scores of some queries alone
_LONG = 2000


class GateError(Exception):
    """Outputs or gradients of a provider are wrong; the message says by how much."""


@dataclass
class _Gold:
    """Values of the reference by name, and the relative error of plain PyTorch in the case's dtype for each of them."""

    values: dict[str, Tensor]
    low: dict[str, float]


class Gate:
    """Checks the providers of one case; computes a reference once for all providers of the same maths.

    Args:
        case: what is about to be timed.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        # in float64, scores of two long utterances fill the memory of a small machine
        last = case.batch - 1
        self.rows = [last] if case.frames > 800 and case.device == "cpu" else sorted({0, last})
        self._gold: dict[tuple, _Gold] = {}
        self._states: dict[tuple, dict[str, Tensor]] = {}

    def state(self, provider: Provider) -> dict[str, Tensor] | None:
        """Weights of a layer in float64, rounded to the case's dtype so that every provider gets the same numbers.

        None for an op, whose modules hold the same parameters already.
        """
        if self.case.op:
            return None
        key = (provider.position, provider.conv_norm, provider.conv_bias)
        if key not in self._states:
            state = random_layer(self.case, *key)
            dtype = self.case.torch_dtype
            self._states[key] = {n: v.to(dtype).double() if v.is_floating_point() else v for n, v in state.items()}
        return self._states[key]

    def check(self, runner: Runner) -> float:
        """Largest ratio of an error to what is allowed, at most 1.

        Raises:
            GateError: the ratio is larger, or a result is not finite.
        """
        provider, case = runner.provider, self.case
        depth = case.layers if provider.name != "lcconformer" else runner.case.depth
        gold = self._reference(provider, depth)
        with runner.without_dropout():
            values = self._values(runner)
        dtype = torch.bfloat16 if case.dtype == "amp" else case.torch_dtype
        worst = 0.0
        for kind, factor in (("output", OUTPUT_FACTOR), ("gradient", GRADIENT_FACTOR)):
            names = [n for n in values if n.startswith(kind)]
            # one bound for all gradients: a small tensor may happen to be nearly exact in plain PyTorch
            allowed = allowed_error(max((gold.low[n] for n in names), default=0.0), factor, dtype)
            if math.isinf(allowed):
                raise GateError(
                    f"plain PyTorch in {case.dtype} gives {kind}s that are not finite, so no error is allowed"
                )
            for name in names:
                error = relative_error(values[name], gold.values[name])
                if not passes(error, allowed):
                    raise GateError(f"{name} is off by {error:.2e} of its scale; at most {allowed:.2e} is allowed")
                worst = max(worst, error / allowed)
        out, gradients = runner()
        if not all(bool(t.isfinite().all()) for t in (*out, *gradients)):
            raise GateError("outputs or gradients of the timed call are not finite")
        return worst

    def _values(self, runner: Runner) -> dict[str, Tensor]:
        """Outputs of the checked utterances by name; in training also gradients of a loss over these utterances alone."""
        rows = self.rows
        if not self.case.backward:
            return {f"output {i}": o[rows] for i, o in enumerate(runner()[0])}

        def cotangents(out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            zeros = tuple(torch.zeros_like(o) for o in out)
            for whole, part in zip(zeros, self._cotangents(tuple(o[rows] for o in out))):
                whole[rows] = part
            return zeros

        kept, runner.cotangents = runner.cotangents, cotangents
        try:
            out, (dx, *parameters) = runner()
        finally:
            runner.cotangents = kept
        values = {f"output {i}": o.detach()[rows] for i, o in enumerate(out)}
        values["gradient of the input"] = dx[rows]
        return values | self._named(runner.module, runner.parameters, parameters, runner.provider.keys)

    @staticmethod
    def _cotangents(out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Random gradients of ``out``, the outputs of the checked utterances."""
        generator = torch.Generator().manual_seed(4)
        return tuple(torch.randn(o.shape, generator=generator).to(o) for o in out)

    def _named(self, module, parameters, gradients, keys) -> dict[str, Tensor]:
        """Gradients of parameters by lcconformer's names, summed over layers."""
        by_id = {id(p): g for p, g in zip(parameters, gradients)}
        if self.case.op:
            named = {n: by_id[id(p)] for n, p in module.named_parameters()}
        else:
            named = layer_gradients(module.layers, by_id, keys)
        return {f"gradient of {n.removeprefix('_orig_mod.')}": g for n, g in named.items()}

    def _reference(self, provider: Provider, depth: int) -> _Gold:
        key = (provider.position, provider.conv_norm, provider.conv_bias, depth)
        if key not in self._gold:
            high, low = (self._run(provider, depth, dtype) for dtype in (torch.float64, self.case.torch_dtype))
            self._gold[key] = _Gold(high, {n: relative_error(low[n], high[n]) for n in high})
        return self._gold[key]

    def _run(self, provider: Provider, depth: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Outputs and gradients of the plain Conformer or op on the checked utterances, computed in ``dtype``."""
        case = self.case
        module: Any
        if case.op:
            module = BASELINE_OPS[case.op](case)
            # round the parameters as those of the providers are
            module.to(case.torch_dtype)
        else:
            module = baselines.Conformer(
                case.d_model,
                case.num_heads,
                case.ffn_dim,
                1,
                case.kernel,
                0.0,
                position=provider.position,
                conv_norm=provider.conv_norm,
                attention=baselines.relative_attention
                if case.frames <= _LONG
                else baselines.relative_attention_in_blocks,
            ).double()
            state = self.state(provider)
            assert state is not None
            load_layers(module.layers, state, None)
            # one layer, run `depth` times: its gradient is the sum over layers
            module.layers = torch.nn.ModuleList([module.layers[0]] * depth)
        module.to(case.device, dtype).eval()
        if case.dtype == "int8" and dtype != torch.float64:
            module = baselines.quantized(module)
        x = case.input().detach()[self.rows].to(dtype).requires_grad_(case.backward)
        exact = dtype == torch.float64
        precision = contextlib.nullcontext() if exact else case.autocast()
        with torch.set_grad_enabled(case.backward), precision:
            out = as_tuple(module(x))
        values = {f"output {i}": o.detach() for i, o in enumerate(out)}
        if case.backward:
            parameters = list(module.parameters())
            dx, *gradients = torch.autograd.grad(out, [x, *parameters], self._cotangents(out))
            values["gradient of the input"] = dx
            if not case.op:
                module.layers = torch.nn.ModuleList([module.layers[0]])
            values |= self._named(module, parameters, gradients, None)
        return {n: v.double() if exact else v for n, v in values.items()}
