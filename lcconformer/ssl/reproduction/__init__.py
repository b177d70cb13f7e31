"""The paper's comparison: models with and without sharing and random depth, trained, measured and reported by one call."""

from .execution import Stopped
from .models import MODELS, Model
from .plan import PARTS, PRESETS, Preset, Run, plan_runs
from .report import write_report
from .run import reproduce
from .speech import ReproductionSpeech, load_reproduction_speech

__all__ = [
    "MODELS",
    "PARTS",
    "PRESETS",
    "Model",
    "Preset",
    "ReproductionSpeech",
    "Run",
    "Stopped",
    "load_reproduction_speech",
    "plan_runs",
    "reproduce",
    "write_report",
]
