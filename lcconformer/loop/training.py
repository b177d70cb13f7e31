"""The training engine: one autograd.Function over all loops of a stack.

Where loops share their weights (ALBERT, arXiv 1909.11942; Conformers: arXiv 2105.00812) the gradient of a matrix is one sum
over the frames of all its loops.  It is accumulated here in float32, by products over as many loops as fill the machine,
where autograd would make a gradient per loop and add them up.  Kept for the backward are the residual stream and the inputs
of the non-linear steps: 18 d_model a frame and loop with ffn_dim = 4 d_model, where the modules keep 24.  Norms,
activations and the depthwise convolution are recomputed; with ``gradient_checkpointing`` everything but the input of a loop
is (Chen et al. 2016, arXiv 1604.06174).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcconformer.blocks import position_frames
from lcconformer.ops.derivatives import differentiable_once
from lcconformer.ops.dropout import dropout_seed
from lcconformer.ops.native import rows_of
from lcconformer.packing import Packing
from lcconformer.stack import LayerStack

from .gradients import Gradients
from .kernels import Kernels, choose_kernels, products_dtype
from .shared_layer import KEPT, LAST, SEEDS, Plan, SharedLayer, plan_of
from .watch import watch

__all__ = ["Kernels", "chosen", "draw_seeds", "kernels_or_reasons", "plans_of", "run", "slower"]


def chosen(stack: LayerStack, x: Tensor) -> list[str]:
    """Return what rules this engine out and was chosen for its own sake: the encoder's config, or an empty input."""
    config, found = stack.config, []
    if not x.numel():
        found.append("there are no frames")
    if config.conditioning:
        found.append("depth conditioning is left to the modules")
    if config.conv_norm_statistics == "per_depth":
        found.append("BatchNorm statistics per depth are left to the modules")
    if config.position != "relative":
        found.append(f"position {config.position!r} is left to the modules; the engine knows 'relative'")
    if config.weights != "float":
        found.append(f"weights are {config.weights}, which the modules train around")
    return found


def kernels_or_reasons(stack: LayerStack, x: Tensor, explaining: bool) -> tuple[Kernels | None, list[str]]:
    """Choose the kernels for the loops of ``x [B, T, d_model]``, or say what keeps this engine from them and can be changed.

    Args:
        explaining: choose without logging or recording the choice.
    """
    found = watch(stack).changed()
    dtype = products_dtype(x)
    wrong = {p.dtype for p in stack.layers.parameters()} - {dtype}
    # autocast casts them, whatever the dtype in which a front end leaves x
    if wrong and not torch.is_autocast_enabled(x.device.type):
        found.append(f"the input is {x.dtype} and weights are {', '.join(sorted(map(str, wrong)))}")
    if found:
        return None, found
    try:
        return choose_kernels(stack, x, explaining), []
    except NotImplementedError as refused:
        return None, [str(refused)]


def slower(x: Tensor, kernels: Kernels | None) -> list[str]:
    """Return why ``auto`` leaves to the modules what this engine could run.

    On the CPU kernels the modules took 1.29 times as long for a training step of 12 loops at (B, T) = (1, 100), 1.24 at
    (1, 400), 1.24 at (8, 400); of 4 loops 1.25, 1.23, 1.21 (float32, d_model 256, one thread of an AMD EPYC with AVX-512).
    On a GPU it is a prediction: with the Triton kernels the engine launches less than half as many kernels as the modules
    do on them (counted at (1, 100) by tests/loop/test_training_cost.py), and moves fewer bytes.
    """
    device = x.device.type
    known = {"cpu": {"cpu"}, "cuda": {"triton", "cuda"}}.get(device, set())
    others = set() if kernels is None else set(kernels.names) - known
    return [f"neither measured nor predicted on the kernels of {', '.join(sorted(others))}"] if others else []


