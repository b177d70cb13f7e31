"""Plan of a demo: settings of trainings and measurements, with as many steps as there is time for."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass

from ...config import ConformerConfig
from ...data import Corpus
from ..evaluation.probes import ProbeSettings
from ..objectives import ObjectiveSettings
from ..pretraining import PretrainSettings
from .training import train_to_the_end

__all__ = ["DemoPlan", "default_plan", "fitting_steps", "plan_for_time"]

_TRAINING = 0.6  # part of a demo's time that the two trainings may take; the measurements take the rest
_STEPS_PER_MINUTE = 120  # at most, so that all machines that are fast enough run the same steps


@dataclass(frozen=True)
class DemoPlan:
    """Settings of the trainings and measurements.

    Attributes:
        settings: settings of the run with sampled depth; its twin differs in ``depth`` alone.
        probe: settings of the probes.
        consistency_frames: number of frames on which the depths are compared.
        rounds: measurements of inference time at each depth.
    """

    settings: PretrainSettings
    probe: ProbeSettings
    consistency_frames: int = 4096
    rounds: int = 9


def default_plan(steps: int) -> DemoPlan:
    """The demo's small encoder, ``steps`` steps of training, and its probes."""
    config = ConformerConfig(
        d_model=128,
        num_heads=4,
        ffn_dim=512,
        num_layers=8,
        conv_kernel_size=15,
        dropout=0.0,
        input_dim=80,
        subsampling="stack",
        subsampling_factor=4,
    )
    settings = PretrainSettings(
        config,
        objective=ObjectiveSettings("reconstruction"),
        depth="uniform",
        steps=steps,
        learning_rate=5e-4,
        warmup=0.1,
        batch_seconds=20.0,
        crop_seconds=15.0,
        device="cpu",
        validate_every=steps,
        checkpoint_every=steps,
    )
    # a machine with time for fewer steps probes fewer frames; the probes still train for as many steps of their own
    frames = min(60_000, 100 * steps)
    return DemoPlan(settings, ProbeSettings(max_frames=frames, hidden=128, epochs=round(480_000 / frames)))


def fitting_steps(step_seconds: float, minutes: float, mean_share: float) -> int:
    """Number of steps that both runs have time for in a demo of ``minutes`` minutes.

    Args:
        step_seconds: duration of a step through all loops.
        minutes: duration of the whole demo.
        mean_share: mean part of all loops that a step of the sampled run goes through.
    """
    fit = _TRAINING * 60.0 * minutes / (step_seconds * (1.0 + mean_share))
    return max(20, min(math.floor(fit), round(_STEPS_PER_MINUTE * minutes)))


def plan_for_time(train: Corpus, minutes: float) -> DemoPlan:
    """The default plan with as many steps as this machine can do in ``minutes`` minutes; runs four steps to find out."""
    sampler = default_plan(1).settings.sampler()
    steps = fitting_steps(_step_seconds(train), minutes, sampler.mean_depth() / sampler.num_layers)
    return default_plan(steps)


def _step_seconds(train: Corpus) -> float:
    """Time of a step through all loops: the shorter of the last two of four."""
    settings = dataclasses.replace(default_plan(4).settings, depth="fixed")
    with tempfile.TemporaryDirectory() as folder:
        history = train_to_the_end(settings, train, out=folder).history
    return min(r.compute_s + r.data_s for r in history[-2:])
