"""The kernels as Triton specialises them: an integer of one is a constant, an absent tensor is None.

The interpreter sees neither. Run as a script, without TRITON_INTERPRET, this file lowers every variant to Triton's IR
("lower"), or says which specialisations inputs of many lengths ask for ("count"); both without a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("triton")

from lcconformer.kernels import (
    chain_convolution,
    chain_products,
    feed_forward,
    glu_depthwise_conv,
    glu_depthwise_conv_backward,
    partials,
    relpos_attention,
    residual_layer_norm,
)
from lcconformer.kernels import feed_forward_products as products
from lcconformer.kernels.common import AotConfig, LaunchConfig

MODULES = (
    chain_convolution,
    chain_products,
    feed_forward,
    glu_depthwise_conv,
    glu_depthwise_conv_backward,
    partials,
    products,
    relpos_attention,
    residual_layer_norm,
)
OPTIONAL = ("lengths_ptr", "bias_ptr", "seed_ptr", "keep_ptr")
# unrolled loops, as short as they go
SHORT = {"BLOCK_R": 2, "TAPS": 2, "STEP": 2}


def variants(config: AotConfig) -> Iterator[AotConfig]:
    fixed = {p.name for p in config.kernel.params if p.do_not_specialize}
    integers = [n for n, kind in config.signature.items() if kind == "i32" and n not in fixed]
    ones = dict.fromkeys(integers, 1)
    # LayerNorm always has its bias, and what draws a seed
    always = (("bias_ptr", "layer_norm"), ("seed_ptr", "draw"), ("keep_ptr", "draw"))
    absent = [
        n for n in OPTIONAL if n in config.signature and not any(n == a and op in config.name for a, op in always)
    ]
    changes = [{}, ones, *({n: None} for n in absent), {**ones, **dict.fromkeys(absent)}]
    # in attention all integers but H are strides, and all are used alike
    changes += [{n: 1} for n in integers if "attention" not in config.name or n == "H"]
    for change in changes:
        yield dataclasses.replace(
            config,
            signature={n: kind for n, kind in config.signature.items() if n not in change},
            constexprs={**config.constexprs, **change},
        )


def lower(config: AotConfig) -> None:
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options({"num_warps": 4})
    names = config.kernel.arg_names
    source = ASTSource(config.kernel, {n: config.signature.get(n, "constexpr") for n in names}, dict(config.constexprs))
    source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def lower_all() -> int:
    """How many variants were lowered."""
    count = 0
    seen = set()
    for module in MODULES:
        for config in module.aot_configs(90):
            short = {n: v for n, v in SHORT.items() if n in config.constexprs}
            config = dataclasses.replace(config, constexprs={**config.constexprs, **short})
            # the sizes of tiles, and of the heads in them, change no line
            flags = tuple((n, str(v)) for n, v in config.constexprs.items() if not n.startswith("BLOCK_") and n != "D")
            if (config.kernel.__name__, flags) in seen:
                continue
            seen.add((config.kernel.__name__, flags))
            for variant in variants(config):
                lower(variant)
                count += 1
    return count


def specialised_on(parameter: object, value: object) -> tuple[bool, ...]:
    """What Triton looks at in an argument."""
    if isinstance(value, torch.Tensor):
        return () if parameter.do_not_specialize_on_alignment else (value.data_ptr() % 16 == 0,)
    return (value == 1, value % 16 == 0) if isinstance(value, int) else ()


def specialisations() -> dict[str, int]:
    """Op, kernel and tiles -> how many specialisations batches of many shapes ask for; nothing is launched."""
    found: dict[str, set[tuple[object, ...]]] = {}
    op = ""

    def record(
        kernel: object, _grid: object, config: LaunchConfig, _x: object, *args: object, **kwargs: object
    ) -> None:
        given = inspect.signature(kernel.fn).bind(*args, **kwargs, **config.blocks).arguments
        tiles = [str(given[p.name]) for p in kernel.params if p.is_constexpr]
        looked_at = [p for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]
        key = tuple(specialised_on(p, given[p.name]) for p in looked_at)
        found.setdefault(" ".join([op, kernel.__name__, *tiles]), set()).add(key)

    for module in MODULES:
        module.launch = record
    for b, t in ((1, 1), (1, 2), (2, 1), (2, 7), (3, 16), (16, 31), (1, 48), (4, 203), (16, 255), (2, 400), (5, 1500)):
        for name, call in calls(b, t):
            op = name
            call()
    return {name: len(keys) for name, keys in found.items()}


def calls(b: int, t: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each op forward and backward, as its autograd.Function calls it."""
    d, f, p = 64, 128, 0.1
    x, wide, vector = torch.zeros(b, t, d), torch.zeros(b, t, 2 * d), torch.zeros(d)
    lengths, ends = torch.zeros(b, dtype=torch.int64), torch.zeros(b + 1, dtype=torch.int64)
    seed = torch.zeros(2, dtype=torch.int64)[b % 2 :][:1]  # those of several loops are one tensor

    def feed() -> None:
        w1, w2, b1 = torch.zeros(f, d), torch.zeros(d, f), torch.zeros(f)
        out, *saved = feed_forward.forward(x, vector, vector, w1, b1, w2, vector, seed, 0.5, p, 1e-5, True)
        feed_forward.backward(out, x, vector, vector, w1, b1, w2, *saved, seed, 0.5, p)

    def feed_by_products() -> None:
        narrow, w1, w2 = x.bfloat16(), torch.zeros(f, d, dtype=torch.bfloat16), torch.zeros(d, f, dtype=torch.bfloat16)
        chosen, products.choice = products.choice, lambda product, *_: products.CONFIGS[product][-1]
        try:
            out, *saved = feed_forward.forward(narrow, vector, vector, w1, None, w2, vector, seed, 0.5, p, 1e-5, True)
            feed_forward.backward(out, narrow, vector, vector, w1, None, w2, *saved, seed, 0.5, p)
        finally:
            products.choice = chosen

    def residual() -> None:
        s, n, *saved = residual_layer_norm.forward(x, x, vector, vector, seed, 0.5, p, 1e-5)
        residual_layer_norm.backward(s, n, s, *saved, vector, seed, 0.5, p)

    def convolution(norm: str) -> None:
        options, taps = (norm, 4, norm == "batch", 1e-5), torch.zeros(d, 31)
        affine = (None, None) if norm == "none" else (vector, vector)
        running = (vector, vector) if norm == "batch" else (None, None)
        out, *saved = glu_depthwise_conv.forward(wide, taps, vector, lengths, *affine, *running, *options, True)
        glu_depthwise_conv_backward.backward(out, wide, taps, lengths, *affine, *saved, *options)

    def attention(shape: tuple[int, ...], *where: torch.Tensor | None) -> None:
        qkv = torch.zeros(*shape, 3, 4, d).unbind(-3)
        given = (*qkv, torch.zeros(2 * t - 1, 4, d), torch.zeros(4, d), torch.zeros(4, d), *where, seed)
        out, lse = relpos_attention.forward(*given, p)
        relpos_attention.backward(torch.zeros_like(out), *given, out, lse, p)

    def chain(layer_norm: bool) -> None:
        norm, rows, taps = (vector, vector), x.view(b * t, d).bfloat16(), torch.zeros(33, d)
        for epilogue, previous in (("silu", norm), ("none", None), ("glu", None)):
            weight = torch.zeros(2 * f if epilogue == "glu" else f, d, dtype=torch.bfloat16)
            out, given = torch.zeros(b * t, f), {"epilogue": epilogue, "previous": previous}
            chain_products.norm_product(rows, norm, weight, None, out, 1e-5, entered=rows, **given)
        chain_products.residual_product(rows, torch.zeros(d, d, dtype=torch.bfloat16), vector, rows, rows)
        chain_products.norm(rows, vector, vector, rows, 1e-5)
        chain_convolution.depthwise(x, taps, 31, lengths, norm if layer_norm else None, 1e-5, x)

    for layer_norm in (True, False):
        yield f"chain, LayerNorm {layer_norm}", functools.partial(chain, layer_norm)
    yield "feed_forward", feed
    yield "feed_forward by products", feed_by_products
    yield "residual_layer_norm", residual
    for norm in ("none", "layer", "batch", "group"):
        yield f"glu_depthwise_conv {norm}", functools.partial(convolution, norm)
    yield "relpos_attention", functools.partial(attention, (b, t), lengths, None)
    yield "relpos_attention packed", functools.partial(attention, (b * t,), None, ends)


def run_script(what: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, what], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_every_specialisation_lowers():
    assert int(run_script("lower")) > 200


def test_one_specialisation_for_all_lengths_and_batches():
    counts = json.loads(run_script("count"))
    assert len(counts) > 40
    assert {name: n for name, n in counts.items() if n > 1} == {}


if __name__ == "__main__":
    print({"lower": lower_all, "count": lambda: json.dumps(specialisations())}[sys.argv[1]]())
