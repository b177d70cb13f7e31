"""The kernels as Triton specialises them: an integer of one is a constant, an absent tensor is None.

The interpreter sees neither. Run as a script, without TRITON_INTERPRET, this file lowers every variant to Triton's IR.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

from lcconformer.kernels import feed_forward, glu_depthwise_conv, partials, residual_layer_norm
from lcconformer.kernels._common import AotConfig

OPTIONAL = ("lengths_ptr", "bias_ptr", "seed_ptr")
# unrolled loops, as short as they go
SHORT = {"BLOCK_R": 2, "TAPS": 2, "STEP": 2}


def variants(config: AotConfig) -> Iterator[AotConfig]:
    fixed = {p.name for p in config.kernel.params if p.do_not_specialize}
    integers = [n for n, kind in config.signature.items() if kind == "i32" and n not in fixed]
    ones = dict.fromkeys(integers, 1)
    # LayerNorm always has its bias
    absent = [n for n in OPTIONAL if n in config.signature and not (n == "bias_ptr" and "layer_norm" in config.name)]
    changes = [{}, ones, *({n: 1} for n in integers), *({n: None} for n in absent), {**ones, **dict.fromkeys(absent)}]
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


def test_every_specialisation_lowers():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) > 100


if __name__ == "__main__":
    count = 0
    seen = set()
    for module in (feed_forward, glu_depthwise_conv, partials, residual_layer_norm):
        for config in module.aot_configs(90):
            short = {n: v for n, v in SHORT.items() if n in config.constexprs}
            config = dataclasses.replace(config, constexprs={**config.constexprs, **short})
            flags = tuple((n, str(v)) for n, v in config.constexprs.items() if not n.startswith("BLOCK_"))
            if (config.kernel.__name__, flags) in seen:
                continue
            seen.add((config.kernel.__name__, flags))
            for variant in variants(config):
                lower(variant)
                count += 1
    print(count)
