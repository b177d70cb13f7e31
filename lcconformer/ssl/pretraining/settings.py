"""Settings of a pretraining run, the record of a step, and the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import ConformerConfig
from ...depth import DepthSampler
from ...validation import need_integer, need_number
from ..model import FeatureSettings, PretrainingModel
from ..objectives import ObjectiveSettings
from .optim import OPTIMIZERS

__all__ = ["PretrainResult", "PretrainSettings", "StepRecord", "TrainingSettings"]

FREE_SETTINGS = ("device", "workers", "checkpoint_every", "keep", "validate_every")
"""Settings that may differ between the parts of a resumed run: none of them changes what a step computes."""
YOUNGER_SETTINGS = {"optimizer": "adamw"}
"""Settings that checkpoints of earlier versions lack: at this value a run is what it was before, and is described so."""
PRECISIONS = ("float32", "bfloat16", "float16")


class TrainingSettings:
    """What the settings of every training have in common; its dataclasses have these fields, and more."""

    config: ConformerConfig
    depth: str
    min_depth: int
    steps: int
    max_minutes: float | None
    optimizer: str
    learning_rate: float
    warmup: float
    weight_decay: float
    clip: float
    batch_seconds: float
    precision: str
    seed: int
    device: str | None
    workers: int
    validate_every: int
    checkpoint_every: int
    keep: int

    def check_training(self, precisions: Sequence[str]) -> None:
        """Check the common settings.

        Raises:
            ValueError: a value out of range.
        """
        owner = type(self).__name__
        for name in ("steps", "validate_every", "checkpoint_every", "keep"):
            need_integer(owner, name, getattr(self, name), 1, 1 << 40)
        need_integer(owner, "seed", self.seed, 0, (1 << 63) - 1)
        need_integer(owner, "workers", self.workers, 0, 1 << 10)
        for name in ("learning_rate", "clip", "batch_seconds"):
            need_number(owner, name, getattr(self, name), 0, open=True)
        need_number(owner, "weight_decay", self.weight_decay, 0)
        need_number(owner, "warmup", self.warmup, 0, below=1)
        if self.max_minutes is not None:
            need_number(owner, "max_minutes", self.max_minutes, 0, open=True)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")
        if self.precision not in precisions:
            raise ValueError(f"precision is {self.precision!r}; expected one of {', '.join(precisions)}")
        if not (self.device is None or isinstance(self.device, str)):
            raise ValueError(f"device is {self.device!r}; expected None or the name of a device")
        self.sampler()  # checks depth and min_depth

    def sampler(self) -> DepthSampler:
        """The sampler of the depth of each step."""
        return DepthSampler(
            self.depth, self.config.num_layers, self.min_depth, self.seed, steps=max(1, self.steps // 2)
        )

    def describe_steps(self, *model: str) -> dict[str, Any]:
        """Everything that decides what a step computes, besides ``model``, what describes the model; ready for JSON."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        old = [key for key, value in YOUNGER_SETTINGS.items() if values[key] == value]
        return {key: values[key] for key in values if key not in (*FREE_SETTINGS, *old, *model)}

    def describe_free(self) -> dict[str, Any]:
        """The settings that a resumed run may change, ready for JSON."""
        return {name: getattr(self, name) for name in FREE_SETTINGS}