def run(
    stack: LayerStack,
    x: Tensor,
    lengths: Tensor | Packing | None,
    depth: int,
    return_hidden_states: bool,
    *,
    backprop_depth: int,
    kernels: Kernels,
    seeds: Tensor | None = None,
) -> list[Tensor]:
    """Return the outputs ``[B, T, d_model]`` of each loop if ``return_hidden_states``, else of the last alone.

    Args:
        backprop_depth: loops, the last ones, that gradients flow through.
        kernels: as :func:`kernels_or_reasons` chose them.
        seeds: of dropout, as :func:`draw_seeds` returns them; None: they are drawn.
    """
    layer_map, first = stack.layer_map[:depth], depth - backprop_depth
    used = sorted(set(layer_map))
    layers: list[Any] = [stack.layers[i] for i in used]
    plans = plans_of(stack, depth)
    tensors: list[Tensor] = []
    for layer, plan in zip(layers, plans):
        own = dict(layer.named_parameters(remove_duplicate=False)) | dict(layer.named_buffers())
        tensors += [layer.positions(position_frames(x, lengths)).to(kernels.dtype), *(own[name] for name in plan.names)]
    call = _Call(
        kernels=kernels,
        plans=plans,
        layer_map=tuple(used.index(i) for i in layer_map),
        first=first,
        every=return_hidden_states,
        checkpointing=stack.gradient_checkpointing,
        group=_group(stack, x, kernels.dtype),
    )
    if seeds is None:
        seeds = _seeds(x, plans, depth)
    return list(LoopFn.apply(call, x.detach() if first else x, lengths, seeds, *tensors))


def plans_of(stack: LayerStack, depth: int) -> tuple[Plan, ...]:
    """Return the plans of the unique layers that ``depth`` loops use."""
    layers: list[Any] = [stack.layers[i] for i in sorted(set(stack.layer_map[:depth]))]
    return tuple(plan_of(layer) for layer in layers)


def draw_seeds(stack: LayerStack, x: Tensor, depth: int) -> Tensor | None:
    """Draw the dropout seeds of each loop, int64 ``[depth, SEEDS]``; None where no module drops anything."""
    return _seeds(x, plans_of(stack, depth), depth)


def _seeds(x: Tensor, plans: tuple[Plan, ...], depth: int) -> Tensor | None:
    return dropout_seed(x, max(max(plan.inside + plan.on) for plan in plans), (depth, SEEDS))


