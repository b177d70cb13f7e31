"""The training engine: one autograd.Function over all loops of a stack.

Where loops share their weights (ALBERT, arXiv 1909.11942; Conformers: arXiv 2105.00812) the gradient of a matrix is one sum
over the frames of all its loops.  It is accumulated here in float32, by products over as many loops as fill the machine,
where autograd would make a gradient per loop and add them up.  Kept for the backward are the residual stream and the inputs
of the non-linear steps: 18 d_model a frame and loop with ffn_dim = 4 d_model, where the modules keep 24.  Norms,
activations and the depthwise convolution are recomputed; with ``gradient_checkpointing`` everything but the input of a loop
is (Chen et al. 2016, arXiv 1604.06174).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcconformer.ops.derivatives import differentiable_once
from lcconformer.ops.dropout import dropout_seed
from lcconformer.ops.native import rows_of
from lcconformer.stack import LayerStack

from .gradients import Gradients
from .kernels import Kernels, choose_kernels, products_dtype
from .shared_layer import KEPT, LAST, SEEDS, Plan, SharedLayer, plan_of
from .watch import watch

__all__ = ["Kernels", "chosen", "kernels_or_reasons", "run", "slower"]


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
    if config.activation != "silu":
        found.append(f"activation {config.activation!r} is not fused, only 'silu' is")
    return found


def kernels_or_reasons(stack: LayerStack, x: Tensor, explaining: bool) -> tuple[Kernels | None, list[str]]:
    """Choose the kernels for the loops of ``x [B, T, d_model]``, or say what keeps this engine from them and can be changed.

    Args:
        explaining: choose without logging or recording the choice.
    """
    found = watch(stack).changed()
    dtype = products_dtype(x)
    wrong = {p.dtype for p in stack.layers.parameters()} - {dtype}
    if dtype == x.dtype and wrong:
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
    """
    if x.device.type != "cpu":
        return ["no GPU has measured the engine yet; LCCONFORMER_ENGINE=loop forces it"]
    others = set() if kernels is None else set(kernels.names) - {"cpu"}
    return [f"not measured on the kernels of {', '.join(sorted(others))}"] if others else []


def run(
    stack: LayerStack,
    x: Tensor,
    lengths: Tensor | None,
    depth: int,
    return_hidden_states: bool,
    *,
    backprop_depth: int,
    kernels: Kernels,
) -> list[Tensor]:
    """Return the outputs ``[B, T, d_model]`` of each loop if ``return_hidden_states``, else of the last alone."""
    layer_map, first = stack.layer_map[:depth], depth - backprop_depth
    used = sorted(set(layer_map))
    layers: list[Any] = [stack.layers[i] for i in used]
    plans = tuple(plan_of(layer) for layer in layers)
    tensors: list[Tensor] = []
    for layer, plan in zip(layers, plans):
        own = dict(layer.named_parameters(remove_duplicate=False)) | dict(layer.named_buffers())
        tensors += [layer.positions(x).to(kernels.dtype), *(own[name] for name in plan.names)]
    call = _Call(
        kernels=kernels,
        plans=plans,
        layer_map=tuple(used.index(i) for i in layer_map),
        first=first,
        every=return_hidden_states,
        checkpointing=stack.gradient_checkpointing,
    )
    seeds = dropout_seed(x, max(max(plan.inside + plan.on) for plan in plans), (depth, SEEDS))
    return list(LoopFn.apply(call, x.detach() if first else x, lengths, seeds, *tensors))


# Rows of a product for a weight gradient up to which loops are put together.
# CPU: one loop at a time; a step of 12 loops took 1.02 times as long with all 12 together at (B, T) = (1, 100), 1.03 with
# 12 at (1, 400), 1.09 with 2 at (8, 400); no number of rows gained more than 0.03 (d_model 256, one thread of an AMD EPYC).
# CUDA: from a model of an H200, not measured.
_ROWS = {"cpu": 1, "cuda": 65536}


@dataclass(frozen=True)
class _Call:
    """Everything of a call of the engine but its tensors.

    Attributes:
        kernels: backends of the ops.
        plans: of the unique layers in use; ``layer_map`` tells which one a loop uses.
        first: the first loop that gradients flow through.
        every: whether the output of every loop is wanted.
        checkpointing: keep nothing of a loop but its input.
    """

    kernels: Kernels
    plans: tuple[Plan, ...]
    layer_map: tuple[int, ...]
    first: int
    every: bool
    checkpointing: bool

    def bind(self, lengths: Tensor | None, tensors: tuple[Tensor, ...]) -> list[SharedLayer]:
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