@dataclass(frozen=True)
class PretrainSettings(TrainingSettings):
    """Settings of a pretraining run.

    Attributes:
        config: the encoder; ``input_dim`` is the number of mel bins.
        features, objective: settings of the log-mel features and of the objective.
        depth: kind of :class:`~lcconformer.DepthSampler`; a curriculum grows over the first half of the steps.
        min_depth: the shallowest sampled depth.
        distill: weight of the distance between hidden states at the shallower depths of a step and at its deepest; only
            ``depth="sandwich"`` has steps of several depths.
        steps: optimizer steps; the learning rate falls to zero at the last one.
        max_minutes: limit of the training time, over all parts of a resumed run.  The learning rate then follows the clock
            wherever the clock is ahead of the steps, so that reruns differ.  None: no limit.
        optimizer: ``"adamw"``; ``"muon"``: Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for all else.
        learning_rate: peak learning rate.
        warmup: part of the run in which the learning rate rises.
        weight_decay: weight decay of matrices; biases and norms have none.
        clip: largest norm of the gradient; longer gradients are scaled down to it.
        accumulate: batches per step on each rank.
        batch_seconds: largest amount of audio in a batch, padding included.
        crop_seconds: longer utterances are cut at random to this length (or to ``batch_seconds`` if that is shorter); None:
            they are never cut.
        precision: ``"float32"``, or autocast to ``"bfloat16"`` or to ``"float16"`` (CUDA only, with loss scaling).
        seed: seed of weights, data order, masks, depths and dropout.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None: the CUDA device of this rank if there is one, else the CPU.
        workers: threads that decode audio ahead.
        validate_every, checkpoint_every: steps between validations and between checkpoints; both also happen at the end.
        keep: number of newest checkpoints to keep.

    Raises:
        ValueError: a value out of range.
    """

    config: ConformerConfig
    features: FeatureSettings = field(default_factory=FeatureSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    depth: str = "uniform"
    min_depth: int = 1
    distill: float = 0.0
    steps: int = 10_000
    max_minutes: float | None = None
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup: float = 0.07
    weight_decay: float = 0.01
    clip: float = 5.0
    accumulate: int = 1
    batch_seconds: float = 80.0
    crop_seconds: float | None = 15.0
    precision: str = "float32"
    seed: int = 0
    device: str | None = None
    workers: int = 1
    validate_every: int = 500
    checkpoint_every: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        owner = "PretrainSettings"
        need_integer(owner, "accumulate", self.accumulate, 1, 1 << 40)
        need_number(owner, "distill", self.distill, 0)
        if self.crop_seconds is not None:
            need_number(owner, "crop_seconds", self.crop_seconds, 0.1)
        self.check_training(PRECISIONS)
        if self.distill and self.depth != "sandwich":
            raise ValueError(
                f"distill is {self.distill} with depth={self.depth!r}: only depth='sandwich' trains several depths in a step"
            )

    def build_model(self) -> PretrainingModel:
        """Build a model, its weights drawn from torch's generator."""
        return PretrainingModel(self.config, self.features, self.objective)

    def describe(self) -> dict[str, Any]:
        """Everything besides the model that decides what a step computes, ready for JSON; a resumed run must agree in it."""
        return self.describe_steps("config", "features", "objective")

    @classmethod
    def from_checkpoint(cls, meta: Mapping[str, Any]) -> PretrainSettings:
        """The settings of the run that wrote a checkpoint, from its ``meta``.

        Raises:
            ValueError: a key is missing or unknown, or a value out of range.
        """
        try:
            return cls(
                config=ConformerConfig(**meta["config"]),
                features=FeatureSettings(**meta["features"]),
                objective=ObjectiveSettings(**meta["objective"]),
                **meta["settings"],
                **meta.get("free_settings", {}),  # checkpoints of version 0.1.0 have none
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"PretrainSettings: the checkpoint does not fit this version ({error})") from error


@dataclass(frozen=True)
class StepRecord:
    """Record of one optimizer step.

    step: number of the step, from 1. depths: depths trained, the deepest first. loss: mean of the objective over masked
    frames and depths. grad_norm: norm of the gradient before clipping. utterances, seconds: number of utterances and seconds
    of audio without padding, over all ranks. compute_s: time of forward, backward and update. data_s: time spent waiting for
    audio. elapsed_s: training time so far, over all parts of the run. skipped: number of steps left out so far because their
    gradient was not finite, this one included if its ``grad_norm`` is not.
    """

    step: int
    epoch: int
    depths: tuple[int, ...]
    loss: float
    grad_norm: float
    learning_rate: float
    utterances: int
    seconds: float
    compute_s: float
    data_s: float
    elapsed_s: float
    skipped: int


@dataclass(frozen=True)
class PretrainResult:
    """Result of :func:`~lcconformer.ssl.pretraining.pretrain`.

    model: the model in evaluation mode. checkpoint: the newest checkpoint. history: steps of this part of the run.
    validation: pairs (step, loss at depth 1 ... N) of this part. stopped: why the run ended, ``"steps"``, ``"minutes"``,
    ``"SIGINT"`` or ``"SIGTERM"``.
    """

    model: PretrainingModel
    checkpoint: Path
    history: list[StepRecord]
    validation: list[tuple[int, tuple[float, ...]]]
    stopped: str
