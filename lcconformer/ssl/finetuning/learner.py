"""Model and optimizers: one optimizer step on a batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...data import Batch, Corpus, frame_count
from ..model import PretrainingModel
from ..pretraining.draws import torch_seed
from ..pretraining.optim import load_optimizer_tensors, make_optimizers, optimizer_tensors
from .augment import draw_hidden
from .settings import FinetuneSettings
from .units import alphabet_of, batch_targets

__all__ = ["Learner"]


class Learner:
    """A new model with its optimizers.

    Args:
        settings: settings of the run.
        train: the training speech, which gives the alphabet.
        validation: speech for :meth:`validate`, or None.
        device: where to train.
        start: model whose encoder's weights the new one takes; None: random weights.

    Raises:
        ValueError: the speech does not tell what is to be predicted, or ``start`` has another encoder or other features.
    """

    def __init__(
        self,
        settings: FinetuneSettings,
        train: Corpus,
        validation: Corpus | None,
        device: torch.device,
        start: PretrainingModel | None,
    ) -> None:
        self._settings, self._device = settings, device
        self._utterances = {u.id: u for u in (*train, *(validation or ()))}
        tasks = settings.tasks
        if (tasks.frames or tasks.phones) and not any(u.phones for u in train):
            raise ValueError(
                f"{train.name} has no phone alignments: set the weights of frames and phones to 0 and that of characters "
                "above 0"
            )
        torch.manual_seed(settings.seed)
        self.model = settings.build_model(alphabet_of(train) if tasks.characters else "")
        if start is not None:
            if (start.config, start.feature_settings) != (settings.config, settings.features):
                raise ValueError(
                    "the pretrained model has another encoder or other features than the settings: take its config and "
                    "its feature_settings"
                )
            self.model.encoder.load_state_dict(start.encoder.state_dict())
        self.model.to(device)
        if settings.freeze_encoder:
            self.model.encoder.requires_grad_(False)
        self.optimizers = make_optimizers(self.model, settings.optimizer, settings.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: ``model.*`` and ``optimizer.*``."""
        model = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        return model | {f"optimizer.{name}": x for name, x in optimizer_tensors(self.optimizers, self.model).items()}

    def load(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], scaler: dict[str, Any]) -> None:
        """Restore the state of an earlier learner, whose model was the same.

        Raises:
            ValueError: the state of the optimizer does not fit, or there is one of a loss scaling, which fine-tuning lacks.
        """
        self.model.load_state_dict(model)
        load_optimizer_tensors(self.optimizers, self.model, optimizer)
        if scaler:
            raise ValueError(f"the state of the loss scaling is damaged ({', '.join(sorted(scaler))})")

    def step(
        self,
        step: int,
        batch: Batch,
        depths: tuple[int, ...],
        learning_rate: float,
        layers: tuple[int, ...] | None = None,
    ) -> tuple[float, float]:
        """Take step ``step`` (from 0); returns the loss and the norm of the gradient before clipping.

        ``layers`` are those that LayerDrop keeps; None: the first ones.  A step whose gradient is not finite changes nothing.
        """
        settings, encoder = self._settings, self.model.encoder
        self.model.train()
        if settings.freeze_encoder:
            encoder.eval()
        elif encoder.front_end is not None:
            encoder.front_end.requires_grad_(step >= settings.freeze_front_end)
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            group["lr"] = learning_rate
        frames, bins = frame_count(batch.lengths).tolist(), settings.features.num_bins
        hide = draw_hidden(settings.augment, batch.ids, frames, bins, seed=settings.seed, step=step)
        statistics = [b.clone() for b in encoder.buffers()]
        torch.manual_seed(torch_seed(settings.seed, step, 0))
        with contextlib.nullcontext() if layers is None else encoder.only(layers):
            with self._autocast():
                loss = self._losses(batch, depths, hide).mean()
            loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip))
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            for buffer, before in zip(encoder.buffers(), statistics):
                buffer.copy_(before)
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach()), norm

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> tuple[float, ...]:
        """Loss at depth 1 ... N, the mean over batches weighted by their seconds."""
        depths = tuple(range(self._settings.config.num_layers, 0, -1))
        total, samples = torch.zeros(len(depths), dtype=torch.float64), 0
        self.model.eval()
        for batch in batches:
            weight = int(batch.lengths.sum())
            with self._autocast():
                losses = self._losses(batch, depths, None)
            total += weight * losses.double().cpu()
            samples += weight
        return tuple((total.flip(0) / max(1, samples)).tolist())

    def _losses(self, batch: Batch, depths: tuple[int, ...], hide: Tensor | None) -> Tensor:
        targets = batch_targets(batch, [self._utterances[name] for name in batch.ids], self.model.alphabet)
        batch, hide = batch.to(self._device), None if hide is None else hide.to(self._device)
        return self.model(batch.audio, batch.lengths, targets.to(self._device), depths, hide)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._settings.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=getattr(torch, self._settings.precision))
