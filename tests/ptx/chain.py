"""Kernels that no op launches, those of the inference chain and the sums of gradients: inputs, launch and formula."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from lcconformer.kernels import chain_convolution as convolution
from lcconformer.kernels import chain_products as products
from lcconformer.kernels import partials
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda u: u, "silu": F.silu, "glu": F.glu}
Make = Callable[..., Tensor]


def norm_product_inputs(case: Mapping[str, Any], tensor: Make) -> dict[str, Any]:
    m, k, n = case["t"], case["d"], case["f"]
    rows = 2 * n if case["epilogue"] == "glu" else n
    inputs: dict[str, Any] = {"x": tensor("x", m, k), "epilogue": case["epilogue"]}
    inputs["norm"] = tensor("norm_weight", k), tensor("norm_bias", k)
    inputs["previous"] = (tensor("previous_weight", k), tensor("previous_bias", k)) if case.get("two") else None
    return inputs | {"weight": tensor("weight", rows, k), "bias": tensor("bias", rows)}


def norm_product_formula(
    x: Tensor, norm: Any, weight: Tensor, bias: Tensor, epilogue: str, previous: Any
) -> tuple[Tensor, ...]:
    entered = x if previous is None else F.layer_norm(x, x.shape[1:], *previous, EPS)
    out = ACTIVATIONS[epilogue](F.linear(F.layer_norm(entered, x.shape[1:], *norm, EPS), weight, bias))
    return (out,) if previous is None else (out, entered)


def norm_product(
    x: Tensor, norm: Any, weight: Tensor, bias: Tensor, epilogue: str, previous: Any
) -> tuple[Tensor, ...]:
    out = x.new_empty(len(x), len(weight) // (2 if epilogue == "glu" else 1))
    entered = None if previous is None else torch.empty_like(x)
    products.norm_product(x, norm, weight, bias, out, EPS, epilogue=epilogue, previous=previous, entered=entered)
    return (out,) if entered is None else (out, entered)


def residual_product_inputs(case: Mapping[str, Any], tensor: Make) -> dict[str, Any]:
    m, k, n = case["t"], case["d"], case["f"]
    inputs = {"a": tensor("a", m, k), "weight": tensor("weight", n, k), "bias": tensor("bias", n)}
    return inputs | {"residual": tensor("residual", m, n)}


def residual_product_formula(a: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return residual + 0.5 * F.linear(a, weight, bias)


def residual_product(a: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    out = residual.clone()
    products.residual_product(a, weight, bias, out, out, 0.5)
    return out


def norm_inputs(case: Mapping[str, Any], tensor: Make) -> dict[str, Any]:
    k = case["d"]
    return {"x": tensor("x", case["t"], k), "weight": tensor("norm_weight", k), "bias": tensor("norm_bias", k)}


def norm_formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], weight, bias, EPS)


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = torch.empty_like(x)
    products.norm(x, weight, bias, out, EPS)
    return out


def depthwise_inputs(case: Mapping[str, Any], tensor: Make) -> dict[str, Any]:
    """``norms``: weight and bias of a LayerNorm; of a BatchNorm with its mean and variance as well."""
    b, t, c, k = case["b"], case["t"], case["c"], case["k"]
    inputs: dict[str, Any] = {"x": tensor("x", b, t, c), "lengths": torch.tensor(case["lengths"])}
    inputs |= {"weight": tensor("weight", c, 1, k), "bias": tensor("bias", c)}
    norms = [tensor(name, c) for name in ("norm_weight", "norm_bias")]
    if case["norm"] == "batch":
        norms += [tensor("mean", c), tensor("var", c).square() + 0.5]
    return inputs | {"norms": tuple(norms) if case["norm"] != "none" else ()}


def depthwise_formula(x: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor, norms: tuple[Tensor, ...]) -> Tensor:
    real = torch.arange(x.shape[1]) < lengths[:, None]
    x = torch.where(real[..., None], x, 0.0).mT
    y = F.conv1d(x, weight, bias, padding=weight.shape[2] // 2, groups=len(weight))
    if len(norms) == 4:
        y = F.batch_norm(y, norms[2].detach(), norms[3].detach(), norms[0], norms[1], eps=EPS)
    y = y.mT
    return F.silu(F.layer_norm(y, y.shape[2:], *norms, EPS) if len(norms) == 2 else y)


def depthwise(x: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor, norms: tuple[Tensor, ...]) -> Tensor:
    k = weight.shape[2]
    taps = torch.empty(convolution.tap_rows(k), len(weight))
    convolution.taps(weight, bias, norms if len(norms) == 4 else None, EPS, taps)
    out = torch.empty_like(x)
    convolution.depthwise(x, taps, k, lengths, norms if len(norms) == 2 else None, EPS, out)
    return out


def accumulate_inputs(case: Mapping[str, Any], tensor: Make) -> dict[str, Any]:
    # partial results of unlike heights and widths, some wider than a program's columns
    parts = [tensor(f"part{i}", 1 + 53 * i, 3 + 5 * i) for i in range(case["parts"])]
    return {"parts": parts, "total": tensor("total", sum(p.shape[1] for p in parts) + 2)}


def accumulate_formula(parts: list[Tensor], total: Tensor) -> Tensor:
    return total + F.pad(torch.cat([p.sum(0) for p in parts]), (1, 1))


def accumulate(parts: list[Tensor], total: Tensor) -> Tensor:
    out, offsets = total.clone(), [1]
    for part in parts:
        offsets.append(offsets[-1] + part.shape[1])
    partials.accumulate(parts, out, offsets[:-1])
    return out


KERNELS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., Any], Callable[..., Any]]] = {
    "chain_norm_product": (norm_product_inputs, norm_product, norm_product_formula),
    "chain_residual_product": (residual_product_inputs, residual_product, residual_product_formula),
    "chain_norm": (norm_inputs, norm, norm_formula),
    "chain_depthwise": (depthwise_inputs, depthwise, depthwise_formula),
    "accumulate": (accumulate_inputs, accumulate, accumulate_formula),
}
"""Name of a case's op -> its inputs, what launches its kernels, and its formula."""


@contextlib.contextmanager
def settings(case: Mapping[str, Any]) -> Iterator[None]:
    """``many``: the tiles for many rows or frames, with two programs for all columns, at few."""
    with contextlib.ExitStack() as stack:
        if case.get("many"):
            for module, name, value in (
                (products, "FEW", 3), (products, "_PROGRAMS", 2), (convolution, "FEW_FRAMES", 0),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(module, name, value))
        yield
