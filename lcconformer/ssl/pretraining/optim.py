"""AdamW without weight decay of biases and norms, and its learning rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["learning_rate_scale", "load_optimizer_tensors", "make_optimizer", "optimizer_tensors"]


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
    """Load the result of :func:`optimizer_tensors` into a new optimizer."""
    parameters = dict(model.named_parameters())
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
