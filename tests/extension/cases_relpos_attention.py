"""The CUDA kernels of relpos_attention through their Python glue, case by case, beside a float64 oracle.

Run as a program, `python cases_relpos_attention.py MODULE`, it takes cases from stdin and the kernels from an emulated
module: a process of its own, since it runs under AddressSanitizer.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lcconformer.ops.dropout import dropout_seed
from lcconformer.ops.relpos_attention import RelposAttention
from lcconformer.ops.relpos_attention import cuda as glue
from lcconformer.ops.relpos_attention.library import RelposAttentionFn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.extension.cases_glu_depthwise_conv import load
from tests.extension.dropout import keep_factor

NAMES = ("q", "k", "v", "pos", "u", "v_bias")
SCHEDULES = 3


def make_inputs(frames: tuple[int, ...], t: int, h: int, d: int, dtype: str) -> list[Tensor]:
    shapes = [(*frames, h, d)] * 3 + [(2 * t - 1, h, d), (h, d), (h, d)]
    return [torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes]


def oracle(inputs: list[Tensor], case: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    """(out, lse) of the formula in arguments.py, utterance by utterance and head by head."""
    q, k, v, pos, u, v_bias = inputs
    t, h, d, p = case["t"], case["h"], case["d"], case["dropout"]
    batch = case["packed"] is None
    sizes = case["lengths"] or [t] * case["b"] if batch else case["packed"]
    starts = [t * i if batch else sum(sizes[:i]) for i in range(len(sizes))]
    flat = [x.reshape(-1, h, d) for x in (q, k, v)]
    outs, lses = [], []
    for b, (start, keys) in enumerate(zip(starts, sizes)):
        queries = t if batch else keys
        i, j = torch.arange(queries, device=q.device)[:, None], torch.arange(keys, device=q.device)[None]
        of_heads = []
        for head in range(h):
            row = flat[0][start : start + queries, head]
            key, value = (x[start : start + keys, head] for x in flat[1:])
            content = (row + u[head]) @ key.T
            position = ((row + v_bias[head]) @ pos[:, head].T).gather(1, t - 1 - i + j)
            scores = (content + position) / math.sqrt(d)
            weights = torch.softmax(scores, 1) if keys else scores
            if p and keys:
                weights = weights * keep_factor(seed, p, queries, keys, major=b * h + head).to(weights)
            lse = scores.logsumexp(1) / math.log(2) if keys else scores.new_zeros(queries)
            of_heads.append((weights @ value, lse))
        outs.append(torch.stack([out for out, _ in of_heads], 1))
        lses.append(torch.stack([lse for _, lse in of_heads]))
    return torch.cat(outs).reshape(q.shape), torch.cat(lses, 1)


def scattered(x: Tensor, by: int) -> Tensor:
    """The same values with `by` elements of NaN around each row."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 2 * by), float("nan"))
    wide[..., by:-by] = x
    return wide[..., by:-by]


