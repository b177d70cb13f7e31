"""Loss on held-out speech at every depth."""

from __future__ import annotations

import torch

from ...data import BatchLoader
from ..model import PretrainingModel
from .draws import VALIDATION, batch_masks, torch_seed

__all__ = ["validation_losses"]


def validation_losses(
    model: PretrainingModel, loader: BatchLoader, *, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[float, ...]:
    """Loss at depth 1 ... N over the first epoch of ``loader``, with the same masks at every call."""
    device, was_training = torch.device(device), model.training
    depths = tuple(range(model.config.num_layers, 0, -1))
    total, terms = torch.zeros(len(depths), dtype=torch.float64), 0
    model.eval()
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number, batch in enumerate(loader.epoch(0)):
            masks = batch_masks(model, batch, seed, VALIDATION)
            torch.manual_seed(torch_seed(seed, VALIDATION, number))
            batch = batch.to(device)
            sums, _ = model(batch.audio, batch.lengths, masks.to(device), depths)
            total += sums.double().cpu()
            terms += model.objective.count(masks)
    model.train(was_training)
    return tuple((total.flip(0) / terms).tolist())
