"""Settings and result of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import ConformerConfig
from ...validation import need_integer
from ..model import FeatureSettings
from ..pretraining import StepRecord
from ..pretraining.settings import TrainingSettings
from .augment import AugmentSettings
from .model import Recogniser, TaskSettings

__all__ = ["PRECISIONS", "FinetuneResult", "FinetuneSettings"]

PRECISIONS = ("float32", "bfloat16")
_NESTED = ("config", "features", "tasks", "augment")


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings):
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
        optimizer: ``"adamw"``; ``"muon"``: Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for all else.
        learning_rate: peak learning rate.
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
    optimizer: str = "adamw"
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
        need_integer("FinetuneSettings", "freeze_front_end", self.freeze_front_end, 0, 1 << 40)
        if not isinstance(self.freeze_encoder, bool):
            raise ValueError(f"freeze_encoder is {self.freeze_encoder!r}; expected True or False")
        self.check_training(PRECISIONS)

    def build_model(self, alphabet: str) -> Recogniser:
        """Build a model, its weights drawn from torch's generator."""
        return Recogniser(self.config, self.features, self.tasks, alphabet)

    def describe(self) -> dict[str, Any]:
        """Everything besides the model that decides what a step computes, ready for JSON; a resumed run must agree in it."""
        return self.describe_steps(*(name for name in _NESTED if name != "augment"))

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
