"""The paper's comparison: models with and without sharing and random depth, trained and measured by one plan."""

from .execution import Stopped, execute, is_complete
from .models import MODELS, Model
from .plan import PARTS, PRESETS, Preset, Run, plan_runs
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
    "execute",
    "is_complete",
    "load_reproduction_speech",
    "plan_runs",
]