def run(case: dict[str, Any], device: str, reseed: Callable[[int], None]) -> dict[str, Any]:
    """{tensor: {error, low, floor}}, and whether runs in other schedules gave the same bits."""
    torch.manual_seed(case["seed"])
    t, packed = case["t"], case["packed"]
    frames = (case["b"], t) if packed is None else (sum(packed),)
    inputs = [x.to(device) for x in make_inputs(frames, t, case["h"], case["d"], case["dtype"])]
    dout = torch.randn(inputs[0].shape).to(inputs[0])
    key = dropout_seed(inputs[0], case["dropout"])
    lengths = None if case["lengths"] is None else torch.tensor(case["lengths"], device=device)
    ends = None if packed is None else torch.tensor([0, *packed], dtype=torch.int32, device=device).cumsum(0)

    def worked_out(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out, lse = oracle(leaves, case, 0 if key is None else int(key))
        out.backward(dout.to(dtype))
        found = {"out": out.detach(), "lse": lse.detach()}
        return found | {f"d{name}": x.grad for name, x in zip(NAMES, leaves) if x.grad is not None}

    def ours(autograd: bool, partial: bool) -> dict[str, Tensor]:
        given = [x.clone() for x in (*inputs, dout)]
        for b, n in enumerate(case["lengths"] or ()):
            for x in given[1:3]:
                x[b, n:] = float("nan")  # keys in the padding must not be looked at
        if case["strided"]:
            given[:4] = [scattered(x, case["strided"]) for x in given[:4]]
            given[6] = scattered(given[6], case["strided"])
        args = RelposAttention(*given[:6], lengths, ends, key, case["dropout"])
        out, lse = glue.forward(args)
        if case["forward_only"]:
            return {"out": out, "lse": lse}
        if autograd:
            leaves = [x.requires_grad_() for x in given[:6]]
            gradients = torch.autograd.grad(RelposAttentionFn.apply(*args.flat(), "cuda"), leaves, given[6])
        else:
            gradients = glue.backward(given[6], args, out, lse, partial=partial)
            if partial:
                gradients = (*gradients[:3], *(x.sum(0).to(dout.dtype) for x in gradients[3:]))
        return {"out": out, "lse": lse, **{f"d{name}": x for name, x in zip(NAMES, gradients)}}

    ref, low = worked_out(torch.float64), worked_out(inputs[0].dtype)
    if case["forward_only"]:
        ref, low = ({name: x[name] for name in ("out", "lse")} for x in (ref, low))
    outs = []
    with contextlib.ExitStack() as stack:
        if case["slots"]:
            for name, value in (("slots", case["slots"]), ("parts", 1)):
                size = mock.patch.object(glue._kernels(), f"relpos_attention_{name}", return_value=value)
                stack.enter_context(size)
        for n in range(SCHEDULES):
            reseed(case["seed"] + n)
            outs.append(ours(autograd=n == 0, partial=n == 1))
    worst: dict[str, Any] = {
        "same_bits": all(torch.equal(out[n], outs[0][n]) for out in outs for n in out),
        "tensors": {},
    }
    assert outs[0].keys() == ref.keys(), (outs[0].keys(), ref.keys())
    for name, out in outs[0].items():
        assert out.shape == ref[name].shape, (name, out.shape, ref[name].shape)
        error, eager = (float((x.double() - ref[name]).abs().nan_to_num(torch.inf).max()) for x in (out, low[name]))
        # gradients of sums over frames are as exact as their terms
        like = ref["dq"] if name.startswith("d") else ref[name]
        floor = 2 * torch.finfo(inputs[0].dtype).eps * float(torch.maximum(like.abs().max(), ref[name].abs().max()))
        worst["tensors"][name] = {"error": error, "low": eager, "floor": floor}
    return worst


def opcheck() -> dict[str, str]:
    """Of both operators, with every optional tensor and with none; the failures."""
    failed = {}
    q, k, v, pos, u, v_bias = make_inputs((2, 9), 9, 2, 32, "bfloat16")
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    for name, args in {
        "plain": (q, k, v, pos, u, v_bias, None, None, None, 0.0),
        "lengths": (q, k, v, pos, u, v_bias, torch.tensor([9, 4]), None, torch.tensor([3]), 0.5),
        "packed": (*packed, pos, u, v_bias, None, torch.tensor([0, 9, 18]), None, 0.0),
    }.items():
        forward, backward = (getattr(torch.ops.lcconformer, f"relpos_attention_{way}") for way in ("fwd", "bwd"))
        out, lse = forward(*args, backend="cuda")
        for operator, given in ((forward, args), (backward, (torch.randn_like(out), *args, out, lse))):
            tests = ("test_schema", "test_faketensor")
            result = torch.library.opcheck(
                operator, given, {"backend": "cuda"}, test_utils=tests, raise_exception=False
            )
            failed |= {f"{name}: {operator}: {test}": str(got) for test, got in result.items() if got != "SUCCESS"}
    return failed


def traffic(emulated: Any, d: int, way: str, arch: int) -> list[int]:
    """(wavefronts, bank conflicts) of the worst block of a pass, "forward" or "backward"."""
    emulated.set_architecture(arch)
    q, *others = make_inputs((1, 128), 128, 1, d, "bfloat16")
    args = RelposAttention(q, *others, None, None, None, 0.0)
    kept = glue.forward(args)
    emulated.count_traffic()
    if way == "forward":
        glue.forward(args)
    else:
        glue.backward(torch.randn_like(q), args, *kept)
    return list(emulated.traffic())


def refusal(d: int, dtype: str) -> str:
    """What sizes that the op would not let through meet in the launcher."""
    try:
        glue.forward(RelposAttention(*make_inputs((1, 4), 4, 1, d, dtype), None, None, None, 0.0))
    except (ValueError, KeyError) as error:
        return str(error)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # memory that nobody has written is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    emulated = load(sys.argv[1])
    glue._kernels = lambda: emulated
    for line in sys.stdin:
        case = json.loads(line)
        if "traffic" in case:
            answer: Any = traffic(emulated, *case["traffic"])
        elif "opcheck" in case:
            answer = opcheck()
        elif "refusal" in case:
            answer = refusal(*case["refusal"])
        else:
            emulated.set_architecture(case["arch"])
            answer = run(case, "cpu", emulated.set_seed)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
