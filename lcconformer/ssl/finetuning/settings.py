"""Settings and result of a fine-tuning run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import ConformerConfig
from ...depth import DepthSampler
from ...validation import need_integer, need_number
from ..model import FeatureSettings
from ..pretraining import StepRecord
from .augment import AugmentSettings
from .model import Recogniser, TaskSettings

__all__ = ["FREE_SETTINGS", "PRECISIONS", "FinetuneResult", "FinetuneSettings"]

FREE_SETTINGS = ("device", "workers", "checkpoint_every", "keep", "validate_every")
"""Settings that may differ between the parts of a resumed run: none of them changes what a step computes."""
PRECISIONS = ("float32", "bfloat16")
_NESTED = ("config", "features", "tasks", "augment")


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of a fine-tuning run.

    Attributes:
        config: the encoder; ``input_dim`` is the number of mel bins.
        features: settings of the log-mel features.
        tasks: what is predicted, and the weight of each prediction in the loss.
        augment: settings of SpecAugment.
        depth: kind of :class:`~lcconformer.DepthSampler`; a curriculum grows over the first half of the steps.  The loss of a
            step with several depths (``"sandwich"``) is their mean.
        min_depth: the shallowest sampled depth.
        freeze_encoder: train the heads alone, on an encoder without dropout.
        freeze_front_end: number of first steps in which the front end keeps its weights.
        steps: optimizer steps; the learning rate falls to zero at the last one.
        max_minutes: limit of the training time, over all parts of a resumed run.  The learning rate then follows the clock
            wherever the clock is ahead of the steps, so that reruns differ.  None: no limit.
        learning_rate: peak learning rate of AdamW.
        warmup: part of the run in which the learning rate rises.
        weight_decay: weight decay of matrices; biases and norms have none.
        clip: largest norm of the gradient; longer gradients are scaled down to it.
        batch_seconds: largest amount of audio in a batch, padding included.  Utterances are never cut.
        precision: ``"float32"``, or autocast to ``"bfloat16"``.
        seed: seed of new weights, data order, SpecAugment, depths and dropout.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None: a CUDA device if there is one, else the CPU.
        workers: threads that decode audio ahead.
        validate_every, checkpoint_every: steps between validations and between checkpoints; both also happen at the end.
        keep: number of newest checkpoints to keep.

    Raises:
        ValueError: a value out of range.
    """

    config: ConformerConfig
    features: FeatureSettings = field(default_factory=FeatureSettings)
    tasks: TaskSettings = field(default_factory=TaskSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    depth: str = "uniform"
    min_depth: int = 1
    freeze_encoder: bool = False
    freeze_front_end: int = 0
    steps: int = 2_000
    max_minutes: float | None = None
    learning_rate: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 5.0
    batch_seconds: float = 40.0
    precision: str = "float32"
    seed: int = 0
    device: str | None = None
    workers: int = 1
    validate_every: int = 500
    checkpoint_every: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        owner = "FinetuneSettings"
        for name in ("steps", "validate_every", "checkpoint_every", "keep"):
            need_integer(owner, name, getattr(self, name), 1, 1 << 40)
        need_integer(owner, "freeze_front_end", self.freeze_front_end, 0, 1 << 40)
        need_integer(owner, "seed", self.seed, 0, (1 << 63) - 1)
        need_integer(owner, "workers", self.workers, 0, 1 << 10)
        for name in ("learning_rate", "clip", "batch_seconds"):
            need_number(owner, name, getattr(self, name), 0, open=True)
        need_number(owner, "weight_decay", self.weight_decay, 0)
        need_number(owner, "warmup", self.warmup, 0, below=1)
        if self.max_minutes is not None:
            need_number(owner, "max_minutes", self.max_minutes, 0, open=True)
        if not isinstance(self.freeze_encoder, bool):
            raise ValueError(f"{owner}: freeze_encoder is {self.freeze_encoder!r}; expected True or False")
        if self.precision not in PRECISIONS:
            raise ValueError(f"{owner}: precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if not (self.device is None or isinstance(self.device, str)):
            raise ValueError(f"{owner}: device is {self.device!r}; expected None or the name of a device")
        self.sampler()  # checks depth and min_depth

    def sampler(self) -> DepthSampler:
        """The sampler of the depth of each step."""
        return DepthSampler(
            self.depth, self.config.num_layers, self.min_depth, self.seed, steps=max(1, self.steps // 2)
        )

    def build_model(self, alphabet: str) -> Recogniser:
        """Build a model, its weights drawn from torch's generator."""
        return Recogniser(self.config, self.features, self.tasks, alphabet)

    def describe(self) -> dict[str, Any]:
        """Everything besides the model that decides what a step computes, ready for JSON; a resumed run must agree in it."""
        values = dataclasses.asdict(self)
        model = [name for name in _NESTED if name != "augment"]
        return {key: values[key] for key in values if key not in (*FREE_SETTINGS, *model)}

    def describe_free(self) -> dict[str, Any]:
        """The settings that a resumed run may change, ready for JSON."""
        return {name: getattr(self, name) for name in FREE_SETTINGS}

    @classmethod
    def from_checkpoint(cls, meta: Mapping[str, Any]) -> FinetuneSettings:
        """The settings of the run that wrote a checkpoint, from its ``meta``.

        Raises:
            ValueError: a key is missing or unknown, or a value out of range.
        """
        try:
            settings = dict(meta["settings"])
            return cls(
                config=ConformerConfig(**meta["config"]),
                features=FeatureSettings(**meta["features"]),
                tasks=TaskSettings(**meta["tasks"]),
                augment=AugmentSettings(**settings.pop("augment")),
                **settings,
                **meta["free_settings"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"FinetuneSettings: the checkpoint does not fit this version ({error})") from error


@dataclass(frozen=True)
class FinetuneResult:
    """Result of :func:`~lcconformer.ssl.finetuning.finetune`.

    model: the model in evaluation mode. checkpoint: the newest checkpoint. history: steps of this part of the run.
    validation: pairs (step, loss at depth 1 ... N) of this part. stopped: why the run ended, ``"steps"``, ``"minutes"``,
    ``"SIGINT"`` or ``"SIGTERM"``.
    """

    model: Recogniser
    checkpoint: Path
    history: list[StepRecord]
    validation: list[tuple[int, tuple[float, ...]]]
    stopped: str