# Bytes of operands of weight gradients that wait for those of other loops, so that one GEMM multiplies them all.
# CPU: none; a step of 12 loops took 1.02 times as long with all 12 together at (B, T) = (1, 100), 1.03 with 12 at (1, 400),
# 1.09 with 2 at (8, 400); no number of loops gained more than 0.03 (d_model 256, one thread of an AMD EPYC).
# CUDA: what is small enough to be bound by launches; at (32, 400) in bfloat16, d_model 256, a loop has 176 MiB of them and
# stays alone, where memory counts and a GEMM of 12,800 rows fills the machine.  Predicted, not measured on a GPU.
_SLAB_BYTES = {"cpu": 0, "cuda": 1 << 28}


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _group(stack: LayerStack, x: Tensor, dtype: torch.dtype) -> int:
    """Return the number of loops whose rows go into one GEMM for a weight gradient, of ``x [B, T, D]``."""
    config = stack.config
    # dy and h of the eight matrices but for the output of attention, which is kept anyway
    columns = 14 * config.d_model + 4 * config.ffn_dim
    loop = x.shape[0] * x.shape[1] * columns * dtype.itemsize
    return max(1, _SLAB_BYTES["cuda" if _on_gpu(x) else "cpu"] // loop)


class _Place(NamedTuple):
    """Where a loop stands in the products for weight gradients: those of a layer are grouped from the last one back."""

    key: tuple[int, int]  # layer, group
    slot: int
    size: int  # loops in the group

    @property
    def last(self) -> bool:
        """Whether the backward completes the group with this loop."""
        return self.slot == self.size - 1


@dataclass(frozen=True)
class _Call:
    """Everything of a call of the engine but its tensors.

    Attributes:
        kernels: backends of the ops.
        plans: of the unique layers in use; ``layer_map`` tells which one a loop uses.
        first: the first loop that gradients flow through.
        every: whether the output of every loop is wanted.
        checkpointing: keep nothing of a loop but its input.
        group: loops whose rows go into one product for a weight gradient.
    """

    kernels: Kernels
    plans: tuple[Plan, ...]
    layer_map: tuple[int, ...]
    first: int
    every: bool
    checkpointing: bool
    group: int

    def dtypes(self) -> list[torch.dtype]:
        """Return the dtypes in which the loops take the tensors of the call."""
        dtype = self.kernels.dtype
        return [each for plan in self.plans for each in (dtype, *plan.dtypes(dtype))]

    def places(self) -> dict[int, _Place]:
        """Return the places of the loops that gradients flow through."""
        found = {}
        for i in range(len(self.plans)):
            loops = [k for k in range(self.first, len(self.layer_map)) if self.layer_map[k] == i]
            for back, k in enumerate(reversed(loops)):
                group, slot = divmod(back, self.group)
                found[k] = _Place((i, group), slot, min(self.group, len(loops) - group * self.group))
        return found

    def bind(self, lengths: Tensor | Packing | None, tensors: Sequence[Tensor]) -> list[SharedLayer]:
        """Return the layers of the call, with their tensors."""
        layers, rest = [], list(tensors)
        for plan in self.plans:
            (pos, *parameters), rest = rest[: 1 + len(plan.names)], rest[1 + len(plan.names) :]
            layers.append(SharedLayer(plan, self.kernels, lengths, pos, parameters))
        return layers

    def seeds(self, seeds: Tensor | None, k: int) -> list[Tensor | None]:
        """Return the dropout seeds of loop ``k``; None where nothing is dropped."""
        plan = self.plans[self.layer_map[k]]
        return [seeds[k, i : i + 1] if seeds is not None and p else None for i, p in enumerate(plan.inside + plan.on)]


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return the tensors in other dtypes, themselves where they have them; one launch for each pair of dtypes."""
    out = list(tensors)
    pairs: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (tensor, dtype) in enumerate(zip(tensors, dtypes)):
        if tensor.dtype != dtype:
            pairs.setdefault((tensor.dtype, dtype), []).append(i)
            out[i] = torch.empty_like(tensor, dtype=dtype)
    for some in pairs.values():
        torch._foreach_copy_([out[i] for i in some], [tensors[i] for i in some])
    return out


class LoopFn(torch.autograd.Function):
    """(call, x [B, T, D], lengths, seeds, positions and parameters of each layer) -> outputs ``[B, T, D]``."""

    @staticmethod
    def forward(ctx, call: _Call, x: Tensor, lengths, seeds, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        outputs: list[Tensor] = []
        inputs: list[Tensor] = []  # of the loops to record: the first, or all with checkpointing
        kept: list[Tensor] = []
        attended: dict[tuple[int, int], Tensor] = {}  # group of loops -> outputs of attention [loops, M, D]
        places, last = call.places(), len(call.layer_map) - 1
        with torch.autocast(x.device.type, enabled=False):
            used = _cast(tensors, call.dtypes())
            layers = call.bind(lengths, used)
            for k, index in enumerate(call.layer_map):
                records, rows = k >= call.first and not call.checkpointing, None
                if k == call.first or (call.checkpointing and k > call.first):
                    inputs.append(x)
                if records:
                    rows = _attended(call, attended, places[k], x)
                x, more = layers[index].forward(x, call.seeds(seeds, k), update=True, attended=rows)
                if records:
                    kept += more
                del more
                if call.every or k == last:
                    outputs.append(x)
        cast = [u for u, t in zip(used, tensors) if u is not t]
        ctx.call, ctx.counts = call, (len(inputs), len(tensors), len(cast), len(attended))
        ctx.packing = lengths if isinstance(lengths, Packing) else None
        ctx.save_for_backward(
            None if isinstance(lengths, Packing) else lengths,
            seeds,
            *inputs,
            *tensors,
            *cast,
            *attended.values(),
            *kept,
        )
        if call.every:
            ctx.mark_non_differentiable(*outputs[: call.first])
        return tuple(outputs)

    @staticmethod
    @differentiable_once(
        "ConformerEncoder",
        'Run the forward pass inside `with lcconformer.engine("modules"), lcconformer.backend("torch")`, which has them',
    )
    def backward(ctx, saved_tensors, *douts):
        # with a graph that is not retained each tensor ends with its last use below, not with the backward
        ctx.maybe_clear_saved_tensors()
        call: _Call = ctx.call
        lengths, seeds, *rest = saved_tensors
        saved_tensors.clear()
        inputs, tensors, cast, slabs = (_take(rest, count) for count in ctx.counts)
        kept = rest
        b, t, d = inputs[0].shape
        given = list(douts if call.every else (None,) * (len(call.layer_map) - 1) + douts)
        del douts
        places = call.places()
        attended = dict(zip(dict.fromkeys(places[k].key for k in sorted(places)), slabs))
        rest_of_cast = iter(cast)
        used = [t if t.dtype == dtype else next(rest_of_cast) for t, dtype in zip(tensors, call.dtypes())]
        del slabs, cast
        zeros = inputs[0].new_zeros(1, d).expand(b * t, d)
        dx: Tensor | None = None
        with torch.autocast(zeros.device.type, enabled=False):
            layers = call.bind(lengths if ctx.packing is None else ctx.packing, used)
            gradients = _gradients(call, ctx.needs_input_grad[4:], tensors, zeros)
            for k in reversed(range(call.first, len(call.layer_map))):
                layer, own, place = layers[call.layer_map[k]], gradients[call.layer_map[k]], places[k]
                dout = given.pop()
                if dout is not None:
                    dx = rows_of(dout) if dx is None else dx + rows_of(dout)
                del dout
                if call.checkpointing:
                    x = inputs.pop()
                    find_x = functools.partial(rows_of, x)
                    rows = _attended(call, attended, place, x)
                    if dx is not None:
                        _, more = layer.forward(x, call.seeds(seeds, k), update=False, attended=rows)
                    del x
                else:
                    more = _take(kept, KEPT, last=True)
                    find_x = functools.partial(_input, call, layers, inputs, kept, k)
                slab = attended.pop(place.key) if place.last else attended[place.key]
                if dx is not None:
                    own.begin(place.slot, slab)
                    dx = layer.backward(dx, zeros, find_x, more, slab[place.slot], call.seeds(seeds, k), own, b)
                    own.end(last=place.last)
                del slab, find_x
            found = _found(call, gradients, tensors)
        into_x = dx.view(b, t, d) if dx is not None and ctx.needs_input_grad[1] else None
        return None, into_x, None, None, *found


def _take(items: list[Tensor], count: int, *, last: bool = False) -> list[Tensor]:
    """Return the first (or ``last``) ``count`` items, which the list loses."""
    part = slice(len(items) - count, None) if last else slice(count)
    taken = items[part]
    del items[part]
    return taken


def _attended(call: _Call, attended: dict[tuple[int, int], Tensor], place: _Place, x: Tensor) -> Tensor:
    """Return where the output of attention goes, ``[M, D]`` in C, for loop inputs ``x [B, T, D]``."""
    b, t, d = x.shape
    if place.key not in attended:
        attended[place.key] = x.new_empty((place.size, b * t, d), dtype=call.kernels.dtype)
    return attended[place.key][place.slot]


def _input(call: _Call, layers: list[SharedLayer], inputs: list[Tensor], kept: list[Tensor], k: int) -> Tensor:
    """Return the input ``[M, D]`` of loop ``k``, from the last residual sum of the one before."""
    if k == call.first:
        return rows_of(inputs[0])
    return layers[call.layer_map[k - 1]].norm_out(kept[LAST])


def _gradients(call: _Call, wanted: tuple[bool, ...], tensors: list[Tensor], x: Tensor) -> list[Gradients]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out, at = [], 0
    for i, plan in enumerate(call.plans):
        names = ("pos", *plan.names)
        own, given = wanted[at : at + len(names)], tensors[at : at + len(names)]
        at += len(names)
        # products give the gradients of matrices
        small = sum(p.numel() for n, p in zip(names, given) if not (n.endswith(".weight") and p.dim() == 2))
        group = min(call.group, call.layer_map[call.first :].count(i))
        total = x.new_zeros(small, dtype=dtype)
        chosen = {n for n, want in zip(names, own) if want}
        out.append(Gradients(chosen, total, group, call.kernels.accumulate, _on_gpu(x)))
    return out


def _found(call: _Call, gradients: list[Gradients], tensors: list[Tensor]) -> list[Tensor | None]:
    """Return the gradients in the order and the dtypes of ``tensors``."""
    names = [("pos", *plan.names) for plan in call.plans]
    sums = [own.finish() for own in gradients]
    found = [own.get(n) for own, some in zip(sums, names) for n in some]
    pairs = [(g.view(p.shape), p.dtype) for g, p in zip(found, tensors) if g is not None]
    cast = iter(_cast([g for g, _ in pairs], [dtype for _, dtype in pairs]))
    return [None if g is None else next(cast) for g in found]
