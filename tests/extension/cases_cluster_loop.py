"""The cluster-resident loop through the encoder, case by case, beside its modules in float64.

Run as a program, `python cases_cluster_loop.py MODULE`, it takes cases from stdin and the kernel from an emulated module: a
process of its own, since it runs under AddressSanitizer.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lcconformer
from lcconformer import ConformerConfig, ConformerEncoder, ExitRule
from lcconformer.loop import cluster
from lcconformer.tolerance import OUTPUT_FACTOR, allowed_error, largest_error

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.conftest import with_random_values
from tests.extension.cases_glu_depthwise_conv import load


def make_encoder(config: dict[str, Any], device: str) -> ConformerEncoder:
    encoder = ConformerEncoder(ConformerConfig(**{"num_layers": 4, "dropout": 0.1, **config})).eval()
    with_random_values(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.dim() == 2:
                parameter.mul_(1 / parameter.shape[1] ** 0.5 / parameter.std())  # branches as large as the stream
        if encoder.config.conv_bias:
            # means of the blocks' channels as far apart as the channels are
            encoder.layers[0].conv.depthwise.bias.add_(torch.arange(256) // 16 % 5 - 2)
    return encoder.to(device, torch.bfloat16)


def make_inputs(case: dict[str, Any], device: str) -> tuple[ConformerEncoder, Tensor, Tensor | None]:
    torch.manual_seed(case["seed"])
    encoder = make_encoder(case["config"], device)
    x = torch.randn(case["b"], case["t"], 256).to(device, torch.bfloat16)
    lengths = None if case["lengths"] is None else torch.tensor(case["lengths"], device=device)
    return encoder, x, lengths


def real(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Which frames are no padding, ``[B, T]``."""
    frames = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[:2])
    return frames < (x.shape[1] if lengths is None else lengths[:, None])


def judged(out: Tensor, ref: Tensor, low: Tensor, inside: Tensor) -> list[float]:
    """(error, allowed error) of the frames ``inside``."""
    error, eager = (largest_error(y[inside], ref[inside]) for y in (out, low))
    scale = float(ref[inside].abs().max()) if inside.any() else 0.0
    return [error, allowed_error(eager, OUTPUT_FACTOR, out.dtype, scale)]


@torch.no_grad()
def run(case: dict[str, Any], device: str, reseed: Callable[[int], None]) -> dict[str, Any]:
    """Error and allowed error of each loop, and whether one loop alone, in other schedules, has the bits of the first."""
    encoder, x, lengths = make_inputs(case, device)
    depth, options = case["depth"], {"return_hidden_states": True}

    def by_modules(dtype: torch.dtype) -> list[Tensor]:
        with lcconformer.engine("modules"), lcconformer.backend("torch"):
            return copy.deepcopy(encoder).to(dtype)(x.to(dtype), lengths, depth=depth, **options)[2][1:]

    given = x.clone()
    if encoder.config.padding == "masked":
        given[~real(x, lengths)] = float("nan")  # what the padding holds must not matter
    with lcconformer.engine("cluster"):
        reseed(case["seed"])
        states = encoder(given, lengths, depth=depth, **options)[2][1:]
        again = []
        for n in range(1, case["schedules"]):
            reseed(case["seed"] + n)
            again.append(encoder(given, lengths, depth=1)[0])
    inside, refs, lows = real(x, lengths), by_modules(torch.float64), by_modules(torch.bfloat16)
    errors = [judged(out, ref, low, inside) for out, ref, low in zip(states, refs, lows, strict=True)]
    return {
        "errors": errors,
        "same_bits": all(torch.equal(state, states[0]) for state in again),
        "finite": all(bool(state.isfinite().all()) for state in states),
    }


@torch.no_grad()
def exits(case: dict[str, Any], device: str, reseed: Callable[[int], None]) -> dict[str, Any]:
    """Exit depths by the kernel and by the modules in two dtypes, and the error of the output where all agree."""
    encoder, x, lengths = make_inputs(case, device)
    rule = ExitRule(**case["rule"])

    def by_modules(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with lcconformer.engine("modules"), lcconformer.backend("torch"):
            out, _, depths = copy.deepcopy(encoder).to(dtype).adaptive(x.to(dtype), lengths, rule)
            return out, depths

    reseed(case["seed"])
    with lcconformer.engine("cluster"):
        out, _, depths = encoder.adaptive(x, lengths, rule)
    (ref, exact), (low, rough) = by_modules(torch.float64), by_modules(torch.bfloat16)
    return {
        "depths": [depths.tolist(), rough.tolist(), exact.tolist()],
        "error": judged(out, ref, low, real(x, lengths)),
    }


def traffic(emulated: Any) -> list[int]:
    """(wavefronts, bank conflicts) of the worst block in one loop."""
    torch.manual_seed(0)
    encoder = make_encoder({}, "cpu")
    emulated.count_traffic()
    with lcconformer.engine("cluster"), torch.no_grad():
        encoder(torch.randn(1, 16, 256).to(torch.bfloat16), depth=1)
    return list(emulated.traffic())


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # memory that nobody has written is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    emulated = load(sys.argv[1])
    cluster._kernels = lambda: emulated
    cluster._missing = lambda device: []
    for line in sys.stdin:
        case = json.loads(line)
        if "traffic" in case:
            answer: Any = traffic(emulated)
        elif "rule" in case:
            answer = exits(case, "cpu", emulated.set_seed)
        else:
            answer = run(case, "cpu", emulated.set_seed)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