class LoopFn(torch.autograd.Function):
    """(call, x [B, T, D], lengths, seeds, positions and parameters of each layer) -> outputs ``[B, T, D]``."""

    @staticmethod
    def forward(ctx, call: _Call, x: Tensor, lengths, seeds, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        outputs: list[Tensor] = []
        inputs: list[Tensor] = []  # of the loops to record: the first, or all with checkpointing
        kept: list[Tensor] = []
        last = len(call.layer_map) - 1
        with torch.autocast(x.device.type, enabled=False):
            layers = call.bind(lengths, tensors)
            for k, index in enumerate(call.layer_map):
                if k == call.first or (call.checkpointing and k > call.first):
                    inputs.append(x)
                x, more = layers[index].forward(x, call.seeds(seeds, k), update=True)
                if k >= call.first and not call.checkpointing:
                    kept += more
                if call.every or k == last:
                    outputs.append(x)
        ctx.call, ctx.inputs = call, len(inputs)
        ctx.save_for_backward(lengths, seeds, *inputs, *tensors, *kept)
        if call.every:
            ctx.mark_non_differentiable(*outputs[: call.first])
        return tuple(outputs)

    @staticmethod
    @differentiable_once(
        "ConformerEncoder",
        'Run the forward pass inside `with lcconformer.engine("modules"), lcconformer.backend("torch")`, which has them',
    )
    def backward(ctx, saved_tensors, *douts):
        call: _Call = ctx.call
        lengths, seeds, *rest = saved_tensors
        inputs, rest = rest[: ctx.inputs], rest[ctx.inputs :]
        count = sum(1 + len(plan.names) for plan in call.plans)
        tensors, kept = tuple(rest[:count]), rest[count:]
        b, t, d = inputs[0].shape
        given = douts if call.every else (None,) * (len(call.layer_map) - 1) + douts
        dx: Tensor | None = None
        with torch.autocast(inputs[0].device.type, enabled=False):
            layers = call.bind(lengths, tensors)
            gradients = _gradients(call, ctx.needs_input_grad[4:], b * t, inputs[0])
            for k in reversed(range(call.first, len(call.layer_map))):
                dout = given[k]
                if dout is not None:
                    dx = rows_of(dout) if dx is None else dx + rows_of(dout)
                if dx is None:
                    continue
                layer, own = layers[call.layer_map[k]], k - call.first
                if call.checkpointing:
                    x = rows_of(inputs[own])
                    _, more = layer.forward(inputs[own], call.seeds(seeds, k), update=False)
                else:
                    more = kept[own * KEPT : (own + 1) * KEPT]
                    x = rows_of(inputs[0])
                    if own:
                        # the output of the loop before, from its last residual sum
                        before = kept[(own - 1) * KEPT : own * KEPT]
                        x = layers[call.layer_map[k - 1]].norm_out(before[LAST])
                dx = layer.backward(dx, x, more, call.seeds(seeds, k), gradients[call.layer_map[k]], b)
            found = _found(call, gradients, tensors)
        into_x = dx.view(b, t, d) if dx is not None and ctx.needs_input_grad[1] else None
        return None, into_x, None, None, *found


def _gradients(call: _Call, wanted: tuple[bool, ...], rows: int, x: Tensor) -> list[Gradients]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    loops = max(1, _ROWS.get(x.device.type, 1) // rows)
    out, at = [], 0
    for plan in call.plans:
        names = ("pos", *plan.names)
        own = wanted[at : at + len(names)]
        at += len(names)
        out.append(Gradients({n for n, want in zip(names, own) if want}, dtype, loops))
    return out


def _found(call: _Call, gradients: list[Gradients], tensors: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Return the gradients in the order and the dtypes of ``tensors``."""
    names = [("pos", *plan.names) for plan in call.plans]
    sums = [own.finish() for own in gradients]
    found = [own.get(n) for own, some in zip(sums, names) for n in some]
    return [None if g is None else g.to(p.dtype).view(p.shape) for g, p in zip(found, tensors)]
