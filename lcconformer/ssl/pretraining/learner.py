"""Model, optimizers and loss scaling: one optimizer step over the batches of all ranks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...data import Batch, frame_count
from ...validation import is_number
from ..masking import Masks
from .distributed import Ranks
from .draws import torch_seed
from .optim import load_optimizer_tensors, make_optimizers, optimizer_tensors
from .settings import PretrainSettings

__all__ = ["Learner", "Update"]


@dataclass(frozen=True)
class Update:
    """Outcome of a step.

    loss: this rank's part of the loss; summed over ranks, it is the mean over masked frames and depths. grad_norm: norm of the
    gradient before clipping; if it is not finite, the step was left out. utterances, samples: numbers over all ranks.
    """

    loss: float
    grad_norm: float
    utterances: int
    samples: int

    @property
    def skipped(self) -> bool:
        return not math.isfinite(self.grad_norm)


class Learner:
    """A new model with its optimizers, on the device of this rank.

    Args:
        settings: settings of the run.
        ranks: the processes of the run.

    Raises:
        ValueError: float16 on a CPU.
    """

    def __init__(self, settings: PretrainSettings, ranks: Ranks) -> None:
        if settings.precision == "float16" and ranks.device.type != "cuda":
            raise ValueError("precision is 'float16' on a CPU; expected 'float32' or 'bfloat16' there")
        self._settings, self._ranks = settings, ranks
        torch.manual_seed(settings.seed)
        self.model = settings.build_model().to(ranks.device)
        self.optimizers = make_optimizers(self.model, settings.optimizer, settings.weight_decay)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.precision == "float16")
        self._replica: nn.Module = self.model

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: ``model.*`` and ``optimizer.*``."""
        model = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        return model | {f"optimizer.{name}": x for name, x in optimizer_tensors(self.optimizers, self.model).items()}

    def load(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], scaler: dict[str, Any]) -> None:
        """Restore the state of an earlier learner, whose model was the same.

        Raises:
            ValueError: the state of the optimizer or of the loss scaling does not fit.
        """
        self.model.load_state_dict(model)
        load_optimizer_tensors(self.optimizers, self.model, optimizer)
        like = self.scaler.state_dict()
        wrong = [key for key in {*like, *scaler} if not is_number(scaler.get(key)) or key not in like]
        if wrong:
            raise ValueError(f"the state of the loss scaling is damaged ({', '.join(sorted(wrong))})")
        self.scaler.load_state_dict(scaler)

    def distribute(self) -> None:
        """Exchange gradients with the other ranks from now on; all ranks must have the same state."""
        if self._ranks.world_size > 1:
            # a depth below N leaves the later of several unique layers without a gradient
            unused = len(self.model.encoder.layers) > 1 and self._settings.depth != "fixed"
            self._replica = DistributedDataParallel(self.model, find_unused_parameters=unused)

    def step(
        self,
        step: int,
        batches: Sequence[Batch],
        masks: Sequence[Masks],
        depths: tuple[int, ...],
        learning_rate: float,
        layers: tuple[int, ...] | None = None,
    ) -> Update:
        """Take step ``step`` (from 0) on this rank's batches; all ranks must call it together.

        ``layers`` are those that LayerDrop keeps; None: the first ones.  A step whose gradient is not finite changes nothing.
        """
        settings, ranks, model = self._settings, self._ranks, self.model
        # numbers over all ranks; the sums of the losses are divided by terms and frames
        terms, frames, utterances, samples = ranks.total(
            [
                sum(model.objective.count(m) for m in masks),
                sum(int(model.encoder.subsampled_lengths(frame_count(b.lengths)).sum()) for b in batches),
                sum(len(b.ids) for b in batches),
                sum(int(b.lengths.sum()) for b in batches),
            ]
        )
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            group["lr"] = learning_rate
        statistics = [b.clone() for b in model.encoder.buffers()]
        loss = torch.zeros((), device=ranks.device)
        for number, (batch, mask) in enumerate(zip(batches, masks)):
            # every batch of the step has its own dropout and noise, whichever rank it is on
            torch.manual_seed(torch_seed(settings.seed, step, number * ranks.world_size + ranks.rank))
            batch, mask = batch.to(ranks.device), mask.to(ranks.device)
            kept = contextlib.nullcontext() if layers is None else model.encoder.only(layers)
            with kept, self._synchronised(number == len(batches) - 1):
                with self._autocast():
                    sums, apart = self._replica(batch.audio, batch.lengths, mask, depths)
                objective = sums.mean() / terms + settings.distill * apart / frames
                # times the number of ranks, because DDP averages gradients and the sum is wanted
                self.scaler.scale(objective * ranks.world_size).backward()
            loss += sums.detach().mean() / terms
        norm = self._update(statistics)
        return Update(float(loss), norm, int(utterances), int(samples))

    def _update(self, statistics: Sequence[Tensor]) -> float:
        """Apply the gradient, or put back the encoder's buffers from before the step; returns the norm of the gradient."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip))
        if math.isfinite(norm) or self.scaler.is_enabled():
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)  # an enabled scaler leaves the step out by itself
        if not math.isfinite(norm):
            for buffer, before in zip(self.model.encoder.buffers(), statistics):
                buffer.copy_(before)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        return norm

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Exchange gradients after the last batch of a step only."""
        if isinstance(self._replica, DistributedDataParallel) and not last:
            return self._replica.no_sync()
        return contextlib.nullcontext()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._settings.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._ranks.device.type, dtype=getattr(torch, self._settings.precision))
