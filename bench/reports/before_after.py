"""What a layer and its kernels cost before the compiled GPU code was reviewed, and cost now, as :mod:`.predicted` prints it.

Before: constants from that review (of 80658a3, 2026-11-26; its sections 2 and 3), whose model differs in details from ours.
Now: kernels of a layer from the predictions, main loops from triton_cost.json, kernels in CUDA from cuda_resources.json and
cuda_cost.json, time of the host from host_cost.json.  Nothing here was measured on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcconformer.kernels.cost import MACHINES

from lcconformer.runtime import read_json

from . import RESULTS
from .table import grid, number

__all__ = ["tables"]

ARCH, WIDTH, HEAD = 90, 256, 64


@dataclass(frozen=True)
class Layer:
    """Section 3 of the review: kernels of a layer, ms of 12 loops in CUDA graphs, how many times faster than the others."""

    kernels: int
    milliseconds: float
    eager: str
    compiled: str


LAYERS = {
    ("inference", 1, 100): Layer(23, 0.72, "4 to 6", "1.3"),
    ("inference", 32, 400): Layer(23, 2.8, "2.2", "1.45"),
    ("inference", 32, 1500): Layer(23, 14.0, "3.3", "1.7"),
    ("training", 32, 400): Layer(126, 16.0, "1.2", "0.8"),
    ("training", 32, 1500): Layer(126, 85.0, "1.4", "0.8"),
}
HOST = (38, 55)  # microseconds of the host for a kernel of ours, from Python, over a driver that does nothing (P1)
# issue slots of a main loop and cycles of its trip, sm_90: attention's for 2048 scores, in training with dropout (P2, P4); the
# convolution's with LayerNorm for 256 multiply-adds (P5)
MAIN_LOOPS: dict[tuple[str, str], tuple[int, int | None]] = {
    ("inference", "relpos_attention.forward"): (424, None),
    ("training", "relpos_attention.forward"): (688, 2359),
    ("training", "relpos_attention.backward_query"): (928, 3869),
    ("training", "relpos_attention.backward_key"): (992, 3661),
    ("training", "relpos_attention.backward_position"): (1674, 5978),
    ("inference", "glu_depthwise_conv.conv_fwd layer"): (691, None),
    ("training", "glu_depthwise_conv.conv_fwd layer"): (691, None),
}
BACKWARD_UNITS = 17  # P2: products of HEAD multiply-adds a score in the backward of attention

# widths of d_model 256 in names of configurations
_WIDTHS = {f"D={HEAD}", f"D={WIDTH}", f"C={WIDTH}", f"K={WIDTH}", f"K={4 * WIDTH}", "K=31"}


def _cost_of(name: str, case: Mapping[str, Any], costs: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the filed cost of a kernel of a case in bfloat16, with dropout where the case trains and there is such a one."""

    def fits(row: Mapping[str, Any]) -> bool:
        words = row["name"].removesuffix(" dropout").split()
        base = re.split(" [DCKM]=", row["name"].removesuffix(" dropout"))[0]
        widths = {w for w in words if re.match("[DCK]=", w)}
        return base == name.removesuffix(" dropout") and "packed" not in words and widths <= _WIDTHS

    own = ("bf16", ARCH, case["batch"], case["frames"])
    rows = [r for r in costs if (r["dtype"], r["arch"], r["batch"], r["frames"]) == own and fits(r)]
    dropped = [r for r in rows if r["name"].endswith(" dropout")]
    kept = [r for r in rows if not r["name"].endswith(" dropout")]
    found = (dropped or kept) if case["mode"] == "training" else kept
    return found[0] if found else None


