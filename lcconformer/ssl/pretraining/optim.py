"""AdamW, or Muon for the matrices of the layers and AdamW for the rest, and their learning rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...encoder import ConformerEncoder

__all__ = [
    "OPTIMIZERS",
    "Muon",
    "learning_rate_scale",
    "load_optimizer_tensors",
    "make_optimizers",
    "optimizer_tensors",
    "orthogonalise",
]

OPTIMIZERS = ("adamw", "muon")
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration; its fixed points are singular values around 1
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before each step (Jordan et al. 2024; Liu et al., arXiv 2502.16982).

    A step changes the entries of a matrix by ``lr`` in the root mean square, about as AdamW does.  All matrices of one shape
    are made orthogonal together.  ``torch.optim.Muon`` takes them one by one and multiplies in bfloat16, which processors
    without such arithmetic emulate.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        momentum: decay of the mean of the gradients; Nesterov's.
        weight_decay: decoupled weight decay.

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.dim() != 2:
                raise ValueError(f"Muon takes matrices, got a parameter of shape {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                mean = state["momentum"] if state else torch.zeros_like(parameter)
                state["momentum"] = mean
                mean.lerp_(gradient, 1.0 - group["momentum"])
                ahead = gradient.lerp(mean, group["momentum"])
                wide = ahead if ahead.shape[0] <= ahead.shape[1] else ahead.mT
                alike[wide.shape[0], wide.shape[1]].append((parameter, wide))
            for (_, columns), members in alike.items():
                # an orthogonal [m, n] matrix, m <= n, has entries of root mean square 1 / sqrt(n)
                steps = group["lr"] * columns**0.5 * orthogonalise(torch.stack([wide for _, wide in members]))
                for (parameter, wide), change in zip(members, steps):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    parameter.sub_(change if parameter.shape == wide.shape else change.mT)


def orthogonalise(x: Tensor) -> Tensor:
    """Bring all singular values of matrices ``[B, m, n]``, m <= n, near to 1 (0.7 to 1.2) by Newton-Schulz iterations.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    linear, cubic, quintic = _COEFFICIENTS
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT  # [B, m, m]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return x


def make_optimizers(model: nn.Module, kind: str, weight_decay: float) -> tuple[torch.optim.Optimizer, ...]:
    """Make the optimizers of all parameters; only the weights of linear layers and convolutions decay.

    Args:
        model: the model.
        kind: ``"adamw"``; ``"muon"``: Muon for the linear layers of the encoder's layers, AdamW for all else.
        weight_decay: weight decay.
    """
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}
    inner: set[int] = set()
    if kind == "muon":
        layers = [m.layers for m in model.modules() if isinstance(m, ConformerEncoder)]
        inner = {id(m.weight) for part in layers for m in part.modules() if isinstance(m, nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in matrices - inner], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in matrices], "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW([group for group in groups if group["params"]])]
    if inner:
        made.append(Muon([p for p in model.parameters() if id(p) in inner], weight_decay=weight_decay))
    return tuple(made)


def learning_rate_scale(progress: float, warmup: float) -> float:
    """Learning rate as a part of its peak at ``progress`` (0 to 1): it rises linearly over ``warmup``, then falls to zero."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, (1.0 - progress) / (1.0 - warmup))


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """State of the optimizers under the names of the parameters, as ``NAME.exp_avg``; parameters never updated have none."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Load the result of :func:`optimizer_tensors` into new optimizers.

    Raises:
        ValueError: an entry is of no parameter, is missing, or has another shape or dtype or values that are not finite.
    """
    parameters = dict(model.named_parameters())
    owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    entries: dict[str, set[str]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in parameters or key not in _kept(owner[id(parameters[name])]):
            raise ValueError(f"the optimizer has {full}, which is of no parameter")
        shape = () if key == "step" else tuple(parameters[name].shape)
        if tuple(value.shape) != shape or not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(
                f"the optimizer's {full} is {value.dtype} {list(value.shape)}; expected finite values of shape {list(shape)}"
            )
        entries.setdefault(name, set()).add(key)
    for name, keys in entries.items():
        if lacking := _kept(owner[id(parameters[name])]) - keys:
            raise ValueError(f"the optimizer lacks {', '.join(sorted(lacking))} of {name}")
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU
        state = owner[id(parameter)].state[parameter]
        state[key] = value if key == "step" else value.to(parameter.device)


def _kept(optimizer: Any) -> set[str]:
    """What an optimizer keeps of a parameter."""
    return {"momentum"} if isinstance(optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
