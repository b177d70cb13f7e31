"""What a pretraining run is told, and what it says of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import ConformerConfig
from ...depth import DepthSampler
from ..model import FeatureSettings, PretrainingModel
from ..objectives import ObjectiveSettings

__all__ = ["PretrainResult", "PretrainSettings", "StepRecord"]

FREE_SETTINGS = ("device", "workers", "checkpoint_every", "keep", "validate_every")
"""Settings that may differ between the parts of a resumed run: none of them changes what a step computes."""
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PretrainSettings:
    """Settings of a pretraining run.

    Attributes:
        config: the encoder; ``input_dim`` is the number of mel bins.
        features, objective: log-mel front end and what is predicted.
        depth: kind of :class:`~lcconformer.DepthSampler`; a curriculum grows over the first half of the steps.
        min_depth: the shallowest sampled depth.
        distill: weight of the distance between the shallower depths of a step and its deepest (only ``"sandwich"`` has any).
        steps: optimizer steps; the learning rate falls to zero at the last one.
        max_minutes: of training time, all parts of a resumed run together; the learning rate then follows the clock wherever
            that is ahead of the steps, and reruns differ.  None: no limit.
        learning_rate: AdamW's, at its peak.
        warmup: part of the run in which the learning rate rises.
        weight_decay: of matrices, not of biases and norms.
        clip: largest norm of the gradient.
        accumulate: batches of a step, on each rank.
        batch_seconds: padded audio of a batch, at most.
        crop_seconds: longer utterances are cut to this at random, or to ``batch_seconds``; None: never.
        precision: ``"float32"``, or autocast to ``"bfloat16"`` or ``"float16"`` (CUDA, with loss scaling).
        seed: of weights, data order, masks, depths and dropout.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None: the CUDA device of this rank if there is one.
        workers: threads that decode audio ahead.
        validate_every, checkpoint_every: steps; both also happen at the end.
        keep: newest checkpoints kept.

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
        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")

        for name in ("steps", "accumulate", "validate_every", "checkpoint_every", "keep"):
            need(getattr(self, name) >= 1, name, "1 or more")
        for name in ("learning_rate", "clip", "batch_seconds"):
            need(getattr(self, name) > 0, name, "a positive number")
        need(self.crop_seconds is None or self.crop_seconds >= 0.1, "crop_seconds", "None, or 0.1 or more")
        for name in ("distill", "weight_decay", "seed", "workers"):
            need(getattr(self, name) >= 0, name, "0 or more")
        need(0 <= self.warmup < 1, "warmup", "0 <= warmup < 1, a part of the run")
        need(self.max_minutes is None or self.max_minutes > 0, "max_minutes", "None or a positive number")
        need(self.precision in PRECISIONS, "precision", "one of " + ", ".join(PRECISIONS))
        if self.distill and self.depth != "sandwich":
            raise ValueError(
                f"distill is {self.distill} with depth={self.depth!r}: only depth='sandwich' trains several depths in a step"
            )
        self.sampler()  # checks depth and min_depth

    def sampler(self) -> DepthSampler:
        """The depth of each step."""
        return DepthSampler(
            self.depth, self.config.num_layers, self.min_depth, self.seed, steps=max(1, self.steps // 2)
        )

    def build_model(self) -> PretrainingModel:
        """A model with weights drawn from torch's generator."""
        return PretrainingModel(self.config, self.features, self.objective)

    def describe(self) -> dict[str, Any]:
        """Everything besides the model that decides what a step computes, ready for JSON; a resumed run must agree in it."""
        values = dataclasses.asdict(self)
        return {key: values[key] for key in values if key not in (*FREE_SETTINGS, "config", "features", "objective")}

    def describe_free(self) -> dict[str, Any]:
        """The settings that a resumed run may change, ready for JSON."""
        return {name: getattr(self, name) for name in FREE_SETTINGS}

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
    """One optimizer step.

    step: counted from 1. depths: loops trained, the deepest first. loss: of the objective, mean over masked frames and
    depths. grad_norm: before clipping. utterances, seconds: of all ranks, seconds of real audio. compute_s: forward,
    backward and update. data_s: waiting for audio. elapsed_s: since the run began, over all its parts. skipped: steps left
    out so far because their gradient was not finite; this one if ``grad_norm`` is not.
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
    """What :func:`~lcconformer.ssl.pretraining.pretrain` returns.

    model: in evaluation mode. checkpoint: the newest one. history: steps of this part of the run. validation: (step, loss at
    depth 1 ... N) of this part. stopped: ``"steps"``, ``"minutes"``, ``"SIGINT"`` or ``"SIGTERM"``.
    """

    model: PretrainingModel
    checkpoint: Path
    history: list[StepRecord]
    validation: list[tuple[int, tuple[float, ...]]]
    stopped: str