def _units(row: Mapping[str, Any], case: Mapping[str, Any]) -> float:
    """Return products of HEAD multiply-adds a score in one launch, those of whole tiles beyond T included."""
    machine = MACHINES[ARCH]
    multiply_adds = row["kilocycles"]["tensor"] * 1e3 * machine.sms * machine.wgmma / 2
    return multiply_adds / (case["batch"] * (WIDTH // HEAD) * case["frames"] ** 2 * HEAD)


def _layers(cases: Iterable[Mapping[str, Any]], host: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for case in cases:
        before = LAYERS[case["mode"], case["batch"], case["frames"]]
        host_before = host_now = "-"
        if case["mode"] == "inference":
            host_before = f"{before.kernels * HOST[0]:,} to {before.kernels * HOST[1]:,}"
        if any(name.startswith("chain_products") for name in case["kernels_us"]):
            host_now = number(host["microseconds_a_loop"])
        lines.append([
            _name(case), str(before.kernels), number(case["kernels_a_layer"]), host_before, host_now,
            number(before.milliseconds), number(case["ours_ms"]), before.eager,
            number(case["eager_ms"] / case["ours_ms"]), before.compiled, number(case["compile_ms"] / case["ours_ms"]),
        ])  # fmt: skip
    return lines


def _kernels(
    cases: Iterable[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]
) -> tuple[list[list[str]], list[str]]:
    """Return the lines of the kernels of Triton, and the names of those without a filed cost."""
    lines, missing = [], []
    for case in cases:
        backward = 0.0
        for name, (times, _) in case["kernels_us"].items():
            row = _cost_of(name, case, costs)
            if row is None:
                missing.append(name)
                continue
            slots, trip = MAIN_LOOPS.get((case["mode"], name), (None, None))
            units = _units(row, case) * times if name.startswith("relpos_attention") and row["mma"] else None
            backward += units or 0.0 if "backward" in name else 0.0
            lines.append([
                _name(case), name, number(times), number(slots), number(row["slots"]), number(trip), number(row["trip"]),
                number(row["mma"] or None), "-", number(units),
            ])  # fmt: skip
        if backward:
            lines.append([
                _name(case), "... backward of attention", "", *["-"] * 5, str(BACKWARD_UNITS), number(backward),
            ])  # fmt: skip
    return lines, list(dict.fromkeys(missing))


def _name(case: Mapping[str, Any]) -> str:
    return f"{case['mode']} ({case['batch']},{case['frames']})"


def tables(cases: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown of the cases, as predicted.json has them, whose width the review has: 256."""
    own = [c for c in cases if c["d_model"] == WIDTH]
    costs = read_json(RESULTS / "triton_cost.json")
    host = read_json(RESULTS / "host_cost.json")
    resources = read_json(RESULTS / "cuda_resources.json")
    filed = {(k["batch"], k["frames"]) for k in costs["kernels"]}
    lines, missing = _kernels([c for c in own if (c["batch"], c["frames"]) in filed], costs["kernels"])
    cuda = [
        [row["kernel"], *(str(row[n]) for n in ("registers", "stack", "spills"))]
        for row in resources["kernels"]
        if row["arch"] == ARCH and row["element"] == "bfloat16" and not re.search(r"_(?!64$)\d+$", row["kernel"])
    ]
    convolutions = read_json(RESULTS / "cuda_cost.json")
    convolution = [
        [
            row["norm"], str(row["channels"]), f"sm_{row['arch']}", f"({row['batch']},{row['frames']})",
            number(row["microseconds"]), row["bound"], number(row["kilocycles"]["issue"]), number(row["triton"]),
        ]
        for row in convolutions["kernels"]
    ]  # fmt: skip
    convolution_header = ["norm", "C", "GPU", "(B,T)", "us", "bound by", "1000 issue slots", "us of Triton's"]
    no_cost = [name for name in missing if name != "GEMM" and not name.startswith("aten ")]
    shapes = dict.fromkeys(f"({c['batch']},{c['frames']})" for c in own if (c["batch"], c["frames"]) not in filed)
    layer_header = [
        f"a layer, d={WIDTH}", "kernels before", "now", "host us before", "now", "ms of 12 before", "now",
        "x eager before", "now", "x compile before", "now",
    ]  # fmt: skip
    kernel_header = [
        "case", "kernel", "times", "issue slots before", "now", "cycles before", "now", "MMA cycles now",
        "MMA units before", "now",
    ]  # fmt: skip
    loop, first = number(host["launches_a_loop"]), number(host["launches_a_first_call"])
    first_us, of_host = number(host["microseconds_a_first_call"]), f"{host['machine']}, Triton {host['triton']}"
    return f"""# Before the review of the compiled code, and now

Before: the review of 80658a3 (2026-11-26, sections 2 and 3), by its own model. Time of the host: before, {HOST[0]} to
{HOST[1]} us for each kernel on the machine of the review; now, a loop of the chain without a CUDA graph, {loop} launches
over a driver that does nothing ({of_host}).
A first call of 12 loops, which binds the arguments of its {first} launches, takes {first_us} us in all.
By default the chain is in a graph, which the host launches once for all loops.

```
{grid(layer_header, _layers(own, host))}
```

Main loops on sm_{ARCH} in bfloat16 with heads of {HEAD}, by Triton {costs["triton"]}: instructions and cycles of a trip.
An MMA unit is one product of {HEAD} multiply-adds for every score; tiles beyond T are included. The backward is cut into
other kernels now, so that only its units compare; trips of the convolution have other sizes.

```
{grid(kernel_header, lines, left=2)}
```

CUDA kernels on sm_{ARCH} in bfloat16 with heads of {HEAD}, by nvcc {resources["nvcc"]}; the review has none of them.

```
{grid(["kernel", "registers", "stack", "spills"], cuda)}
```

The forward pass of the convolution on tensor cores, K = 31, by nvcc {convolutions["nvcc"]}, beside Triton
{convolutions["triton"]}; both store what a backward pass needs. `auto` takes the CUDA kernel without a norm and with an
evaluation BatchNorm, where it is cheaper in every case; with LayerNorm not, as a short utterance alone has too few blocks.

```
{grid(convolution_header, convolution)}
```

Not counted:

- time of the host where PyTorch launches kernels, that is inference by the modules and training, and of the replay of a graph:
  without a GPU neither is what it would be with one. In training 30 of the 126 kernels before were additions of PyTorch's.
- issue slots and MMA units of products by the library (GEMM) and of PyTorch's own kernels (aten), whose code is not ours.
- issue slots of {", ".join(no_cost) or "nothing else"}: not in triton_cost.json at this width; nor are main loops at \
{", ".join(shapes) or "no shape"}.
- issue slots and MMA units of the other CUDA kernels: no file has them.
- multiply-adds of the convolution's main loop now (256 before), and barriers of LayerNorm (95 before): no file has them.
"""
