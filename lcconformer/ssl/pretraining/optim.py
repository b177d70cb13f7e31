"""AdamW without weight decay of biases and norms, and its learning rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["learning_rate_scale", "load_optimizer_tensors", "make_optimizer", "optimizer_tensors"]

_STATE = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps of a parameter


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Make an AdamW that decays only the weights of linear layers and convolutions."""
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def learning_rate_scale(progress: float, warmup: float) -> float:
    """Learning rate as a part of its peak at ``progress`` (0 to 1): it rises linearly over ``warmup``, then falls to zero."""
    if progress < warmup:
        return progress / warmup
    return max(0.0, (1.0 - progress) / (1.0 - warmup))


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """State of the optimizer under the names of the parameters, as ``NAME.exp_avg``; parameters never updated have none."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the result of :func:`optimizer_tensors` into a new optimizer.

    Raises:
        ValueError: an entry is of no parameter, is missing, or has another shape or dtype or values that are not finite.
    """
    parameters = dict(model.named_parameters())
    entries: dict[str, set[str]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in parameters or key not in _STATE:
            raise ValueError(f"the optimizer has {full}, which is of no parameter")
        shape = () if key == "step" else tuple(parameters[name].shape)
        if tuple(value.shape) != shape or not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(
                f"the optimizer's {full} is {value.dtype} {list(value.shape)}; expected finite values of shape {list(shape)}"
            )
        entries.setdefault(name, set()).add(key)
    for name, keys in entries.items():
        if keys != _STATE:
            raise ValueError(f"the optimizer lacks {', '.join(sorted(_STATE - keys))} of {name}")
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
